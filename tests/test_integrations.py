"""Other packages that look at a model work with birnn_ext: counters of operations, and Opacus.

Tests of packages in tests/third_party.txt are skipped if these are not installed, but fail if BIRNN_THIRD_PARTY is set,
as CI does.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import os
import subprocess
import sys
import types
from collections.abc import Callable

import pytest
import torch
from cells import GRU_CELL, LSTM_CELL, RNN_CELL, Cell, every_cell
from helpers import all_near, leaves, projected_by_pytorch, random_state
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.flop_counter import FlopCounterMode

import birnn_ext
from birnn_ext import accelerate
from birnn_ext._after_import import after_import

STEPS, BATCH, FEATURES, HIDDEN, LAYERS = 5, 4, 6, 8, 2
F64 = {"dtype": torch.float64}
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # Opacus's, at a model's first layer


needs_third_party = pytest.mark.slow  # CI installs them for its slow part


def third_party(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if os.environ.get("BIRNN_THIRD_PARTY"):
            raise
        pytest.skip(f"{error}: pip install --no-deps -r tests/third_party.txt")


# --- after_import -----------------------------------------------------------------------------------------------------


def test_after_import(tmp_path, monkeypatch):
    (tmp_path / "birnn_test_late.py").write_text("value = 1")
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    for k in range(2):
        after_import("birnn_test_late", lambda module, k=k: seen.append((k, module.value)))
    assert importlib.util.find_spec("birnn_test_late") is not None  # finding it does not import it
    assert seen == []
    module = importlib.import_module("birnn_test_late")
    assert seen == [(0, 1), (1, 1)]
    after_import("birnn_test_late", seen.append)
    assert seen[2:] == [module]
    monkeypatch.delitem(sys.modules, "birnn_test_late")


def test_a_package_that_has_changed_is_still_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "other_tool", types.ModuleType("other_tool"))
    with pytest.warns(UserWarning, match="other_tool of this version does not know birnn_ext's modules .*'rules'"):
        birnn_ext.integrations._when_imported("other_tool", lambda module: module.rules)


def test_nothing_else_is_imported():
    names = {*birnn_ext.integrations.RULES_BY_TYPE, "torch.utils.flop_counter", "opacus"}
    code = f"import sys, birnn_ext; assert not {names} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- counters ---------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.rnn = cell.theirs(FEATURES, HIDDEN, LAYERS, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(2 * HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0])


def thop(package: types.ModuleType, model: nn.Module) -> tuple[float, float]:
    return package.profile(model, (torch.randn(BATCH, STEPS, FEATURES),), verbose=False)


def ptflops(package: types.ModuleType, model: nn.Module) -> tuple[float, float]:
    return package.get_model_complexity_info(
        model, (STEPS, FEATURES), as_strings=False, print_per_layer_stat=False, backend="pytorch"
    )


def torchinfo(package: types.ModuleType, model: nn.Module) -> tuple[float, float]:
    counts = package.summary(model, (BATCH, STEPS, FEATURES), verbose=0)
    return counts.total_mult_adds, counts.total_params


@needs_third_party
@every_cell
@pytest.mark.filterwarnings("ignore:distutils")
@pytest.mark.parametrize("count", [thop, ptflops, torchinfo])
def test_other_counters_count_what_they_count_for_pytorchs_module(count, cell):
    package = third_party(count.__name__)
    model = Model(cell)
    expected = count(package, model)
    assert expected[0] > 2500 * cell.gates
    assert expected[1] == sum(p.numel() for p in model.parameters())
    accelerate(model)
    assert count(package, model) == expected


def flops(model: nn.Module, x: Tensor, hx: object) -> tuple[int, int]:
    """Counts the operations of a forward and a backward pass."""
    with FlopCounterMode(display=False) as forward:
        results = leaves(model(x, hx))
    with FlopCounterMode(display=False) as backward:
        sum(result.sum() for result in results).backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("operator", ["layer", "recurrence"])
@pytest.mark.parametrize(
    ("cell", "options"),
    [
        (LSTM_CELL, {}),
        (LSTM_CELL, {"bias": False, "bidirectional": True}),
        (LSTM_CELL, {"proj_size": 3}),
        (GRU_CELL, {}),
        (GRU_CELL, {"bias": False, "bidirectional": True}),
        (RNN_CELL, {"bidirectional": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("state", ["none", "given", "trainable"])
@pytest.mark.parametrize("trainable_input", [False, True])
def test_flop_counter_mode(trainable_input, state, cell, options, operator):
    """PyTorch runs its modules in float64 as matrix products, which it counts."""
    theirs = cell.theirs(FEATURES, HIDDEN, LAYERS, **options, **F64)
    ours = cell.module(FEATURES, HIDDEN, LAYERS, **options)
    rows = LAYERS * (2 if "bidirectional" in options else 1)
    h, *c = random_state(rows, BATCH, HIDDEN, cell)
    hx = None if state == "none" else (h[..., : options.get("proj_size")], *c)

    def count(lstm: nn.RNNBase) -> tuple[int, int]:
        kind = lstm.weight_ih_l0.dtype
        x = torch.randn(STEPS, BATCH, FEATURES, dtype=kind, requires_grad=trainable_input)
        states = hx and tuple(t.to(kind).requires_grad_(state == "trainable") for t in hx)
        return flops(lstm, x, cell.hx(states))

    forward, backward = count(theirs)
    if state == "none" and (operator == "recurrence" or "proj_size" in options):
        # for dW_hh PyTorch multiplies by its initial state of zeros, and we do not
        backward -= rows * 2 * BATCH * cell.gates * HIDDEN * options.get("proj_size", HIDDEN)
    with projected_by_pytorch() if operator == "recurrence" else contextlib.nullcontext():
        assert count(ours) == (forward, backward)


@every_cell
def test_flop_counter_mode_counts_recomputed_products(cell):
    x = torch.randn(STEPS, BATCH, FEATURES)
    forward, backward = flops(cell.module(FEATURES, HIDDEN, bidirectional=True), x, None)
    assert flops(cell.module(FEATURES, HIDDEN, bidirectional=True, recompute=True), x, None) == (
        forward,
        backward + (forward if cell.saved else 0),  # without saved values nothing is computed again
    )


# --- Opacus -----------------------------------------------------------------------------------------------------------


LENGTHS = [3, 5, 1, 4]

CALLS: dict[str, Callable[..., tuple]] = {
    "plain": lambda lstm, x, lengths, hx: lstm(x),
    "states": lambda lstm, x, lengths, hx: lstm(x, hx),
    "keywords": lambda lstm, x, lengths, hx: lstm(input=x, hx=hx, lengths=lengths),
    "last": lambda lstm, x, lengths, hx: lstm(x, output="last", lengths=lengths),
    "cells": lambda lstm, x, lengths, hx: (sum(lstm(x, return_cell_states=True)[::2]), None),
    "reset": lambda lstm, x, lengths, hx: lstm(x, reset=x[..., 0] > 0.5),
    "twice": lambda lstm, x, lengths, hx: lstm(lstm(x)[0][..., :FEATURES]),
    "packed": lambda lstm, x, lengths, hx: lstm(
        pack_padded_sequence(x, lengths, lstm.batch_first, enforce_sorted=False), hx
    ),
}


class Private(nn.Module):
    """An LSTM or GRU between linear layers, whose outputs all enter the loss."""

    def __init__(self, call: str, batch_first: bool, cell: Cell = LSTM_CELL, **options) -> None:
        super().__init__()
        self.cell = cell
        self.call = CALLS[call]
        self.before = nn.Linear(3, FEATURES, **F64)
        lstm = {"num_layers": LAYERS, "batch_first": batch_first, "bidirectional": True, **options}
        self.lstm = cell.module(FEATURES, HIDDEN, **lstm, **F64)
        self.after = nn.Linear(2 * HIDDEN, 2, **F64)

    def forward(self, x: Tensor, lengths: Tensor, h_0: Tensor, c_0: Tensor) -> Tensor:
        """Takes (B, T, 3), (B,) and two states (B, rows, H); returns (B, 2)."""
        x = self.before(x)
        batch = 0 if self.lstm.batch_first else 1
        hx = self.cell.hx((h_0.transpose(0, 1), c_0.transpose(0, 1)))
        y, states, *_ = self.call(self.lstm, x if batch == 0 else x.transpose(0, 1), lengths, hx)
        if not isinstance(y, Tensor):
            y = pad_packed_sequence(y, self.lstm.batch_first)[0]
        if y.dim() == 3:
            y = y.sum(1 - batch)
        states = leaves(states)
        if states:
            y = y + torch.cat([states[0][-1], states[-1][0]], -1)
        return self.after(y)


def samples() -> tuple[Tensor, ...]:
    states = torch.randn(2, BATCH, 2 * LAYERS, HIDDEN, **F64)
    return torch.randn(BATCH, STEPS, 3, **F64), torch.tensor(LENGTHS), *states


def gradients_in_a_loop(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    of_each = []
    for k in range(BATCH):
        loss = model(*(t[k : k + 1] for t in inputs)).square().sum()
        of_each.append(torch.autograd.grad(loss, list(model.parameters())))
    return [torch.stack(parts) for parts in zip(*of_each, strict=True)]


def check_per_sample_gradients(call: str, reduction: str, batch_first: bool, cell: Cell = LSTM_CELL, **options) -> None:
    opacus = third_party("opacus")
    model = Private(call, batch_first, cell, **options)
    inputs = samples()
    expected = gradients_in_a_loop(model, inputs)
    assert importlib.import_module("opacus.validators").ModuleValidator.validate(model, strict=True) == []
    private = opacus.GradSampleModule(model, loss_reduction=reduction)
    losses = private(*inputs).square().sum(-1)
    (losses.mean() if reduction == "mean" else losses.sum()).backward()
    all_near([p.grad_sample for p in model.parameters()], expected)
    private.remove_hooks()
    assert not model.lstm._forward_hooks


@needs_third_party
@every_cell
@pytest.mark.parametrize("reduction, batch_first", [("mean", True), ("sum", False)])
@pytest.mark.parametrize("call", [call for call in CALLS if call not in ("cells", "reset")])
def test_opacus_per_sample_gradients_equal_a_loops(call, reduction, batch_first, cell):
    check_per_sample_gradients(call, reduction, batch_first, cell)


@needs_third_party
@every_cell
def test_opacus_per_sample_gradients_of_learned_states(cell):
    check_per_sample_gradients("plain", "mean", True, cell, learned_state=True)


@needs_third_party
def test_opacus_per_sample_gradients_of_a_gru_with_resets():
    check_per_sample_gradients("reset", "mean", False, GRU_CELL)


@needs_third_party
@pytest.mark.filterwarnings("ignore:birnn_ext..lstm_variant.* has no rule for torch.func's transforms:UserWarning")
@pytest.mark.parametrize("call", ["cells", "reset"])
def test_opacus_per_sample_gradients_of_variants(call, reference_operators):
    check_per_sample_gradients(call, "mean", False)


@needs_third_party
@every_cell
@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
@pytest.mark.parametrize("made", ["ours", "accelerated", "parametrized"])
@pytest.mark.filterwarnings("ignore:Secure RNG turned off")
def test_opacus_trains_differentially_private(made, mode, cell):
    opacus = third_party("opacus")
    model = Private("plain", True, cell)
    if made != "ours":
        model.lstm = cell.theirs(FEATURES, HIDDEN, LAYERS, batch_first=True, bidirectional=True, **F64)
        if made == "parametrized":
            nn.utils.parametrizations.weight_norm(model.lstm, "weight_hh_l0")
        assert accelerate(model).replaced == ["lstm"]
    expected = gradients_in_a_loop(model, inputs := samples())
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in expected]).norm(dim=0)
    clip = float(norms.median())
    clipped = [torch.tensordot((clip / (norms + 1e-6)).clamp(max=1), g, 1) / BATCH for g in expected]

    before = copy.deepcopy([p.detach() for p in model.parameters()])
    engine = opacus.PrivacyEngine()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*inputs), batch_size=BATCH)
    private, optimizer, *rest = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=loader,
        noise_multiplier=0.0,
        max_grad_norm=clip,
        poisson_sampling=False,
        grad_sample_mode=mode,
        **({"criterion": SumOfSquares()} if mode == "ghost" else {}),
    )
    loss = (
        rest[0](private(*inputs), torch.zeros(BATCH, 2, **F64))
        if mode == "ghost"
        else private(*inputs).square().sum(-1).mean()
    )
    loss.backward()
    optimizer.step()
    all_near([b - p.detach() for b, p in zip(before, model.parameters(), strict=True)], clipped)


class SumOfSquares(nn.Module):
    """A criterion for Opacus, which asks for each sample's loss."""

    reduction = "mean"

    def forward(self, y: Tensor, target: Tensor) -> Tensor:
        losses = (y - target).square().sum(-1)
        return losses.mean() if self.reduction == "mean" else losses


