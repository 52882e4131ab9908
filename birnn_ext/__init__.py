"""Fused bidirectional LSTM kernels for PyTorch, CPU and CUDA, forward and backward.

`LSTM` is a drop-in for `torch.nn.LSTM`, `BiRNN` for the classifier of the well-known PyTorch tutorial.
"""

from birnn_ext._info import __version__, build_info, op_calls
from birnn_ext.modules import LSTM, BiRNN

__all__ = ["LSTM", "BiRNN", "__version__", "build_info", "op_calls"]
