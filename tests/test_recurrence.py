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
from helpers import all_near, as_double, assert_near

import birnn_ext
from birnn_ext import reference
from birnn_ext.ops import lstm_recurrence

forward_op = torch.ops.birnn_ext.lstm_recurrence.default
backward_op = torch.ops.birnn_ext.lstm_recurrence_backward.default


def random_case(rng: random.Random, dtype: torch.dtype, device: str):
    """Returns arguments of a forward call with random sizes, state and lengths; unusual ones are likely."""
    steps, batch, directions = rng.choice([1, 2, 3, 5, 9]), rng.choice([1, 2, 5, 6, 7, 13, 19]), rng.choice([1, 2])
    hidden = rng.choice([1, 3, 4, 7, 8, 15, 16, 17, 24, 31, 33, 40, 48, 65])

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64).to(device, dtype)

    state = rng.random() < 0.5
    h0, c0 = (tensor(directions, batch, hidden), tensor(directions, batch, hidden)) if state else (None, None)
    lengths = torch.tensor([rng.randint(0, steps) for _ in range(batch)], device=device) if rng.random() < 0.5 else None
    w_hh = tensor(directions, 4 * hidden, hidden) / hidden**0.5
    return tensor(steps, batch, directions, 4 * hidden), w_hh, h0, c0, lengths


@pytest.mark.parametrize("case", range(24))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_operators_against_the_reference(dtype, case, device):
    """The truth, forward and backward, is the reference in float64. Odd cases leave out incoming gradients."""
    args = random_case(random.Random(case), dtype, device)
    results = forward_op(*args, "all")
    expected = reference.lstm_recurrence(*as_double(args), "all")
    for name, a, e in zip(("y", "h_n", "c_n", "gates", "cells"), results, expected, strict=True):
        assert_near(a, e, name, dtype)
    assert [r.dtype for r in results] == [dtype] * 4 + [torch.float64 if dtype == torch.float64 else torch.float32]
    without_saving = forward_op(*args, "none")
    assert all(torch.equal(a, b) for a, b in zip(without_saving[:3], results[:3], strict=True))
    assert without_saving[3].numel() == without_saving[4].numel() == 0
    *_, no_gates, cells = forward_op(*args, "cells")
    assert no_gates.numel() == 0 and torch.equal(cells, results[4])

    _, w_hh, _, c0, lengths = args
    y, h_n, c_n, gates, cells = results
    dy, dh_n, dc_n = (torch.randn_like(t) for t in (y, h_n, c_n))
    if case % 4 == 1:
        dy = None
    if case % 4 == 3:
        dh_n = dc_n = None
    backward_args = (w_hh, c0, lengths, gates, cells, dy, dh_n, dc_n, True)
    results = backward_op(*backward_args)
    for name, a, e in zip(
        ("d_gates_x", "dh0", "dc0"), results, reference.lstm_recurrence_backward(*as_double(backward_args)), strict=True
    ):
        assert_near(a, e, name, dtype)
        assert a.dtype == dtype
    d_gates_x, *empty = backward_op(*backward_args[:-1], False)
    assert torch.equal(d_gates_x, results[0])
    assert all(t.numel() == 0 for t in empty)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_operators_against_the_reference_at_length(seed, device):
    for case, dtype in itertools.product(range(10), [torch.float64, torch.float32]):
        test_operators_against_the_reference(dtype, 24 + 10 * seed + case, device)


def small_case(directions: int, ragged: bool, state: bool, device: str):
    steps, batch, hidden = 3, 3, 2

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)

    floating = [tensor(steps, batch, directions, 4 * hidden), tensor(directions, 4 * hidden, hidden)]
    if state:
        floating += [tensor(directions, batch, hidden), tensor(directions, batch, hidden)]
    return floating, torch.tensor([2, 3, 0], device=device) if ragged else None


@pytest.mark.parametrize("state", [True, False], ids=["state", "no_state"])
@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "full"])
@pytest.mark.parametrize("directions", [1, 2])
def test_gradcheck_first_and_second_order(directions, ragged, state, device):
    floating, lengths = small_case(directions, ragged, state, device)

    def run(gates_x, w_hh, h0=None, c0=None):
        return lstm_recurrence(gates_x, w_hh, h0, c0, lengths)

    # An emulated device is too slow to check every entry, so fast_mode checks random projections.
    assert torch.autograd.gradcheck(run, floating, fast_mode=device == "cuda")
    assert torch.autograd.gradgradcheck(run, floating, fast_mode=device == "cuda")


@pytest.mark.parametrize("save", ["all", "cells", "none"])
@pytest.mark.parametrize("state", [True, False], ids=["state", "no_state"])
@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "full"])
def test_opcheck(ragged, state, save, device):
    floating, lengths = small_case(2, ragged, state, device)
    args = (*floating, *[None] * (4 - len(floating)), lengths)
    detached = [a.detach() if a is not None else None for a in args]
    torch.library.opcheck(forward_op, (*(args if save == "all" else detached), save))
    if save == "all":
        y, h_n, _, gates, cells = forward_op(*detached, "all")
        backward_args = (
            args[1], args[3], lengths, gates.requires_grad_(), cells.requires_grad_(), torch.randn_like(y), None,
            torch.randn_like(h_n), state,
        )  # fmt: skip
        torch.library.opcheck(backward_op, backward_args)


