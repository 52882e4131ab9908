"""The recurrent cells: what the code that serves every cell must know of one. A new cell adds an entry here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from birnn_ext import reference
from birnn_ext._torch_private import nn_operator
from birnn_ext.gradients import RECURRENCES


class Cell(NamedTuple):
    """A recurrent cell, with the operators that run it.

    They all return y, the final states, and what is kept for the backward pass. Those of a stack and of a layer take x,
    weights, bias, the initial states, lengths and what else their schemas have (csrc/schema.cpp).
    """

    name: str  # of our module, and of PyTorch's; errors begin with it
    operator: str  # of PyTorch's operator, with which the names of ours begin
    article: str  # "a" or "an"
    theirs: type[nn.RNNBase]  # PyTorch's module
    gates: int  # the weights have gates * H rows
    states: tuple[str, ...]  # the states, by the names of the parameters that learn them; h is the first
    options: Mapping[str, Any]  # what our module has beyond PyTorch's, and the defaults; PyTorch's has no such options
    stack: Callable[..., Any]  # the operator of a stack of layers
    layer: Callable[..., Any]  # the operator of a layer
    recurrence: Callable[..., Any]  # the operator of the recurrence alone,
    function: Callable[..., Any]  # the same for torch.func's transforms,
    reference: Callable[..., Any]  # and in plain PyTorch
    own_bias: bool  # whether bias_hh is an argument of the recurrence; else it is a part of gates_x
    hold: tuple[float, ...] | None  # of each gate: what, added to W_ih x, makes a step leave the last state as it is
    clear: tuple[float, ...] | None  # likewise, what makes it 0, if b_ih is not added; None if lstm_variant does so, or
    # there is no such input, nor one that holds the state: then a call with resets takes the steps one by one
    cpu_autocast: bool  # whether CPU autocast casts PyTorch's operator, not products in it: then y has h_0's wider type
    nn_operator: Callable[..., Any]  # PyTorch's operator
    onnx_order: tuple[int, ...]  # places of the gates as ONNX's operator of the same name orders them
    onnx_attributes: Mapping[str, int | str]  # what it is told beside its sizes; a text is one for each direction


# sigmoid is exactly 0 and 1 so far out, and 16 bits can hold it.
_SHUT, _OPEN = -1e4, 1e4


def _operators(name: str) -> dict[str, Any]:
    """Finds the operators of a cell by the beginning of their names."""
    ours = torch.ops.birnn_ext
    return {
        "operator": name,
        "stack": getattr(ours, name),
        "layer": getattr(ours, f"{name}_layer"),
        "recurrence": getattr(ours, f"{name}_recurrence"),
        "function": RECURRENCES[f"{name}_recurrence"].apply,
        "reference": getattr(reference, f"{name}_recurrence"),
        "nn_operator": nn_operator(name),
    }


LSTM_CELL = Cell(
    name="LSTM",
    article="an",
    theirs=nn.LSTM,
    gates=4,
    states=("h_0", "c_0"),
    options={
        "recompute": False, "recurrent_dropout": 0.0, "zoneout": (0.0, 0.0), "layer_norm": False,
        "learned_state": False,
    },
    own_bias=False,
    hold=(_SHUT, _OPEN, 0, 0),
    clear=None,
    cpu_autocast=True,
    onnx_order=(0, 3, 1, 2),
    onnx_attributes={},
    **_operators("lstm"),
)  # fmt: skip

GRU_CELL = Cell(
    name="GRU",
    article="a",
    theirs=nn.GRU,
    gates=3,
    states=("h_0",),
    options={"recompute": False, "learned_state": False},
    own_bias=True,
    hold=(0, _OPEN, 0),
    clear=(_SHUT, _SHUT, 0),
    cpu_autocast=False,
    onnx_order=(1, 0, 2),
    onnx_attributes={"linear_before_reset": 1},
    **_operators("gru"),
)

RNN_TANH_CELL = Cell(
    name="RNN",
    article="an",
    theirs=nn.RNN,
    gates=1,
    states=("h_0",),
    options={"recompute": False, "learned_state": False},
    own_bias=True,
    hold=None,
    clear=None,
    cpu_autocast=True,
    onnx_order=(0,),
    onnx_attributes={"activations": "Tanh"},
    **_operators("rnn_tanh"),
)

RNN_RELU_CELL = RNN_TANH_CELL._replace(onnx_attributes={"activations": "Relu"}, **_operators("rnn_relu"))

CELLS = (LSTM_CELL, GRU_CELL, RNN_TANH_CELL, RNN_RELU_CELL)
