"""The reference in plain PyTorch, which other tests compare with, agrees with PyTorch's modules and with itself."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import all_near, assert_near
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from birnn_ext import reference

STEPS, BATCH, FEATURES, HIDDEN = 5, 4, 3, 6
CELLS = {  # the module, its gates, its states
    "lstm": (nn.LSTM, 4, 2),
    "gru": (nn.GRU, 3, 1),
    "rnn_tanh": (nn.RNN, 1, 1),
    "rnn_relu": (partial(nn.RNN, nonlinearity="relu"), 1, 1),
}
CASES = [(cell, *case) for cell in CELLS for case in itertools.product([1, 2], [False, True], [False, True])]


def in_double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize(("cell", "directions", "ragged", "state"), CASES)
def test_reference_is_pytorchs_module(cell, directions, ragged, state):
    kind, gates, states = CELLS[cell]
    module = kind(FEATURES, HIDDEN, bidirectional=directions == 2).double()
    x, lengths = in_double(STEPS, BATCH, FEATURES), torch.tensor([3, 5, 1, 4]) if ragged else None
    s0 = [in_double(directions, BATCH, HIDDEN) for _ in range(states)] if state else None
    theirs = x if lengths is None else pack_padded_sequence(x, lengths, enforce_sorted=False)
    y, final = module(theirs, s0[0] if s0 and states == 1 else s0)
    y = y if lengths is None else pad_packed_sequence(y)[0]

    w_ih, w_hh, bias_ih, bias_hh = ([w[k] for w in module.all_weights] for k in range(4))
    gates_x = F.linear(x, torch.cat(w_ih), torch.cat(bias_ih)).unflatten(-1, (directions, gates * HIDDEN))
    if cell != "lstm":
        args = (gates_x, torch.stack(w_hh), torch.stack(bias_hh), *(s0 or [None]))
    else:
        args = (gates_x + torch.stack(bias_hh), torch.stack(w_hh), *(s0 or [None, None]))
    ours = getattr(reference, f"{cell}_recurrence")(*args, lengths, "none")
    assert_near(ours[0].flatten(2), y, "y")
    all_near(ours[1 : 1 + states], final if states == 2 else [final], "states")
    assert all(kept.numel() == 0 for kept in ours[1 + states :])


def random_recurrence(cell: str, directions: int, ragged: bool, state: bool) -> list:
    """Returns the arguments of a recurrence but for the last."""
    _, gates, states = CELLS[cell]
    shapes = [(STEPS, BATCH, directions, gates * HIDDEN), (directions, gates * HIDDEN, HIDDEN)]
    if state:
        shapes += [(directions, gates * HIDDEN)] * (states == 1) + [(directions, BATCH, HIDDEN)] * states
    floating = [in_double(*shape).requires_grad_() for shape in shapes]
    return [*floating, *[None] * (4 - len(shapes)), torch.tensor([3, 5, 0, 4]) if ragged else None]


@pytest.mark.parametrize(("cell", "directions", "ragged", "state"), CASES)
def test_reference_agrees_with_itself(cell, directions, ragged, state):
    """The reference's backward is autograd's derivative of the reference's forward, that of what it saves included."""
    args = random_recurrence(cell, directions, ragged, state)
    gates_x, w_hh, *others, lengths = args
    results = getattr(reference, f"{cell}_recurrence")(*args, "all")
    cotangents = [torch.randn_like(t) for t in results]
    states = CELLS[cell][2]
    dy, *d_states = cotangents[: 1 + states]
    dependent = [
        (r, c) for r, c in zip(results, cotangents, strict=True) if r.requires_grad
    ]  # not gates that are empty
    s0 = [s for s in others[-states:] if s is not None]

    def differentiate(*inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad([r for r, _ in dependent], inputs, [c for _, c in dependent], retain_graph=True)

    expected = differentiate(gates_x, *s0)
    if cell == "lstm":
        d_gates_x, *d_s0 = reference.lstm_recurrence_backward(
            w_hh, others[1], lengths, results[3], results[4], dy, *d_states, True, *cotangents[3:]
        )
    else:
        bias_hh, h0 = others
        direct = cotangents[2:] if cell == "gru" else []
        d_gates_x, d_q, *d_s0 = getattr(reference, f"{cell}_recurrence_backward")(
            w_hh, h0, lengths, results[0], results[2], dy, *d_states, True, *direct
        )
        if bias_hh is not None:  # the gradient of W_hh h + b_hh, summed
            dz = torch.cat([d_gates_x[..., : 2 * HIDDEN], d_q], -1) if cell == "gru" else d_gates_x
            assert_near(dz.sum((0, 1)), *differentiate(bias_hh))
    assert_near(d_gates_x, expected[0])
    if state:
        all_near(d_s0, expected[1:], "states")


@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck_first_and_second_order(cell):
    args = random_recurrence(cell, 2, True, True)
    gates_x, *others, lengths = args
    lengths = lengths.clamp(max=2)

    def run(gates_x, *others):
        return getattr(reference, f"{cell}_recurrence")(gates_x, *others, lengths, "none")[: 1 + CELLS[cell][2]]

    few = (gates_x.detach()[:2].requires_grad_(), *others)
    assert torch.autograd.gradcheck(run, few, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, few, fast_mode=True)


def test_gradients_of_relu_are_pytorchs_where_something_is_not_finite():
    """Nothing passes a unit that is 0, not even an infinite gradient; what is NaN passes its own on."""
    h = torch.tensor([0, 1, torch.nan, 2]).view(1, 1, 1, 4)
    dy = torch.tensor([torch.inf, 1, 3, torch.inf]).view(1, 1, 1, 4)
    args = (torch.zeros(1, 4, 4), None, None, h, torch.empty(0), dy, None, False)
    expected = torch.ops.aten.threshold_backward(dy, h, 0)
    for backward in (reference.rnn_relu_recurrence_backward, torch.ops.birnn_ext.rnn_relu_recurrence_backward):
        assert torch.equal(backward(*args)[0], expected)
