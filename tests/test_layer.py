"""The CPU's operator for a whole layer agrees with an input projection and the recurrence, in values and gradients."""

from __future__ import annotations

import os
import platform
import random
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cells import GRU_CELL, LSTM_CELL, RNN_CELL, Cell, every_cell, every_cell_fast, every_equation
from helpers import TOLERANCE, all_near, assert_near, error, projected_by_pytorch, twins
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import birnn_ext
from birnn_ext import op_calls


def composite(cell, x, weights, bias, *states_and_lengths):
    """Computes the layer without its operator. x beyond a sequence's end must be finite."""
    stride = 4 if bias else 2
    of_x, of_h = (weights[2::4], weights[3::4]) if bias else ([None] * 2,) * 2
    own = "bias_hh" in cell.inputs  # the recurrence adds it, not the projection
    if bias and not own:
        of_x = [a + b for a, b in zip(of_x, of_h, strict=True)]
    gates_x = torch.stack([F.linear(x, w, b) for w, b in zip(weights[::stride], of_x, strict=False)], 2)
    bias_hh = [torch.stack(of_h) if bias else None] if own else []
    return cell.function("recurrence")(gates_x, torch.stack(weights[1::stride]), *bias_hh, *states_and_lengths)


def random_layer(cell: Cell, rng: random.Random, dtype: torch.dtype, sizes: tuple[int, int, int, int] | None = None):
    """Returns x, weights, bias, the states and lengths; all but bias and lengths require gradients."""
    steps, batch, features, hidden = sizes or (
        rng.choice([1, 2, 3, 7]), rng.choice([1, 2, 6, 13, 70]), rng.choice([1, 3, 8, 17]), rng.choice([1, 4, 15, 16, 33])
    )  # fmt: skip
    directions, bias, state, ragged = rng.choice([1, 2]), *(rng.random() < 0.5 for _ in range(3))

    def tensor(*shape: int) -> torch.Tensor:
        # If many features saturated a single unit, its gradients would be what 16 bits leave of 1 - n * n.
        return (torch.randn(shape, dtype=torch.float64) / shape[-1] ** 0.5).to(dtype).requires_grad_()

    x = torch.randn(steps, batch, features, dtype=torch.float64).to(dtype).requires_grad_()
    rows = cell.gates * hidden
    shapes = [(rows, features), (rows, hidden), (rows,), (rows,)][: 4 if bias else 2]
    weights = [tensor(*shape) for _ in range(directions) for shape in shapes]
    states = [tensor(directions, batch, hidden) if state else None for _ in range(cell.states)]
    lengths = torch.tensor([rng.randint(0, steps) for _ in range(batch)]) if ragged else None
    return x, weights, bias, *states, lengths


def results_and_gradients(function, x, weights, bias, *states, **kwargs):
    *states, lengths = states
    inputs = [x, *weights, *(state for state in states if state is not None)]
    out = function(x, weights, bias, *states, lengths, **kwargs)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in out]
    return [*out, *torch.autograd.grad(out, inputs, cotangents)]


def compare_with_the_composite(cell: Cell, recompute: bool, *args) -> None:
    found = results_and_gradients(cell.function("layer"), *args, recompute=recompute)
    all_near(found, results_and_gradients(partial(composite, cell), *args))


@every_equation
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", range(16))
def test_against_the_composite(case, dtype, recompute, cell):
    compare_with_the_composite(cell, recompute, *random_layer(cell, random.Random(case), dtype))


# Among these are more units than one thread has, few rows, many steps, several rounds, and more features than an ISA's
# step.
SIZES_OF_16_BITS = [*[None] * 12, (40, 1, 70, 290), (3, 33, 65, 17), (60, 70, 5, 17), (3, 5, 4, 130)]


def detached_double(args):
    return [t.detach().double().requires_grad_() if torch.is_tensor(t) and t.is_floating_point() else t for t in args]


