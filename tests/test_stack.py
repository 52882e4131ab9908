"""The operator of a whole stack of layers: against PyTorch's modules in float64, what it keeps, casts and refuses."""

from __future__ import annotations

import random
from unittest import mock

import pytest
import torch
from cells import Cell, every_cell, every_cell_fast
from helpers import all_near, twins
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close


class Case:
    """A stack of random sizes and options, beside PyTorch's module."""

    def __init__(self, cell: Cell, seed: int, device: str):
        draw = random.Random(seed)
        self.batch, self.steps = draw.choice([1, 2, 5]), draw.choice([1, 2, 7])
        directions, layers = draw.choice([1, 2]), draw.choice([1, 2, 3])
        features, hidden = draw.choice([1, 4, 9]), draw.choice([1, 5, 17])
        self.recompute = device == "cpu" and draw.random() < 0.3
        self.ours, self.theirs = twins(
            features, hidden, layers, bias=draw.random() < 0.7, bidirectional=directions == 2,
            dtype=torch.float64, device=device, cell=cell,
        )  # fmt: skip
        self.ours.recompute = self.recompute
        self.last = draw.random() < 0.5
        options = {"dtype": torch.float64, "device": device}
        if draw.random() < 0.4:  # some parameters are frozen
            for ours, theirs in zip(self.ours.parameters(), self.theirs.parameters(), strict=True):
                trained = draw.random() < 0.5
                ours.requires_grad_(trained)
                theirs.requires_grad_(trained)
        self.x = torch.randn(self.steps, self.batch, features, **options, requires_grad=draw.random() < 0.6)
        self.initial: tuple[Tensor, ...] = ()
        if draw.random() < 0.5:
            shape = (layers * directions, self.batch, hidden)
            trained = draw.random() < 0.6
            self.initial = tuple(torch.randn(shape, **options, requires_grad=trained) for _ in range(cell.states))
        self.hx = (self.initial if cell.states > 1 else self.initial[0]) if self.initial else None
        self.lengths = None
        if draw.random() < 0.5:
            self.lengths = torch.tensor([draw.randint(1, self.steps) for _ in range(self.batch)], device=device)
        self.weighted = [draw.random() < 0.7 for _ in range(3)]

    def run(self, of_ours: bool) -> list[Tensor]:
        if of_ours:
            y, states = self.ours(self.x, self.hx, lengths=self.lengths, output="last" if self.last else "all")
            return [y, *self.listed(states)]
        x = self.x
        if self.lengths is not None:
            x = torch.nn.utils.rnn.pack_padded_sequence(x, self.lengths.cpu(), enforce_sorted=False)
        y, states = self.theirs(x, self.hx)
        if self.lengths is not None:
            y, _ = torch.nn.utils.rnn.pad_packed_sequence(y, total_length=self.steps)
        if self.last:
            ends = torch.full((self.batch,), self.steps, device=y.device) if self.lengths is None else self.lengths
            y = y[ends - 1, torch.arange(self.batch, device=y.device)]
        return [y] if self.last and self.ours.bidirectional else [y, *self.listed(states)]

    def listed(self, states: Tensor | tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        return (states,) if isinstance(states, Tensor) else states or ()

    def gradients(self, of_ours: bool, results: list[Tensor], create_graph: bool) -> list[Tensor]:
        module = self.ours if of_ours else self.theirs
        inputs = [t for t in (self.x, *self.initial, *module.parameters()) if t.requires_grad]
        # Some results may not be used, and a sum of squares makes each gradient depend on everything.
        used = [r for r, wanted in zip(results, self.weighted, strict=False) if wanted] or results[:1]
        loss = sum((r**2).sum() for r in used)
        if not inputs or not loss.requires_grad:
            return []
        found = torch.autograd.grad(loss, inputs, create_graph=create_graph, allow_unused=True, materialize_grads=True)
        if not create_graph:
            return list(found)
        penalty = sum((g**2).sum() for g in found)
        return list(torch.autograd.grad(penalty, inputs, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize(
    ("seeds", "twice"),
    [(range(60), False), (range(60, 70), True), pytest.param(range(70, 120), True, marks=pytest.mark.slow)],
    ids=str,
)
@every_cell
def test_against_pytorchs_module(seeds, twice, cell, device):
    """Results and gradients, or with `twice` gradients of gradients."""
    for seed in seeds:
        case = Case(cell, seed, device)
        ours, theirs = case.run(True), case.run(False)
        all_near(ours, theirs, f"seed {seed}")
        for a, b in zip(case.gradients(True, ours, twice), case.gradients(False, theirs, twice), strict=True):
            assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda text, seed=seed: f"seed {seed}: {text}")


def operators(call) -> list[str]:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    return [event.name for event in profiled.events()]


@every_cell
@pytest.mark.parametrize("output", ["all", "last"])
def test_python_calls_one_operator(output, cell, device):
    module = cell.module(3, 5, 3, batch_first=True, bidirectional=True, device=device)
    x = torch.randn(2, 4, 3, device=device)
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode, mock.patch("birnn_ext.recurrent.run_layer", side_effect=AssertionError("a layer by itself")):
            assert operators(lambda: module(x, output=output)).count(f"birnn_ext::{cell.operators}") == 1


@every_cell_fast
@pytest.mark.parametrize("cast", [False, True], ids=["float32", "autocast"])
def test_layers_below_the_trained_ones_keep_nothing(cast, cell):
    module = cell.module(3, 5, 3, bidirectional=True)
    for name, p in module.named_parameters():
        p.requires_grad_("_l2" in name)
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=cast),
    ):
        y, _ = module(torch.randn(7, 2, 3))
    assert torch.equal(y, y.to(torch.bfloat16)) == cast  # a GRU's is float32 again on the CPU
    sizes = sorted(t.numel() // (7 * 2) for t in kept if t.shape[:2] == (7, 2))
    kept = [10] * (cell.states - 1) + [40] * (cell.saved > 0)
    assert sizes == [3, 10, 10, *kept]  # the stack's x; of layer 2 its x, its y, its cells and its gates
    y.sum().backward()
    assert all((p.grad is not None) == ("_l2" in name) for name, p in module.named_parameters())


@every_cell_fast
@pytest.mark.parametrize("last", [False, True], ids=["all", "last"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_opcheck(grad, last, cell):
    module = cell.theirs(3, 5, 2, bidirectional=True)
    states = [torch.randn(4, 2, 5, requires_grad=grad) for _ in range(cell.states)]
    weights = [w.requires_grad_(grad) for w in module._flat_weights]
    lengths = torch.tensor([4, 2])
    args = (torch.randn(4, 2, 3, requires_grad=grad), weights, True, *states, lengths, 2, last, False)
    torch.library.opcheck(cell.operator(), args)


@every_cell
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_autocast_casts_all_weights_at_once(grad, cell, device):
    module = cell.module(3, 8, 2, bidirectional=True, device=device)
    x = torch.randn(4, 2, 3, device=device)

    def step():
        with torch.autocast(device, torch.bfloat16), torch.set_grad_enabled(grad):
            y, _ = module(x)
            assert torch.equal(y, y.to(torch.bfloat16))
        if grad:
            y.sum().backward()

    with mock.patch.object(cell.module, "_layer_weights", side_effect=AssertionError("each weight by itself")):
        names = operators(step)
    assert names.count("aten::_foreach_copy_") == 1 + grad
    assert not grad or all(w.grad is not None and w.grad.dtype == torch.float32 for w in module.parameters())


@every_cell
def test_second_derivatives_through_autocast(cell, device):
    """The casts of weights are differentiated, too; PyTorch's module in float32 is the measure."""
    torch.manual_seed(5)
    ours, theirs = twins(3, 4, 1, device=device, cell=cell)
    x = torch.randn(4, 2, 3, device=device)

    def penalty(module, cast: bool) -> list[Tensor]:
        with torch.autocast(device, torch.bfloat16, enabled=cast):
            y, _ = module(x)
            assert torch.equal(y, y.to(torch.bfloat16)) == cast
        found = torch.autograd.grad((y.float() ** 2).sum(), list(module.parameters()), create_graph=True)
        return list(torch.autograd.grad(sum((g**2).sum() for g in found), list(module.parameters())))

    for a, b in zip(penalty(ours, True), penalty(theirs, False), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() <= 0.1 * b.abs().max()


def ok(*shape: int) -> Tensor:
    return torch.zeros(shape)


WEIGHTS = [ok(8, 3), ok(8, 2), ok(8, 2), ok(8, 2)]  # of two layers, without biases
WRONG = [
    ((ok(4, 2, 3), WEIGHTS, False, None, None, None, 0, False, False), "layers must be at least 1, got 0"),
    ((ok(4, 2, 3), WEIGHTS[:3], False, None, None, None, 2, False, False), "weights must be those of 2 layers, got 3"),
    ((ok(4, 3), WEIGHTS, False, None, None, None, 2, False, False), r"x must have shape \(T, B, I\), got \[4, 3\]"),
    ((ok(4, 2, 3), WEIGHTS, False, ok(1, 2, 2), ok(2, 2, 2), None, 2, False, False), r"h0 must have shape \(2, B, H\)"),
    ((ok(4, 2, 3), WEIGHTS, False, ok(2, 2, 2), ok(2, 2), None, 2, False, False), r"c0 must have shape \(2, B, H\)"),
    ((ok(4, 2, 5), WEIGHTS, False, None, None, None, 2, False, False), r"w_ih must have shape \[8, 5\], got \[8, 3\]"),
    ((ok(4, 2, 3), WEIGHTS, False, None, None, torch.tensor([5, 1]), 2, True, False), "lengths must be between 0 and"),
]


@pytest.mark.parametrize(("args", "message"), WRONG, ids=[message for _, message in WRONG])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_wrong_arguments(args, message, grad):
    args = (args[0].clone().requires_grad_(grad), *args[1:])
    with pytest.raises(ValueError, match=message):
        torch.ops.birnn_ext.lstm(*args)


def test_wrong_arguments_of_a_gru():
    weights = [ok(6, 3), ok(6, 2), ok(6, 2), ok(6, 2)]
    with pytest.raises(ValueError, match="gru: weights must be those of 2 layers, got 3 tensors"):
        torch.ops.birnn_ext.gru(ok(4, 2, 3), weights[:3], False, None, None, 2, False, False)
    with pytest.raises(ValueError, match=r"gru: h0 must have shape \(2, B, H\)"):
        torch.ops.birnn_ext.gru(ok(4, 2, 3), weights, False, ok(1, 2, 2), None, 2, False, False)
    with pytest.raises(ValueError, match=r"w_ih must have shape \[6, 5\], got \[6, 3\]"):
        torch.ops.birnn_ext.gru(ok(4, 2, 5), weights, False, None, None, 2, False, False)
