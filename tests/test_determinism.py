"""Results have the same bits each time: over runs, numbers of threads, processes, and compiled or not.

All tests run with torch.use_deterministic_algorithms(True), under which PyTorch also fills fresh memory with NaN.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from cells import every_cell
from torch import Tensor

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it for that

RUNS = 50

# The arguments of a module, and of its forward.
CONFIGURATIONS = {
    "plain": ({}, {}),
    "lengths": ({}, {"lengths": [5, 0, 2, 5, 1]}),
    "last": ({}, {"output": "last"}),
    "last with lengths": ({}, {"output": "last", "lengths": [5, 0, 2, 5, 1]}),
    "recompute": ({"recompute": True}, {}),
    "two layers, no bias": ({"num_layers": 2, "bias": False}, {}),
}
configurations = pytest.mark.parametrize("configuration", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def a_module(cell, configuration, dtype, device, sizes=(5, 5, 6, 20)) -> Callable[..., list[Tensor]]:
    """Returns a function that runs a module of a cell and returns outputs, states and all gradients."""
    (options, arguments), (steps, batch, features, hidden) = configuration, sizes
    rnn = cell.module(features, hidden, bidirectional=True, dtype=dtype, device=device, **options)
    x = torch.randn(steps, batch, features).to(device, dtype).requires_grad_()
    rows = 2 * rnn.num_layers
    first = [torch.randn(rows, batch, hidden).to(device, dtype).requires_grad_() for _ in range(cell.states)]
    if "lengths" in arguments:
        lengths = torch.tensor(arguments["lengths"]).repeat(batch)[:batch]
        arguments = {**arguments, "lengths": lengths.clamp(max=steps).to(device)}

    def run(module: Callable[..., tuple] = rnn) -> list[Tensor]:
        outputs = flat(module(x, cell.hx(first), **arguments))
        inputs = [x, *first, *rnn.parameters()]
        return [*outputs, *torch.autograd.grad(outputs, inputs, [o.detach().cos() for o in outputs])]

    return run


def flat(results: tuple) -> list[Tensor]:
    """Returns output and final states, of which there are none, one or two."""
    y, states = results
    return [y, *([states] if isinstance(states, Tensor) else states or ())]


def assert_same_bits(results: list[Tensor], expected: list[Tensor]) -> None:
    for k, (a, b) in enumerate(zip(results, expected, strict=True)):
        assert torch.equal(a, b), f"result {k} of shape {tuple(b.shape)} differs by up to {(a - b).abs().max():.2e}"
        assert b.isfinite().all()


@configurations
@dtypes
@every_cell
def test_50_runs(cell, configuration, dtype, device):
    run = a_module(cell, configuration, dtype, device, (3, 5, 4, 12) if device == "cuda" else (5, 5, 6, 20))
    first = run()
    junk = []
    for k in range(RUNS - 1):
        junk = [torch.full((k + 1, 1000), float(k)) for _ in range(3)]  # changes which memory the module gets
        assert_same_bits(run(), first)
    assert len(junk) == 3


@pytest.mark.parametrize("sizes", [(6, 1, 4, 33), (5, 70, 3, 17), (40, 61, 5, 40)], ids=str)
@configurations
@every_cell
def test_any_number_of_threads(cell, configuration, sizes):
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        run = a_module(cell, configuration, dtype, "cpu", sizes)
        before = torch.get_num_threads()
        results = []
        try:
            for threads in (1, 2, 3, 4, 8, 1):
                torch.set_num_threads(threads)
                results.append(run())
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert_same_bits(other, results[0])


@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "full"])
@dtypes
@every_cell
def test_recurrence_on_any_number_of_threads(cell, dtype, ragged):
    steps, batch, rows, hidden = 6, 45, cell.gates * 24, 24
    gates_x = torch.randn(steps, batch, 2, rows).to(dtype).requires_grad_()
    shapes = {"h0": (2, batch, hidden), "c0": (2, batch, hidden), "bias_hh": (2, rows)}
    others = [torch.randn(shapes[name]).to(dtype).requires_grad_() for name in cell.inputs]
    w_hh = (torch.randn(2, rows, hidden) / 5).to(dtype)
    lengths = torch.arange(batch) % (steps + 1) if ragged else None
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 4, 8, 1):
            torch.set_num_threads(threads)
            outputs = cell.function("recurrence")(gates_x, w_hh, *others, lengths)
            grads = torch.autograd.grad(outputs, [gates_x, *others], [o.detach().cos() for o in outputs])
            results.append([*outputs, *grads])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_cell
def test_inference_gives_the_bits_of_training(cell, dtype, device):
    for configuration in CONFIGURATIONS.values():
        run = a_module(cell, configuration, dtype, device)
        outputs: list[list[Tensor]] = []

        def keep(module, arguments, options, result, outputs=outputs):
            outputs.append([t.detach().clone() for t in flat(result)])

        rnn = run.__defaults__[0]
        hook = rnn.register_forward_hook(keep, with_kwargs=True)
        run()
        with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
            run()
        hook.remove()
        assert_same_bits(outputs[1], outputs[0])


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("aot_eager", torch.float32),
        ("aot_eager", torch.bfloat16),
        pytest.param("inductor", torch.float32, marks=pytest.mark.slow),
        pytest.param("inductor", torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["plain", "last with lengths"])
@every_cell
def test_compiled(cell, name, dtype, backend):
    run = a_module(cell, CONFIGURATIONS[name], dtype, "cpu")
    torch._dynamo.reset()
    compiled = torch.compile(run.__defaults__[0], backend=backend, fullgraph=True)
    assert_same_bits(run(compiled), run())


@pytest.mark.slow
@every_cell
def test_processes(cell):
    """Each process has its own addresses, and its own order of imports and allocations."""
    code = f"""
import hashlib, sys, torch
waste = torch.empty(int(sys.argv[1]))
import birnn_ext
torch.manual_seed(1)
torch.use_deterministic_algorithms(True)
rnn = birnn_ext.{cell.module.__name__}(9, 33, 2, bidirectional=True)
x = torch.randn(30, 20, 9, requires_grad=True)
y, _ = rnn(x)
grads = torch.autograd.grad(y.sum(), [x, *rnn.parameters()])
print(hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in [y, *grads])).hexdigest())
"""
    runs = [
        subprocess.run([sys.executable, "-c", code, str(size)], capture_output=True, text=True, check=True)
        for size in (1, 1000, 77777)
    ]
    assert len({run.stdout for run in runs}) == 1


@dtypes
@every_cell
def test_a_sequence_in_batches_of_any_size(cell, dtype):
    """The rows of a batch's last tile, of any number, get the bits that they get in a full one."""
    steps, features, hidden, most = 2, 19, 21, 54
    rnn = cell.module(features, hidden, bidirectional=True, dtype=dtype)
    x = torch.randn(steps, most, features).to(dtype)
    with torch.no_grad():
        expected, _ = rnn(x)
        for batch in range(most - 12, most):
            assert_same_bits([rnn(x[:, :batch])[0]], [expected[:, :batch]])
