"""The operators agree with the reference in plain PyTorch, on random sizes, and pass PyTorch's checks of operators."""

from __future__ import annotations

import itertools
import os
import random
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from cells import GRU_CELL, LSTM_CELL, Cell, every_cell, every_cell_fast, every_cell_the_gru_slow, every_equation
from helpers import all_near, as_double, assert_near

import birnn_ext
from birnn_ext.ops import lstm_recurrence


def shape_of(name: str, batch: int, directions: int, rows: int, hidden: int) -> tuple[int, ...]:
    """Returns the shape of one of a cell's `inputs`."""
    return (directions, rows) if name == "bias_hh" else (directions, batch, hidden)


def random_case(cell: Cell, rng: random.Random, dtype: torch.dtype, device: str):
    """Returns arguments of a forward call with random sizes, state and lengths; unusual ones are likely."""
    steps, batch, directions = rng.choice([1, 2, 3, 5, 9]), rng.choice([1, 2, 5, 6, 7, 13, 19]), rng.choice([1, 2])
    hidden = rng.choice([1, 3, 4, 7, 8, 15, 16, 17, 24, 31, 33, 40, 48, 65])

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64).to(device, dtype)

    rows = cell.gates * hidden
    state = rng.random() < 0.5
    given = [tensor(*shape_of(name, batch, directions, rows, hidden)) if state else None for name in cell.inputs]
    lengths = torch.tensor([rng.randint(0, steps) for _ in range(batch)], device=device) if rng.random() < 0.5 else None
    w_hh = tensor(directions, rows, hidden) / hidden**0.5
    return tensor(steps, batch, directions, rows), w_hh, *given, lengths


@every_equation
@pytest.mark.parametrize("case", range(24))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_operators_against_the_reference(dtype, case, cell, device):
    """The truth, forward and backward, is the reference in float64. Odd cases leave out incoming gradients."""
    args = random_case(cell, random.Random(case), dtype, device)
    results = cell.forward(*args, "all")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, a, e in zip(cell.results, results, cell.reference(as_double(args)), strict=True):
        assert a.dtype == (wide if name == "cells" else dtype)
        assert_near(a, e, name, dtype)
    without_saving = cell.forward(*args, "none")
    assert all(torch.equal(a, b) for a, b in zip(cell.outputs(without_saving), cell.outputs(results), strict=True))
    assert all(kept.numel() == 0 for kept in cell.kept(without_saving))
    gates, *cells = cell.kept(cell.forward(*args, "cells"))
    assert gates.numel() == 0
    assert all(torch.equal(a, b) for a, b in zip(cells, cell.kept(results)[1:], strict=True))

    dy, *d_states = (torch.randn_like(t) for t in cell.outputs(results))
    if case % 4 == 1:
        dy = None
    if case % 4 == 3:
        d_states = [None] * len(d_states)
    backward_args = cell.backward_args(args, results, (dy, *d_states))
    results = cell.backward(*backward_args)
    expected = cell.reference_backward(as_double(backward_args))
    for name, a, e in zip(cell.gradients, results, expected, strict=True):
        assert_near(a, e, name, dtype)
        assert a.dtype == dtype
    without_states = cell.backward(*backward_args[:-1], False)
    for name, a, b in zip(cell.gradients, without_states, results, strict=True):
        assert a.numel() == 0 if name in ("dh0", "dc0") else torch.equal(a, b)


@every_equation
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_operators_against_the_reference_at_length(seed, cell, device):
    for case, dtype in itertools.product(range(10), [torch.float64, torch.float32]):
        test_operators_against_the_reference(dtype, 24 + 10 * seed + case, cell, device)


def small_case(cell: Cell, directions: int, ragged: bool, state: bool, device: str):
    steps, batch, hidden, rows = 3, 3, 2, cell.gates * 2

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)

    floating = [tensor(steps, batch, directions, rows), tensor(directions, rows, hidden)]
    if state:
        floating += [tensor(*shape_of(name, batch, directions, rows, hidden)) for name in cell.inputs]
    return floating, torch.tensor([2, 3, 0], device=device) if ragged else None


@every_cell
@pytest.mark.parametrize("state", [True, False], ids=["state", "no_state"])
@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "full"])
@pytest.mark.parametrize("directions", [1, 2])
def test_gradcheck_first_and_second_order(directions, ragged, state, cell, device):
    floating, lengths = small_case(cell, directions, ragged, state, device)

    def run(gates_x, w_hh, *given):
        return cell.function("recurrence")(gates_x, w_hh, *given, lengths=lengths)

    # An emulated device is too slow to check every entry, so fast_mode checks random projections.
    assert torch.autograd.gradcheck(run, floating, fast_mode=device == "cuda")
    assert torch.autograd.gradgradcheck(run, floating, fast_mode=device == "cuda")