@every_cell
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_training_is_one_operator(dtype, recompute, cell):
    """Neither the projection nor a sum is rounded before its end, so errors are smaller than with PyTorch's products."""
    rng, squares = random.Random(0), torch.zeros(2)
    products = partial(composite, cell)
    for case, sizes in enumerate(SIZES_OF_16_BITS):
        x, weights, *rest = random_layer(cell, rng, dtype, sizes)
        wide = detached_double(rest)
        truth = results_and_gradients(products, *detached_double([x]), detached_double(weights), *wide)
        before = op_calls()
        with OnlyOurProducts():
            results = results_and_gradients(cell.function("layer"), x, weights, *rest, recompute=recompute)
        counts = {name: count - before[name] for name, count in op_calls().items() if count != before[name]}
        assert counts == {"cpu_forward": 1, "cpu_backward": 1}
        outputs = [t.to(dtype) for t in cell.outputs(truth)]
        all_near(cell.outputs(results), outputs, f"case {case} ")  # in gradients, terms may cancel
        for k, found in enumerate((results, results_and_gradients(products, x, weights, *rest))):
            for actual, expected in zip(found, truth, strict=True):
                scale = expected.square().sum().clamp(min=1e-30)
                squares[k] += (actual.double() - expected).square().sum() / scale
    # A plain cell's derivative comes from y, as in nn.RNN, and near 1 the rounding of y outweighs all else in both.
    assert squares[0] < squares[1] * (4 if cell is RNN_CELL else 1)


@every_cell
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("steps", "batch"), [(64, 512), (7, 2000)])
def test_16_bit_gradients_of_weights_do_not_lose_accuracy_in_long_sums(steps, batch, dtype, cell):
    """Sums are float32, so what remains is the rounding of a result and what the terms' errors leave."""
    x, weights, bias, *_ = random_layer(cell, random.Random(3), dtype, (steps, batch, 5, 9))
    y = cell.function("layer")(x, weights, bias)[0]
    cotangent = (1 + torch.randn_like(y) / 4).to(dtype)
    found = torch.autograd.grad(y, weights, cotangent)
    wide = detached_double(weights)
    y = composite(cell, x.detach().double(), wide, bias)[0]
    for actual, expected in zip(found, torch.autograd.grad(y, wide, cotangent.double()), strict=True):
        assert (actual.double() - expected).norm() <= torch.finfo(dtype).eps / 2 * expected.norm()


