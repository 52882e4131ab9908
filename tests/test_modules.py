"""Our modules agree with PyTorch's in results, gradients, states, arguments and errors."""

from __future__ import annotations

import copy
import inspect
import itertools
import subprocess
import sys

import pytest
import torch
from cells import GRU_CELL, LSTM_CELL, RELU_CELL, RNN_CELL, every_cell, every_equation, every_h_cell
from helpers import (
    TOLERANCE,
    WORSE_THAN_TORCH,
    all_near,
    assert_near,
    error,
    gradients,
    leaves,
    plain_torch,
    random_state,
    twins,
)
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from birnn_ext import GRU, LSTM, RNN, op_calls
from birnn_ext.ops import lstm_recurrence

# T, B, I, H: batch 1, one step, one unit, H at and off multiples of every vector width, more rows than a register tile
SIZES = [(1, 1, 3, 5), (5, 3, 4, 1), (7, 1, 8, 16), (4, 13, 5, 17), (3, 2, 28, 24), (2, 7, 3, 66)]


@every_equation
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("bidirectional", [True, False], ids=["bi", "uni"])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_same_numbers_and_gradients(size, layers, bidirectional, bias, dtype, cell, device):
    steps, batch, features, hidden = size
    if dtype == torch.float32 and ((cell is RNN_CELL and hidden == 1) or (cell is RELU_CELL and hidden < 16)):
        pytest.skip(
            "gradients of few units, which tanh or relu may nearly shut, are sums that cancel: both modules round"
        )
    ours, theirs = twins(
        features, hidden, layers, bias=bias, bidirectional=bidirectional, device=device, dtype=dtype, cell=cell
    )
    x = torch.randn(steps, batch, features, device=device, dtype=dtype, requires_grad=True)
    state = random_state(layers * (1 + bidirectional), batch, hidden, device=device, dtype=dtype, cell=cell)
    for s in state:
        s.requires_grad_()
    results = []
    for module in (ours, theirs):
        y, *states = leaves(module(x, cell.hx(state)))
        results.append([y, *states, *gradients(module, (y, *states), (x, *state))])
    all_near(*results)


@every_cell
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@pytest.mark.parametrize("with_state", [True, False], ids=["hx", "no_hx"])
@pytest.mark.parametrize("layout", ["time_first", "batch_first", "unbatched", "unbatched_batch_first"])
def test_layouts(layout, with_state, contiguous, cell, device):
    steps, batch, features, hidden = 6, 4, 5, 9
    ours, theirs = twins(
        features, hidden, 2, bidirectional=True, batch_first="batch_first" in layout, device=device, cell=cell
    )
    shape = {"time_first": (steps, batch, features), "batch_first": (batch, steps, features)}.get(
        layout, (steps, features)
    )
    x = torch.randn(shape, device=device)
    state_shape = (4, hidden) if "unbatched" in layout else (4, batch, hidden)
    state = tuple(torch.randn(state_shape, device=device) for _ in range(cell.states))
    if not contiguous:
        x = torch.randn(*shape[:-1], 2 * features, device=device)[..., ::2]
        state = tuple(torch.stack([s, s], -1)[..., 0] for s in state)
        assert not x.is_contiguous()
        assert not state[0].is_contiguous()
    x.requires_grad_()
    hx = state if with_state else None
    results = []
    for module in (ours, theirs):
        y, *states = leaves(module(x, cell.hx(hx)))
        results.append([y, *states, *gradients(module, (y, *states), (x,))])
    all_near(*results)


@every_cell
def test_non_contiguous_gradient_of_the_output(cell, device):
    ours, theirs = twins(4, 6, bidirectional=True, device=device, cell=cell)
    x = torch.randn(5, 3, 4, device=device, requires_grad=True)
    # expand makes a gradient with strides 0
    all_near(*(torch.autograd.grad(m(x)[0].sum(), [x, *m.parameters()]) for m in (ours, theirs)))


@every_cell
@pytest.mark.parametrize("used", [0, 1, -1], ids=["y", "h_n", "c_n"])
def test_gradient_of_one_result_alone(used, cell, device):
    ours, theirs = twins(4, 6, 2, bidirectional=True, device=device, cell=cell)
    x = torch.randn(5, 3, 4, device=device, requires_grad=True)
    results = []
    for module in (ours, theirs):
        results.append(gradients(module, [leaves(module(x))[used]], [x]))
    all_near(*results)


def test_a_long_memory_in_16_bits():
    """With f near 1, cells grow large and remember hundreds of steps, so small errors of sigmoid and tanh add up."""
    torch.manual_seed(0)
    exact = nn.LSTM(16, 32)
    with torch.no_grad():
        exact.bias_ih_l0[32:64] += 5
    ours = LSTM(16, 32)
    ours.load_state_dict(exact.state_dict())
    ours = ours.half()
    exact = exact.double()
    exact.load_state_dict(ours.state_dict())
    x = torch.randn(1000, 4, 16, dtype=torch.float16)
    inputs = [x.double().requires_grad_(), x.requires_grad_()]
    outputs = [module(value)[0] for module, value in zip((exact, ours), inputs, strict=True)]
    assert (outputs[1] - outputs[0]).pow(2).mean().sqrt() < 2e-4  # 1.1e-4 with float32's functions
    for output in outputs:
        output.sum().backward()
    difference = inputs[1].grad.double() - inputs[0].grad
    assert difference.norm() < 8e-3 * inputs[0].grad.norm()  # 4e-3 with float32's functions


