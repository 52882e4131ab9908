"""Gradients are right in second order, in eval mode, under torch.func's transforms, forward mode and checkpointing.

The tests compare with "a loop", which calls the same module eagerly for one sample after the other. Other tests show
that these calls are right.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import pytest
import torch
from cells import LSTM_CELL, Cell, every_cell, every_cell_fast
from helpers import TutorialBiRNN, all_near, assert_near, leaves, projected_by_pytorch, twins
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.nn.utils import stateless
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from birnn_ext import LSTM, BiRNN, op_calls
from birnn_ext.ops import lstm_recurrence

F64 = {"dtype": torch.float64}
SAMPLES, STEPS, BATCH, FEATURES, HIDDEN = 4, 5, 3, 4, 6
LENGTHS = [[5, 2, 0], [1, 1, 1], [3, 5, 4], [0, 5, 2]]

# Arguments of a call beside the input. "own" ones differ from sample to sample.
LAYOUTS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "unbatched": {"unbatched": True},
    "hx": {"hx": "own"},
    "shared_hx": {"hx": "shared"},
    "lengths": {"lengths": "own"},
    "shared_lengths": {"lengths": "shared", "hx": "own"},
    "last": {"output": "last"},
    "last_lengths": {"output": "last", "lengths": "own", "batch_first": True, "hx": "own"},
    "recompute": {"recompute": True},
    "one_direction": {"bidirectional": False},
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
forward_mode = pytest.mark.filterwarnings("ignore:birnn_ext..\\w+_.* has no forward-mode derivative:UserWarning")


class Case:
    """A module (of two layers by default) and some `samples`. `run(parameters, *sample)` calls it for one sample."""

    def __init__(
        self,
        device: str,
        layout: str = "plain",
        dtype: torch.dtype = torch.float64,
        layers: int = 2,
        cell: Cell = LSTM_CELL,
    ) -> None:
        options = dict(LAYOUTS[layout])
        self.last = options.pop("output", "all") == "last"
        unbatched = options.pop("unbatched", False)
        kinds = {name: options.pop(name, None) for name in ("hx", "lengths")}
        options = {"bidirectional": True, **options}
        self.cell = cell
        self.module = cell.module(FEATURES, HIDDEN, layers, device=device, dtype=dtype, **options)
        self.parameters = {name: p.detach() for name, p in self.module.named_parameters()}
        self.directions = 1 + self.module.bidirectional
        shape = (
            (STEPS, FEATURES)
            if unbatched
            else (BATCH, STEPS, FEATURES)
            if self.module.batch_first
            else (STEPS, BATCH, FEATURES)
        )
        state = (layers * self.directions, BATCH, HIDDEN)
        every = {
            "input": torch.randn(SAMPLES, *shape, dtype=dtype),
            **{
                name: torch.randn(SAMPLES, *state, dtype=dtype) if kinds["hx"] else None
                for name in ("h0", "c0")[: cell.states]
            },
            "lengths": torch.tensor(LENGTHS) if kinds["lengths"] else None,
        }
        for name in list(every)[1:]:
            if kinds["lengths" if name == "lengths" else "hx"] == "shared":
                every[name] = every[name][0]
        self.samples = {name: value.to(device) for name, value in every.items() if value is not None}
        self.dims = tuple(
            None if kinds.get("lengths" if name == "lengths" else "hx") == "shared" and name != "input" else 0
            for name in self.samples
        )

    def run(self, parameters: dict[str, Tensor], *sample: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.samples, sample, strict=True))
        hx = self.cell.hx([named[name] for name in ("h0", "c0") if name in named] or None)
        options = {"lengths": named.get("lengths"), "output": "last" if self.last else "all"}
        return tuple(leaves(functional_call(self.module, parameters, (named["input"], hx), options)))

    def loss(self, parameters: dict[str, Tensor], *sample: Tensor) -> Tensor:
        return sum(out.square().sum() + out.sum() for out in self.run(parameters, *sample))

    def sample(self, k: int) -> list[Tensor]:
        return [v if dim is None else v[k] for v, dim in zip(self.samples.values(), self.dims, strict=True)]

    def layer_calls(self) -> int:
        """The number of operators that one call runs. With "last" the last layer's directions run one by one."""
        return 1 + (self.directions if self.last else 1)