@every_cell
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_second_order(dtype, cell):
    if cell is RNN_CELL and dtype == torch.bfloat16:
        pytest.skip("bfloat16 is too coarse for second derivatives of a plain cell: nn.RNN's are off by more than ours")
    x, weights, *rest = random_layer(cell, random.Random(2), dtype, (4, 6, 5, 9))

    def penalty(function, x, weights, *rest):
        inputs = [x, *weights]
        grads = torch.autograd.grad(function(x, weights, *rest)[0].square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    wide = penalty(partial(composite, cell), *detached_double([x]), detached_double(weights), *detached_double(rest))
    tolerance = TOLERANCE[dtype] * (4 if cell is RNN_CELL else 1)  # its derivative comes from y, which is rounded
    for found, expected in zip(penalty(cell.function("layer"), x, weights, *rest), wide, strict=True):
        assert error(found, expected.to(dtype)) <= tolerance


class OnlyOurProducts(TorchDispatchMode):
    """Fails where PyTorch multiplies matrices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        products = {"mm", "addmm", "bmm", "baddbmm", "matmul", "linear"}
        assert func.overloadpacket not in {getattr(torch.ops.aten, name) for name in products}
        return func(*args, **(kwargs or {}))


class NoBatchedProduct(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (torch.ops.aten.bmm, torch.ops.aten.baddbmm)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("cell", "options"),
    [
        (LSTM_CELL, {}),
        (LSTM_CELL, {"dtype": torch.bfloat16}),
        (LSTM_CELL, {"proj_size": 4}),
        (LSTM_CELL, {"layer_norm": True}),
        (GRU_CELL, {}),
        (GRU_CELL, {"dtype": torch.bfloat16}),
    ],
    ids=str,
)
def test_an_input_projection_is_one_product(cell, options, device):
    """PyTorch would copy the weights for each sequence if the batch is first and they need no gradient."""
    rnn = cell.module(6, 8, 2, batch_first=True, bidirectional=True, device=device, **options)
    x = torch.randn(3, 5, 6, device=device, dtype=options.get("dtype"))
    with projected_by_pytorch(), NoBatchedProduct():
        with torch.no_grad():
            rnn(x)
        rnn.requires_grad_(False)
        rnn(x.requires_grad_())[0].sum().backward()


@every_equation
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_against_the_composite_at_length(seed, cell):
    for case in range(20):
        for recompute in (False, True):
            test_against_the_composite(16 + 20 * seed + case, torch.float64, recompute, cell)


# Some have more steps than a round, more units than a group of panels or a tile, or few rows with many steps.
@every_cell
@pytest.mark.parametrize("sizes", [(60, 70, 5, 17), (9, 300, 3, 8), (3, 5, 4, 290), (150, 1, 30, 20)], ids=str)
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
def test_sizes_that_take_several_rounds(sizes, recompute, cell):
    for case in range(4):
        compare_with_the_composite(cell, recompute, *random_layer(cell, random.Random(case), torch.float64, sizes))


@every_cell_fast
@pytest.mark.parametrize("sizes", [(1, 1, 16, 5), (1, 3, 48, 17), (2, 1, 80, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_sizes_of_a_single_tile(sizes, dtype, cell):
    compare_with_the_composite(cell, False, *random_layer(cell, random.Random(sum(sizes)), dtype, sizes))


@every_cell
@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
def test_infinite_weights_of_a_single_tile(value, cell):
    """dx of a sequence whose gradient is 0 becomes NaN as in PyTorch's module: 0 times infinity counts here, too."""
    ours, theirs = twins(16, 5, cell=cell)
    for module in (ours, theirs):
        with torch.no_grad():
            module.weight_ih_l0[2, 3] = value
    found = []
    for module in (ours, theirs):
        x = torch.rand(1, 3, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        module(x)[0][:, 0].nansum().backward()
        found.append(x.grad)
    assert found[1].isnan().any(-1).all() and torch.equal(*(dx.isnan() for dx in found))
    assert_near(*(dx.nan_to_num() for dx in found))


@every_cell_fast
def test_strides(cell):
    """x is batch-first or has strided features, and gradients arrive transposed or expanded."""
    x, weights, *rest = random_layer(cell, random.Random(1), torch.float64, (5, 4, 6, 9))
    functions = (cell.function("layer"), partial(composite, cell))
    views = (
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: x[:, :1].expand(-1, 4, -1),
    )
    for view in views:
        ours, theirs = (
            results_and_gradients(lambda x, *a, f=f, view=view: f(view(x), *a), x, weights, *rest) for f in functions
        )
        all_near(ours, theirs)
    for function in (lambda y: y.sum(), lambda y: y.transpose(0, 1).contiguous().square().sum()):
        ours, theirs = (torch.autograd.grad(function(f(x, weights, *rest)[0]), [x, *weights]) for f in functions)
        all_near(ours, theirs)


@every_cell
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "full"])
def test_gradcheck_first_and_second_order(ragged, recompute, cell):
    x, weights, bias, *_ = random_layer(cell, random.Random(6), torch.float64, (3, 3, 2, 2))
    shape = (len(weights) // (4 if bias else 2), 3, 2)
    states = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(cell.states)]
    lengths = torch.tensor([2, 3, 0]) if ragged else None

    def run(x, *others):
        given, weights = others[: cell.states], others[cell.states :]
        return cell.function("layer")(x, list(weights), bias, *given, lengths, recompute=recompute)

    assert torch.autograd.gradcheck(run, (x, *states, *weights))
    assert torch.autograd.gradgradcheck(run, (x, *states, *weights))


@every_cell_fast
def test_second_order_where_one_input_depends_on_another(cell):
    x, weights, *rest = random_layer(cell, random.Random(3), torch.float64, (3, 2, 4, 4))

    def penalty(function):
        (grad,) = torch.autograd.grad(
            function(x * weights[0].sum(), weights, *rest)[0].square().sum(),
            weights[0],
            create_graph=True,
        )
        return torch.autograd.grad(grad.square().sum(), [x, *weights])

    all_near(penalty(cell.function("layer")), penalty(partial(composite, cell)))


@every_cell
@pytest.mark.parametrize("save", ["none", "all", "cells"])
@pytest.mark.parametrize(("case", "dtype"), [(0, torch.float32), (3, torch.float32), (5, torch.bfloat16)], ids=str)
def test_opcheck(case, dtype, save, cell):
    args = random_layer(cell, random.Random(case), dtype, (3, 4, 5, 6))
    x, weights, bias, *rest = args
    detached = (x.detach(), [w.detach() for w in weights], bias, *(None if t is None else t.detach() for t in rest))
    layer_op, backward_op = cell.operator("_layer"), cell.operator("_layer_backward")
    if save == "none":
        torch.library.opcheck(layer_op, (*detached, "none"))
        return
    torch.library.opcheck(layer_op, (*args, save))
    y, h_n, *_ = results = layer_op(*detached, save)
    grads = (torch.randn_like(y), torch.randn_like(h_n), None)[: 1 + cell.states]
    for wanted in ((True, True, True), (False, True, False)):
        torch.library.opcheck(backward_op, (*detached, y, *cell.kept(results), *grads, *wanted))


