"""Large sizes and long use, at which 32-bit indices, launch limits and growing caches would fail."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from cells import GRU_CELL, LSTM_CELL, Cell
from helpers import assert_near, gradients, leaves, twins
from measuring import memory

from birnn_ext import BiRNN

# These tests take minutes, and a plain RNN's loops and memory are the GRU's.
two_cells = pytest.mark.parametrize("cell", [LSTM_CELL, GRU_CELL], ids=str)
one_cell = pytest.mark.parametrize("cell", [LSTM_CELL], ids=str)


def same_as_pytorchs(cell: Cell, x: torch.Tensor, hidden: int, bidirectional: bool = True) -> None:
    """Compares values and all gradients, in x's dtype and on its device, with PyTorch's in float64 on the CPU."""
    ours, theirs = twins(x.shape[2], hidden, bidirectional=bidirectional, dtype=x.dtype, cell=cell)
    ours.to(x.device)
    theirs.double()
    x, x_there = x.requires_grad_(), x.detach().cpu().double().requires_grad_()
    found, expected = leaves(ours(x)), leaves(theirs(x_there))
    found, expected = [*found, *gradients(ours, found, [x])], [*expected, *gradients(theirs, expected, [x_there])]
    for k, (a, e) in enumerate(zip(found, expected, strict=True)):
        assert_near(a.cpu(), e, f"result {k}", dtype=x.dtype)


@one_cell
@pytest.mark.slow
def test_size_limits_70000_steps(cell, device):  # PyTorch's takes most of the time, which grows as steps^2
    dtype = torch.float64 if device == "cpu" else torch.float32
    same_as_pytorchs(cell, torch.randn(70_000, 1, 2, dtype=dtype, device=device), 3)


@two_cells
@pytest.mark.slow
def test_size_limits_70000_sequences_of_one_unit(cell, device):
    same_as_pytorchs(cell, torch.randn(2, 70_000, 1, device=device), 1)


@two_cells
def test_size_limits_10240_sequences(cell, device):
    same_as_pytorchs(cell, torch.randn(2, 10_240, 3, device=device), 2)


@two_cells
@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_size_limits_4096_units(batch, cell):
    same_as_pytorchs(cell, torch.randn(2, batch, 8), 4096, bidirectional=False)


@two_cells
@pytest.mark.slow
def test_size_limits_more_than_2_31_elements(cell):
    """The sequences that come last in memory get the same results as they get alone."""
    steps, batch, directions, hidden = 1 << 14, (1 << 10) + 8, 2, -(-64 // cell.gates)
    rows = cell.gates * hidden
    gates_x = torch.zeros(steps, batch, directions, rows, dtype=torch.bfloat16)
    assert gates_x.numel() > 1 << 31
    few = torch.randn(steps, 5, directions, rows, dtype=torch.bfloat16)
    gates_x[:, -5:] = few
    w_hh = torch.randn(directions, rows, hidden, dtype=torch.bfloat16) / 4
    recurrence = cell.function("recurrence")
    y, *states = recurrence(gates_x, w_hh)
    y_alone, *states_alone = recurrence(few, w_hh)
    assert torch.equal(y[:, -5:], y_alone)
    assert all(torch.equal(s[:, -5:], alone) for s, alone in zip(states, states_alone, strict=True))
    assert not y[:, :-5].any()


@one_cell
@pytest.mark.slow
def test_no_cache_grows_in_20000_steps_of_training(cell):
    """Batches have every size up to 16. The test reads memory, threads and open files after a tenth and at the end."""
    model = BiRNN(28, 16, 2, 10, cell=cell.name)
    optimizer = torch.optim.Adam(model.parameters())
    generator = torch.Generator().manual_seed(1)
    digits = torch.rand(16, 28, 28, generator=generator)
    labels = torch.randint(10, (16,), generator=generator)

    def train(steps: int) -> float:
        for step in range(steps):
            batch = 1 + step % 16
            loss = torch.nn.functional.cross_entropy(model(digits[:batch]), labels[:batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    def in_use() -> tuple[int, int, int]:
        return (
            len(list(Path("/proc/self/task").iterdir())),
            len(list(Path("/proc/self/fd").iterdir())),
            threading.active_count(),
        )

    train(2_000)
    before, things = memory("VmRSS"), in_use()
    loss = train(18_000)
    assert loss < 0.1, "it did not learn, so it did not train"
    assert in_use() == things
    assert memory("VmRSS") < 1.01 * before