@every_cell_fast
def test_samples_may_differ_in_any_one_input(cell, device):
    """torch.func.vmap over gradients, with samples of gates_x, weights, a bias or a state alone."""
    floating, lengths = small_case(cell, 2, True, True, device)
    floating = [t.detach() for t in floating]

    def loss(*args):
        return sum(t.square().sum() for t in cell.function("recurrence")(*args, lengths=lengths))

    gradients = torch.func.grad(loss, argnums=tuple(range(len(floating))))
    for place, given in enumerate(floating):
        samples = torch.randn(3, *given.shape, dtype=given.dtype, device=device)
        before, after = floating[:place], floating[place + 1 :]
        in_dims = tuple(0 if k == place else None for k in range(len(floating)))
        together = torch.func.vmap(gradients, in_dims)(*before, samples, *after)
        for k, sample in enumerate(samples):
            all_near([t[k] for t in together], gradients(*before, sample, *after), f"input {place}")


@every_cell_fast
@pytest.mark.parametrize("save", ["all", "cells", "none"])
@pytest.mark.parametrize("state", [True, False], ids=["state", "no_state"])
@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "full"])
def test_opcheck(ragged, state, save, cell, device):
    floating, lengths = small_case(cell, 2, ragged, state, device)
    args = (*floating, *[None] * (4 - len(floating)), lengths)
    detached = [a.detach() if a is not None else None for a in args]
    torch.library.opcheck(cell.forward, (*(args if save == "all" else detached), save))
    if save == "all":
        results = [r.requires_grad_() for r in cell.forward(*detached, "all")]
        dy, *_, d_last_state = (torch.randn_like(t) for t in cell.outputs(results))
        gradients = (dy, None, d_last_state) if cell is LSTM_CELL else (dy, d_last_state)
        torch.library.opcheck(cell.backward, cell.backward_args(args, results, gradients, state))


@every_cell_fast
def test_differentiating_what_was_not_saved_is_an_error(cell):
    floating, _ = small_case(cell, 2, False, False, "cpu")
    y = cell.forward(*floating, None, None, None, "none")[0]
    with pytest.raises(RuntimeError, match=f'{cell.operators}_recurrence was called with save="none", so it can'):
        y.sum().backward()


@every_cell_fast
def test_strided_arguments(cell, device):
    args = random_case(cell, random.Random(4), torch.float32, device)
    strided = [None if a is None else torch.stack([a, a], -1)[..., 0] if a.is_floating_point() else a for a in args]
    assert not strided[0].is_contiguous()
    all_near(cell.forward(*strided, "all"), cell.forward(*args, "all"))


@every_cell_fast
def test_misaligned_arguments(cell, device):
    """The kernels must not use 16-byte accesses for a view that begins 4 bytes into its storage."""
    rows = cell.gates * 8
    gates_x, w_hh = torch.randn(3, 2, 2, rows, device=device), torch.randn(2, rows, 8, device=device)
    shifted = torch.empty(gates_x.numel() + 1, device=device)[1:].view(gates_x.shape).copy_(gates_x)
    assert shifted.data_ptr() % 16 == 4
    rest = (w_hh, None, None, None, "all")
    all_near(cell.forward(shifted, *rest), cell.forward(gates_x, *rest))


@every_cell_fast
def test_saturated_and_special_values(cell, device):
    gates_x = torch.tensor([0.0, 1e4, -1e4, float("inf"), -float("inf"), float("nan"), 88.8, -88.8], device=device)
    hidden = gates_x.numel()
    gates_x = gates_x.repeat(cell.gates).view(1, 1, 1, -1).expand(3, 2, 1, -1)
    w_hh = torch.zeros(1, cell.gates * hidden, hidden, device=device)
    args = (gates_x, w_hh, None, None, None)
    results = cell.forward(*args, "all")
    y = results[0]
    expected = cell.reference(as_double(args))
    is_nan = torch.arange(hidden, device=device) == 5
    # In the first step the NaN stays in its own unit. After that it is everywhere, as 0 * NaN is NaN.
    assert y[0].isnan().equal(is_nan.expand_as(y[0]))
    for name, a, e in zip(cell.results, results, expected, strict=True):
        if name in ("y", "gates", "cells") and a.numel():
            torch.testing.assert_close(a[0].double(), e[0], equal_nan=True, rtol=1e-5, atol=1e-6)