@contextmanager
def kernel_calls(device: str, forward: int, backward: int = 0) -> Iterator[None]:
    """Asserts how often the compiled kernels run, and that the reference never does."""
    before = op_calls()
    yield
    ran = {name: count - before[name] for name, count in op_calls().items() if count != before[name]}
    ran = {name: count for name, count in ran.items() if name.endswith(("_forward", "_backward"))}
    expected = {f"{device}_forward": forward, f"{device}_backward": backward}
    assert ran == {name: count for name, count in expected.items() if count}


def stacked(results: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(parts) for parts in zip(*results, strict=True)]


def eager_gradients(loss: Callable[..., Tensor], parameters: dict[str, Tensor], *args: Tensor) -> dict[str, Tensor]:
    leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    return dict(zip(leaves, torch.autograd.grad(loss(leaves, *args), list(leaves.values())), strict=True))


# --- eval mode and second order ---------------------------------------------------------------------------------------


@every_cell_fast
@pytest.mark.parametrize("lengths", [None, [5, 2, 1]], ids=["full", "ragged"])
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
def test_backward_in_eval_mode_saliency(recompute, lengths, cell, device):
    """A saliency map needs it, and cuDNN refuses it for nn.LSTM."""
    ours, theirs = twins(FEATURES, HIDDEN, 2, dropout=0.5, bidirectional=True, **F64, cell=cell)
    ours.recompute = recompute
    ours = ours.to(device).eval()
    theirs.eval()
    x = torch.randn(STEPS, BATCH, FEATURES, **F64)
    saliency = []
    for module in (ours, theirs):
        leaf = x.to(module.weight_ih_l0.device).requires_grad_()
        if lengths is None:
            y = module(leaf)[0]
        elif module is ours:
            y = module(leaf, lengths=torch.tensor(lengths, device=device))[0]
        else:
            y = pad_packed_sequence(module(pack_padded_sequence(leaf, torch.tensor(lengths)))[0])[0]
        y.square().sum().backward()
        saliency.append([leaf.grad.cpu(), *(p.grad.cpu() for p in module.parameters())])
    all_near(*saliency)


class Critic(nn.Module):
    def __init__(self, lstm: nn.RNNBase) -> None:
        super().__init__()
        self.lstm, self.score = lstm, nn.Linear(2 * HIDDEN, 1, **F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.lstm(x)[0][:, -1])


