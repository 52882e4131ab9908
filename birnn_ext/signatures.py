"""Tells type checkers of `LSTM.forward`, `GRU.forward` and `RNN.forward`, whose results depend on their arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, cast, overload

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

LSTMState = tuple[Tensor, Tensor]


class LSTMForward(Protocol):
    """`LSTM.forward` of an instance."""

    @overload
    def __call__(
        self,
        input: Tensor,
        hx: LSTMState | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        output: Literal["all"] = "all",
        reset: Tensor | None = None,
        return_cell_states: Literal[False] = False,
    ) -> tuple[Tensor, LSTMState]: ...
    @overload
    def __call__(
        self,
        input: PackedSequence,
        hx: LSTMState | None = None,
        *,
        lengths: None = None,
        output: Literal["all"] = "all",
        reset: PackedSequence | None = None,
        return_cell_states: Literal[False] = False,
    ) -> tuple[PackedSequence, LSTMState]: ...
    @overload
    def __call__(
        self,
        input: Tensor,
        hx: LSTMState | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        output: Literal["all"] = "all",
        reset: Tensor | None = None,
        return_cell_states: Literal[True],
    ) -> tuple[Tensor, LSTMState, Tensor]: ...
    @overload
    def __call__(
        self,
        input: PackedSequence,
        hx: LSTMState | None = None,
        *,
        lengths: None = None,
        output: Literal["all"] = "all",
        reset: PackedSequence | None = None,
        return_cell_states: Literal[True],
    ) -> tuple[PackedSequence, LSTMState, PackedSequence]: ...
    @overload
    def __call__(
        self,
        input: Tensor | PackedSequence,
        hx: LSTMState | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        output: Literal["last"],
        reset: Tensor | PackedSequence | None = None,
        return_cell_states: Literal[False] = False,
    ) -> tuple[Tensor, LSTMState | None]: ...


class HForward(Protocol):
    """`GRU.forward` of an instance, and `RNN.forward`, whose state is h alone."""

    @overload
    def __call__(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        output: Literal["all"] = "all",
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def __call__(
        self,
        input: PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: None = None,
        output: Literal["all"] = "all",
        reset: PackedSequence | None = None,
    ) -> tuple[PackedSequence, Tensor]: ...
    @overload
    def __call__(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        output: Literal["last"],
        reset: Tensor | PackedSequence | None = None,
    ) -> tuple[Tensor, Tensor | None]: ...


def with_lstm_overloads(forward: Callable[..., Any]) -> LSTMForward:
    """Returns the function as it is; a type checker then knows it by `LSTMForward`."""
    return cast(LSTMForward, forward)


def with_h_overloads(forward: Callable[..., Any]) -> HForward:
    """Returns the function as it is; a type checker then knows it by `HForward`."""
    return cast(HForward, forward)
