"""birnn_ext.BiRNN agrees with the tutorial's class on nn.LSTM, or nn.GRU, on real digits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cells import LSTM_CELL, Cell, every_cell, every_cell_fast, every_cell_the_gru_slow
from helpers import TutorialBiRNN, all_near, assert_near
from torch import nn

from birnn_ext import BiRNN, op_calls

SIZES = (28, 16, 2, 10)  # input, hidden, layers, classes


class OnTheirs(nn.Module):
    """The tutorial's classifier, with PyTorch's module of a cell under the cell's name."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int, num_classes: int, cell: Cell) -> None:
        super().__init__()
        self.name = cell.name
        rnn = cell.theirs(input_size, hidden_size, num_layers, batch_first=True, bidirectional=True)
        self.add_module(cell.name, rnn)
        self.fc = nn.Linear(hidden_size * 2, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(getattr(self, self.name)(x)[0][:, -1])


def theirs_on(cell: Cell) -> Callable[..., nn.Module]:
    """Returns what makes the classifier on PyTorch's module: for the LSTM it is the tutorial's own class."""
    return TutorialBiRNN if cell is LSTM_CELL else partial(OnTheirs, cell=cell)


@every_cell_fast
def test_on_each_cell(cell, device):
    """Parameters of the same seed, their names, scores and gradients are those of the model on PyTorch's module."""
    made = []
    for make in (lambda: BiRNN(*SIZES, cell=cell.name), lambda: OnTheirs(*SIZES, cell)):
        torch.manual_seed(1)
        made.append(make())
    ours, theirs = (model.to(device) for model in made)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    x = torch.randn(5, 28, 28, device=device, requires_grad=True)
    results = [[m(x), *torch.autograd.grad(m(x).square().sum(), [x, *m.parameters()])] for m in (ours, theirs)]
    all_near(*results)


def test_other_cells_are_refused():
    with pytest.raises(ValueError, match='BiRNN: cell must be "lstm", "gru" or "rnn", got \'RNN\''):
        BiRNN(*SIZES, cell="RNN")
    with pytest.raises(ValueError, match=r"BiRNN: cell must be .*, got \['gru'\]"):
        BiRNN(*SIZES, cell=["gru"])


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    data = pytest.importorskip("birnn_ext.mnist.data", reason="needs birnn_ext[mnist]")
    train, _ = data.read_sample(Path())
    return train.images.float() / 255, train.labels


@every_cell
def test_checkpoints_both_ways(tmp_path, cell, device):
    """BiRNN reads the tutorial's model.ckpt, and the tutorial's class reads ours."""
    x = torch.randn(5, 28, 28, device=device)
    ours, theirs = partial(BiRNN, cell=cell.name), theirs_on(cell)
    for make_source, make_target in ((ours, theirs), (theirs, ours)):
        source, target = make_source(*SIZES).to(device), make_target(*SIZES).to(device)
        torch.save(source.state_dict(), tmp_path / "model.ckpt")
        target.load_state_dict(torch.load(tmp_path / "model.ckpt", weights_only=True))
        assert_near(target(x), source(x))


def test_same_seed_same_model():
    torch.manual_seed(1)
    ours = BiRNN(*SIZES).state_dict()
    torch.manual_seed(1)
    theirs = TutorialBiRNN(*SIZES).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_gradients(device):
    ours, theirs = BiRNN(*SIZES).to(device), TutorialBiRNN(*SIZES).to(device)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 28, 28, device=device, requires_grad=True)
    labels = torch.arange(5, device=device)
    grads = [
        torch.autograd.grad(F.cross_entropy(model(x), labels), [x, *model.parameters()]) for model in (ours, theirs)
    ]
    all_near(*grads)


@every_cell_the_gru_slow
def test_training_follows_the_tutorial_step_by_step(digits, cell, device):
    """In 20 steps of Adam on real digits, from the same seed, every loss stays within 1e-4 of PyTorch's."""
    images, labels = (t.to(device) for t in digits)
    # an emulated device is slow, so it learns two small batches by heart
    steps, batch, batches, sizes = (20, 100, 20, (28, 128, 2, 10)) if device == "cpu" else (20, 10, 2, SIZES)
    before = op_calls()
    losses = []
    for make in (partial(BiRNN, cell=cell.name), theirs_on(cell)):
        torch.manual_seed(0)
        model = make(*sizes).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
        losses.append([])
        for step in range(steps):
            begin = step % batches * batch
            chosen = slice(begin, begin + batch)
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    ours, theirs = (torch.tensor(curve) for curve in losses)
    assert ours[-5:].mean() < 0.97 * ours[:5].mean(), "nothing was learnt, so nothing was compared"
    assert (ours - theirs).abs().max() < 1e-4
    # two layers, the last one as a forward pass and one reverse step, make 3 calls each way and step
    assert op_calls()[f"{device}_backward"] - before[f"{device}_backward"] == 3 * steps
