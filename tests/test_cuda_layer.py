"""CUDA's operator for a whole layer: against float64, what it needs no launch for, and that LSTM runs it."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cells import RNN_CELL, every_cell, every_persistent_cell
from helpers import TOLERANCE, as_double, assert_near
from test_layer import composite, random_layer, results_and_gradients
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from birnn_ext import LSTM, BiRNN, op_calls

pytestmark = pytest.mark.cuda
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def to_cuda(args):
    return [
        [w.detach().cuda().requires_grad_() for w in arg] if isinstance(arg, list)
        else arg.detach().cuda().requires_grad_(arg.is_floating_point()) if isinstance(arg, torch.Tensor)
        else arg
        for arg in args
    ]  # fmt: skip


@every_cell
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", range(8))
def test_against_float64(case, dtype, cell):
    args = random_layer(cell, random.Random(case), dtype)
    x, weights, bias, *rest = args
    in_double = (*as_double([x]), as_double(weights), bias, *as_double(rest))
    truth = results_and_gradients(partial(composite, cell), *in_double)
    before = op_calls()
    found = results_and_gradients(cell.function("layer"), *to_cuda(args))
    assert op_calls()["cuda_forward"] == before["cuda_forward"] + 1
    assert op_calls()["cuda_backward"] == before["cuda_backward"] + 1
    for k, (a, e) in enumerate(zip(found, truth, strict=True)):
        assert_near(a.cpu(), e, f"result {k}", dtype)


@every_cell
def test_gradients_are_aligned(cell):
    """Kernels that torch.compile makes read an operator's results as aligned to 16 bytes."""
    rnn = cell.module(3, 5, bidirectional=True, dtype=torch.bfloat16, device="cuda")
    y, _ = rnn(torch.randn(4, 2, 3, dtype=torch.bfloat16, device="cuda"))
    for gradient in torch.autograd.grad(y.sum(), list(rnn.parameters())):
        assert gradient.data_ptr() % 16 == 0


# The strides of dy: as if y's first dimension was the batch; rows that are no whole number of 16 bytes apart; one
# gradient for all sequences.
STRIDES = {
    "batch first": lambda dy: dy.transpose(0, 1).contiguous().transpose(0, 1),
    "odd rows": lambda dy: F.pad(dy.flatten(2), (0, 1))[..., :-1].unflatten(2, dy.shape[2:]),
    "expanded": lambda dy: dy[:, :1].expand_as(dy),
}


@every_cell
@pytest.mark.parametrize("algorithm", ["stepwise", "persistent-cta"])
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_y_may_have_any_strides(dtype, strides, algorithm, cell, monkeypatch):
    monkeypatch.setenv("BIRNN_CUDA_ALGO", f"{algorithm},stepwise")
    module = cell.module(3, 8, bidirectional=True, dtype=dtype, device="cuda")
    x = torch.randn(4, 5, 3, dtype=dtype, device="cuda", requires_grad=True)
    y, _ = module(x)
    inputs = [x, *module.parameters()]
    dy = STRIDES[strides](torch.randn(4, 5, 2, 8, dtype=dtype, device="cuda")).flatten(2)
    assert not dy.is_contiguous()
    found = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    dense = torch.autograd.grad(y, inputs, dy.contiguous())
    for a, b in zip(found, dense, strict=True):
        assert torch.equal(a, b)


@every_cell
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_batch_first_input_and_values_beyond_the_ends(dtype, cell):
    """What lies beyond a sequence's end reaches nothing, though products read all rows."""
    generator = torch.Generator().manual_seed(0)
    module = cell.module(5, 8, bidirectional=True, batch_first=True, dtype=dtype, device="cuda")
    x = torch.randn(3, 6, 5, generator=generator).to("cuda", dtype)
    lengths = torch.tensor([6, 0, 4], device="cuda")

    def gradients(beyond):
        filled = x.clone()
        for b, length in enumerate(lengths.tolist()):
            filled[b, length:] = beyond
        filled.requires_grad_()
        module.zero_grad()
        y, states = module(filled, lengths=lengths)
        (y.sum() + sum((k + 1) * state.sum() for k, state in enumerate(states))).backward()
        return [y.detach(), *(p.grad.clone() for p in module.parameters()), filled.grad]

    for a, b in zip(gradients(0.0), gradients(float("nan")), strict=True):
        assert torch.equal(a, b)


@every_cell
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cells_alone_are_saved_as_with_all(dtype, cell):
    args = to_cuda(random_layer(cell, random.Random(1), dtype))
    with torch.no_grad():
        gates, *cells = cell.kept(cell.operator("_layer")(*args, "cells"))
        _, *all_cells = cell.kept(cell.operator("_layer")(*args, "all"))
    assert gates.numel() == 0
    assert all(torch.equal(a, b) for a, b in zip(cells, all_cells, strict=True))