@every_cell_fast
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
def test_double_backward_gradient_penalty(recompute, cell, device):
    """A WGAN-GP critic trains for two steps, which nn.LSTM on cuDNN refuses."""
    ours, theirs = twins(FEATURES, HIDDEN, 2, bidirectional=True, batch_first=True, **F64, cell=cell)
    ours.recompute = recompute
    theirs = Critic(theirs)
    ours = Critic(ours)
    ours.load_state_dict(theirs.state_dict())
    ours.to(device)
    real, fake, mix = (
        torch.randn(BATCH, STEPS, FEATURES, **F64),
        torch.randn(BATCH, STEPS, FEATURES, **F64),
        torch.rand(BATCH, 1, 1, **F64),
    )
    seen = []
    for critic in (ours, theirs):
        r, f, m = (t.to(critic.score.weight.device) for t in (real, fake, mix))
        optimizer = torch.optim.SGD(critic.parameters(), 0.1)
        for _ in range(2):
            between = (m * r + (1 - m) * f).requires_grad_()
            (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
            penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
            optimizer.zero_grad()
            (critic(f).mean() - critic(r).mean() + 10 * penalty).backward()
            optimizer.step()
        seen.append([penalty.detach().cpu(), *(p.grad.cpu() for p in critic.parameters())])
        seen[-1] += [p.detach().cpu() for p in critic.parameters()]
    all_near(*seen)


@every_cell
@pytest.mark.parametrize("layout", ["last_lengths", "recompute"])
def test_double_backward_gradgradcheck(layout, cell, device):
    case = Case(device, layout, layers=1, cell=cell)
    lengths = case.samples.get("lengths")
    tensors = [t.requires_grad_() for t in case.sample(0) if t.is_floating_point()]
    names = list(case.parameters)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        sample = list(inputs[: len(tensors)]) + ([] if lengths is None else [lengths[0]])
        return case.run(dict(zip(names, inputs[len(tensors) :], strict=True)), *sample)

    inputs = (*tensors, *(p.clone().requires_grad_() for p in case.parameters.values()))
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


# --- vmap -------------------------------------------------------------------------------------------------------------


@every_cell_fast
@layouts
def test_vmap_over_inputs(layout, cell, device):
    """The kernels run all samples at once."""
    case = Case(device, layout, cell=cell)
    with kernel_calls(device, forward=case.layer_calls()):
        mapped = vmap(lambda *sample: case.run(case.parameters, *sample), in_dims=case.dims)(*case.samples.values())
    all_near(mapped, stacked([case.run(case.parameters, *case.sample(k)) for k in range(SAMPLES)]))


@every_cell
def test_vmap_over_any_dimension(cell, device):
    case = Case(device, cell=cell)
    x = case.samples["input"].movedim(0, 2)
    y = vmap(lambda x: case.module(x)[0], in_dims=2, out_dims=1)(x)
    all_near(y.unbind(1), [case.module(case.sample(k)[0])[0] for k in range(SAMPLES)])


@every_cell
@pytest.mark.parametrize("mapped", ["hx", "lengths"])
def test_vmap_over_all_but_the_input(mapped, cell, device):
    case = Case(device, "shared_lengths", cell=cell)
    x, *states, _ = case.samples.values()
    lengths = torch.tensor(LENGTHS, device=device)
    if mapped == "hx":
        y = vmap(lambda *s: case.module(x[0], cell.hx(s), lengths=lengths[0])[0])(*states)
        expected = [case.module(x[0], cell.hx([s[k] for s in states]), lengths=lengths[0])[0] for k in range(SAMPLES)]
    else:
        hx = cell.hx([s[0] for s in states])
        y = vmap(lambda n: case.module(x[0], hx, lengths=n)[0])(lengths)
        expected = [case.module(x[0], hx, lengths=lengths[k])[0] for k in range(SAMPLES)]
    all_near(y, expected)


@every_cell
def test_vmap_within_vmap(cell, device):
    case = Case(device, "unbatched", cell=cell)
    x = torch.randn(2, 3, STEPS, FEATURES, device=device, **F64)
    with kernel_calls(device, forward=2):
        y = vmap(vmap(lambda x: case.module(x)[0]), in_dims=2)(x.permute(1, 2, 0, 3))
    all_near(y.flatten(0, 1), [case.module(sample)[0] for sample in x.flatten(0, 1)])


@every_cell
@pytest.mark.parametrize("samples, batch", [(0, BATCH), (SAMPLES, 0)], ids=["no_samples", "no_sequences"])
def test_vmap_over_nothing(samples, batch, cell, device):
    lstm = cell.module(FEATURES, HIDDEN, 2, bidirectional=True, device=device)
    y, *states = leaves(vmap(lstm)(torch.randn(samples, STEPS, batch, FEATURES, device=device)))
    assert y.shape == (samples, STEPS, batch, 2 * HIDDEN)
    assert [s.shape for s in states] == [(samples, 4, batch, HIDDEN)] * cell.states


@every_cell
def test_vmap_over_a_model_ensemble(cell, device):
    """Each sample has its own weights, by stack_module_state, forward and in gradients."""
    models = [cell.module(FEATURES, HIDDEN, 2, bidirectional=True, device=device, **F64) for _ in range(3)]
    x = torch.randn(STEPS, BATCH, FEATURES, device=device, **F64)
    lengths = torch.tensor(LENGTHS[0], device=device)
    parameters, buffers = stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")

    def run(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(skeleton, (parameters, buffers), (x,), {"lengths": lengths})[0]

    with kernel_calls(device, forward=6, backward=6):
        y = vmap(run)(parameters, buffers)
        found = torch.autograd.grad(y.square().sum(), list(parameters.values()))
    each = [m(x, lengths=lengths)[0] for m in models]
    all_near(y, each)
    all_near(
        found,
        stacked(
            [torch.autograd.grad(e.square().sum(), list(m.parameters())) for e, m in zip(each, models, strict=True)]
        ),
    )
    per_model = vmap(grad(lambda *args: run(*args).square().sum()))(parameters, buffers)
    all_near([per_model[name] for name in parameters], found)


@every_cell
def test_vmap_and_dropout(cell, device):
    """The randomness is the one that vmap is given. Without it, vmap raises its own error."""
    lstm = cell.module(FEATURES, HIDDEN, 2, dropout=0.5, device=device)
    x = torch.randn(1, STEPS, BATCH, FEATURES, device=device).expand(SAMPLES, STEPS, BATCH, FEATURES)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: lstm(x)[0])(x)
    y = vmap(lambda x: lstm(x)[0], randomness="same")(x)
    assert_near(y[0], y[1])  # PyTorch's product of few columns does not round every row alike
    y = vmap(lambda x: lstm(x)[0], randomness="different")(x)
    assert not torch.equal(y[0], y[1])
    y = vmap(lambda x: lstm.eval()(x)[0])(x)
    all_near(y, [lstm(x[0])[0]] * SAMPLES)


@pytest.mark.filterwarnings("ignore:birnn_ext..lstm_variant has no rule for torch.func's transforms:UserWarning")
@pytest.mark.parametrize("options", [{"recurrent_dropout": 0.5}, {"zoneout": 0.5}], ids=str)
def test_vmap_and_masks_of_the_recurrence(options, device, reference_operators):
    lstm = LSTM(FEATURES, HIDDEN, device=device, **options)
    x = torch.randn(1, STEPS, BATCH, FEATURES, device=device).expand(SAMPLES, STEPS, BATCH, FEATURES)
    y = vmap(lambda x: lstm(x)[0], randomness="same")(x)
    assert torch.equal(y[0], y[1])
    y = vmap(lambda x: lstm(x)[0], randomness="different")(x)
    assert not torch.equal(y[0], y[1])


def test_vmap_over_bad_input():
    """Errors name the argument, as they do without vmap."""
    lstm = LSTM(FEATURES, HIDDEN)
    x = torch.randn(SAMPLES, STEPS, BATCH, FEATURES)
    with pytest.raises(ValueError, match="lengths must be between 0 and T = 5, got"):
        vmap(lambda x, n: lstm(x, lengths=n)[0])(x, torch.tensor(LENGTHS) + 1)
    with pytest.raises(ValueError, match=r"lengths must have shape \(3,\), got \(4,\)"):
        vmap(lambda x: lstm(x, lengths=torch.tensor([1, 2, 3, 4]))[0])(x)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(1, 3, 6\), got \[1, 4, 6\]"):
        vmap(lambda x, h: lstm(x, (h, h))[0])(x, torch.randn(SAMPLES, 1, 4, HIDDEN))
    gates_x, w_hh = torch.randn(SAMPLES, STEPS, BATCH, 1, 4 * HIDDEN), torch.randn(1, 4 * HIDDEN, HIDDEN)
    with pytest.raises(ValueError, match="h0 must have shape"):
        vmap(lambda g, h: lstm_recurrence(g, w_hh, h)[0])(gates_x, torch.randn(SAMPLES, 1, 4, HIDDEN))
    with pytest.raises(ValueError, match="w_hh must have shape"):
        vmap(lambda g, w: lstm_recurrence(g, w)[0])(gates_x, torch.randn(SAMPLES, 1, 4 * HIDDEN, HIDDEN + 1))


# --- gradients under torch.func ---------------------------------------------------------------------------------------


@every_cell_fast
@layouts
def test_per_sample_gradients(layout, cell, device):
    """vmap(grad(loss)) for weights, input and states runs in the kernels."""
    case = Case(device, layout, cell=cell)
    floating = tuple(k for k, t in enumerate(case.samples.values()) if t.is_floating_point())
    function = grad(case.loss, argnums=(0, *(k + 1 for k in floating)))
    with kernel_calls(device, forward=case.layer_calls(), backward=case.layer_calls()):
        d_weights, *d_inputs = vmap(function, in_dims=(None, *case.dims))(case.parameters, *case.samples.values())
    for k in range(SAMPLES):
        leaves = {name: p.clone().requires_grad_() for name, p in case.parameters.items()}
        sample = [t.clone().requires_grad_() if t.is_floating_point() else t for t in case.sample(k)]
        wanted = [*leaves.values(), *(sample[j] for j in floating)]
        expected = torch.autograd.grad(case.loss(leaves, *sample), wanted)
        all_near([*(d_weights[name][k] for name in leaves), *(d[k] for d in d_inputs)], expected)


def test_per_sample_gradients_of_the_tutorials_model(device):
    """Differential privacy needs them. The truth is a loop over the tutorial's class on nn.LSTM."""
    theirs = TutorialBiRNN(7, HIDDEN, 2, 5)
    ours = BiRNN(7, HIDDEN, 2, 5)
    ours.load_state_dict(theirs.state_dict())
    ours.to(device)
    x, labels = torch.randn(8, 6, 7), torch.randint(5, (8,))

    def loss(parameters: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(ours, parameters, (x[None],)), label[None])

    parameters = {name: p.detach() for name, p in ours.named_parameters()}
    with kernel_calls(device, forward=3, backward=3):
        found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x.to(device), labels.to(device))
    for k in range(8):
        expected = torch.autograd.grad(
            nn.functional.cross_entropy(theirs(x[k : k + 1]), labels[k : k + 1]), theirs.parameters()
        )
        all_near([found[name][k].cpu() for name in parameters], expected)


