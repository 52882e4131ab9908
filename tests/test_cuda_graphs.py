"""LSTM, GRU and BiRNN work in CUDA graphs that PyTorch's own functions make, with lengths that change between replays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from cells import GRU_CELL, LSTM_CELL, Cell
from helpers import all_near, leaves, skip_without_triton_on_cuda
from torch import Tensor, nn

from birnn_ext import BiRNN, op_calls

pytestmark = pytest.mark.cuda
BATCH, STEPS = 5, 7
LENGTHS = [[7, 3, 0, 5, 1], [1, 1, 7, 7, 7], [7] * 5, [2, 0, 0, 3, 4]]


class ManyToOne(nn.Module):
    """The classifier of docs/speed.md."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.rnn = cell.module(6, 8, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        last, _ = self.rnn(x, lengths=lengths, output="last")
        return self.fc(last)


class Outputs(nn.Module):
    """Two layers in both directions; all outputs and states."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.rnn = cell.module(6, 8, 2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, ...]:
        return tuple(leaves(self.rnn(x, lengths=lengths)))


KINDS = [
    pytest.param(partial(make, cell), ragged, id=f"{cell.name}: {name}")
    for cell in (LSTM_CELL, GRU_CELL)
    for name, make, ragged in (
        ("BiRNN", lambda cell: BiRNN(6, 8, 2, 3, cell=cell.name), False),
        ("outputs", Outputs, False),
        ("outputs with lengths", Outputs, True),
        ("many to one with lengths", ManyToOne, True),
    )
]


def arguments(k: int, ragged: bool) -> list[Tensor]:
    """Returns the k-th batch. Its input needs a gradient, too."""
    generator = torch.Generator("cuda").manual_seed(k)
    x = torch.randn(BATCH, STEPS, 6, device="cuda", generator=generator, requires_grad=True)
    return [x, torch.tensor(LENGTHS[k], device="cuda")] if ragged else [x]


def results(module: Callable, parameters: list[nn.Parameter], args: list[Tensor]) -> list[Tensor]:
    """Returns outputs and all gradients."""
    outputs = module(*args)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    loss = sum((k + 1) * output.square().sum() for k, output in enumerate(outputs))
    return [t.clone() for t in (*outputs, *torch.autograd.grad(loss, [args[0], *parameters]))]


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # nn.Linear's graph gives this warning, too
@pytest.mark.parametrize(("make", "ragged"), KINDS)
def test_make_graphed_callables(make, ragged):
    module = make().cuda()
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(module), tuple(arguments(0, ragged)))
    before = op_calls()["cuda_forward"]
    found = [results(graphed, list(graphed.parameters()), arguments(k, ragged)) for k in range(4)]
    assert op_calls()["cuda_forward"] == before  # these were replays
    for k in range(4):
        expected = results(module, list(module.parameters()), arguments(k, ragged))
        assert all(torch.equal(a, b) for a, b in zip(found[k], expected, strict=True)), k


@pytest.mark.slow
@pytest.mark.parametrize(("make", "ragged"), KINDS)
def test_compile_with_reduce_overhead(make, ragged):
    skip_without_triton_on_cuda()
    module = make().cuda()
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, fullgraph=True, mode="reduce-overhead")
    for k in range(4):  # the first calls compile and record
        torch.compiler.cudagraph_mark_step_begin()
        found = results(compiled, list(twin.parameters()), arguments(k, ragged))
        all_near(found, results(module, list(module.parameters()), arguments(k, ragged)))
    calls = op_calls()["cuda_forward"]
    torch.compiler.cudagraph_mark_step_begin()
    results(compiled, list(twin.parameters()), arguments(1, ragged))
    assert op_calls()["cuda_forward"] == calls  # this was a replay