@every_cell
@pytest.mark.parametrize(("size", "draws"), [((9, 5, 7, 19), 6), ((28, 8, 28, 64), 3), ((1, 1, 3, 40), 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_error_is_no_worse_than_torch(size, draws, dtype, cell, device):
    """Compares root-mean-square errors against float64, over y, states and all gradients. They are means over enough
    draws of weights and inputs to exclude chance.

    On a GPU the expected ratios are 0.9 to 1.3 (for a single step). Ratios of single draws vary by 0.06, 0.03 and
    0.2 (more with fewer roundings), so the means vary by 0.03 or less: a sixth of the distance to the limit of 1.5.
    """
    steps, batch, features, hidden = size
    errors = torch.zeros(2, 3)
    for _ in range(draws):
        truth = cell.theirs(features, hidden, 2, bidirectional=True).to(dtype).double()
        ours, theirs = twins(features, hidden, 2, bidirectional=True, device=device, dtype=dtype, cell=cell)
        x = torch.randn(steps, batch, features).to(dtype)
        weights = torch.randn(steps, batch, 2 * hidden).to(dtype)
        results = []
        for module in (truth, ours, theirs):
            module.load_state_dict(truth.state_dict())
            leaf = x.to(next(module.parameters())).requires_grad_()
            y, *states = leaves(module(leaf))
            grads = torch.autograd.grad((y * weights.to(y)).sum(), [leaf, *module.parameters()])
            assert module is truth or {y.dtype, *(s.dtype for s in states)} == {dtype}
            results.append(
                [t.detach().double().cpu() for t in (y, torch.cat(states))] + [g.double().cpu() for g in grads]
            )

        def norm_error(result, results=results):
            relative = [
                float((a - e).norm() / e.norm().clamp(min=1e-30)) for a, e in zip(result, results[0], strict=True)
            ]
            return torch.tensor([relative[0], relative[1], sum(relative[2:]) / len(relative[2:])])

        errors[0] += norm_error(results[1])
        errors[1] += norm_error(results[2])
    ratio = errors[0] / errors[1]
    assert (ratio <= WORSE_THAN_TORCH).all(), f"errors of y, states, gradients in terms of PyTorch's: {ratio.tolist()}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_biases_are_rounded_with_the_product_or_not_at_all(dtype, device):
    """1 + e + e, where 16 bits can't tell 1 + e from 1: rounded after each sum it would be 1."""
    e = 0.375 * torch.finfo(dtype).eps
    ours = LSTM(1, 1, device=device, dtype=dtype)
    with torch.no_grad():
        for parameter, value in zip(ours.parameters(), (e, 0, 1, e), strict=True):  # w_ih, w_hh, b_ih, b_hh
            parameter.fill_(value)
    y, _ = ours(torch.ones(1, 1, 1, device=device, dtype=dtype))

    def recurrence(z, dtype):
        w_hh = torch.zeros(1, 4, 1, device=device, dtype=dtype)
        return lstm_recurrence(torch.full((1, 1, 1, 4), z, device=device, dtype=dtype), w_hh)[0].flatten()

    once, thrice = recurrence(1 + 2 * e, dtype), recurrence(1, dtype)
    never = recurrence(1 + 2 * e, torch.float64).to(dtype)
    assert not torch.equal(once, thrice)
    assert torch.equal(y.flatten(), once) or torch.equal(y.flatten(), never)
    assert not torch.equal(y.flatten(), thrice) or torch.equal(never, thrice)


@every_cell
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype, cell, device):
    ours, theirs = twins(5, 12, 2, bidirectional=True, device=device, cell=cell)
    x = torch.randn(6, 4, 5, device=device, requires_grad=True)
    state = random_state(4, 4, 12, device=device, cell=cell)
    results = []
    for module, enabled in ((ours, True), (theirs, False)):  # nn.LSTM's autocast fails for float16 on some CPUs
        with torch.autocast(device, dtype, enabled=enabled):
            y, *states = leaves(module(x, cell.hx(state)))
        results.append([y, *states, *gradients(module, (y, *states), (x,))])
    for a, e in zip(*results, strict=True):
        assert_near(a, e, dtype=dtype)
    expected = torch.float32 if cell is GRU_CELL and device == "cpu" else dtype
    assert all(t.dtype == expected for t in results[0][: 1 + cell.states])
    assert all(g.dtype == torch.float32 for g in results[0][1 + cell.states :])


@every_cell
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_autocast_takes_any_mixture_of_types(x_dtype, state_dtype, dtype, cell, device):
    """Results have autocast's type, as nn.LSTM's have on CUDA, and a GRU's on the CPU that of nn.GRU's.

    A gradient has the type of its tensor.
    """
    ours, theirs = twins(5, 12, 2, bidirectional=True, device=device, cell=cell)
    x = torch.randn(6, 4, 5, device=device).to(x_dtype).requires_grad_()
    state = None
    if state_dtype is not None:
        state = tuple(s.to(state_dtype).requires_grad_() for s in random_state(4, 4, 12, device=device, cell=cell))
    inputs = (x, *(state or ()))
    with torch.autocast(device, dtype):
        y, *states = leaves(ours(x, cell.hx(state)))
        as_theirs = cell is GRU_CELL and device == "cpu"
        expected = {t.dtype for t in leaves(theirs(x, cell.hx(state)))} if as_theirs else {dtype}
    assert {y.dtype, *(s.dtype for s in states)} == expected
    grads = gradients(ours, (y, *states), inputs)
    assert [g.dtype for g in grads] == [t.dtype for t in (*inputs, *ours.parameters())]
    expected = leaves(theirs(x.float(), cell.hx(state and tuple(s.float() for s in state))))
    loosest = max((x_dtype, state_dtype or dtype, dtype), key=TOLERANCE.__getitem__)
    for a, e in zip([y, *states, *grads], [*expected, *gradients(theirs, expected, inputs)], strict=True):
        assert_near(a, e, dtype=loosest)


@every_cell
def test_autocast_leaves_float64_alone(cell, device):
    ours, theirs = twins(5, 6, device=device, dtype=torch.float64, cell=cell)
    x = torch.randn(3, 2, 5, device=device, dtype=torch.float64)
    with torch.autocast(device, torch.bfloat16):
        y = ours(x)[0]
        assert y.dtype == torch.float64
        with pytest.raises(
            ValueError, match=r"input dtype \(torch\.float32\) does not match weight dtype \(torch\.float64\)"
        ):
            ours(x.float())
        with pytest.raises(ValueError, match=r"input dtype \(torch\.int64\)"):
            cell.module(5, 6, device=device)(x.long())
    all_near([y], [theirs(x)[0]])


# --- requests of nn.LSTM's users --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "before", "after"),
    [
        (LSTM, "proj_size=0, ", ", recurrent_dropout=0.0, zoneout=0.0, layer_norm=False, learned_state=False"),
        (GRU, "", ", learned_state=False, **refused"),
        (RNN, "", ", learned_state=False, **refused"),
    ],
)
def test_signature_is_that_of_the_documentation(module, before, after):
    kind = "nonlinearity='tanh', " if module is RNN else ""
    expected = (
        f"(input_size, hidden_size, num_layers=1, {kind}bias=True, batch_first=False, dropout=0.0, bidirectional=False, "
        f"{before}device=None, dtype=None, *, recompute=False{after})"
    )
    parameters = list(inspect.signature(module).parameters.values())
    plain = inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters])
    assert str(plain) == expected