@every_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_per_sample_gradients_in_other_types(dtype, cell, device):
    case = Case(device, "lengths", dtype, cell=cell)
    found = vmap(grad(case.loss), in_dims=(None, *case.dims))(case.parameters, *case.samples.values())
    for k in range(SAMPLES):
        expected = eager_gradients(case.loss, case.parameters, *case.sample(k))
        for name, e in expected.items():
            assert found[name].dtype == dtype
            assert_near(found[name][k], e, name)


@every_cell
def test_per_sample_gradients_under_autocast(cell, device):
    case = Case(device, dtype=torch.float32, cell=cell)
    with torch.autocast(device, torch.bfloat16):
        found = vmap(grad(case.loss), in_dims=(None, 0))(case.parameters, case.samples["input"])
    with torch.autocast(device, torch.bfloat16):
        expected = [eager_gradients(case.loss, case.parameters, *case.sample(k)) for k in range(SAMPLES)]
    for name in case.parameters:
        assert found[name].dtype == torch.float32
        assert_near(found[name], torch.stack([e[name] for e in expected]), name, torch.bfloat16)


@every_cell
@pytest.mark.parametrize("layout", ["plain", "last_lengths"])
def test_gradient_of_a_vmapped_function(layout, cell, device):
    """This is grad(vmap), and vmap within a graph of ordinary autograd."""
    case = Case(device, layout, cell=cell)
    parameters, samples = case.parameters, tuple(case.samples.values())

    def total(parameters: dict[str, Tensor]) -> Tensor:
        return vmap(case.loss, in_dims=(None, *case.dims))(parameters, *samples).sum()

    with kernel_calls(device, forward=case.layer_calls(), backward=case.layer_calls()):
        found = grad(total)(parameters)
    with kernel_calls(device, forward=case.layer_calls(), backward=case.layer_calls()):
        eager = eager_gradients(total, parameters)
    each = [eager_gradients(case.loss, parameters, *case.sample(k)) for k in range(SAMPLES)]
    for name in parameters:
        expected = sum(e[name] for e in each)
        assert_near(found[name], expected, name)
        assert_near(eager[name], expected, name)


