"""`accelerate` and `restore` on models that know nothing of birnn_ext."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import TutorialBiRNN, all_near
from torch import nn

import birnn_ext
from birnn_ext import accelerate, restore


class Shared(nn.Module):
    """One LSTM under two names and in a list, as parts of a model may be."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(4, 4, batch_first=True)
        self.again = self.first
        self.stack = nn.ModuleList([nn.Sequential(self.first)])
        self.outside = [self.first]  # no registered name at all

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outside[0](self.again(self.first(x)[0])[0])[0]


def outputs_and_gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    y = model(x)
    return [y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))]


@pytest.mark.parametrize("make", [lambda: TutorialBiRNN(4, 6, 2, 3), Shared], ids=["tutorial", "shared"])
def test_same_numbers_same_parameters(make, device):
    model = make().to(device)
    x = torch.randn(3, 5, 4, device=device)
    before = outputs_and_gradients(model, x)
    parameters = dict(model.named_parameters())
    keys = list(model.state_dict())
    report = accelerate(model)
    assert report.left == {}
    assert report.replaced == ["lstm" if isinstance(model, TutorialBiRNN) else "first"]
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == keys
    calls = birnn_ext.op_calls()[f"{device}_forward"]
    all_near(outputs_and_gradients(model, x), before)
    assert birnn_ext.op_calls()[f"{device}_forward"] > calls

    assert restore(model) == report.replaced
    calls = birnn_ext.op_calls()[f"{device}_forward"]
    assert not any(isinstance(m, birnn_ext.LSTM) for m in model.modules())
    all_near(outputs_and_gradients(model, x), before)
    assert birnn_ext.op_calls()[f"{device}_forward"] == calls


def test_hooks_copies_and_pickles_survive():
    model = nn.Sequential(nn.LSTM(4, 6))
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    accelerate(model)
    x = torch.randn(5, 2, 4)
    y, _ = model(x)
    assert seen == [1]
    del model[0]._forward_hooks
    model[0]._forward_hooks = {}
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin[0]) is birnn_ext.LSTM
        assert torch.equal(twin(x)[0], y)


def test_the_model_itself():
    lstm = nn.LSTM(4, 6)
    assert str(accelerate(lstm)) == "replaced (the model itself)"
    assert isinstance(lstm, birnn_ext.LSTM)
    assert str(accelerate(lstm)) == "found no nn.LSTM"  # once is enough


def test_what_is_left_and_why():
    class Peephole(nn.LSTM):
        pass

    model = nn.ModuleDict({"own": Peephole(3, 4), "gru": nn.GRU(3, 4)})
    report = accelerate(model)
    assert report.replaced == []
    assert report.left == {"own": "its class Peephole is a subclass of nn.LSTM"}
    assert str(report) == "left own: its class Peephole is a subclass of nn.LSTM"
    assert restore(model) == []


def test_forward_that_was_replaced_is_left():
    lstm = nn.LSTM(3, 4)
    lstm.forward = lstm.forward
    assert "forward has been replaced" in accelerate(lstm).left[""]


def test_restore_says_what_it_leaves():
    model = nn.Sequential(nn.LSTM(3, 4))
    accelerate(model)
    nn.utils.parametrizations.weight_norm(model[0], "weight_hh_l0")
    with pytest.warns(UserWarning, match=r"restore: 0 is left, .* ParametrizedLSTM since"):
        assert restore(model) == []
    nn.utils.parametrize.remove_parametrizations(model[0], "weight_hh_l0")
    assert restore(model) == ["0"]