@every_cell
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_same_seed_same_weights(bidirectional, bias, cell, device):
    modules = []
    for cls in (cell.module, cell.theirs):
        torch.manual_seed(3)
        modules.append(cls(5, 7, 3, bias=bias, bidirectional=bidirectional, device=device))
    ours, theirs = modules
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert isinstance(ours, cell.theirs)
    assert ours.all_weights[2][0] is ours.get_parameter("weight_ih_l" + ("1" if bidirectional else "2"))


@every_cell
def test_state_dict_both_ways(cell):
    ours, theirs = cell.module(5, 7, 2, bidirectional=True), cell.theirs(5, 7, 2, bidirectional=True)
    x = torch.randn(4, 3, 5)
    assert theirs.load_state_dict(ours.state_dict()) == ours.load_state_dict(ours.state_dict())
    all_near([ours(x)[0]], [theirs(x)[0]])
    theirs = cell.theirs(5, 7, 2, bidirectional=True)
    ours.load_state_dict(theirs.state_dict())
    all_near([ours(x)[0]], [theirs(x)[0]])


@every_cell
def test_dropout(cell, device):
    ours = cell.module(4, 8, 3, dropout=0.5, device=device)
    x = torch.randn(3, 2, 4, device=device)
    ours.eval()
    assert torch.equal(ours(x)[0], ours(x)[0])
    ours.train()
    assert not torch.equal(ours(x)[0], ours(x)[0])
    torch.manual_seed(5)
    first = ours(x)[0]
    torch.manual_seed(5)
    assert torch.equal(first, ours(x)[0])


@every_cell
@pytest.mark.parametrize("bidirectional", [True, False])
def test_dropout_1_zeroes_the_input_of_later_layers(bidirectional, cell, device):
    ours, theirs = twins(4, 8, 2, dropout=1.0, bidirectional=bidirectional, device=device, cell=cell)
    x = torch.randn(3, 2, 4, device=device)
    all_near([ours(x)[0]], [theirs(x)[0]])


@every_cell
def test_dropout_has_the_right_mean(cell):
    ours = cell.module(4, 8, 2, dropout=0.25)
    seen = []
    ours._layer, real = (
        lambda layer, last, given, *rest: seen.append(given.x) or real(layer, last, given, *rest),
        ours._layer,
    )
    ours(torch.randn(50, 40, 4))
    kept = (seen[1] != 0).float().mean().item()
    assert abs(kept - 0.75) < 0.02


@every_cell
def test_live_weights(cell, device):
    """Weights may be pruned, parametrized, shared and swapped, as nothing is flattened."""
    ours, theirs = twins(4, 6, device=device, cell=cell)
    x = torch.randn(3, 2, 4, device=device)
    for module in (ours, theirs):
        with torch.no_grad():
            module.weight_hh_l0.data = module.weight_hh_l0.data.clone() * 2
    all_near([ours(x)[0]], [theirs(x)[0]])
    prune.l1_unstructured(ours, "weight_hh_l0", 0.5)
    with torch.no_grad():
        theirs.weight_hh_l0.copy_(ours.weight_hh_l0)
    all_near([ours(x)[0]], [theirs(x)[0]])

    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    ours, theirs = twins(4, 6, device=device, cell=cell)
    parametrize.register_parametrization(ours, "weight_ih_l0", Double())
    with torch.no_grad():
        theirs.weight_ih_l0.mul_(2)
    all_near([ours(x)[0]], [theirs(x)[0]])


@every_cell
def test_copies(tmp_path, cell):
    ours = cell.module(4, 6, 2, bidirectional=True)
    x = torch.randn(3, 2, 4)
    expected = ours(x)[0]
    assert torch.equal(copy.deepcopy(ours)(x)[0], expected)
    torch.save(ours, tmp_path / "m.pt")
    assert torch.equal(torch.load(tmp_path / "m.pt", weights_only=False)(x)[0], expected)
    assert_near(ours.double()(x.double())[0], expected.double(), dtype=torch.float32)
    assert ours.flatten_parameters() is None


@every_cell
def test_no_grad_saves_nothing_and_gives_the_same(cell):
    ours = cell.module(4, 6, bidirectional=True)
    x = torch.randn(3, 2, 4)
    with torch.no_grad():
        y = ours(x)[0]
    assert not y.requires_grad
    assert torch.equal(y, ours(x)[0])