@every_cell
@layouts
def test_gradient_under_torch_func(layout, cell, device):
    case = Case(device, layout, cell=cell)
    with kernel_calls(device, forward=case.layer_calls(), backward=case.layer_calls()):
        found = grad(case.loss)(case.parameters, *case.sample(0))
    all_near(found.values(), eager_gradients(case.loss, case.parameters, *case.sample(0)).values())


@every_cell
def test_results_may_be_changed_in_place_under_torch_func(cell, device):
    case = Case(device, cell=cell)
    x = case.samples["input"]

    def doubled(x: Tensor) -> Tensor:
        return case.module(x)[0].mul_(2)

    expected = grad(lambda x: (2 * vmap(lambda x: case.module(x)[0])(x)).square().sum())(x)
    all_near([grad(lambda x: vmap(doubled)(x).square().sum())(x)], [expected])
    all_near([vmap(grad(lambda x: doubled(x).square().sum()))(x)], [expected])


@every_cell
def test_gradient_within_no_grad(cell, device):
    """torch.func.grad differentiates under a no_grad around it, and respects a no_grad within it."""
    case = Case(device, cell=cell)
    sample = case.sample(0)
    expected = grad(case.loss)(case.parameters, *sample)
    with torch.no_grad():
        all_near(grad(case.loss)(case.parameters, *sample).values(), expected.values())

    def detached(x: Tensor) -> Tensor:
        with torch.no_grad():
            factor = case.module(x)[0].sum()
        return factor * x.sum()

    found = grad(detached)(sample[0])
    all_near([found], [case.module(sample[0])[0].sum().detach().expand_as(found)])


# --- derivatives of vectors, and second order under torch.func ---------------------------------------------------------


