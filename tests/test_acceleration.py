"""`accelerate` and `restore` work on models that were written without birnn_ext."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import sys
import weakref

import pytest
import torch
from cells import every_cell, every_cell_fast
from helpers import TutorialBiRNN, all_near
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import birnn_ext
from birnn_ext import accelerate, restore


class Shared(nn.Module):
    """A model that has one LSTM or GRU under two names and in a list."""

    def __init__(self, theirs: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.first = theirs(4, 4, batch_first=True)
        self.again = self.first
        self.stack = nn.ModuleList([nn.Sequential(self.first)])
        self.outside = [self.first]  # a list does not register it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outside[0](self.again(self.first(x)[0])[0])[0]


def outputs_and_gradients(model: nn.Module, x: torch.Tensor, output=lambda result: result) -> list[torch.Tensor]:
    y = output(model(x))
    return [y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))]


@pytest.mark.parametrize(
    "make",
    [lambda: TutorialBiRNN(4, 6, 2, 3), Shared, lambda: Shared(nn.GRU), lambda: Shared(nn.RNN)],
    ids=["tutorial", "shared", "shared GRU", "shared RNN"],
)
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
    assert not any(isinstance(m, (birnn_ext.LSTM, birnn_ext.GRU, birnn_ext.RNN)) for m in model.modules())
    all_near(outputs_and_gradients(model, x), before)
    assert birnn_ext.op_calls()[f"{device}_forward"] == calls


@every_cell_fast
def test_hooks_copies_and_pickles_survive(cell):
    model = nn.Sequential(cell.theirs(4, 6))
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    accelerate(model)
    x = torch.randn(5, 2, 4)
    y, _ = model(x)
    assert seen == [1]
    del model[0]._forward_hooks
    model[0]._forward_hooks = {}
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin[0]) is cell.module
        assert torch.equal(twin(x)[0], y)


@every_cell_fast
def test_the_model_itself(cell):
    module = cell.theirs(4, 6)
    assert str(accelerate(module)) == "replaced (the model itself)"
    assert type(module) is cell.module
    assert str(accelerate(module)) == "found no nn.LSTM, nn.GRU or nn.RNN"  # a second call changes nothing


@every_cell_fast
def test_forward_that_was_replaced_is_left(cell):
    module = cell.theirs(3, 4)
    module.forward = module.forward
    assert "forward has been replaced" in accelerate(module).left[""]


@every_cell
def test_restore_says_what_it_leaves(cell):
    """A class that was derived at run time becomes what it was before."""
    model = nn.Sequential(cell.theirs(3, 4))
    accelerate(model)
    model[0].__class__ = type("Wrapped", (cell.module,), {})
    with pytest.warns(UserWarning, match="restore: 0 is left, as its class Wrapped is not one"):
        assert restore(model) == []
    model[0].__class__ = cell.module
    assert restore(model) == ["0"]


# --- subclasses -------------------------------------------------------------------------------------------------------


class Initialised(nn.LSTM):
    """A subclass with its own initialisation, which reads nn.LSTM's private list of names."""

    def reset_parameters(self) -> None:
        for names in self._all_weights:
            for name in names:
                nn.init.normal_(getattr(self, name), std=0.3)


class Options(nn.LSTM):
    def __init__(self, size: int, hidden: int) -> None:
        super().__init__(size, hidden, 2, batch_first=True, bidirectional=True)