@every_cell_fast
def test_repeatable_bitwise(cell, device):
    args = random_case(cell, random.Random(8), torch.float32, device)
    first = cell.forward(*args, "all")
    assert all(torch.equal(a, b) for a, b in zip(first, cell.forward(*args, "all"), strict=True))


@every_cell_fast
@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "full"])
def test_bitwise_the_same_for_any_number_of_threads(ragged, cell):
    gates_x, w_hh = torch.randn(9, 13, 2, cell.gates * 21), torch.randn(2, cell.gates * 21, 21) / 5
    lengths = torch.arange(13).remainder(10) if ragged else None
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5, 8):
            torch.set_num_threads(threads)
            args = (gates_x, w_hh, None, None, lengths)
            found = cell.forward(*args, "all")
            gradients = cell.backward(*cell.backward_args(args, found, cell.outputs(found)))
            results.append([found[0], *gradients])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc, which this system lacks")
@every_cell_the_gru_slow
def test_runs_on_as_many_threads_as_torch_is_told(cell):
    code = f"""
import os, torch, birnn_ext
torch.set_num_threads(3)
before = len(os.listdir("/proc/self/task"))
gates_x, w_hh = torch.zeros(2, 40, 2, {64 * cell.gates}), torch.zeros(2, {64 * cell.gates}, 64)
torch.ops.birnn_ext.{cell.operators}_recurrence(gates_x, w_hh, None, None, None, "none")
print("started", len(os.listdir("/proc/self/task")) - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "started 2" in done.stdout, done.stdout + done.stderr


IMPORT = "import birnn_ext"


def python(*arguments: str, isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "BIRNN_CPU_ISA": isa}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def runnable_isas() -> list[str]:
    """Returns the list that the extension's own error names when asked for kernels that don't exist."""
    said = python("-c", IMPORT, isa="none").stderr
    return re.search(r"this build and CPU run ([\w, ]+)", said).group(1).split(", ")


@pytest.mark.slow
@pytest.mark.parametrize("isa", birnn_ext.build_info()["cpu_isas"])
def test_every_instruction_set(isa):
    """A new process runs each ISA's kernels. One that this CPU lacks must raise an error."""
    runnable = isa in runnable_isas()
    here = Path(__file__)
    tests = [f"{here}::test_operators_against_the_reference", f"{here.with_name('test_math.py')}"]
    arguments = ["-m", "pytest", "-q", "-m", "not cuda and not slow", *tests] if runnable else ["-c", IMPORT]
    done = python(*arguments, isa=isa)
    if runnable:
        assert done.returncode == 0, done.stdout[-3000:]
        assert re.search(r"\d+ passed", done.stdout)
    else:
        assert done.returncode != 0
        assert f"BIRNN_CPU_ISA={isa} is not available" in done.stderr


def test_unknown_instruction_set_fails_at_import():
    done = python("-c", IMPORT, isa="mmx")
    assert done.returncode != 0
    assert "ImportError: BIRNN_CPU_ISA=mmx is not available: this build and CPU run generic" in done.stderr