def test_differentiating_what_was_not_saved_is_an_error():
    floating, _ = small_case(2, False, False, "cpu")
    y = forward_op(*floating, None, None, None, "none")[0]
    with pytest.raises(RuntimeError, match='called with save="none", so it can'):
        y.sum().backward()


def test_strided_arguments(device):
    args = random_case(random.Random(4), torch.float32, device)
    strided = [None if a is None else torch.stack([a, a], -1)[..., 0] if a.is_floating_point() else a for a in args]
    assert not strided[0].is_contiguous()
    all_near(forward_op(*strided, "all"), forward_op(*args, "all"))


def test_misaligned_arguments(device):
    """The kernels must not use 16-byte accesses for a view that begins 4 bytes into its storage."""
    gates_x, w_hh = torch.randn(3, 2, 2, 32, device=device), torch.randn(2, 32, 8, device=device)
    shifted = torch.empty(gates_x.numel() + 1, device=device)[1:].view(gates_x.shape).copy_(gates_x)
    assert shifted.data_ptr() % 16 == 4
    all_near(forward_op(shifted, w_hh, None, None, None, "all"), forward_op(gates_x, w_hh, None, None, None, "all"))


def test_saturated_and_special_values(device):
    gates_x = torch.tensor([0.0, 1e4, -1e4, float("inf"), -float("inf"), float("nan"), 88.8, -88.8], device=device)
    hidden = gates_x.numel()
    gates_x = gates_x.repeat(4).view(1, 1, 1, 4 * hidden).expand(3, 2, 1, -1)
    w_hh = torch.zeros(1, 4 * hidden, hidden, device=device)
    y, _, _, gates, cells = forward_op(gates_x, w_hh, None, None, None, "all")
    expected = reference.lstm_recurrence(gates_x[..., :].double(), w_hh.double(), None, None, None, "all")
    is_nan = torch.arange(hidden, device=device) == 5
    # In the first step the NaN stays in its own unit. After that it is everywhere, as 0 * NaN is NaN.
    assert y[0].isnan().equal(is_nan.expand_as(y[0]))
    torch.testing.assert_close(y[0].double(), expected[0][0], equal_nan=True, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gates[0].double(), expected[3][0], equal_nan=True, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cells[0].double(), expected[4][0], equal_nan=True, rtol=1e-5, atol=1e-6)


def test_repeatable_bitwise(device):
    args = random_case(random.Random(8), torch.float32, device)
    first = forward_op(*args, "all")
    assert all(torch.equal(a, b) for a, b in zip(first, forward_op(*args, "all"), strict=True))


@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "full"])
def test_bitwise_the_same_for_any_number_of_threads(ragged):
    gates_x, w_hh = torch.randn(9, 13, 2, 4 * 21), torch.randn(2, 4 * 21, 21) / 5
    lengths = torch.arange(13).remainder(10) if ragged else None
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5, 8):
            torch.set_num_threads(threads)
            y, h_n, c_n, gates, cells = forward_op(gates_x, w_hh, None, None, lengths, "all")
            results.append([y, *backward_op(w_hh, None, lengths, gates, cells, y, h_n, c_n, True)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc, which this system lacks")
def test_runs_on_as_many_threads_as_torch_is_told():
    code = """
import os, torch, birnn_ext
torch.set_num_threads(3)
before = len(os.listdir("/proc/self/task"))
gates_x, w_hh = torch.zeros(2, 40, 2, 256), torch.zeros(2, 256, 64)
torch.ops.birnn_ext.lstm_recurrence(gates_x, w_hh, None, None, None, "none")
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


def test_reference_serves_other_devices_and_says_so_once(reference_operators):
    """A dispatch key without a kernel (XLA's) reaches the reference. CPU tensors stand in for the device's."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.XLA)
    args = random_case(random.Random(2), torch.float32, "cpu")
    before = birnn_ext.op_calls()["reference_forward"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = forward_op.redispatch(keys, *args, "all")
        forward_op.redispatch(keys, *args, "all")
    assert len(caught) == 1
    assert "birnn_ext::lstm_recurrence has no compiled kernel for device 'cpu'" in str(caught[0].message)
    assert birnn_ext.op_calls()["reference_forward"] == before + 2
    all_near(results, forward_op(*args, "all"))
    y, h_n, c_n, gates, cells = results
    backward_args = (args[1], args[3], args[4], gates, cells, y, h_n, c_n, True)
    before = birnn_ext.op_calls()["reference_backward"]
    d = backward_op.redispatch(keys, *backward_args)
    assert birnn_ext.op_calls()["reference_backward"] == before + 1
    all_near(d, backward_op(*backward_args))


def ok(*shape: int, **kwargs) -> torch.Tensor:
    return torch.zeros(shape, **kwargs)


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
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS, ids=[message for _, _, message in ERRORS])
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
