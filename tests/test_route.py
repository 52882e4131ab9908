"""What runs a layer, and why: one decision for each call of a layer."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from cells import GRU_CELL, LSTM_CELL
from torch.autograd import forward_ad

from birnn_ext import as_nn_lstm, layer, recurrent
from birnn_ext.route import Route, Way, choose_route


def given(dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> tuple:
    """x (T, B, I) and weights."""
    x = torch.randn(3, 2, 4).to(dtype)
    weights = [torch.randn(n, k).to(dtype) for n, k in ((20, 4), (20, 5))]
    return x.requires_grad_(requires_grad), weights


def with_tangent() -> Route:
    x, weights = given()
    with forward_ad.dual_level():
        return choose_route(forward_ad.make_dual(x, torch.ones_like(x)), weights)


def in_vmap(**options: bool) -> Route:
    x, weights = given()
    found = []
    torch.func.vmap(lambda x: (found.append(choose_route(x, weights, **options)), x)[1])(x.expand(2, 3, 2, 4))
    return found[0]


ROUTES: list[tuple[Callable[[], Route], Way, str, str]] = [
    (lambda: choose_route(*given()), Way.LAYER, "none", "whole layer"),
    (lambda: choose_route(*given(requires_grad=True)), Way.LAYER, "all", "whole layer"),
    (lambda: choose_route(*given(requires_grad=True), recompute=True), Way.LAYER, "cells", "whole layer"),
    (lambda: choose_route(*given(torch.bfloat16), recompute=True), Way.LAYER, "none", "whole layer"),
    (lambda: choose_route(*given(torch.bfloat16, True)), Way.LAYER, "all", "whole layer"),
    (lambda: choose_route(*given(torch.float16, True), recompute=True), Way.LAYER, "cells", "whole layer"),
    (
        lambda: choose_route(*given(requires_grad=True), extended=True, recompute=True),
        Way.AGAIN,
        "none",
        "recompute=True",
    ),
    (lambda: choose_route(*given(), extended=True), Way.OPERATOR, "none", "has kernels"),
    (lambda: choose_route(*given(), extended=True, cells=True), Way.OPERATOR, "cells", "has kernels"),
    (lambda: choose_route(*given(requires_grad=True), extended=True), Way.OPERATOR, "all", "has kernels"),
    (lambda: choose_route(*given(), recorded=True), Way.TORCH, "none", "without birnn_ext"),
    (with_tangent, Way.REFERENCE, "none", "has no forward-mode derivative"),
    (in_vmap, Way.FUNCTION, "all", "know no autograd formulas"),
    (lambda: in_vmap(extended=True), Way.REFERENCE, "none", "has no rule for torch.func's transforms"),
]


@pytest.mark.parametrize(("choose", "way", "save", "why"), ROUTES)
def test_routes(choose, way, save, why):
    found = choose()
    assert (found.way, found.save) == (way, save)
    assert why in found.why


@pytest.mark.parametrize(
    ("cell", "options", "output", "calls"),
    [
        (LSTM_CELL, {}, "all", 1),
        (LSTM_CELL, {}, "last", 1),
        (LSTM_CELL, {"layer_norm": True}, "all", 3),
        (LSTM_CELL, {"layer_norm": True}, "last", 4),
        (GRU_CELL, {}, "all", 1),
        (GRU_CELL, {}, "last", 1),
    ],
    ids=str,
)
def test_the_route_is_chosen_once(cell, options, output, calls):
    """It is chosen for a stack that is one operator, and else for each layer.

    With output="last" the last layer's directions are two layers, of different steps.
    """
    rnn = cell.module(4, 5, 3, bidirectional=True, **options)
    x = torch.randn(3, 2, 4, dtype=options.get("dtype"))
    chooses = mock.Mock(wraps=choose_route)
    with mock.patch.object(layer, "choose_route", chooses), mock.patch.object(recurrent, "choose_route", chooses):
        rnn(x, lengths=[3, 1], output=output)
        assert chooses.call_count == calls
        with as_nn_lstm():
            cell.module(4, 5, 3)(x.float(), lengths=[3, 1])
        assert chooses.call_count == calls + 3