def small_function(device: str, layout: str = "full", cell: Cell = LSTM_CELL) -> tuple[Callable, Tensor]:
    lstm = cell.module(2, 2, bidirectional=True, device=device, **F64)
    options = {} if layout == "full" else {"lengths": torch.tensor([3, 1], device=device), "output": "last"}
    return lambda x: lstm(x, **options)[0].square().sum(0), torch.randn(3, 2, 2, device=device, **F64)


@every_cell
@forward_mode
@pytest.mark.parametrize("layout", ["full", "last_lengths"])
def test_jacobians(layout, cell, device, reference_operators):
    f, x = small_function(device, layout, cell=cell)
    expected = torch.autograd.functional.jacobian(f, x)
    found = {
        "jacrev": jacrev(f)(x),
        "jacfwd": jacfwd(f)(x),
        "vmap(vjp)": vmap(vjp(f, x)[1])(
            torch.eye(expected.flatten(0, -4).shape[0], device=device, **F64).view(-1, *f(x).shape)
        )[0].view_as(expected),
        "vectorize": torch.autograd.functional.jacobian(f, x, vectorize=True),
        "forward vectorize": torch.autograd.functional.jacobian(f, x, vectorize=True, strategy="forward-mode"),
    }
    for how, jacobian in found.items():
        assert_near(jacobian, expected, how)


@every_cell
def test_reverse_mode_jacobians_run_in_the_kernels(cell, device):
    f, x = small_function(device, cell=cell)
    with kernel_calls(device, forward=1, backward=1):
        jacrev(f)(x)


@every_cell
@forward_mode
def test_second_order_under_torch_func(cell, device, reference_operators):
    """This covers forward over reverse, reverse over reverse and so on, per sample, and Hessian-vector products."""
    vector, x = small_function(device, "last_lengths", cell=cell)

    def f(x: Tensor) -> Tensor:
        return vector(x).sum()

    expected = torch.autograd.functional.hessian(f, x)
    v = torch.randn_like(x)
    product = torch.tensordot(expected, v, 3)
    found = {
        "hessian": hessian(f)(x),
        "jacrev(jacrev)": jacrev(jacrev(f))(x),
        "jacrev(jacfwd)": jacrev(jacfwd(f))(x),
        "vmap(hessian)": vmap(hessian(f))(torch.stack([x + 1, x]))[1],
        "vmap(jacrev(jacrev))": vmap(jacrev(jacrev(f)))(torch.stack([x + 1, x]))[1],
        "vectorize": torch.autograd.functional.hessian(f, x, vectorize=True),
    }
    for how, matrix in found.items():
        assert_near(matrix, expected, how)
    assert_near(jvp(grad(f), (x,), (v,))[1], product, "jvp(grad)")
    assert_near(grad(lambda x: (grad(f)(x) * v).sum())(x), product, "grad(grad)")
    assert_near(vjp(grad(f), x)[1](v)[0], product, "vjp(grad)")


@every_cell_fast
@forward_mode
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "full"])
def test_forward_mode(ragged, recompute, cell, device, reference_operators):
    ours, theirs = twins(3, 5, bidirectional=True, **F64, cell=cell)
    ours = ours.to(device)
    ours.recompute = recompute
    x, v = torch.randn(2, 4, 2, 3, **F64)
    lengths = torch.tensor([4, 4 - ragged])

    def run(x: Tensor) -> Tensor:
        return ours(x.to(device), lengths=lengths.to(device))[0].cpu()

    y, tangent = jvp(run, (x,), (v,))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(run(forward_ad.make_dual(x, v)))
    # nn.LSTM's derivative is linear in v, so two reverse passes give the forward one
    padded = x.clone().requires_grad_()
    expected, _ = pad_packed_sequence(theirs(pack_padded_sequence(padded, lengths))[0])
    u = torch.zeros_like(expected, requires_grad=True)
    (pulled,) = torch.autograd.grad(expected, padded, u, create_graph=True)
    (pushed,) = torch.autograd.grad(pulled, u, v)
    all_near([y, tangent, dual.primal, dual.tangent], [expected, pushed, expected, pushed])