@every_cell_fast
def test_reference_serves_other_devices_and_says_so_once(cell, reference_operators, monkeypatch):
    """A dispatch key without a kernel (XLA's) reaches the reference. CPU tensors stand in for the device's."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.XLA)
    monkeypatch.setattr("birnn_ext.without_kernels._said", set())
    args = random_case(cell, random.Random(2), torch.float32, "cpu")
    before = birnn_ext.op_calls()["reference_forward"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = cell.forward.redispatch(keys, *args, "all")
        cell.forward.redispatch(keys, *args, "all")
    assert len(caught) == 1
    assert f"birnn_ext::{cell.operators}_recurrence has no compiled kernel for device 'cpu'" in str(caught[0].message)
    assert birnn_ext.op_calls()["reference_forward"] == before + 2
    all_near(results, cell.forward(*args, "all"))
    backward_args = cell.backward_args(args, results, cell.outputs(results))
    before = birnn_ext.op_calls()["reference_backward"]
    d = cell.backward.redispatch(keys, *backward_args)
    assert birnn_ext.op_calls()["reference_backward"] == before + 1
    all_near(d, cell.backward(*backward_args))


def ok(*shape: int, **kwargs) -> torch.Tensor:
    return torch.zeros(shape, **kwargs)


forward_op, backward_op = LSTM_CELL.forward, LSTM_CELL.backward
gru_op, gru_backward_op = GRU_CELL.forward, GRU_CELL.backward
ERRORS = [
    (lambda: lstm_recurrence(ok(4, 2, 8), ok(1, 8, 2)), ValueError, r"gates_x must have shape \(T, B, D, 4H\), got \[4, 2, 8\]"),
    (lambda: lstm_recurrence(ok(4, 2, 1, 9), ok(1, 8, 2)), ValueError, r"gates_x must have shape \(T, B, D, 4H\)"),
    (lambda: lstm_recurrence(ok(0, 2, 1, 8), ok(1, 8, 2)), ValueError, "at least one time step"),
    (lambda: lstm_recurrence(ok(4, 2, 3, 8), ok(3, 8, 2)), ValueError, "1 or 2 directions"),
    (lambda: lstm_recurrence(ok(4, 2, 1, 8), ok(1, 8, 3)), ValueError, r"w_hh must have shape \[1, 8, 2\], got \[1, 8, 3\]"),
    (lambda: lstm_recurrence(ok(4, 2, 1, 8), ok(1, 8, 2, dtype=torch.float64)), TypeError, "w_hh must be Float, got Double"),
    (lambda: lstm_recurrence(ok(4, 2, 1, 8, dtype=torch.int32), ok(1, 8, 2)), TypeError, "gates_x must be float64, float32, float16 or bfloat16, got Int"),
    (lambda: lstm_recurrence(ok(4, 2, 1, 8), ok(1, 8, 2), ok(1, 3, 2)), ValueError, r"h0 must have shape \[1, 2, 2\]"),
    (lambda: lstm_recurrence(ok(4, 2, 1, 8), ok(1, 8, 2), None, ok(1, 2, 2, dtype=torch.float16)), TypeError, "c0 must be Float, got Half"),
    (lambda: lstm_recurrence(ok(4, 2, 1, 8), ok(1, 8, 2), lengths=ok(3, dtype=torch.int64)), ValueError, r"lengths must have shape \[2\]"),
    (lambda: lstm_recurrence(ok(4, 2, 1, 8), ok(1, 8, 2), lengths=ok(2)), TypeError, "lengths must be Long, got Float"),
    (lambda: lstm_recurrence(ok(4, 2, 1, 8), ok(1, 8, 2), lengths=torch.tensor([5, 1])), ValueError, r"between 0 and T = 4, got lengths\[0\] = 5"),
    (lambda: backward_op(ok(1, 8, 2), None, None, ok(0), ok(0), None, None, None, False), ValueError, 'those of a forward call with save="all"'),
    (lambda: backward_op(ok(1, 0, 0), None, None, ok(4, 2, 1, 0), ok(4, 2, 1, 0), None, None, None, False), ValueError, 'those of a forward call with save="all"'),
    (lambda: forward_op(ok(4, 2, 1, 8), ok(1, 8, 2, device="meta"), None, None, None, "none"), ValueError, "all tensors must be on one device"),
    (lambda: backward_op(ok(1, 8, 2), None, None, ok(4, 2, 1, 8), ok(4, 2, 1, 3), None, None, None, False), ValueError, "cells must have shape"),
    (lambda: backward_op(ok(1, 8, 2), None, None, ok(4, 2, 1, 8), ok(4, 2, 1, 2), ok(4, 2, 1, 1), None, None, False), ValueError, "dy must have shape"),
    (lambda: gru_op(ok(4, 2, 1, 8), ok(1, 6, 2), None, None, None, "none"), ValueError, r"gates_x must have shape \(T, B, D, 3H\), got \[4, 2, 1, 8\]"),
    (lambda: gru_op(ok(4, 2, 1, 6), ok(1, 8, 2), None, None, None, "none"), ValueError, r"w_hh must have shape \[1, 6, 2\], got \[1, 8, 2\]"),
    (lambda: gru_op(ok(4, 2, 1, 6), ok(1, 6, 2), ok(1, 8), None, None, "none"), ValueError, r"bias_hh must have shape \[1, 6\], got \[1, 8\]"),
    (lambda: gru_op(ok(4, 2, 1, 6), ok(1, 6, 2), None, ok(1, 3, 2), None, "none"), ValueError, r"h0 must have shape \[1, 2, 2\]"),
    (lambda: gru_backward_op(ok(1, 6, 2), None, None, ok(4, 2, 1, 2), ok(0), None, None, False), ValueError, 'gru_recurrence_backward: gates must be those of a forward call with save="all"'),
    (lambda: gru_backward_op(ok(1, 6, 2), None, None, ok(4, 2, 1, 3), ok(4, 2, 1, 8), None, None, False), ValueError, r"y must have shape \[4, 2, 1, 2\]"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS, ids=[message for _, _, message in ERRORS])
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
