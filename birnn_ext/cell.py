"""The recurrent cells: what the code that serves every cell must know of one. A new cell adds an entry here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from birnn_ext import reference
from birnn_ext._torch_private import nn_gru_operator, nn_lstm_operator
from birnn_ext.gradients import GRU_RECURRENCE, LSTM_RECURRENCE


class Cell(NamedTuple):
    """A recurrent cell, with the operators that run it.

    They all return y, the final states, and what is kept for the backward pass. Those of a stack and of a layer take x,
    weights, bias, the initial states, lengths and what else their schemas have (csrc/schema.cpp).
    """

    name: str  # of our module, and of PyTorch's; errors begin with it
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
    hold: tuple[float, ...]  # of each gate: what, added to W_ih x, makes a step leave the last state as it is
    clear: tuple[float, ...] | None  # likewise, what makes it 0, if b_ih is not added; None if lstm_variant does so
    cpu_autocast: bool  # whether CPU autocast casts PyTorch's operator, not products in it: then y has h_0's wider type
    nn_operator: Callable[..., Any]  # PyTorch's operator
    onnx_order: tuple[int, ...]  # places of the gates as ONNX's operator of the same name orders them
    onnx_attributes: Mapping[str, int]  # what it is told beside its sizes


# sigmoid is exactly 0 and 1 so far out, and 16 bits can hold it.
_SHUT, _OPEN = -1e4, 1e4

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
    stack=torch.ops.birnn_ext.lstm,
    layer=torch.ops.birnn_ext.lstm_layer,
    recurrence=torch.ops.birnn_ext.lstm_recurrence,
    function=LSTM_RECURRENCE.apply,
    reference=reference.lstm_recurrence,
    own_bias=False,
    hold=(_SHUT, _OPEN, 0, 0),
    clear=None,
    cpu_autocast=True,
    nn_operator=nn_lstm_operator,
    onnx_order=(0, 3, 1, 2),
    onnx_attributes={},
)  # fmt: skip

GRU_CELL = Cell(
    name="GRU",
    article="a",
    theirs=nn.GRU,
    gates=3,
    states=("h_0",),
    options={"recompute": False, "learned_state": False},
    stack=torch.ops.birnn_ext.gru,
    layer=torch.ops.birnn_ext.gru_layer,
    recurrence=torch.ops.birnn_ext.gru_recurrence,
    function=GRU_RECURRENCE.apply,
    reference=reference.gru_recurrence,
    own_bias=True,
    hold=(0, _OPEN, 0),
    clear=(_SHUT, _SHUT, 0),
    cpu_autocast=False,
    nn_operator=nn_gru_operator,
    onnx_order=(1, 0, 2),
    onnx_attributes={"linear_before_reset": 1},
)
