"""Times birnn_ext beside torch.nn.LSTM and torch.nn.GRU.

What is timed is forward, forward + backward, and a training step of the MNIST model. `make bench` or
`python -m pytest benchmarks` runs it. A group has both contestants on the same work. Times include all that a user
pays for: packing of weights, allocation, Python.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from birnn_ext import GRU, LSTM, BiRNN, op_calls

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers import TutorialBiRNN

# B, T, I, H, layers, as in DESIGN.md
SHAPES = [(100, 28, 28, 128, 2), (1, 28, 28, 128, 2), (32, 100, 128, 256, 2), (64, 200, 256, 512, 1)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
pytestmark = pytest.mark.filterwarnings("ignore::pytest_benchmark.logger.PytestBenchmarkWarning")

if not torch.cuda.is_available():
    DEVICES = DEVICES[:1]


def measure(benchmark, work: Callable[[], object], device: str, ours: bool) -> None:
    def timed() -> None:
        work()
        if device == "cuda":
            torch.cuda.synchronize()

    before = op_calls()
    benchmark.pedantic(timed, rounds=9, iterations=1, warmup_rounds=3)
    after = op_calls()
    ran = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert bool(ran) == ours, f"op calls: {ran}"
    assert not any(name.startswith("reference") for name in ran)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[LSTM, nn.LSTM, GRU, nn.GRU], ids=["birnn_ext", "nn.LSTM", "birnn_ext.GRU", "nn.GRU"])
def cls(request: pytest.FixtureRequest) -> type[nn.RNNBase]:
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(benchmark, shape, dtype, device, cls):
    benchmark.group = f"{cls.__name__}, forward, no grad, {device} {dtype} B,T,I,H,layers={shape}"
    batch, steps, features, hidden, layers = shape
    rnn = cls(features, hidden, layers, batch_first=True, bidirectional=True, device=device, dtype=dtype)
    x = torch.randn(batch, steps, features, device=device, dtype=dtype)
    with torch.no_grad():
        measure(benchmark, lambda: rnn(x), device, cls in (LSTM, GRU))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_backward(benchmark, shape, dtype, device, cls):
    benchmark.group = f"{cls.__name__}, forward + backward, all outputs, {device} {dtype} B,T,I,H,layers={shape}"
    batch, steps, features, hidden, layers = shape
    rnn = cls(features, hidden, layers, batch_first=True, bidirectional=True, device=device, dtype=dtype)
    x = torch.randn(batch, steps, features, device=device, dtype=dtype)
    dy = torch.randn(batch, steps, 2 * hidden, device=device, dtype=dtype)

    def work() -> None:
        rnn.zero_grad()
        rnn(x)[0].backward(dy)

    measure(benchmark, work, device, cls in (LSTM, GRU))


@pytest.mark.parametrize("model", [BiRNN, TutorialBiRNN], ids=["birnn_ext", "nn.LSTM"])
def test_mnist_step(benchmark, model, device):
    benchmark.group = f"MNIST training step with Adam, {device}, B=100"
    torch.manual_seed(0)
    birnn = model(28, 128, 2, 10).to(device)
    optimizer = torch.optim.Adam(birnn.parameters(), lr=0.003)
    images, labels = torch.rand(100, 28, 28, device=device), torch.arange(100, device=device) % 10

    def work() -> None:
        loss = F.cross_entropy(birnn(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    measure(benchmark, work, device, model is BiRNN)
