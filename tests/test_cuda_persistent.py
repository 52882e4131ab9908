"""The right CUDA algorithm is chosen, and each gives the same results.

Calls through `forced` assert which algorithm ran, by the extension's own counts.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cells import GRU_CELL, LSTM_CELL, Cell, every_persistent_cell
from helpers import TOLERANCE, as_double, assert_near, error

import birnn_ext
from birnn_ext import _C

PERSISTENT = ["persistent-cta", "persistent-grid", "persistent-cluster"]
ALGORITHMS = ["stepwise", *PERSISTENT]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

forward_op = torch.ops.birnn_ext.lstm_recurrence.default
backward_op = torch.ops.birnn_ext.lstm_recurrence_backward.default

# ---- the choice: a function of numbers, so it needs no GPU -----------------------------------------------------------

# multiprocessors, bytes of shared memory that a block may have, compute capability
GPUS = {
    "T4": (40, 64 << 10, 75),
    "A100": (108, 163 << 10, 80),
    "A10": (72, 99 << 10, 86),
    "RTX 4090": (128, 99 << 10, 89),
    "L4": (58, 99 << 10, 89),
    "H100": (132, 227 << 10, 90),
    "B200": (148, 227 << 10, 100),
}


def choice(
    gpu: str, dtype: str, hidden: int, batch: int = 16, directions: int = 2, algorithm: str = "", cell: Cell = LSTM_CELL
):
    """Returns the extension's description of what would run the layer on that GPU, or None."""
    return _C.cuda_choice(dtype, hidden, batch, directions, *GPUS[gpu], algorithm, cell=cell.name)


@every_persistent_cell
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("gpu", GPUS)
def test_choice_fits_the_gpu(gpu, dtype, cell):
    multiprocessors, shared_memory, capability = GPUS[gpu]
    for hidden, batch, directions in itertools.product(
        [1, 16, 100, 128, 256, 512, 768, 1024, 2048], [1, 16, 500], [1, 2]
    ):
        for algorithm in ["", *ALGORITHMS]:
            found = choice(gpu, dtype, hidden, batch, directions, algorithm, cell)
            if found is None:
                assert algorithm in PERSISTENT
                continue
            name = found["algorithm"]
            assert name == algorithm or not algorithm
            if name == "stepwise":
                continue
            assert dtype != "float64" and capability >= 80
            for plan in (found["forward"], found["backward"]):
                assert plan["bytes"] <= shared_memory
                if name == "persistent-cta":
                    assert plan["ctas"] == 1
                elif name == "persistent-cluster":
                    assert capability >= 90 and plan["ctas"] <= 16
                else:  # a block fills a multiprocessor, and the groups of all directions must be resident together
                    assert plan["ctas"] * directions <= multiprocessors