class Scaled(nn.LSTM):
    """A subclass with its own parameter, whose forward changes input and output. Its h_0 is a name that we use, too."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.scale = nn.Parameter(torch.full((1,), 1.5))
        self.h_0 = nn.Parameter(torch.randn(1, 1, args[1]))

    def forward(self, x: torch.Tensor, hx: tuple | None = None) -> tuple:
        h_0 = self.h_0.expand(-1, x.shape[1], -1).contiguous()
        y, states = super().forward(x * self.scale, hx or (h_0, torch.zeros_like(h_0)))
        return y * 2, states


class Grandchild(Scaled):
    def forward(self, input: torch.Tensor) -> tuple:
        return super(Grandchild, self).forward(self.prepared(input))  # noqa: UP008, as older code does

    @staticmethod
    def prepared(x: torch.Tensor) -> torch.Tensor:
        return x.flip(0)


class Doubling:
    def forward(self, input: torch.Tensor, hx: tuple | None = None) -> tuple:
        y, states = super().forward(input, hx)
        return y + y, states


class Mixed(Doubling, nn.LSTM):
    pass


class MixedGRU(Doubling, nn.GRU):
    pass


class ScaledGRU(nn.GRU):
    """A subclass with its own parameter, whose forward changes input and output."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.scale = nn.Parameter(torch.full((1,), 1.5))

    def forward(self, x: torch.Tensor, hx: torch.Tensor | None = None) -> tuple:
        y, h_n = super().forward(x * self.scale, hx)
        return y * 2, h_n


