"""Fused bidirectional LSTM, GRU and RNN kernels for PyTorch, CPU and CUDA, forward and backward.

`LSTM` is a drop-in for `torch.nn.LSTM`, `GRU` for `torch.nn.GRU`, `RNN` for `torch.nn.RNN`, `BiRNN` for the classifier
of the well-known PyTorch tutorial; `accelerate` turns the recurrent modules of a model that somebody else wrote.
"""

import importlib
from typing import TYPE_CHECKING, Any

from birnn_ext import integrations as integrations  # tells other packages of us
from birnn_ext._info import __version__, build_info, op_calls
from birnn_ext.acceleration import Acceleration, accelerate, restore
from birnn_ext.modules import GRU, LSTM, RNN, BiRNN
from birnn_ext.portable import as_nn_gru, as_nn_lstm, as_nn_rnn

if TYPE_CHECKING:
    from birnn_ext import onnx as onnx

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Acceleration",
    "BiRNN",
    "__version__",
    "accelerate",
    "as_nn_gru",
    "as_nn_lstm",
    "as_nn_rnn",
    "build_info",
    "op_calls",
    "restore",
]


def __getattr__(name: str) -> Any:
    """Loads `birnn_ext.onnx` when it is asked for."""
    if name != "onnx":
        raise AttributeError(f"module 'birnn_ext' has no attribute {name!r}")
    return importlib.import_module("birnn_ext.onnx")


def __dir__() -> list[str]:
    return sorted({*globals(), "onnx"})