@every_cell
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("sizes", [(40, 61, 5, 40), (30, 2, 7, 90)], ids=str)
@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_bitwise_the_same_for_any_number_of_threads(dtype, ragged, sizes, recompute, cell):
    """Threads split many sequences among them, and share few, of which each has some hidden units."""
    *args, _ = random_layer(cell, random.Random(2), dtype, sizes)
    lengths = torch.arange(sizes[1]).remainder(sizes[0] + 1) if ragged else None
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5, 8, 2):
            torch.set_num_threads(threads)
            results.append(results_and_gradients(cell.function("layer"), *args, lengths, recompute=recompute))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@every_cell
def test_concurrent_calls(cell):
    """Several Python threads at once, each with its own work, get the same results as alone."""
    function = cell.function("layer")
    cases = [random_layer(cell, random.Random(k), torch.float32, (20, 30, 9, 24)) for k in range(4)]
    alone = [results_and_gradients(function, *case) for case in cases]
    together: list = [None] * len(cases)

    def work(k: int) -> None:
        for _ in range(5):
            together[k] = results_and_gradients(function, *cases[k])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@every_cell
def test_infinite_weights_reach_the_same_sequences_for_any_number_of_threads(cell):
    """0 times infinity is NaN, so the kernels must not skip products with gradients of 0 then."""
    generator = torch.Generator().manual_seed(3)
    rows = cell.gates * 8
    weights = [torch.randn(shape, generator=generator) / 4 for shape in [(rows, 3), (rows, 8)] * 2]
    weights[1][0, 0] = float("inf")
    x, h0 = torch.rand(6, 24, 3, generator=generator), torch.rand(2, 24, 8, generator=generator) + 0.5
    args = (x, weights, False, h0, *[None] * cell.states)
    y, *_ = results = cell.operator("_layer")(*args, "all")
    assert not y.isnan().any()
    dy = torch.zeros_like(y)
    dy[:, ::7] = 1
    seen, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            states = [None] * cell.states  # their gradients
            dx = cell.operator("_layer_backward")(*args, y, *cell.kept(results), dy, *states, True, True, False)[0]
            seen.append(dx.isnan())
    finally:
        torch.set_num_threads(before)
    assert seen[0].any(-1).any(0).all()
    assert all(torch.equal(seen[0], other) for other in seen)


@every_cell
def test_errors_of_sums_do_not_grow_with_their_length(cell):
    """The weights' gradients are sums over 128,000 steps of sequences."""
    rnn = cell.module(8, 16)
    wide = cell.module(8, 16, dtype=torch.float64)
    wide.load_state_dict(rnn.state_dict())
    x = torch.randn(2000, 64, 8)
    grads = [torch.autograd.grad(m(x.to(m.weight_ih_l0.dtype))[0].square().sum(), m.parameters()) for m in (rnn, wide)]
    for a, e in zip(*grads, strict=True):
        assert error(a, e) < 2e-6


@every_cell
def test_batch_of_gradients(cell):
    x, weights, *rest = random_layer(cell, random.Random(1), torch.float64, (4, 3, 5, 6))
    y = cell.function("layer")(x, weights, *rest)[0]
    v = torch.randn(5, *y.shape, dtype=torch.float64)
    batch = torch.autograd.grad(y, [x, *weights], v, is_grads_batched=True, retain_graph=True)
    for k in range(5):
        all_near([g[k] for g in batch], torch.autograd.grad(y, [x, *weights], v[k], retain_graph=True))