@every_cell
def test_output_may_be_changed_in_place(cell, device):
    ours, theirs = twins(3, 5, 2, bidirectional=True, batch_first=True, device=device, cell=cell)
    x = torch.randn(4, 2, 3, device=device, requires_grad=True)
    all_near(*(torch.autograd.grad(m(x)[0].mul_(2).relu_().sum(), [x, *m.parameters()]) for m in (ours, theirs)))


@every_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recompute(dtype, cell, device):
    """It computes the same numbers, and saves only inputs, outputs and states."""
    torch.manual_seed(1)
    plain = cell.module(5, 12, 2, bidirectional=True, device=device, dtype=dtype)
    frugal = cell.module(5, 12, 2, bidirectional=True, device=device, dtype=dtype, recompute=True)
    frugal.load_state_dict(plain.state_dict())
    x = torch.randn(4, 9, 5, device=device).to(dtype)
    results, sizes = [], []
    for lstm in (plain, frugal):
        kept = [0]

        def pack(t, kept=kept):
            kept[0] = max(kept[0], t.numel() // (4 * 9))
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y, _ = lstm(x, lengths=torch.tensor([4, 2, 0, 4, 4, 4, 1, 4, 4], device=device))
        results.append([y, *torch.autograd.grad(y.square().sum(), lstm.parameters())])
        sizes.append(kept[0])
    all_near(*results)
    if cell.saved:  # else nothing is computed again
        assert sizes[0] >= 8 * 12  # the gates of both directions
    assert sizes[1] <= 4 * 12


@pytest.mark.parametrize(
    ("cell", "options"),
    [(LSTM_CELL, {}), (LSTM_CELL, {"proj_size": 2}), (GRU_CELL, {})],
    ids=["lstm", "projected", "gru"],
)
def test_meta_device(cell, options):
    ours = cell.module(3, 5, 2, bidirectional=True, device="meta", **options)
    outputs = options.get("proj_size", 5)
    y, *states = leaves(ours(torch.empty(4, 2, 3, device="meta")))
    assert [y.shape, *(s.shape for s in states)] == [(4, 2, 2 * outputs), (4, 2, outputs), (4, 2, 5)][: 1 + cell.states]
    y.sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in ours.parameters())


@every_cell
def test_runs_the_compiled_op(cell, device):
    before = op_calls()
    ours = cell.module(3, 5, 2, bidirectional=True, device=device)
    ours(torch.randn(4, 2, 3, device=device))[0].sum().backward()
    after = op_calls()
    ran = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    algorithms = [ran.pop(name) for name in list(ran) if name.startswith(("cuda_stepwise", "cuda_persistent"))]
    assert ran == {f"{device}_forward": 2, f"{device}_backward": 2}
    assert algorithms == ([4] if device == "cuda" else [])


@every_cell
def test_empty_batch(cell, device):
    ours = cell.module(3, 5, 2, bidirectional=True, device=device)
    x = torch.randn(4, 0, 3, device=device, requires_grad=True)
    y, *states = leaves(ours(x))
    assert y.shape == (4, 0, 10)
    assert [s.shape for s in states] == [(4, 0, 5)] * cell.states
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all((p.grad == 0).all() for p in ours.parameters())


# --- output="last" ----------------------------------------------------------------------------------------------------


@every_cell
@pytest.mark.parametrize("with_state", [True, False], ids=["hx", "no_hx"])
@pytest.mark.parametrize("bidirectional", [True, False], ids=["bi", "uni"])
@pytest.mark.parametrize("layout", ["time_first", "batch_first", "unbatched"])
def test_last(layout, bidirectional, with_state, cell, device):
    ours, theirs = twins(
        3, 7, 2, bidirectional=bidirectional, batch_first=layout == "batch_first", device=device, cell=cell
    )
    x = torch.randn({"unbatched": (6, 3), "time_first": (6, 4, 3), "batch_first": (4, 6, 3)}[layout], device=device)
    x.requires_grad_()
    state = random_state(2 * (1 + bidirectional), 4, 7, device=device, cell=cell) if with_state else None
    if state and layout == "unbatched":
        state = tuple(s[:, 0] for s in state)
    y, hx = ours(x, cell.hx(state), output="last")
    full, *expected_states = leaves(theirs(x, cell.hx(state)))
    expected = full[:, -1] if layout == "batch_first" else full[-1]
    assert_near(y, expected)
    all_near(gradients(ours, [y], [x]), gradients(theirs, [expected], [x]))
    if bidirectional:
        assert hx is None
    else:
        all_near(leaves(hx), expected_states)


# --- lengths and PackedSequence ---------------------------------------------------------------------------------------


@every_cell
@pytest.mark.parametrize("with_state", [True, False], ids=["hx", "no_hx"])
@pytest.mark.parametrize("bidirectional", [True, False], ids=["bi", "uni"])
@pytest.mark.parametrize("lengths", [[3, 6, 1, 6, 2], [6, 6, 6, 6, 6], [1, 1, 1, 1, 4]], ids=str)
def test_lengths_equal_packing(lengths, bidirectional, with_state, cell, device):
    ours, theirs = twins(3, 7, 2, bidirectional=bidirectional, device=device, dtype=torch.float64, cell=cell)
    x = torch.randn(6, 5, 3, device=device, dtype=torch.float64, requires_grad=True)
    state = (
        random_state(2 * (1 + bidirectional), 5, 7, device=device, dtype=torch.float64, cell=cell)
        if with_state
        else None
    )
    y, *states = leaves(ours(x, cell.hx(state), lengths=torch.tensor(lengths, device=device)))
    packed, expected_states = theirs(
        pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False), cell.hx(state)
    )
    expected_states = leaves(expected_states)
    expected, _ = pad_packed_sequence(packed, total_length=6)
    all_near([y, *states], [expected, *expected_states])
    all_near(gradients(ours, [y, *states], [x]), gradients(theirs, [expected, *expected_states], [x]))


