"""`python -m birnn_ext` says what was built: why without CUDA kernels, and what a report of an error should name."""

from birnn_ext._info import describe

print(describe())