@every_cell
@forward_mode
@pytest.mark.parametrize("operator", ["layer", "recurrence"])
def test_tangent_of_the_output_gradient_alone(operator, cell, device, reference_operators):
    """The graph was made without tangents, and a kernel would silently drop the tangent of the linear backward pass."""
    lstm = cell.module(FEATURES, HIDDEN, 2, bidirectional=True, device=device, **F64)
    x = torch.randn(STEPS, BATCH, FEATURES, device=device, **F64).requires_grad_()
    with projected_by_pytorch() if operator == "recurrence" else nullcontext():
        y = lstm(x)[0]
    u, v = torch.randn(2, *y.shape, device=device, **F64)
    wanted = [x, *lstm.parameters()]
    expected = torch.autograd.grad(y, wanted, v, retain_graph=True)
    with forward_ad.dual_level():
        found = torch.autograd.grad(y, wanted, forward_ad.make_dual(u, v), retain_graph=True)
        tangents = [forward_ad.unpack_dual(g).tangent for g in found]
    all_near(tangents, expected)

    def pull(u: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, wanted, u, retain_graph=True)

    if operator == "layer":
        with pytest.raises(NotImplementedError, match="can't follow a graph that was made outside of them"):
            jvp(pull, (u,), (v,))
    else:
        all_near(jvp(pull, (u,), (v,))[1], expected)


@every_cell
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("how", ["is_grads_batched", "vmap"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_batch_of_output_gradients(dtype, how, create_graph, cell, device):
    """A graph of ordinary autograd takes a batch of output gradients."""
    lstm = cell.module(FEATURES, HIDDEN, 2, bidirectional=True, device=device, dtype=dtype)
    x = torch.randn(STEPS, BATCH, FEATURES, device=device).to(dtype).requires_grad_()
    first = [torch.randn(4, BATCH, HIDDEN, device=device).to(dtype).requires_grad_() for _ in range(cell.states)]
    y = lstm(x, cell.hx(first), lengths=torch.tensor(LENGTHS[0], device=device))[0]
    v = torch.randn(3, *y.shape, device=device).to(dtype)
    wanted = [x, *first, *lstm.parameters()]

    def pull(v: Tensor, **kwargs) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, wanted, v, retain_graph=True, create_graph=create_graph, **kwargs)

    found = pull(v, is_grads_batched=True) if how == "is_grads_batched" else vmap(pull)(v)
    all_near(found, stacked([pull(v[k]) for k in range(3)]))


@every_cell
@pytest.mark.filterwarnings("ignore:birnn_ext..\\w+_recurrence has no rule for torch.func.functionalize:UserWarning")
def test_functionalize(cell, device, reference_operators):
    f, x = small_function(device, cell=cell)
    all_near([torch.func.functionalize(f)(x)], [f(x)])


# --- calls in other ways ----------------------------------------------------------------------------------------------


@every_cell
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("layout", ["plain", "last_lengths"])
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_checkpoint(use_reentrant, layout, recompute, cell, device):
    """torch.utils.checkpoint wraps the module, which has dropout between its layers."""
    case = Case(device, layout, cell=cell)
    case.module.recompute, case.module.dropout = recompute, 0.3
    sample = [t.requires_grad_() if t.is_floating_point() else t for t in case.sample(0)]
    inputs = [t for t in sample if t.is_floating_point()]
    live = dict(case.module.named_parameters())

    def run(*sample: Tensor) -> tuple[Tensor, ...]:
        return case.run(live, *sample)

    results = []
    for outputs in (lambda: run(*sample), lambda: checkpoint(run, *sample, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        sum((k + 1) * out.square().sum() for k, out in enumerate(outputs())).backward()
        results.append([t.grad for t in (*inputs, *live.values())])
        for t in (*inputs, *live.values()):
            t.grad = None
    all_near(*results)


@every_cell
@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("call", [functional_call, stateless.functional_call], ids=["torch.func", "stateless"])
def test_functional_call(call, tie_weights, cell, device):
    ours, theirs = twins(FEATURES, HIDDEN, 2, bidirectional=True, **F64, cell=cell)
    ours = ours.to(device)
    x = torch.randn(STEPS, BATCH, FEATURES, **F64)
    own = {name: p.clone() for name, p in ours.named_parameters()}
    others = {name: torch.randn_like(p).requires_grad_() for name, p in ours.named_parameters()}
    y = call(ours, others, (x.to(device),), tie_weights=tie_weights)[0]
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(others[name])
    expected = theirs(x)[0]
    found = torch.autograd.grad(y.square().sum(), list(others.values()))
    all_near(
        [y.cpu(), *(g.cpu() for g in found)],
        [expected, *torch.autograd.grad(expected.square().sum(), list(theirs.parameters()))],
    )
    assert all(torch.equal(p, own[name]) for name, p in ours.named_parameters())
