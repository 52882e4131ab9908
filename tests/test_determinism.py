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
from torch import Tensor

from birnn_ext import LSTM
from birnn_ext.ops import lstm_recurrence

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it for that

RUNS = 50

# The arguments of LSTM, and of its forward.
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


def an_lstm(configuration, dtype, device, sizes=(5, 5, 6, 20)) -> Callable[..., list[Tensor]]:
    """Returns a function that runs an LSTM and returns outputs, states and all gradients."""
    (options, arguments), (steps, batch, features, hidden) = configuration, sizes
    lstm = LSTM(features, hidden, bidirectional=True, dtype=dtype, device=device, **options)
    x = torch.randn(steps, batch, features).to(device, dtype).requires_grad_()
    layers = 2 * lstm.num_layers
    hx = [torch.randn(layers, batch, hidden).to(device, dtype).requires_grad_() for _ in "hc"]
    if "lengths" in arguments:
        lengths = torch.tensor(arguments["lengths"]).repeat(batch)[:batch]
        arguments = {**arguments, "lengths": lengths.clamp(max=steps).to(device)}

    def run(module: Callable[..., tuple] = lstm) -> list[Tensor]:
        y, states = module(x, hx, **arguments)
        outputs = [y, *(states or ())]
        inputs = [x, *hx, *lstm.parameters()]
        return [*outputs, *torch.autograd.grad(outputs, inputs, [o.detach().cos() for o in outputs])]

    return run


def assert_same_bits(results: list[Tensor], expected: list[Tensor]) -> None:
    for k, (a, b) in enumerate(zip(results, expected, strict=True)):
        assert torch.equal(a, b), f"result {k} of shape {tuple(b.shape)} differs by up to {(a - b).abs().max():.2e}"
        assert b.isfinite().all()


@configurations
@dtypes
def test_50_runs(configuration, dtype, device):
    run = an_lstm(configuration, dtype, device, (3, 5, 4, 12) if device == "cuda" else (5, 5, 6, 20))
    first = run()
    junk = []
    for k in range(RUNS - 1):
        junk = [torch.full((k + 1, 1000), float(k)) for _ in range(3)]  # changes which memory the LSTM gets
        assert_same_bits(run(), first)
    assert len(junk) == 3


@pytest.mark.parametrize("sizes", [(6, 1, 4, 33), (5, 70, 3, 17), (40, 61, 5, 40)], ids=str)
@configurations
def test_any_number_of_threads(configuration, sizes):
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        run = an_lstm(configuration, dtype, "cpu", sizes)
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
def test_recurrence_on_any_number_of_threads(dtype, ragged):
    steps, batch, hidden = 6, 45, 24
    gates_x = torch.randn(steps, batch, 2, 4 * hidden).to(dtype).requires_grad_()
    h0, c0 = (torch.randn(2, batch, hidden).to(dtype).requires_grad_() for _ in "hc")
    w_hh = (torch.randn(2, 4 * hidden, hidden) / 5).to(dtype)
    lengths = torch.arange(batch) % (steps + 1) if ragged else None
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 4, 8, 1):
            torch.set_num_threads(threads)
            outputs = lstm_recurrence(gates_x, w_hh, h0, c0, lengths)
            grads = torch.autograd.grad(outputs, [gates_x, h0, c0], [o.detach().cos() for o in outputs])
            results.append([*outputs, *grads])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inference_gives_the_bits_of_training(dtype, device):
    for configuration in CONFIGURATIONS.values():
        run = an_lstm(configuration, dtype, device)
        outputs: list[list[Tensor]] = []

        def keep(module, arguments, options, result, outputs=outputs):
            y, states = result
            outputs.append([t.detach().clone() for t in (y, *(states or ()))])

        lstm = run.__defaults__[0]
        hook = lstm.register_forward_hook(keep, with_kwargs=True)
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
def test_compiled(name, dtype, backend):
    run = an_lstm(CONFIGURATIONS[name], dtype, "cpu")
    torch._dynamo.reset()
    compiled = torch.compile(run.__defaults__[0], backend=backend, fullgraph=True)
    assert_same_bits(run(compiled), run())


@pytest.mark.slow
def test_processes():
    """Each process has its own addresses, and its own order of imports and allocations."""
    code = """
import hashlib, sys, torch
waste = torch.empty(int(sys.argv[1]))
import birnn_ext
torch.manual_seed(1)
torch.use_deterministic_algorithms(True)
lstm = birnn_ext.LSTM(9, 33, 2, bidirectional=True)
x = torch.randn(30, 20, 9, requires_grad=True)
y, _ = lstm(x)
grads = torch.autograd.grad(y.sum(), [x, *lstm.parameters()])
print(hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in [y, *grads])).hexdigest())
"""
    runs = [
        subprocess.run([sys.executable, "-c", code, str(size)], capture_output=True, text=True, check=True)
        for size in (1, 1000, 77777)
    ]
    assert len({run.stdout for run in runs}) == 1


@dtypes
def test_a_sequence_in_batches_of_any_size(dtype):
    """The rows of a batch's last tile, of any number, get the bits that they get in a full one."""
    steps, features, hidden, most = 2, 19, 21, 54
    lstm = LSTM(features, hidden, bidirectional=True, dtype=dtype)
    x = torch.randn(steps, most, features).to(dtype)
    with torch.no_grad():
        expected, _ = lstm(x)
        for batch in range(most - 12, most):
            assert_same_bits([lstm(x[:, :batch])[0]], [expected[:, :batch]])