@every_cell
def test_second_order_within_autocast(cell):
    """A graph that was made outside autocast keeps its types."""
    rnn = cell.module(3, 5)
    x = torch.randn(4, 2, 3, requires_grad=True)
    y = rnn(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    second = torch.autograd.grad(grad.square().sum(), list(rnn.parameters()))
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    all_near(second, torch.autograd.grad(grad.square().sum(), list(rnn.parameters())))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_cell
def test_works_in_a_forked_child(cell, dtype):
    """The child has lost OpenMP's threads, and would hang if it waited for them."""
    code = f"""
import os, torch
from birnn_ext import {cell.module.__name__} as Module
rnn = Module(28, 128, 2, bidirectional=True).to({dtype})
x = torch.randn(28, 100, 28).to({dtype}).requires_grad_()

def step():
    return torch.autograd.grad(rnn(x)[0].sum(), x)[0]

expected = step()
child = os.fork()
if child == 0:
    os._exit(0 if torch.allclose(step(), expected, rtol=1e-2, atol=1e-2) else 1)
print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "child 0" in done.stdout, done.stdout + done.stderr


def saved_floats(rnn: nn.RNNBase, x: torch.Tensor) -> int:
    """Counts the values that a forward pass saves for the backward pass, without parameters and input."""
    known = {t.data_ptr() for t in (x, *rnn.parameters())}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.data_ptr() not in known:
            kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        rnn(x)
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_cell_fast
def test_saved_state_for_the_backward_pass(cell, dtype):
    steps, batch, hidden = 7, 5, 16
    plain = cell.module(4, hidden, bidirectional=True, dtype=dtype)
    frugal = cell.module(4, hidden, bidirectional=True, recompute=True, dtype=dtype)
    x, values = torch.randn(steps, batch, 4).to(dtype), steps * batch * 2 * hidden
    assert saved_floats(plain, x) == (cell.states + cell.saved) * values  # y, an LSTM's cells, and the gates
    assert saved_floats(frugal, x) == cell.states * values
    with torch.no_grad():
        nothing = [None] * (cell.states + 1)
        results = cell.operator("_layer")(x, list(plain.parameters()), True, *nothing, "none")
        assert all(kept.numel() == 0 for kept in cell.kept(results))
        assert saved_floats(plain, x) == 0


@every_cell
def test_recompute_gives_the_same(cell):
    torch.manual_seed(1)
    plain = cell.module(5, 12, 3, bidirectional=True, batch_first=True)
    frugal = cell.module(5, 12, 3, bidirectional=True, batch_first=True, recompute=True)
    frugal.load_state_dict(plain.state_dict())
    x = torch.randn(4, 9, 5)
    grads = []
    for rnn in (plain, frugal):
        y, _ = rnn(x, lengths=torch.tensor([9, 2, 0, 5]))
        grads.append([y, *torch.autograd.grad(y.square().sum(), rnn.parameters())])
    all_near(*grads)


@every_cell
def test_vanished_gradients_are_zero_and_cheap(cell):
    """Gradients of the last output vanish over many steps. One that is 0 in one sequence must not stop another's."""
    rnn = cell.module(3, 16, bidirectional=True)
    with torch.no_grad():
        for p in rnn.parameters():
            p.mul_(0.1)
    steps, batch = 400, 13
    x = torch.randn(steps, batch, 3, requires_grad=True)
    dy = torch.zeros(steps, batch, 32)
    dy[-1, :7], dy[250, 9] = 1, 1
    (dx,) = torch.autograd.grad(rnn(x)[0], x, dy)
    double = cell.module(3, 16, bidirectional=True, dtype=torch.float64)
    double.load_state_dict(rnn.state_dict())
    wide = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(double(wide)[0], wide, dy.double())
    assert_near(dx, expected, dtype=torch.float32)
    assert (dx[100, :7] == 0).all()  # the forward direction, 300 steps before the end
    assert (dx[240, 9] != 0).any()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="denormals are flushed on x86 only")
@every_cell
def test_only_the_kernels_flush_denormals(cell):
    rnn = cell.module(3, 16, bidirectional=True)
    x = torch.randn(5, 4, 3, requires_grad=True)
    y = rnn(x)[0]
    assert (torch.autograd.grad(y, x, torch.full_like(y, 1e-40))[0] == 0).all()
    assert (torch.full((100,), 1e-30) * 1e-10 != 0).all()  # the calling thread does not flush


@pytest.mark.skipif(
    birnn_ext.build_info()["cpu_isa"] != "amx", reason="this CPU has no AMX, or BIRNN_CPU_ISA forbids it"
)
@every_cell
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
def test_matmul_precision_high(recompute, cell):
    """Products keep 16 bits, so errors are smaller than with bfloat16's 8, and larger than with float32's 24."""
    case = random_layer(cell, random.Random(1), torch.float64, (9, 21, 30, 70))
    wide = results_and_gradients(cell.function("layer"), *case)
    x, weights, bias, *states, lengths = case
    states = [None if s is None else s.detach().float().requires_grad_() for s in states]
    narrow = (x.detach().float().requires_grad_(), [w.detach().float().requires_grad_() for w in weights], bias)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        results = results_and_gradients(cell.function("layer"), *narrow, *states, lengths, recompute=recompute)
    finally:
        torch.set_float32_matmul_precision(before)
    errors = [error(a, e) for a, e in zip(results, wide, strict=True)]
    assert 1e-7 < max(errors) < 1e-4, errors