@every_persistent_cell
def test_a_persistent_kernel_runs_a_small_layer(cell):
    x = torch.randn(3, 2, 4, device="cuda")
    weights = [torch.randn(cell.gates * 8, n, device="cuda") for n in (4, 8)]
    before = op_calls()
    cell.operator("_layer")(x, weights, False, *[None] * cell.states, None, "none")
    algorithm = "persistent-cta" if torch.cuda.get_device_capability() >= (8, 0) else "stepwise"
    assert op_calls()[f"cuda_{algorithm}"] == before[f"cuda_{algorithm}"] + 1


def test_stepwise_alone_runs_a_plain_rnn(monkeypatch):
    cell = RNN_CELL
    x, weights = torch.randn(3, 2, 4, device="cuda"), [torch.randn(8 * cell.gates, n, device="cuda") for n in (4, 8)]
    args = (x, weights, False, None, None, "none")
    before = op_calls()["cuda_stepwise"]
    cell.operator("_layer")(*args)
    assert op_calls()["cuda_stepwise"] == before + 1
    monkeypatch.setenv("BIRNN_CUDA_ALGO", "persistent-cta")
    why = f"BIRNN_CUDA_ALGO=persistent-cta can't run this layer: {cell.operators}, hidden_size 8.*run the LSTM and the GRU"
    with pytest.raises(RuntimeError, match=why):
        cell.operator("_layer")(*args)


class Computing(TorchDispatchMode):
    """Counts operators that compute: neither views nor allocations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not (func.is_view or name.startswith(("empty", "new_empty", "detach", "_unsafe_view"))):
            self.names.append(name)
        return out


@every_cell
def test_operators_of_the_tutorials_step(cell):
    """Of the tutorial's model, forward, and forward and backward."""
    model = BiRNN(28, 128, 2, 10, cell=cell.name).cuda()
    x, target = torch.randn(100, 28, 28, device="cuda"), torch.randint(10, (100,), device="cuda")
    with Computing() as forward:
        outputs = model(x)
    assert len(forward.names) <= 8, forward.names
    loss = torch.nn.functional.cross_entropy(outputs, target)
    with Computing() as backward:
        loss.backward()
    assert len(forward.names) + len(backward.names) <= 22, forward.names + backward.names  # of the loss, its backward


def launching(call) -> list[str]:
    """PyTorch's own operators that launch a kernel within those of ours."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    ours = [event for event in profiled.events() if event.name.startswith("birnn_ext::lstm_layer")]
    within = [child.name.removeprefix("aten::") for event in ours for child in event.cpu_children]
    views = {"empty", "reshape", "flatten", "select", "t", "narrow", "view", "contiguous", "unsqueeze"}
    return [name for name in within if name not in views]


# What launches a kernel, by PyTorch's names; with a product goes all that it calls.
LAUNCHES = {
    "mm",
    "addmm",
    "sum",
    "cat",
    "copy_",
    "fill_",
    "zero_",
    "add",
    "add_",
    "masked_fill_",
    "index",
    "index_put_",
}


def launches(call) -> tuple[int, list[str]]:
    """How many kernels a call launches, ours among them, and the names of PyTorch's."""
    before = op_calls()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    names: list[str] = []

    def walk(event) -> None:
        name = event.name.removeprefix("aten::")
        if name in LAUNCHES:
            names.append(name)
        else:
            for child in event.cpu_children:
                walk(child)

    for event in profiled.events():
        if event.cpu_parent is None:
            walk(event)
    ours = sum(count - before[name] for name, count in op_calls().items() if name in ("cuda_forward", "cuda_backward"))
    return ours + len(names), names


def test_launches_of_the_tutorials_step():
    """Of the tutorial's model, forward: x is copied, five products, three recurrences, and their ends are joined."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("stepwise runs there, with launches for each step")
    model = BiRNN(28, 128, 2, 10).cuda()
    x = torch.randn(100, 28, 28, device="cuda")
    model(x).sum().backward()  # gradients that exist are added to
    model.zero_grad()
    outputs = []
    forward, names = launches(lambda: outputs.append(model(x)))
    assert forward <= 10, names
    backward, names = launches(lambda: outputs[0].backward(torch.ones_like(outputs[0])))
    assert backward <= 24, names  # one is the gradient's


def test_what_a_layer_launches_beside_the_recurrence():
    """A product for each direction forward; backward one each for x and W_hh, one for both W_ih, and the biases' sum."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("stepwise runs there, with launches for each step")
    lstm = LSTM(28, 64, bidirectional=True, device="cuda")
    x = torch.randn(5, 16, 28, device="cuda", requires_grad=True)
    lstm(x)[0].sum().backward()
    outputs = []
    assert launching(lambda: outputs.append(lstm(x)[0].sum())) == ["mm"] * 2
    names = launching(lambda: outputs[0].backward())
    assert sorted(names) == sorted(["mm"] * 4 + ["addmm", "sum", "clone"]), names


def test_tolerances_name_every_dtype():
    assert set(DTYPES) == set(TOLERANCE)
