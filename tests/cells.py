"""The cells whose operators the tests compare, and what these take and return."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import birnn_ext
from birnn_ext import ops, reference


class Cell(NamedTuple):
    """A cell, with its operators."""

    name: str
    theirs: type[nn.RNNBase]  # PyTorch's module
    gates: int
    states: int
    inputs: tuple[str, ...]  # of the recurrence, between w_hh and lengths
    results: tuple[str, ...]  # of the recurrence, and of a layer; gradients arrive of y and of the states
    gradients: tuple[str, ...]  # results of the recurrence's backward operator

    def __str__(self) -> str:
        return self.name  # in the names of tests

    @property
    def module(self) -> type[nn.RNNBase]:
        """Our module."""
        return getattr(birnn_ext, self.theirs.__name__)

    def hx(self, states: Any) -> Any:
        """Returns states as the modules take them: an LSTM's pair, a GRU's tensor, or None."""
        return states if states is None or self.states > 1 else states[0]

    def operator(self, suffix: str = "") -> Any:
        """Returns an operator: that of a stack of layers, or one whose name goes on so."""
        return getattr(torch.ops.birnn_ext, self.name + suffix).default

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
        return getattr(ops, f"{self.name}_{kind}")

    def reference(self, args: Any, save: str = "all") -> tuple[Tensor, ...]:
        """Runs the recurrence in plain PyTorch."""
        return getattr(reference, f"{self.name}_recurrence")(*args, save)

    def reference_backward(self, args: Any) -> tuple[Tensor, ...]:
        """Computes its gradients in plain PyTorch."""
        return getattr(reference, f"{self.name}_recurrence_backward")(*args)

    def outputs(self, results: Any) -> list[Tensor]:
        """Returns y and the final states, of all that an operator returned."""
        return list(results[: 1 + self.states])

    def backward_args(self, args: Any, results: Any, gradients: Any, state_grads: bool = True) -> tuple[Any, ...]:
        """Returns the arguments of the backward operator, from those of the forward one and its results."""
        named = dict(zip(("gates_x", "w_hh", *self.inputs, "lengths"), args, strict=True))
        kept = dict(zip(self.results, results, strict=True))
        if self.name == "lstm":
            saved = (named["w_hh"], named["c0"], named["lengths"], kept["gates"], kept["cells"])
        else:
            saved = (named["w_hh"], named["h0"], named["lengths"], kept["y"], kept["gates"], kept["cells"])
        return (*saved, *gradients, state_grads)


LSTM_CELL = Cell(
    "lstm", nn.LSTM, 4, 2, ("h0", "c0"), ("y", "h_n", "c_n", "gates", "cells"), ("d_gates_x", "dh0", "dc0")
)
GRU_CELL = Cell("gru", nn.GRU, 3, 1, ("bias_hh", "h0"), ("y", "h_n", "gates", "cells"), ("d_gates_x", "d_q", "dh0"))

every_cell = pytest.mark.parametrize("cell", [LSTM_CELL, GRU_CELL], ids=lambda cell: cell.name)
# For tests of more than two seconds, of which the fast ones run the LSTM's case alone.
every_cell_the_gru_slow = pytest.mark.parametrize(
    "cell", [LSTM_CELL, pytest.param(GRU_CELL, marks=pytest.mark.slow)], ids=lambda cell: cell.name
)
