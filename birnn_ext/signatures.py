"""Tells type checkers of `LSTM.forward`, whose results depend on its arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, cast, overload

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

State = tuple[Tensor, Tensor]


class Forward(Protocol):
    """`LSTM.forward` of an instance."""

    @overload
    def __call__(
        self,
        input: Tensor,
        hx: State | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        output: Literal["all"] = "all",
        reset: Tensor | None = None,
        return_cell_states: Literal[False] = False,
    ) -> tuple[Tensor, State]: ...
    @overload
    def __call__(
        self,
        input: PackedSequence,
        hx: State | None = None,
        *,
        lengths: None = None,
        output: Literal["all"] = "all",
        reset: PackedSequence | None = None,
        return_cell_states: Literal[False] = False,
    ) -> tuple[PackedSequence, State]: ...
    @overload
    def __call__(
        self,
        input: Tensor,
        hx: State | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        output: Literal["all"] = "all",
        reset: Tensor | None = None,
        return_cell_states: Literal[True],
    ) -> tuple[Tensor, State, Tensor]: ...
    @overload
    def __call__(
        self,
        input: PackedSequence,
        hx: State | None = None,
        *,
        lengths: None = None,
        output: Literal["all"] = "all",
        reset: PackedSequence | None = None,
        return_cell_states: Literal[True],
    ) -> tuple[PackedSequence, State, PackedSequence]: ...
    @overload
    def __call__(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        output: Literal["last"],
        reset: Tensor | PackedSequence | None = None,
        return_cell_states: Literal[False] = False,
    ) -> tuple[Tensor, State | None]: ...


def with_overloads(forward: Callable[..., Any]) -> Forward:
    """Returns the function as it is; a type checker then knows it by `Forward`."""
    return cast(Forward, forward)
