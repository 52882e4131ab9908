"""Fused bidirectional LSTM kernels for PyTorch, CPU and CUDA, forward and backward.

`LSTM` is a drop-in for `torch.nn.LSTM`, `BiRNN` for the classifier of the well-known PyTorch tutorial; `accelerate`
turns the LSTMs of a model that somebody else wrote.
"""

from birnn_ext import integrations as integrations  # what other packages are told of us
from birnn_ext._info import __version__, build_info, op_calls
from birnn_ext.acceleration import Acceleration, accelerate, restore
from birnn_ext.modules import LSTM, BiRNN

__all__ = [
    "LSTM",
    "Acceleration",
    "BiRNN",
    "__version__",
    "accelerate",
    "build_info",
    "op_calls",
    "restore",
]
