"""The cells whose operators the tests compare, and what these take and return."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import birnn_ext
from birnn_ext import ops, reference


class Cell(NamedTuple):
    """A cell, with its operators."""

    name: str  # of the module, in small letters
    operators: str  # the beginning of the operators' names
    theirs: type[nn.RNNBase]  # PyTorch's module
    gates: int
    states: int
    inputs: tuple[str, ...]  # of the recurrence, between w_hh and lengths
    results: tuple[str, ...]  # of the recurrence, and of a layer; gradients arrive of y and of the states
    gradients: tuple[str, ...]  # results of the recurrence's backward operator
    saved: int  # values of a unit that a step saves, beside y
    nonlinearity: str = "tanh"  # of a plain cell

    def __str__(self) -> str:
        return self.operators  # in the names of tests

    @property
    def module(self) -> type[nn.RNNBase]:
        """Our module."""
        return getattr(birnn_ext, self.theirs.__name__)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments with which the modules are of this cell."""
        return {} if self.nonlinearity == "tanh" else {"nonlinearity": self.nonlinearity}

    def hx(self, states: Any) -> Any:
        """Returns states as the modules take them: an LSTM's pair, a GRU's tensor, or None."""
        return states if states is None or self.states > 1 else states[0]

    def operator(self, suffix: str = "") -> Any:
        """Returns an operator: that of a stack of layers, or one whose name goes on so."""
        return getattr(torch.ops.birnn_ext, self.operators + suffix).default

    @property
    def forward(self) -> Any:
        """The operator of the recurrence."""
        return self.operator("_recurrence")

    @property
    def backward(self) -> Any:
        """The operator of its gradients."""
        return self.operator("_recurrence_backward")

    def function(self, kind: str) -> Any:
        """Returns the function that users call, of the kind "recurrence" or "layer"."""
        return partial(getattr(ops, f"{self.name}_{kind}"), **self.options)

    def reference(self, args: Any, save: str = "all") -> tuple[Tensor, ...]:
        """Runs the recurrence in plain PyTorch."""
        return getattr(reference, f"{self.operators}_recurrence")(*args, save)

    def reference_backward(self, args: Any) -> tuple[Tensor, ...]:
        """Computes its gradients in plain PyTorch."""
        return getattr(reference, f"{self.operators}_recurrence_backward")(*args)

    def outputs(self, results: Any) -> list[Tensor]:
        """Returns y and the final states, of all that an operator returned."""
        return list(results[: 1 + self.states])

    def kept(self, results: Any) -> list[Tensor]:
        """Returns the others: what it keeps for the backward pass."""
        return list(results[1 + self.states :])

    def backward_args(self, args: Any, results: Any, gradients: Any, state_grads: bool = True) -> tuple[Any, ...]:
        """Returns the arguments of the backward operator, from those of the forward one and its results."""
        named = dict(zip(("gates_x", "w_hh", *self.inputs, "lengths"), args, strict=True))
        kept = dict(zip(self.results, results, strict=True))
        if self.states == 2:
            saved = (named["w_hh"], named["c0"], named["lengths"], kept["gates"], kept["cells"])
        else:
            saved = (named["w_hh"], named["h0"], named["lengths"], kept["y"], kept["gates"])
        return (*saved, *gradients, state_grads)


LSTM_CELL = Cell(
    "lstm", "lstm", nn.LSTM, 4, 2, ("h0", "c0"), ("y", "h_n", "c_n", "gates", "cells"), ("d_gates_x", "dh0", "dc0"), 4
)
GRU_CELL = Cell("gru", "gru", nn.GRU, 3, 1, ("bias_hh", "h0"), ("y", "h_n", "gates"), ("d_gates_x", "d_q", "dh0"), 4)
RNN_CELL = GRU_CELL._replace(name="rnn", operators="rnn_tanh", theirs=nn.RNN, gates=1, saved=0)
RELU_CELL = RNN_CELL._replace(operators="rnn_relu", nonlinearity="relu")


def _each_of(*cells: Cell, slow: tuple[Cell, ...] = ()) -> pytest.MarkDecorator:
    marked = [pytest.param(cell, marks=pytest.mark.slow) for cell in slow]
    return pytest.mark.parametrize("cell", [*cells, *marked], ids=str)


# Most tests run for the cells whose kernels differ most. The fast ones run the plain cell's where that takes little
# time, and what is its own, and relu's where only the equation matters.
every_cell = _each_of(LSTM_CELL, GRU_CELL, slow=(RNN_CELL,))
every_cell_fast = _each_of(LSTM_CELL, GRU_CELL, RNN_CELL)
every_equation = _each_of(LSTM_CELL, GRU_CELL, RNN_CELL, RELU_CELL)
every_persistent_cell = _each_of(LSTM_CELL, GRU_CELL)  # that CUDA's persistent kernels run
every_h_cell = _each_of(GRU_CELL, RNN_CELL, RELU_CELL)  # whose state is their output
# For tests of more than two seconds, of which the fast ones run the LSTM's case alone.
every_cell_the_gru_slow = _each_of(LSTM_CELL, slow=(GRU_CELL, RNN_CELL))