@needs_third_party
@pytest.mark.parametrize(
    ("cell", "options"),
    [
        (LSTM_CELL, {"dropout": 0.5}),
        (LSTM_CELL, {"recurrent_dropout": 0.5}),
        (LSTM_CELL, {"zoneout": 0.1}),
        (GRU_CELL, {"dropout": 0.5}),
    ],
    ids=str,
)
def test_opacus_is_told_of_dropout(cell, options):
    opacus = third_party("opacus")
    model = Private("plain", True, cell, **options)
    (error,) = importlib.import_module("opacus.validators").ModuleValidator.validate(model)
    of_lstm = "birnn_ext.LSTM: dropout, recurrent_dropout and zoneout must be 0 with Opacus"
    assert (of_lstm if cell is LSTM_CELL else "birnn_ext.GRU: dropout must be 0 with Opacus") in str(error)
    with pytest.raises(NotImplementedError, match="must be 0 with Opacus"):
        opacus.GradSampleModule(model)


@needs_third_party
@every_cell
def test_opacus_is_told_of_a_forward_that_is_not_ours(cell):
    opacus = third_party("opacus")

    class Mine(cell.theirs):
        def forward(self, x: Tensor) -> tuple:
            return super().forward(x * 2)

    model = nn.Sequential(Mine(3, 4))
    accelerate(model)
    with pytest.raises(NotImplementedError, match="Mine has a forward of its own"):
        opacus.GradSampleModule(model)


@needs_third_party
@every_cell
def test_opacus_is_told_that_samples_need_a_batch(cell):
    opacus = third_party("opacus")
    with pytest.raises(ValueError, match="input must be batched, 3-D, got 2-D"):
        opacus.GradSampleModule(cell.module(3, 4))(torch.randn(5, 3))