@every_persistent_cell
@pytest.mark.parametrize(
    ("gpu", "algorithm", "dtype", "hidden"),
    [
        ("A100", "persistent-cta", "float32", 64),
        ("A100", "persistent-cta", "bfloat16", 128),
        ("A100", "persistent-grid", "float16", 864),
        ("A100", "persistent-grid", "float32", 640),
        ("H100", "persistent-cluster", "bfloat16", 768),
        ("H100", "persistent-cluster", "float32", 512),
        ("H100", "persistent-grid", "bfloat16", 1024),
        ("H100", "persistent-grid", "float32", 768),
        ("L4", "persistent-cta", "bfloat16", 128),
        ("RTX 4090", "persistent-grid", "bfloat16", 768),
    ],
)
def test_capacity(gpu, algorithm, dtype, hidden, cell):
    for smaller in {hidden, hidden - 1, hidden // 2, 1}:
        assert choice(gpu, dtype, smaller, algorithm=algorithm, cell=cell) is not None


@every_persistent_cell
def test_choice_by_kind_of_gpu(cell):
    def names(gpu: str, dtype: str, *hidden: int) -> list[str]:
        return [choice(gpu, dtype, h, cell=cell)["algorithm"] for h in hidden]

    assert names("T4", "float16", 64, 256) == ["stepwise", "stepwise"]
    assert names("A100", "float64", 64) == ["stepwise"]
    for gpu in ("A100", "A10", "RTX 4090", "L4"):
        assert names(gpu, "bfloat16", 32, 128) == ["persistent-cta", "persistent-cta"]
    for gpu in ("H100", "B200"):
        assert names(gpu, "bfloat16", 32, 192) == ["persistent-cta", "persistent-cluster"]
    assert names("A100", "bfloat16", 256, 768, 4096) == ["persistent-grid", "persistent-grid", "stepwise"]
    assert names("A100", "float32", 64, 640, 2048) == ["persistent-cta", "persistent-grid", "stepwise"]
    assert names("H100", "bfloat16", 256, 768, 1024) == ["persistent-cluster", "persistent-cluster", "persistent-grid"]
    assert names("B200", "bfloat16", 768) == ["persistent-cluster"]


STEPS = json.loads((Path(__file__).parents[1] / "benchmarks/results/steps_h100.json").read_text())


@pytest.mark.parametrize(
    "row", STEPS["rows"], ids=[f"{r['pass']}-{r['dtype']}-{r['H']}-{r['B']}" for r in STEPS["rows"]]
)
def test_the_choice_agrees_with_the_steps_that_were_measured(row):
    """For each size the choice is the fastest that was measured, or one that is as fast by the model, and the model is
    within 15 % of the measurements."""
    found = _C.cuda_choice(row["dtype"], row["H"], row["B"], 2, *STEPS["gpu"].values(), row["algorithm"])[row["pass"]]
    chosen = _C.cuda_choice(row["dtype"], row["H"], row["B"], 2, *STEPS["gpu"].values(), "")
    assert chosen["algorithm"] != "stepwise"
    assert chosen[row["pass"]]["ticks"] <= 1.15 * found["ticks"]
    if found["ctas"] == row["ctas"]:
        assert found["ticks"] / 1980 == pytest.approx(row["us"], rel=0.15)
    else:  # the choice has another number of blocks, which is faster by the model
        assert found["ticks"] / 1980 <= 1.15 * row["us"]


def test_choice_where_the_device_refuses_large_clusters():
    """A device may refuse clusters of more than 8. Then the choice is a smaller cluster, or another algorithm."""

    def refused(hidden: int, algorithm: str = ""):
        return _C.cuda_choice("bfloat16", hidden, 16, 2, *GPUS["H100"], algorithm, largest_cluster=8)

    assert choice("H100", "bfloat16", 768)["forward"]["ctas"] == 16
    assert refused(768, "persistent-cluster") is None
    assert refused(768)["algorithm"] == "persistent-grid"
    assert refused(256)["algorithm"] == "persistent-cluster"
    assert max(refused(256)[name]["ctas"] for name in ("forward", "backward")) <= 8


def test_the_choice_is_never_clearly_slower_than_another_plan(tmp_path):
    """Fewer blocks are preferred only to plans that the model can't tell from the fastest, not step by step to more."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    program = tmp_path / "choice"
    source = ROOT / "tests/native/choice_test.cc"
    subprocess.run([compiler, "-std=c++17", "-O1", f"-I{ROOT / 'csrc'}", source, "-o", program], check=True)
    gpus = [",".join(map(str, numbers)) for numbers in GPUS.values()]
    done = subprocess.run([program, *gpus], capture_output=True, text=True, check=True)
    assert done.stdout == ""


@every_persistent_cell
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("hidden", [100, 200, 300, 400, 600, 650, 1000])
def test_sizes_that_fill_no_kernel_cost_little(hidden, dtype, cell):
    """The model's time of a step is compared with that of the next multiple of 64."""
    found, filled = (choice("H100", dtype, h, batch=16, cell=cell) for h in (hidden, (hidden + 63) // 64 * 64))
    assert found["us"] <= 1.15 * filled["us"]


@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu"])
def test_stepwise_alone_runs_a_plain_rnn(cell):
    layer = ("bfloat16", 128, 16, 2, *GPUS["H100"])
    assert all(_C.cuda_choice(*layer, cell=of)["algorithm"] != "stepwise" for of in ("lstm", "gru"))
    assert _C.cuda_choice(*layer, cell=cell)["algorithm"] == "stepwise"
    assert _C.cuda_choice(*layer, "persistent-cluster", cell=cell) is None
    with pytest.raises(ValueError, match="cell must be lstm, gru, rnn_tanh or rnn_relu, got rnn"):
        _C.cuda_choice(*layer, cell="rnn")


@pytest.mark.parametrize(
    ("arguments", "algorithm", "message"),
    [
        (("bfloat16", 0, 1, 2), "", "H, B and multiprocessors must be positive"),
        (("bfloat16", 8, 1, 3), "", "D 1 or 2"),
        (("int8", 8, 1, 2), "", "dtype must be float64, float32, float16 or bfloat16, got int8"),
        (("bfloat16", 8, 1, 2), "quick", "unknown algorithm quick"),
    ],
)
def test_choice_of_nonsense(arguments, algorithm, message):
    with pytest.raises(ValueError, match=message):
        _C.cuda_choice(*arguments, *GPUS["A100"], algorithm)
    with pytest.raises(ValueError, match="cell must be lstm, gru, rnn_tanh or rnn_relu, got mlp"):
        _C.cuda_choice("bfloat16", 8, 1, 2, *GPUS["A100"], cell="mlp")


# ---- the kernels -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def forced(algorithm: str) -> Iterator[None]:
    """Allows only this algorithm, and asserts that it has run something."""
    before = birnn_ext.op_calls()
    saved = os.environ.get("BIRNN_CUDA_ALGO")
    os.environ["BIRNN_CUDA_ALGO"] = algorithm
    try:
        yield
    finally:
        if saved is None:
            del os.environ["BIRNN_CUDA_ALGO"]
        else:
            os.environ["BIRNN_CUDA_ALGO"] = saved
    after = birnn_ext.op_calls()
    ran = {name for name in ALGORITHMS if after[f"cuda_{name}"] > before[f"cuda_{name}"]}
    assert ran == {algorithm.strip()}


@pytest.fixture(params=PERSISTENT)
def algorithm(request: pytest.FixtureRequest) -> str:
    if request.param == "persistent-cluster" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("thread-block clusters need compute capability 9.0")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the persistent kernels need compute capability 8.0")
    return request.param


def largest(algorithm: str, dtype: torch.dtype, hidden: int) -> int:
    """Returns the largest hidden_size up to `hidden` that the algorithm runs on every GPU that has it."""
    if algorithm != "persistent-cta":
        return hidden
    return min(hidden, 64 if dtype == torch.float32 else 128)


def arguments(cell: Cell, tensor: Callable[..., torch.Tensor], given: Iterable[bool], *sizes: int):
    """Returns arguments of a forward call without lengths. `given` tells of each of the cell's inputs whether it is."""
    steps, batch, directions, hidden = sizes
    rows = cell.gates * hidden
    w_hh = tensor(directions, rows, hidden) / hidden**0.5
    shapes = [(directions, rows) if name == "bias_hh" else (directions, batch, hidden) for name in cell.inputs]
    inputs = [tensor(*shape) if there else None for shape, there in zip(shapes, given, strict=True)]
    return tensor(steps, batch, directions, rows), w_hh, *inputs, None


def random_case(cell: Cell, rng: random.Random, dtype: torch.dtype, most: int, steps: int = 12, batch: int = 70):
    """Returns arguments of a forward call on CUDA, hidden_size 1 to `most`. Lengths contain zeros."""
    steps, batch, directions = rng.randint(1, steps), rng.randint(1, batch), rng.choice([1, 2])
    hidden = rng.choice([rng.randint(1, most), rng.randint(1, most) // 8 * 8 or 8])

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64).to("cuda", dtype)

    given = [rng.random() < 0.5 for _ in cell.inputs]
    lengths = torch.tensor([rng.randint(0, steps) for _ in range(batch)], device="cuda") if rng.random() < 0.5 else None
    return *arguments(cell, tensor, given, steps, batch, directions, hidden)[:-1], lengths


def on_cuda(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    return lambda *shape: torch.randn(shape).to("cuda", dtype)


def run_both(cell: Cell, algorithm: str, args, incoming: int):
    """Returns the results of forward and backward. The bits of `incoming` say which gradients come in."""
    with forced(algorithm):
        results = cell.forward(*args, "all")
        generator = torch.Generator().manual_seed(1)
        dy, *d_states = (torch.randn(t.shape, generator=generator).to(t) for t in cell.outputs(results))
        if incoming % 4 == 1:
            dy = None
        if incoming % 4 == 3:
            d_states = [None] * len(d_states)
        backward_args = cell.backward_args(args, results, (dy, *d_states), incoming % 5 != 4)
        return results, backward_args, cell.backward(*backward_args)


def truth(cell: Cell, args, backward_args) -> list[torch.Tensor]:
    """Returns all results in float64."""
    return [*cell.reference(as_double(args)), *cell.reference_backward(as_double(backward_args))]


def names(cell: Cell) -> tuple[str, ...]:
    return cell.results + cell.gradients


def deviations(cell: Cell, algorithm: str, args, incoming: int) -> list[tuple[float, float]]:
    """Returns each result's largest and mean square difference from float64 truth, relative to the largest value."""
    results, backward_args, grads = run_both(cell, algorithm, args, incoming)

    def mean_square(a: torch.Tensor, e: torch.Tensor) -> float:
        return float(((a.double() - e) / e.abs().max().clamp(min=1e-30)).square().mean()) if e.numel() else 0.0

    expected = truth(cell, args, backward_args)
    return [(error(a, e), mean_square(a, e)) for a, e in zip((*results, *grads), expected, strict=True)]


def errors(cell: Cell, algorithm: str, args, incoming: int) -> dict[str, float]:
    found = deviations(cell, algorithm, args, incoming)
    return dict(zip(names(cell), [largest for largest, _ in found], strict=True))


def compare(cell: Cell, algorithm: str, dtype: torch.dtype, seed: int, cases: int, most: int, **sizes: int) -> None:
    """Compares random cases with float64. Over all cases no output's root mean square error may exceed 1.5 times that
    of stepwise. (The largest error would depend on chance.)"""
    sums, sums_stepwise = [0.0] * len(names(cell)), [0.0] * len(names(cell))
    for case in range(cases):
        args = random_case(cell, random.Random(1000 * seed + case), dtype, most, **sizes)
        found = deviations(cell, algorithm, args, case)
        largest = [e for e, _ in found]
        assert all(e <= TOLERANCE[dtype] for e in largest), (case, dict(zip(names(cell), largest, strict=True)))
        sums = [total + square for total, (_, square) in zip(sums, found, strict=True)]
        found = deviations(cell, "stepwise", args, case)
        sums_stepwise = [total + square for total, (_, square) in zip(sums_stepwise, found, strict=True)]
    for name, mine, theirs in zip(names(cell), sums, sums_stepwise, strict=True):
        ratio = (mine / max(theirs, 1e-30)) ** 0.5
        assert ratio <= 1.5, f"{name}: {ratio:.2f} times stepwise's error"


@pytest.mark.cuda
@every_persistent_cell
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_reference(algorithm, dtype, cell):
    compare(cell, algorithm, dtype, 0, cases=10, most=largest(algorithm, dtype, 160), steps=6, batch=40)


@pytest.mark.cuda
@pytest.mark.slow
@every_persistent_cell
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_reference_at_length(algorithm, dtype, seed, cell):
    compare(cell, algorithm, dtype, seed, cases=12, most=largest(algorithm, dtype, 300))


@pytest.mark.cuda
@every_persistent_cell
@pytest.mark.parametrize("hidden", [1, 37, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_step_or_one_sequence(algorithm, dtype, hidden, cell):
    for steps, batch in ((1, 3), (4, 1), (1, 1)):
        args = arguments(cell, on_cuda(dtype), [True] * len(cell.inputs), steps, batch, 2, hidden)
        found = errors(cell, algorithm, args, 0)
        assert all(e <= TOLERANCE[dtype] for e in found.values()), (steps, batch, found)


@pytest.mark.cuda
@every_persistent_cell
@pytest.mark.parametrize(("algorithm", "dtype", "hidden"), [
    ("persistent-cta", torch.float32, 64),
    ("persistent-cta", torch.bfloat16, 128),
    ("persistent-grid", torch.bfloat16, 400),
    ("persistent-cluster", torch.bfloat16, 768),
    ("persistent-cluster", torch.float32, 256),
], indirect=["algorithm"])  # fmt: skip
def test_large_layers(algorithm, dtype, hidden, cell):
    """The registers do not hold all weights, and warps split the sums."""
    args = arguments(cell, on_cuda(dtype), [True] * len(cell.inputs), 3, 5, 2, hidden)
    found = errors(cell, algorithm, args, 0)
    assert all(e <= TOLERANCE[dtype] for e in found.values()), found


@pytest.mark.cuda
@every_persistent_cell
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saved_state_serves_every_algorithm(algorithm, dtype, cell):
    """One algorithm runs the forward pass, and another the backward pass."""
    args = random_case(cell, random.Random(5), dtype, largest(algorithm, dtype, 90), steps=5, batch=20)
    _, backward_args, grads = run_both(cell, algorithm, args, 0)
    _, other_args, other_grads = run_both(cell, "stepwise", args, 0)
    with forced("stepwise"):
        mixed = cell.backward(*backward_args)
    with forced(algorithm):
        mixed_back = cell.backward(*other_args)
    for a, b, c, d in zip(grads, other_grads, mixed, mixed_back, strict=True):
        for other in (b, c, d):
            assert_near(a, other)


@pytest.mark.cuda
@every_persistent_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_repeatable(algorithm, dtype, cell):
    """This holds within a process, and for all that share the folder BIRNN_BITS. CI varies their schedules."""
    args = random_case(cell, random.Random(3), dtype, largest(algorithm, dtype, 100), steps=5, batch=40)
    digests = []
    for _ in range(2):
        results, _, grads = run_both(cell, algorithm, args, 0)
        bits = b"".join(t.cpu().view(torch.uint8).numpy().tobytes() for t in (*results, *grads))
        digests.append(hashlib.sha256(bits).hexdigest())
    if "BIRNN_BITS" in os.environ:
        capability = "{}.{}".format(*torch.cuda.get_device_capability())
        known = Path(os.environ["BIRNN_BITS"], f"{cell.name}, {algorithm}, {dtype}, {capability}")
        if not known.exists():
            known.write_text(digests[0])
        digests.append(known.read_text())
    assert len(set(digests)) == 1


@pytest.mark.cuda
@every_persistent_cell
def test_without_saving(algorithm, cell):
    args = random_case(cell, random.Random(4), torch.float32, 100, steps=5, batch=20)
    with forced(algorithm):
        saved, not_saved = cell.forward(*args, "all"), cell.forward(*args, "none")
    assert all(torch.equal(a, b) for a, b in zip(cell.outputs(saved), cell.outputs(not_saved), strict=True))
    assert all(kept.numel() == 0 for kept in cell.kept(not_saved))


@pytest.mark.cuda
@every_persistent_cell
def test_misaligned_and_strided_arguments(algorithm, cell):
    """The kernels must not use accesses of 16 bytes for views that begin 4 bytes into their storage."""
    args = arguments(cell, on_cuda(torch.float32), [True] * len(cell.inputs), 3, 2, 2, 16)

    def shifted(t):
        if not isinstance(t, torch.Tensor) or not t.numel():
            return t
        view = torch.empty(t.numel() + 1, device="cuda")[1:].view(t.shape).copy_(t)
        assert view.data_ptr() % 16 == 4
        return view

    with forced(algorithm):
        plain = cell.forward(*args, "all")
        moved = cell.forward(*map(shifted, args), "all")
        assert all(torch.equal(a, b) for a, b in zip(plain, moved, strict=True))
        backward_args = cell.backward_args(args, plain, cell.outputs(plain))
        grads = cell.backward(*backward_args)
        moved = cell.backward(*map(shifted, backward_args))
        assert all(torch.equal(a, b) for a, b in zip(grads, moved, strict=True))


def legacy_switch() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def matmul_precision() -> None:
    torch.set_float32_matmul_precision("high")


def newer_switch() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def newer_switch_for_all() -> None:
    torch.backends.fp32_precision = "tf32"


def newer_switch_for_all_but_products() -> None:
    torch.backends.fp32_precision = "tf32"
    torch.backends.cuda.matmul.fp32_precision = "ieee"


@pytest.fixture
def precision_of_torch() -> Iterator[None]:
    saved = torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision = saved


@pytest.mark.cuda
@every_persistent_cell
@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this torch has no fp32_precision")
@pytest.mark.parametrize(
    ("switch", "exact"),
    [
        (lambda: None, True),
        (legacy_switch, False),
        (matmul_precision, False),
        (newer_switch, False),
        (newer_switch_for_all, False),
        (newer_switch_for_all_but_products, True),
    ],
)
def test_tf32_only_where_pytorch_allows_it(algorithm, switch, exact, precision_of_torch, cell):
    args = arguments(cell, on_cuda(torch.float32), [True] * len(cell.inputs), 2, 16, 1, 64)
    switch()
    found = max(errors(cell, algorithm, args, 0).values())
    assert found < 1e-5 if exact else 2e-5 < found < 5e-3


@pytest.mark.cuda
@every_persistent_cell
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_and_undefined_weights(algorithm, dtype, cell):
    """An infinite weight saturates its gate (in float32 it makes NaN), and a NaN stays in the units that it reaches."""
    args = arguments(cell, on_cuda(dtype), [True] * len(cell.inputs), 1, 3, 1, 20)
    w_hh = args[1]
    w_hh[0, 7, 2], w_hh[0, 30, 3], w_hh[0, 41, 19] = float("inf"), -float("inf"), float("nan")
    with forced(algorithm):
        results = cell.forward(*args, "all")
    for a, e in zip(results, cell.reference(as_double(args)), strict=True):
        if not e.numel():
            continue
        if dtype == torch.float32:
            e = e.where(~a.isnan(), float("nan"))
            assert a.isnan().double().mean() < 0.3
        tolerance = 10 * TOLERANCE[dtype]
        torch.testing.assert_close(a.double(), e, equal_nan=True, rtol=tolerance, atol=tolerance, check_dtype=False)


@pytest.mark.cuda
@every_persistent_cell
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_infinite_states(algorithm, dtype, cell):
    """Padding beyond H (20 is no multiple of 16) has weights of 0, and infinity times 0 must not reach other units."""
    args = arguments(cell, on_cuda(dtype), [name == "h0" for name in cell.inputs], 3, 3, 1, 20)
    args[2 + cell.inputs.index("h0")][0, 1, 4] = float("inf")
    if cell is GRU_CELL:  # r and z become 1, so that the sequence keeps its state, infinity in unit 4 included
        args[1][0, :40, 4] = args[1][0, :40, 4].abs() + 0.1
    with forced(algorithm):
        results = cell.forward(*args, "all")
    expected = cell.reference(as_double(args))
    assert expected[0][..., :4].isfinite().all()
    for a, e in zip(results, expected, strict=True):
        assert e.isfinite().all() or cell is GRU_CELL
        torch.testing.assert_close(a.double(), e, rtol=0.1, atol=0.1, check_dtype=False)

    args = arguments(cell, on_cuda(dtype), [False] * len(cell.inputs), 3, 3, 1, 20)
    with forced(algorithm):
        results = cell.forward(*args, "all")
    dy, *d_states = (torch.zeros_like(t) for t in cell.outputs(results))
    dy[2, 1, 0, 4] = float("inf")
    backward_args = cell.backward_args(args, results, (dy, *d_states))
    with forced(algorithm):
        grads = cell.backward(*backward_args)
    for a, e in zip(grads, cell.reference_backward(as_double(backward_args)), strict=True):
        assert torch.equal(a.isfinite(), e.isfinite())
    assert not grads[0][0, 1].isfinite().any(), "an infinite gradient must be seen by a GradScaler"


def nan_of(bits: int) -> torch.Tensor:
    return torch.tensor([bits - (1 << 32) if bits >> 31 else bits], dtype=torch.int32).view(torch.float32).cuda()


NANS = pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000], ids=hex)


def put(t: torch.Tensor, bits: int) -> None:
    """Puts a NaN of these bits into both directions of an argument (T, B, D, ...) or (D, ...)."""
    for d in range(2):
        (t[0, 0, d] if t.dim() == 4 else t[d].view(-1))[13] = nan_of(bits)


@pytest.mark.cuda
@every_persistent_cell
@NANS
@pytest.mark.parametrize("where", ["gates_x", "w_hh", "the first input", "the last input"])
def test_a_nan_stays_one_whatever_its_bits(algorithm, where, bits, cell):
    """GPUs make 0x7fffffff. Rounding it to TF32 by an integer addition would leave only a sign."""
    args = arguments(cell, on_cuda(torch.float32), [True] * len(cell.inputs), 4, 3, 2, 20)
    put(args[("gates_x", "w_hh", "the first input", "the last input").index(where)], bits)
    # the reverse direction of the first sequence holds its state at first
    call = (*args[:-1], torch.tensor([2, 4, 3], device="cuda"))
    with forced(algorithm):
        results = cell.forward(*call, "all")
    for a, e in zip(results, cell.reference(as_double(call)), strict=True):
        assert torch.equal(a.isnan(), e.isnan()) and (e.isnan().any() or not e.numel())


@pytest.mark.cuda
@every_persistent_cell
@NANS
@pytest.mark.parametrize("where", ["w_hh", "dy", "the first state", "the last state"])
def test_a_nan_stays_one_in_gradients(algorithm, where, bits, cell):
    args = arguments(cell, on_cuda(torch.float32), [True] * len(cell.inputs), 4, 3, 2, 20)
    results = cell.forward(*args, "all")
    incoming = [torch.randn_like(t) for t in cell.outputs(results)]
    put(
        {"w_hh": args[1], "dy": incoming[0], "the first state": incoming[1], "the last state": incoming[-1]}[where],
        bits,
    )
    call = cell.backward_args(args, results, incoming)
    with forced(algorithm):
        grads = cell.backward(*call)
    for a, e in zip(grads, cell.reference_backward(as_double(call)), strict=True):
        assert e.isnan().any() and torch.equal(a.isnan(), e.isnan())


@pytest.mark.cuda
@every_persistent_cell
def test_threads_with_layers_of_their_own(algorithm, cell):
    """Each thread plans a new layer, while others run theirs with the same kernels."""
    cases = [random_case(cell, random.Random(20 + k), torch.float32, 30 * k + 8, steps=3, batch=20) for k in range(4)]
    cases = [case for case in cases if case[1].shape[-1] <= largest(algorithm, torch.float32, 98)]
    expected = [run_both(cell, algorithm, args, 0) for args in cases]
    turns = [*reversed(range(len(cases)))] * 2

    def run(k: int):
        results = cell.forward(*cases[k], "all")
        return *results, *cell.backward(*expected[k][1])

    with forced(f"{algorithm} "), ThreadPoolExecutor(4) as pool:  # the text is part of a plan's key
        found = list(pool.map(run, turns))
    for k, tensors in zip(turns, found, strict=True):
        results, _, grads = expected[k]
        assert all(torch.equal(a, e) for a, e in zip(tensors, (*results, *grads), strict=True))


@pytest.mark.cuda
@every_persistent_cell
def test_graph_capture(algorithm, cell):
    """A capture also fails if a launch uses another stream than the current one."""
    args = (*random_case(cell, random.Random(11), torch.float32, 60, steps=4, batch=20)[:-1], None)
    eager, backward_args, grads = run_both(cell, algorithm, args, 0)
    with forced(algorithm):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = cell.forward(*args, "all")
            captured_grads = cell.backward(*backward_args)
        for t in (*captured, *captured_grads):
            t.zero_()
        for _ in range(2):  # the counters of the CTAs' exchange must start from 0 again
            graph.replay()
    for a, b in zip((*captured, *captured_grads), (*eager, *grads), strict=True):
        assert torch.equal(a, b)


@pytest.mark.cuda
@every_persistent_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_classifier_trains(algorithm, dtype, cell):
    """Five steps of the tutorial's training on CUDA follow those on the CPU."""
    losses = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(2)
        model = birnn_ext.BiRNN(28, largest(algorithm, dtype, 128), 2, 10, cell=cell.name).to(device, dtype)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
        generator = torch.Generator().manual_seed(3)
        losses[device] = []
        for _ in range(5):
            x = torch.rand(20, 28, 28, generator=generator).to(device, dtype)
            target = torch.randint(10, (20,), generator=generator).to(device)
            with forced(algorithm) if device == "cuda" else contextlib.nullcontext():
                loss = torch.nn.functional.cross_entropy(model(x).float(), target)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            losses[device].append(loss.item())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-3
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0, abs=tolerance)


@pytest.mark.cuda
def test_wrong_wishes_fail_loudly(monkeypatch):
    gates_x, w_hh = torch.randn(2, 2, 1, 8, device="cuda"), torch.randn(1, 8, 2, device="cuda")
    monkeypatch.setenv("BIRNN_CUDA_ALGO", "quick")
    with pytest.raises(ValueError, match=r"BIRNN_CUDA_ALGO must name some of stepwise, persistent-cta.* got 'quick'"):
        forward_op(gates_x, w_hh, None, None, None, "none")
    monkeypatch.setenv("BIRNN_CUDA_ALGO", "persistent-grid")
    with pytest.raises(RuntimeError, match="BIRNN_CUDA_ALGO=persistent-grid can't run this layer: lstm, hidden_size 2"):
        forward_op(gates_x.double(), w_hh.double(), None, None, None, "none")
    monkeypatch.setenv("BIRNN_CUDA_ALGO", "persistent-cta")
    with pytest.raises(RuntimeError, match="can't run this layer: lstm, hidden_size 200"):
        forward_op(
            torch.zeros(2, 2, 1, 800, device="cuda"), torch.zeros(1, 800, 200, device="cuda"), None, None, None, "none"
        )
    with pytest.raises(RuntimeError, match="BIRNN_CUDA_ALGO=persistent-cta,stepwise falls back to it"):
        forward_op(gates_x.double(), w_hh.double(), None, None, None, "none")
    with pytest.raises(RuntimeError, match="can't run this layer: gru, hidden_size 200"):
        GRU_CELL.forward(
            torch.zeros(2, 2, 1, 600, device="cuda"), torch.zeros(1, 600, 200, device="cuda"), None, None, None, "none"
        )
    monkeypatch.setenv("BIRNN_CUDA_ALGO", " persistent-cta, stepwise,")
    before = birnn_ext.op_calls()["cuda_stepwise"]
    forward_op(gates_x.double(), w_hh.double(), None, None, None, "none")
    assert birnn_ext.op_calls()["cuda_stepwise"] == before + 1


# ---- tests of the tests ----------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]


emulated_only = pytest.mark.skipif(not os.environ.get("CUDA_EMULATOR"), reason="CUDA_EMULATOR names no emulator")
built_for_cuda = pytest.mark.skipif(birnn_ext.build_info()["cuda"] is None, reason="birnn_ext is built without CUDA")


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Returns a function that builds the kernels as a program, with PTX for one compute capability, each kind once."""

    @functools.cache
    def build(ptx: int, *flags: str) -> Path:
        nvcc = shutil.which("nvcc")
        assert nvcc, "CUDA_EMULATOR is set, but there is no nvcc on the PATH"
        sources = [ROOT / "tests/native/persistent_test.cu", *sorted((ROOT / "csrc/cuda/persistent").glob("*.cu"))]
        program = tmp_path_factory.mktemp("native") / "program"
        target = ["-gencode", f"arch=compute_{ptx},code=compute_{ptx}"]
        options = ["-std=c++17", "-O1", "-cudart", "shared", f"-I{ROOT / 'csrc'}"]
        subprocess.run([nvcc, *options, *target, *flags, *sources, "-o", program], check=True)
        return program

    return build


def emulated(capability: int, seed: int, *command: str | Path) -> subprocess.CompletedProcess[str]:
    options = ["--cc", str(capability), "--seed", str(seed), "--check", "race,uninit"]
    return subprocess.run([os.environ["CUDA_EMULATOR"], *options, "--", *command], capture_output=True, text=True)


@pytest.mark.slow
@emulated_only
@built_for_cuda
def test_a_missing_barrier_would_be_seen(native):
    """A race detector accepts the kernels, and reports a race if the barrier between steps is left out."""
    right, wrong = native(80), native(80, "-DBIRNN_WITHOUT_BARRIER")
    for seed in range(1, 4):
        for cell in ([], ["gru"]):
            done = emulated(80, seed, right, "steps", *cell)
            assert done.returncode == 0, done.stdout + done.stderr
            done = emulated(80, seed, wrong, "steps", *cell)
            assert done.returncode != 0 and "race" in done.stderr, done.stdout + done.stderr


@pytest.mark.slow
@emulated_only
@built_for_cuda
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_of_the_tables(native, capability):
    """They agree with the equations in double precision, with sizes that fill a kernel and sizes that do not."""
    program = native(capability)
    for seed in (1, 2) if capability == 90 else (3,):
        done = emulated(capability, seed, program, "rows")
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("cell 0") >= (40 if capability == 80 else 130)
        assert done.stdout.count("cell 1") >= (20 if capability == 80 else 60)


@pytest.mark.slow
@emulated_only
@built_for_cuda
def test_passes_give_the_same_as_all_groups_at_once(native):
    """If not all of grid's groups are resident, they go through the batch in passes, with the same buffers for h."""
    program = native(80)
    for seed in range(1, 4):
        done = emulated(80, seed, program, "passes")
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("the same") == 96  # T 1 to 4, an LSTM's three and a GRU's one row of three dtypes, two
        # ways to make passes


@pytest.mark.slow
@emulated_only
@built_for_cuda
@pytest.mark.parametrize(("ptx", "capability", "cta", "cluster"), [
    (75, 80, False, False), (80, 80, True, False), (80, 90, True, False), (90, 90, True, True),
])  # fmt: skip
def test_kernels_built_for_less_are_not_run(native, ptx, capability, cta, cluster):
    """A GPU also runs PTX for an older one, but kernels built for that lack what they need."""
    done = emulated(capability, 1, native(ptx), "resident")
    assert done.returncode == 0, done.stdout + done.stderr
    counts = dict(line.split() for line in done.stdout.splitlines())
    assert (int(counts["cta"]) > 0, int(counts["cluster"]) > 0) == (cta, cluster)


def cuobjdump(*options: str) -> str:
    """Runs cuobjdump (the CUDA toolkit's or Triton's) on the extension; returns what it prints."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        triton = pytest.importorskip("triton", reason="neither the CUDA toolkit's cuobjdump nor Triton's")
        tool = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    return subprocess.run([tool, *options, _C.__file__], check=True, capture_output=True, text=True).stdout


@built_for_cuda
def test_one_block_always_fits_a_multiprocessor():
    """Co-residency needs one block per multiprocessor. The compiler's figures show that it fits without spills."""
    usage = re.findall(
        r"Function \S*(forward|backward)_kernel\S*wardTraitsILNS0_8ExchangeE\dELNS_8CellKindE\dE((?:Li\d+E)+)\S*:\s+"
        r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)",
        cuobjdump("-res-usage"),
    )
    assert len(usage) >= 60  # three types, for each architecture
    for kind, sizes, registers, stack, shared, local in usage:
        warps = int(re.findall(r"\d+", sizes)[4 if kind == "forward" else 7])
        allotted = (int(registers) + 7) // 8 * 8  # the hardware allots registers in eights
        assert 32 * warps * allotted <= 65536
        assert int(stack) == int(local) == 0
        assert int(shared) <= 1024  # the rest is dynamic, and counted by the plan


@pytest.mark.slow
@built_for_cuda
def test_products_run_on_tensor_cores():
    checked = 0
    for binary in re.split(r"arch = sm_", cuobjdump("-sass"))[1:]:
        if int(re.match(r"\d+", binary).group()) < 80:  # the kernels only trap there
            continue
        for function in re.split(r"\n\s*Function : ", binary)[1:]:
            name = function.split("\n", 1)[0]
            if "wardTraits" in name:
                kind = "HMMA.1688.F32.TF32" if "kernelIf" in name else "HMMA.16816.F32"
                if "ExchangeE2E" in name and int(re.match(r"\d+", binary).group()) < 90:
                    continue  # a kernel with clusters only traps there
                assert kind in function, name
                checked += 1
    assert checked >= 6