@every_cell
@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
def test_lengths_on_the_host_are_moved(kind, cell, device):
    """Tensors on the CPU, lists and tuples give the same results as a tensor on the device."""
    lstm = cell.module(3, 5, 2, bidirectional=True, device=device)
    x = torch.randn(6, 4, 3, device=device)
    for output in ("all", "last"):
        expected, _ = lstm(x, lengths=torch.tensor([3, 6, 0, 2], device=device), output=output)
        assert torch.equal(lstm(x, lengths=kind([3, 6, 0, 2]), output=output)[0], expected)
    with pytest.raises(ValueError, match=r"lengths must be between 0 and T = 6, got lengths\[2\] = 7"):
        lstm(x, lengths=kind([3, 6, 7, 2]))  # also on CUDA, where a tensor on the device would fail an assertion
    assert lstm(x[:, :0], lengths=kind([]) if kind is not torch.tensor else torch.zeros(0).long())[0].shape[1] == 0


@every_cell
def test_lengths_on_the_cpu_for_an_input_elsewhere(cell):
    """Lengths must be on the CPU or on the input's device, as with a GPU."""
    lstm, x = cell.module(3, 5, device="meta"), torch.empty(4, 2, 3, device="meta")
    for lengths in ([1, 2], torch.tensor([1, 2])):
        assert lstm(x, lengths=lengths)[0].shape == (4, 2, 5)
    with pytest.raises(ValueError, match=r"got lengths\[1\] = 5"):
        lstm(x, lengths=torch.tensor([1, 5]))


