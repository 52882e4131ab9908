"""`python -m birnn_ext` prints what was built, and why without CUDA kernels. A report of an error should name it."""

from birnn_ext._info import describe

print(describe())