@every_cell
def test_counts_as_a_call_of_the_kernels(cell):
    before = op_calls()
    cell.module(3, 5, bidirectional=True)(torch.randn(4, 2, 3))[0].sum().backward()
    after = op_calls()
    assert (after["cpu_forward"] - before["cpu_forward"], after["cpu_backward"] - before["cpu_backward"]) == (1, 1)


def w(*shape: int, **kwargs) -> torch.Tensor:
    return torch.zeros(shape, **kwargs)


OK, OK_GRU = [w(8, 3), w(8, 2)], [w(6, 3), w(6, 2)]
layer_op, backward_op = LSTM_CELL.operator("_layer"), LSTM_CELL.operator("_layer_backward")
gru_op, gru_backward_op = GRU_CELL.operator("_layer"), GRU_CELL.operator("_layer_backward")
ERRORS = [
    (lambda: layer_op(w(4, 3), OK, False, None, None, None, "none"), ValueError, r"x must have shape \(T, B, I\), got \[4, 3\]"),
    (lambda: layer_op(w(0, 2, 3), OK, False, None, None, None, "none"), ValueError, "at least one time step"),
    (lambda: layer_op(w(4, 2, 3, dtype=torch.float16), OK, False, None, None, None, "none"), TypeError, "w_ih must be Half, got Float"),
    (lambda: layer_op(w(4, 2, 3), OK, True, None, None, None, "none"), ValueError, "weights must be 4 or 8 tensors, got 2"),
    (lambda: layer_op(w(4, 2, 3), [w(8, 3), w(8)], False, None, None, None, "none"), ValueError, r"w_hh must have shape \(4H, H\), got \[8\]"),
    (lambda: layer_op(w(4, 2, 3), [w(8, 4), w(8, 2)], False, None, None, None, "none"), ValueError, r"w_ih must have shape \[8, 3\], got \[8, 4\]"),
    (lambda: layer_op(w(4, 2, 3), [*OK, w(8), w(7)], True, None, None, None, "none"), ValueError, r"bias_hh must have shape \[8\], got \[7\]"),
    (lambda: layer_op(w(4, 2, 3), [w(8, 3), w(8, 2).double()], False, None, None, None, "none"), TypeError, "w_hh must be Float, got Double"),
    (lambda: layer_op(w(4, 2, 3), OK, False, w(1, 2, 3), None, None, "none"), ValueError, r"h0 must have shape \[1, 2, 2\]"),
    (lambda: layer_op(w(4, 2, 3), OK, False, None, None, torch.tensor([1, 5]), "none"), ValueError, r"between 0 and T = 4, got lengths\[1\] = 5"),
    (lambda: layer_op(w(4, 2, 0), [w(8, 0), w(8, 2)], False, None, None, None, "none"), ValueError, "one time step and one feature"),
    (lambda: layer_op(w(4, 2, 3), OK, False, None, None, None, "some"), ValueError, 'save must be "none", "cells" or "all", got "some"'),
    (lambda: layer_op(w(4, 2, 3), [w(8, 3), w(8, 2, device="meta")], False, None, None, None, "none"), ValueError, "all tensors must be on one device, got .'cpu', 'meta'."),
    (lambda: backward_op(w(4, 2, 3), OK, False, None, None, None, w(4, 2, 1, 2), w(0), w(0), None, None, None, True, True, False), ValueError, "cells must have shape"),
    (lambda: backward_op(w(4, 2, 3), OK, False, None, None, None, w(4, 2, 1, 3), w(0), w(4, 2, 1, 2), None, None, None, True, True, False), ValueError, "y must have shape"),
    (lambda: gru_op(w(4, 3), OK_GRU, False, None, None, "none"), ValueError, r"gru_layer: x must have shape \(T, B, I\), got \[4, 3\]"),
    (lambda: gru_op(w(4, 2, 3), OK_GRU, True, None, None, "none"), ValueError, "gru_layer: weights must be 4 or 8 tensors, got 2"),
    (lambda: gru_op(w(4, 2, 3), [w(6, 3), w(6)], False, None, None, "none"), ValueError, r"w_hh must have shape \(3H, H\), got \[6\]"),
    (lambda: gru_op(w(4, 2, 3), OK, False, None, None, "none"), ValueError, r"w_ih must have shape \[6, 3\], got \[8, 3\]"),
    (lambda: gru_backward_op(w(4, 2, 3), OK_GRU, False, None, None, w(4, 2, 1, 3), w(0), None, None, True, True, False), ValueError, "y must have shape"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS, ids=[message for _, _, message in ERRORS])
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
