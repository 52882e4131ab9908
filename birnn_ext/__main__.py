"""`python -m birnn_ext` says what was built: for whom something does not work, and for whom he asks."""

from birnn_ext._info import describe

print(describe())