class WeightDrop(nn.LSTM):
    """A module that replaces a weight before each call."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.raw = nn.Parameter(self.weight_hh_l0.detach().clone())
        del self.weight_hh_l0
        self.set_weight()

    def set_weight(self) -> None:
        self.weight_hh_l0 = self.raw * 0.5

    def flatten_parameters(self) -> None:
        pass

    def forward(self, *args) -> tuple:
        self.set_weight()
        return super().forward(*args)


def results(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    return outputs_and_gradients(module, x, lambda result: result[0])


SUBCLASSES = [Initialised, Options, Scaled, Grandchild, Mixed, WeightDrop, MixedGRU, ScaledGRU]


@pytest.mark.parametrize("cls", SUBCLASSES)
def test_subclasses_whose_forward_is_nn_lstms_or_ends_in_it(cls, device):
    module = cls(4, 6).to(device)
    x = torch.randn(5, 3, 4, device=device)
    before = results(module, x)
    parameters = dict(module.named_parameters())
    assert str(accelerate(module)) == "replaced (the model itself)"
    assert isinstance(module, cls)
    assert isinstance(module, birnn_ext.GRU if issubclass(cls, nn.GRU) else birnn_ext.LSTM)
    assert (type(module).__name__, type(module).__module__) == (cls.__name__, cls.__module__)
    assert repr(module) == repr(cls(4, 6))
    assert accelerate(module).replaced == []  # a second call changes nothing
    assert all(p is parameters[name] for name, p in module.named_parameters())
    calls = birnn_ext.op_calls()
    all_near(results(module, x), before)
    assert birnn_ext.op_calls()[f"{device}_forward"] > calls[f"{device}_forward"]
    assert birnn_ext.op_calls()[f"{device}_backward"] > calls[f"{device}_backward"]

    assert restore(module) == [""]
    assert type(module) is cls
    calls = birnn_ext.op_calls()
    all_near(results(module, x), before)
    assert birnn_ext.op_calls() == calls


@pytest.mark.parametrize("cls", [Scaled, ScaledGRU])
@pytest.mark.parametrize("where", ["a module", "__main__"])
def test_subclasses_are_copied_and_saved_as_the_users_class(where, cls, monkeypatch):
    if where == "__main__":  # as in a script or a notebook
        monkeypatch.setattr(cls, "__module__", "__main__")
        monkeypatch.setattr(sys.modules["__main__"], cls.__name__, cls, raising=False)
    model = nn.Sequential(cls(4, 6))
    accelerate(model)
    x = torch.randn(5, 2, 4)
    y, _ = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    copies += [pickle.loads(pickle.dumps(model, protocol)) for protocol in (0, 2, 5)]
    shallow = copy.copy(model[0])
    assert shallow.scale is model[0].scale
    for twin in (*copies, [shallow]):
        assert type(twin[0]) is type(model[0])
    for twin in copies:
        assert torch.equal(twin(x)[0], y)
        assert twin[0].scale is not model[0].scale
        assert restore(twin) == ["0"]
        assert type(twin[0]) is cls


def test_a_subclass_is_initialised_by_its_own_code():
    """This includes parameters whose names are ours, which our own code would set to 0."""
    module = Scaled(4, 6)
    accelerate(module)
    module.reset_parameters()
    assert module.h_0.abs().min() > 0


def test_a_data_parallel_model_of_a_subclass():
    model = nn.DataParallel(Scaled(4, 6))
    x = torch.randn(5, 2, 4)
    y, _ = model(x)
    assert accelerate(model).replaced == ["module"]
    all_near([model(x)[0]], [y])


def test_the_class_of_a_subclass_is_freed_after_use():
    class Local(nn.LSTM):
        pass

    module, other = Local(4, 6), Local(4, 6)
    accelerate(nn.ModuleList([module, other]))
    assert type(module) is type(other)
    made = weakref.ref(type(module))
    restore(nn.ModuleList([module, other]))
    gc.collect()
    assert made() is None


def own(**body: object) -> type[nn.LSTM]:
    """Returns a subclass of nn.LSTM with these methods."""

    class Own(nn.LSTM):
        pass

    for name, value in body.items():
        setattr(Own, name, value)
    return Own


def calls_by_name(self, input, hx=None):
    return nn.LSTM.forward(self, input, hx)


def writes_its_own(self, input, hx=None):
    return torch._VF.lstm(input, hx, self._flat_weights, True, 1, 0.0, False, False, False)


def sets_flat_weights(self, input, hx=None):
    _halve(self)
    return super(type(self), self).forward(input, hx)


def _halve(lstm):
    setattr(lstm, "_flat_weights", [w / 2 for w in lstm.parameters()])  # noqa: B010


def calls_super(self, input, hx=None):
    return super(type(self), self).forward(input, hx)


class Registered(nn.LSTM):
    names: list[str] = []  # noqa: RUF012

    def __init_subclass__(cls) -> None:
        Registered.names.append(cls.__name__)


class GRUOfItsOwn(nn.GRU):
    def check_input(self, *_) -> None:
        pass


def made_at_run_time() -> type[nn.LSTM]:
    return type("Wrapped", (nn.LSTM,), {"__module__": __name__})


@pytest.mark.parametrize(
    "cls, why",
    [
        (own(forward=calls_by_name), "its class Own has a forward that does not call super().forward"),
        (own(forward=writes_its_own), "its class Own has a forward that does not call super().forward"),
        (own(forward=sets_flat_weights), "its class Own has a forward that uses _flat_weights, one of nn.LSTM's inner"),
        (own(forward=len), "its class Own has a forward that does not call super().forward"),
        (
            own(check_input=lambda *_: None, forward=calls_super),
            "its class Own has check_input, one of nn.LSTM's inner workings, of its own",
        ),
        (own(layer_norm=property(lambda self: nn.LayerNorm(4))), "it has an attribute layer_norm, a name that"),
        (own(_run=calls_super), "it has an attribute _run, a name that birnn_ext.LSTM uses for something else"),
        (Registered, "its class Registered has a metaclass or an __init_subclass__, which may not want another"),
        (type("OwnGRU", (nn.GRU,), {"__module__": __name__, "forward": calls_by_name}), "its class OwnGRU was made at"),
        (GRUOfItsOwn, "its class GRUOfItsOwn has check_input, one of nn.GRU's inner workings, of its own"),
        (made_at_run_time(), "its class Wrapped was made at run time, by another library perhaps"),
    ],
)
def test_subclasses_that_are_left_and_why(cls, why):
    model = nn.ModuleDict({"own": cls(3, 4), "linear": nn.Linear(3, 4)})
    report = accelerate(model)
    assert report.replaced == []
    assert str(report).startswith(f"left own: {why}")
    assert type(model["own"]) is cls
    assert restore(model) == []
    assert Registered.names == []


# --- classes that PyTorch makes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [nn.LSTM, Scaled, nn.GRU, ScaledGRU])
@pytest.mark.parametrize("first", ["accelerated", "parametrized"])
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrizations(norm, first, cls):
    module = cls(4, 6).eval()
    if first == "accelerated":
        accelerate(module)
    for name in ("weight_hh_l0", "weight_ih_l0"):  # the second call finds the class that the first one made
        norm(module, name)
        if name == "weight_hh_l0" and first == "parametrized":
            assert accelerate(module).replaced == [""]
    x = torch.randn(5, 3, 4)
    calls = birnn_ext.op_calls()["cpu_forward"]
    ours = results(module, x)
    assert birnn_ext.op_calls()["cpu_forward"] > calls
    all_near(results(copy.deepcopy(module), x), ours)
    assert type(module).__name__ == f"Parametrized{cls.__name__}"
    assert isinstance(module, cls)

    assert restore(module) == [""]
    assert not isinstance(module, (birnn_ext.LSTM, birnn_ext.GRU))
    all_near(ours, results(module, x))
    accelerate(module)
    for name in ("weight_hh_l0", "weight_ih_l0"):
        parametrize.remove_parametrizations(module, name)
    assert isinstance(module, (birnn_ext.LSTM, birnn_ext.GRU))
    all_near([module(x)[0]], ours[:1])
    restore(module)
    assert type(module) is cls


@pytest.mark.parametrize("first", ["accelerated", "normed"])
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*deprecated")
@every_cell
def test_norms_by_hooks(cell, norm, first):
    """The older functions replace a weight before each call, in a hook."""
    module = cell.theirs(4, 6).double().eval()
    steps = [accelerate, lambda module: norm(module, "weight_hh_l0")]
    for step in steps if first == "accelerated" else reversed(steps):
        step(module)
    x = torch.randn(5, 3, 4).double()
    calls = birnn_ext.op_calls()["cpu_forward"]
    ours = results(module, x)
    assert birnn_ext.op_calls()["cpu_forward"] > calls
    assert restore(module) == [""]
    all_near(ours, results(module, x))


# --- programs ---------------------------------------------------------------------------------------------------------


def loaded(program: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    file = io.BytesIO()
    torch.jit.save(program, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.filterwarnings("ignore:.*deprecated", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("way", ["scripted", "traced", "frozen"])
def test_torchscript_is_listed_as_left(way):
    model = TutorialBiRNN(4, 6, 2, 3).eval()
    program = torch.jit.trace(model, torch.randn(2, 5, 4)) if way == "traced" else torch.jit.script(model)
    if way == "frozen":  # a frozen program is one graph, without submodules
        program = torch.jit.freeze(program)
    for module in (program, loaded(program), nn.Sequential(loaded(program))):
        report = accelerate(module)
        assert report.replaced == []
        parts = ["0"] * isinstance(module, nn.Sequential) + ["lstm"] * (way != "frozen")
        assert list(report.left) == [".".join(parts)]
        assert "it is TorchScript, which can't be changed" in str(report)


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("module", [nn.GRU(3, 4), nn.RNN(3, 4), nn.RNN(3, 4, nonlinearity="relu")], ids=str)
def test_torchscript_of_other_cells_is_listed_as_left(module):
    left = f"and has nn.{type(module).__name__}'s operator"
    assert left in str(accelerate(torch.jit.script(nn.Sequential(module))))


@every_cell
@pytest.mark.filterwarnings("ignore:The tensor attributes self.0._flat_weights")
def test_an_exported_graph_is_listed_as_left(cell):
    model = nn.Sequential(cell.theirs(3, 4))
    program = torch.export.export(model, (torch.randn(2, 5, 3),)).module()
    assert str(accelerate(program)).startswith("left (the model itself): it is an exported graph")
    assert str(accelerate(torch.fx.symbolic_trace(model))) == "replaced 0"