@every_cell
@pytest.mark.parametrize("bidirectional", [True, False], ids=["bi", "uni"])
def test_last_with_lengths(bidirectional, cell, device):
    ours, _ = twins(
        3, 7, 2, bidirectional=bidirectional, batch_first=True, device=device, dtype=torch.float64, cell=cell
    )
    x = torch.randn(5, 6, 3, device=device, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([3, 6, 0, 1, 5], device=device)
    state = random_state(2 * (1 + bidirectional), 5, 7, device=device, dtype=torch.float64, cell=cell)
    y, states = ours(x, cell.hx(state), lengths=lengths, output="last")
    full, *all_states = leaves(ours(x, cell.hx(state), lengths=lengths))
    expected = full[torch.arange(5), (lengths - 1).clamp(min=0)]
    assert_near(y, expected)
    assert (y[2] == 0).all()
    all_near(gradients(ours, [y], [x]), gradients(ours, [expected], [x]))
    if not bidirectional:
        all_near(leaves(states), all_states)


@every_cell
def test_zero_lengths_keep_the_state(cell, device):
    ours, _ = twins(3, 5, bidirectional=True, device=device, cell=cell)
    x = torch.randn(4, 3, 3, device=device)
    first = [s.requires_grad_() for s in random_state(2, 3, 5, device=device, cell=cell)]
    y, *states = leaves(ours(x, cell.hx(first), lengths=torch.tensor([0, 4, 0], device=device)))
    assert (y[:, [0, 2]] == 0).all()
    gradients = torch.autograd.grad(states, first, [torch.full_like(s, 2 + k) for k, s in enumerate(states)])
    for k, (before, after, gradient) in enumerate(zip(first, states, gradients, strict=True)):
        assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
        assert (gradient[:, [0, 2]] == 2 + k).all()


@every_cell
def test_padding_is_never_read(cell, device):
    ours = cell.module(3, 5, 2, bidirectional=True, device=device)
    x = torch.randn(4, 3, 3, device=device)
    lengths = torch.tensor([2, 4, 1], device=device)
    before = leaves(ours(x, lengths=lengths))
    for b, length in enumerate(lengths.tolist()):
        x[length:, b] = float("inf")
    assert all(map(torch.equal, leaves(ours(x, lengths=lengths)), before))


@every_cell
@pytest.mark.parametrize("output", ["all", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_in_the_padding_reaches_gradients(dtype, output, cell, device):
    ours = cell.module(3, 5, 2, bidirectional=True, device=device, dtype=dtype)
    lengths = torch.tensor([2, 4, 0], device=device)
    grads = []
    for filler in (0.0, float("nan")):
        torch.manual_seed(1)
        x = torch.randn(4, 3, 3, device=device).to(dtype)
        for b, length in enumerate(lengths.tolist()):
            x[length:, b] = filler
        x.requires_grad_()
        y, _ = ours(x, lengths=lengths, output=output)
        grads.append(torch.autograd.grad(y.sum(), [x, *ours.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@every_cell
def test_last_of_an_empty_sequence_is_zero_whatever_its_state(cell, device):
    ours = cell.module(3, 5, device=device)
    h0 = torch.full((1, 2, 5), float("nan"), device=device)
    y, _ = ours(
        torch.randn(4, 2, 3, device=device),
        cell.hx((h0, h0)),
        lengths=torch.tensor([0, 1], device=device),
        output="last",
    )
    assert (y[0] == 0).all()


@every_cell
@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("with_state", [True, False], ids=["hx", "no_hx"])
def test_packed_sequence(with_state, enforce_sorted, cell, device):
    ours, theirs = twins(3, 7, 2, bidirectional=True, device=device, cell=cell)
    lengths = [6, 4, 4, 1] if enforce_sorted else [4, 1, 6, 4]
    x = torch.randn(6, 4, 3, device=device, requires_grad=True)
    state = random_state(4, 4, 7, device=device, cell=cell) if with_state else None
    results = []
    for module in (ours, theirs):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
        y, states = module(packed, cell.hx(state))
        states = leaves(states)
        assert isinstance(y, PackedSequence)
        padded, lengths_back = pad_packed_sequence(y)
        assert lengths_back.tolist() == lengths
        results.append([y.data, padded, *states, *gradients(module, [y.data, *states], [x])])
    all_near(*results)
    last, none = ours(packed, cell.hx(state), output="last")
    assert none is None
    assert_near(last, padded[torch.tensor(lengths) - 1, torch.arange(4)])


@every_cell
def test_packed_from_pack_sequence_without_indices(cell):
    ours, theirs = twins(3, 5, cell=cell)
    packed = pack_sequence([torch.randn(n, 3) for n in (4, 2, 1)])
    bare = PackedSequence(packed.data, packed.batch_sizes)
    all_near([ours(bare)[0].data], [theirs(bare)[0].data])
    assert ours(bare)[0].sorted_indices is None


# --- what cells without c have beyond PyTorch's -------------------------------------------------------------------------------------


def in_pieces(
    rnn: nn.RNNBase, x: torch.Tensor, h0: torch.Tensor, lengths: list[int], reset: torch.Tensor
) -> list[torch.Tensor]:
    """Runs one layer of two directions for each piece between resets, as if it were a sequence by itself."""
    ys, finals = [], []
    none = torch.zeros_like(h0[:1, 0])
    for b, length in enumerate(lengths):
        cuts = sorted({0, length, *(t for t in range(length) if reset[t, b])})
        pieces = []
        for start, end in itertools.pairwise(cuts):
            first = none if start or reset[0, b] else h0[:1, b]
            last = h0[1:, b] if end == length else none
            pieces.append(rnn(x[start:end, b], torch.cat([first, last])))
        ys.append(torch.cat([*(y for y, _ in pieces), x.new_zeros(len(x) - length, 2 * rnn.hidden_size)]))
        finals.append(torch.stack([pieces[-1][1][0], pieces[0][1][1]]) if pieces else h0[:, b])
    return [torch.stack(ys, 1), torch.stack(finals, 1)]


@every_h_cell
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
def test_resets_without_c(recompute, cell, device):
    """Values and gradients are those of the pieces, run by PyTorch's module."""
    ours, theirs = twins(3, 5, bidirectional=True, device=device, dtype=torch.float64, cell=cell)
    ours.recompute = recompute
    lengths = [6, 4, 0, 1]
    x = torch.randn(6, 4, 3, device=device, dtype=torch.float64, requires_grad=True)
    h0 = torch.randn(2, 4, 5, device=device, dtype=torch.float64, requires_grad=True)
    reset = torch.zeros(6, 4, dtype=torch.bool, device=device)
    for t, b in ((0, 0), (2, 0), (3, 0), (1, 1), (5, 1), (0, 2), (1, 3)):  # some are at ends, or beyond them
        reset[t, b] = True
    found = leaves(ours(x, h0, lengths=torch.tensor(lengths, device=device), reset=reset))
    expected = in_pieces(theirs, x, h0, lengths, reset)
    all_near(found, expected)
    all_near(gradients(ours, found, [x, h0]), gradients(theirs, expected, [x, h0]))


def test_resets_of_a_gru_clear_any_finite_state_and_any_given_one(device):
    """Weights of 1 keep a state of 1e6, and add as much to every gate."""
    ours, theirs = twins(3, 5, bidirectional=True, dtype=torch.float64, cell=GRU_CELL, device=device)
    with torch.no_grad():
        for module in (ours, theirs):
            for parameter in module.parameters():
                parameter.fill_(1)
    x = torch.randn(6, 4, 3, dtype=torch.float64, device=device)
    h0 = torch.full((2, 4, 5), 1e6, dtype=torch.float64, device=device)
    lengths, reset = [6, 6, 3, 0], torch.zeros(6, 4, dtype=torch.bool, device=device)
    for t, b in [(3, 0), (0, 1), (4, 1), (2, 2), (0, 3)]:
        reset[t, b] = True
    keywords = {"lengths": torch.tensor(lengths, device=device), "reset": reset}
    y, h_n = ours(x, h0, **keywords)
    expected = in_pieces(theirs, x, h0, lengths, reset)
    assert y.max() == 1e6
    all_near(
        [y / h0.max(), y.clamp(max=2), h_n / h0.max()], [expected[0] / 1e6, expected[0].clamp(max=2), expected[1] / 1e6]
    )
    for value in (float("nan"), float("inf"), -float("inf")):
        other = h0.clone()
        other[0, 1] = value
        other.requires_grad_()
        found = ours(x, other, **keywords)
        assert torch.equal(found[0], y) and torch.equal(found[1], h_n)
        assert (torch.autograd.grad(found[0].sum(), other)[0][0, 1] == 0).all()


@every_h_cell
@pytest.mark.parametrize("layout", ["batch_first", "unbatched", "packed", "last"])
def test_resets_without_c_in_each_layout(layout, cell, device):
    rnn = cell.module(3, 5, 2, bidirectional=True, device=device, **cell.options)
    x, reset = torch.randn(6, 4, 3, device=device), torch.rand(6, 4, device=device) < 0.4
    lengths = [6, 2, 5, 1]
    expected, h_n = rnn(x, lengths=lengths, reset=reset)
    if layout == "last":
        y, none = rnn(x, lengths=lengths, reset=reset, output="last")
        assert none is None
        assert_near(y, expected[torch.tensor(lengths) - 1, torch.arange(4)])
    elif layout == "packed":
        packed = [pack_padded_sequence(t, torch.tensor(lengths), enforce_sorted=False) for t in (x, reset)]
        y, states = rnn(packed[0], reset=packed[1])
        all_near([pad_packed_sequence(y)[0], states], [expected, h_n])
    elif layout == "unbatched":
        all_near(rnn(x[:, 0], reset=reset[:, 0]), [expected[:, 0], h_n[:, 0]])
    else:
        rnn.batch_first = True
        y, states = rnn(x.transpose(0, 1), lengths=lengths, reset=reset.transpose(0, 1))
        all_near([y.transpose(0, 1), states], [expected, h_n])


@every_h_cell
def test_learned_state_without_c(cell, device):
    rnn = cell.module(3, 5, 2, bidirectional=True, learned_state=True, device=device, **cell.options)
    name = cell.name.upper()
    assert repr(rnn) == f"{name}(3, 5, num_layers=2, bidirectional=True, learned_state=True)"
    assert (rnn.h_0 == 0).all() and rnn.h_0.shape == (4, 5) and not hasattr(rnn, "c_0")
    with torch.no_grad():
        rnn.h_0.copy_(torch.randn(4, 5))
    theirs = cell.theirs(3, 5, 2, bidirectional=True, device=device, **cell.options)
    theirs.load_state_dict({key: p for key, p in rnn.state_dict().items() if key != "h_0"})
    x = torch.randn(4, 2, 3, device=device)
    h0 = rnn.h_0.detach().unsqueeze(1).repeat(1, 2, 1).requires_grad_()
    found, expected = rnn(x), theirs(x, h0)
    all_near(found, expected)
    (learned,) = torch.autograd.grad(sum(t.sum() for t in found), rnn.h_0)
    (given,) = torch.autograd.grad(sum(t.sum() for t in expected), h0)
    assert_near(learned, given.sum(1))
    with pytest.raises(ValueError, match=f"{name}: reset must be None with learned_state=True"):
        rnn(x, reset=torch.zeros(4, 2, dtype=torch.bool, device=device))


# --- errors -----------------------------------------------------------------------------------------------------------


def with_weight(module: nn.RNNBase, weight: torch.Tensor) -> nn.RNNBase:
    module.weight_hh_l0 = nn.Parameter(weight)
    return module


ERRORS = [
    (lambda m: m(torch.randn(4, 2, 5)), RuntimeError, "input.size.-1. must be equal to input_size. Expected 3, got 5"),
    (lambda m: m(torch.randn(3)), ValueError, "Expected input to be 2D or 3D, got 1D"),
    (lambda m: m(torch.randn(0, 2, 3)), RuntimeError, "Expected sequence length to be larger than 0"),
    (lambda m: m(torch.randn(4, 2, 3, dtype=torch.float64)), ValueError, r"input dtype .torch.float64. does not match weight dtype .torch.float32.. Convert input: input.to.torch.float32."),
    (lambda m: m(torch.ones(4, 2, 3, dtype=torch.int64)), ValueError, r"input dtype .torch.int64. does not match"),
    (lambda m: m(torch.randn(4, 2, 3, device="meta")), RuntimeError, "weights' device cpu, got meta"),
    (lambda m: m(torch.randn(4, 2, 3), output="first"), ValueError, 'output must be "all" or "last", got \'first\''),
    (lambda m: m(torch.randn(4, 2, 3), lengths=torch.tensor([1])), ValueError, r"lengths must have shape \(2,\), got \(1,\)"),
    (lambda m: m(torch.randn(4, 2, 3), lengths=torch.tensor([1.0, 2.0])), TypeError, "lengths must be int64, got torch.float32"),
    (lambda m: m(torch.randn(4, 2, 3), lengths=torch.tensor([1, 5])), ValueError, r"lengths must be between 0 and T = 4, got lengths\[1\] = 5"),
    (lambda m: m(torch.randn(4, 2, 3), lengths=torch.tensor([-1, 4])), ValueError, r"got lengths\[0\] = -1"),
    (lambda m: m(torch.randn(4, 3), lengths=torch.tensor([4])), ValueError, "lengths must be None with unbatched"),
    (lambda m: m(pack_sequence([torch.randn(2, 3)]), lengths=torch.tensor([2])), ValueError, "lengths must be None with a PackedSequence"),
    (lambda m: m([1.0]), TypeError, "input must be a tensor or a PackedSequence, got list"),
    (lambda m: m(torch.randn(4, 2, 3), lengths={1, 2}), TypeError, "lengths must be a tensor or a list of integers, got set"),
    (lambda m: with_weight(m, torch.zeros(1, 5, dtype=torch.float64))(torch.randn(4, 2, 3)), ValueError, "weight_hh_l0 must be torch.float32 on cpu as weight_ih_l0, got torch.float64"),
    (lambda m: with_weight(m, torch.zeros(1, 5, device="meta"))(torch.randn(4, 2, 3)), ValueError, "weight_hh_l0 must be torch.float32 on cpu as weight_ih_l0, got torch.float32 on meta"),
    (lambda m: type(m)(3, 0), ValueError, "hidden_size must be greater than zero"),
    (lambda m: type(m)(3, 5, dropout=2), ValueError, "dropout should be a number in range"),
    (lambda m: type(m)(3, 5, 0), ValueError, "num_layers must be greater than zero"),
]  # fmt: skip


LSTM_ERRORS = [
    (lambda m: m(torch.randn(4, 2, 3), (torch.randn(1, 2, 6), torch.randn(1, 2, 5))), RuntimeError, r"hidden\[0\] size \(1, 2, 5\), got \[1, 2, 6\]"),
    (lambda m: m(torch.randn(4, 2, 3), (torch.randn(1, 2, 5), torch.randn(2, 2, 5))), RuntimeError, r"hidden\[1\] size \(1, 2, 5\), got \[2, 2, 5\]"),
    (lambda m: m(torch.randn(4, 2, 3), (torch.randn(1, 5), torch.randn(1, 5))), RuntimeError, "batched 3-D input, hx and cx should also be 3-D"),
    (lambda m: m(torch.randn(4, 3), (torch.randn(1, 1, 5), torch.randn(1, 1, 5))), RuntimeError, "unbatched 2-D input, hx and cx should also be 2-D"),
    (lambda m: m(torch.randn(4, 2, 3), (torch.randn(1, 2, 5).double(), torch.randn(1, 2, 5))), RuntimeError, r"hidden\[0\] must be torch.float32"),
    (lambda m: m(torch.randn(4, 2, 3), (torch.randn(1, 2, 5), torch.randn(1, 2, 5, device="meta"))), RuntimeError, r"hidden\[1\] must be on the input's device cpu, got meta"),
    (lambda m: m(torch.randn(4, 2, 3), torch.zeros(1, 2, 5)), TypeError, "hx must be None or a pair of tensors"),
    (lambda m: m(torch.randn(4, 2, 3), 5), TypeError, "hx must be None or a pair of tensors"),
    (lambda m: m(torch.randn(4, 2, 3), (torch.zeros(1, 2, 5), None)), TypeError, "hx must be None or a pair of tensors"),
]  # fmt: skip

X = torch.zeros(4, 2, 3)
H_ERRORS = [
    (lambda m: m(X, torch.zeros(1, 2, 6)), RuntimeError, r"Expected hidden size \(1, 2, 5\), got \[1, 2, 6\]"),
    (lambda m: m(X, torch.zeros(1, 5)), RuntimeError, "batched 3-D input, hx should also be 3-D but got 2-D tensor"),
    (
        lambda m: m(X[:, 0], torch.zeros(1, 1, 5)),
        RuntimeError,
        "unbatched 2-D input, hx should also be 2-D but got 3-D",
    ),
    (lambda m: m(X, torch.zeros(1, 2, 5).double()), RuntimeError, ": hidden must be torch.float32 as the input"),
    (lambda m: m(X, torch.zeros(1, 2, 5, device="meta")), RuntimeError, "hidden must be on the input's device cpu"),
    (
        lambda m: m(X, (torch.zeros(1, 2, 5), torch.zeros(1, 2, 5))),
        TypeError,
        "hx must be None or a tensor h_0, got tu",
    ),
    (lambda m: m(X, return_cell_states=True), TypeError, "unexpected keyword argument 'return_cell_states'"),
    (lambda m: type(m)(3, 5, proj_size=2), ValueError, "proj_size argument is only supported for LSTM, not RNN or GRU"),
    (lambda m: type(m)(3, 5, zoneout=0.1), TypeError, "unexpected keyword argument 'zoneout'"),
]
EVERY_ERROR = [(cell, *case) for cell in (LSTM_CELL, GRU_CELL, RNN_CELL) for case in ERRORS]
EVERY_ERROR += [(LSTM_CELL, *case) for case in LSTM_ERRORS]
EVERY_ERROR += [(cell, *case) for cell in (GRU_CELL, RNN_CELL) for case in H_ERRORS]


@pytest.mark.parametrize(
    ("cell", "call", "kind", "message"), EVERY_ERROR, ids=[f"{cell.name}: {text}" for cell, _, _, text in EVERY_ERROR]
)
def test_errors(cell, call, kind, message):
    with pytest.raises(kind, match=message) as raised:
        call(cell.module(3, 5))
    assert cell is LSTM_CELL or "LSTM: " not in str(raised.value)


@every_cell
def test_the_oracle_is_not_cudnn(cell, device):
    """On a GPU cuDNN would be off by 1e-3, and refuse these states and this backward pass (plain_torch)."""
    theirs = cell.theirs(3, 5, 2, bidirectional=True).eval()
    x = torch.randn(4, 2, 3)
    state = [torch.randn(4, 2, 10)[..., ::2] for _ in range(cell.states)]
    results = []
    for module, to in (
        (copy.deepcopy(theirs).to(device), {"device": device}),
        (theirs.double(), {"dtype": torch.float64}),
    ):
        leaf = x.to(**to).requires_grad_()
        y, *states = leaves(module(leaf, cell.hx(tuple(s.to(**to) for s in state))))
        y = y.mul_(2)
        results.append([y, *states, *gradients(module, (y, *states), (leaf,))])
    for a, e in zip(*results, strict=True):
        assert_near(a.cpu(), e, dtype=torch.float32)


@pytest.mark.parametrize("before", [True, False])
def test_the_oracle_is_not_cudnn_whatever_was_set(before):
    assert not torch.backends.cudnn.enabled, "every test runs so"
    assert torch.get_float32_matmul_precision() == "highest"
    torch.backends.cudnn.enabled = before
    torch.backends.cuda.matmul.allow_tf32 = True
    with plain_torch():
        assert not torch.backends.cudnn.enabled
        assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.enabled is before


def test_error_function_of_the_tests_can_fail():
    assert error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])) == 0.5
    with pytest.raises(AssertionError, match="relative error nan"):
        assert_near(torch.tensor([float("nan")]), torch.tensor([1.0]), "x")


@every_cell
@pytest.mark.cuda
def test_wrong_lengths_on_cuda_stop_the_program(cell):
    """The lengths are on the device, whose assertion ruins the CUDA context, so this needs a new process."""
    code = f"""
import torch
from birnn_ext import {cell.module.__name__} as Module
Module(3, 5, device="cuda")(torch.randn(4, 2, 3, device="cuda"), lengths=torch.tensor([1, LENGTH], device="cuda"))
torch.cuda.synchronize()
print("went through")
"""
    run = [
        subprocess.run([sys.executable, "-c", code.replace("LENGTH", n)], capture_output=True, text=True) for n in "45"
    ]
    assert "went through" in run[0].stdout, run[0].stderr
    assert run[1].returncode != 0
    assert "went through" not in run[1].stdout
    assert "assert" in run[1].stderr or "lengths must be between" in run[1].stderr
