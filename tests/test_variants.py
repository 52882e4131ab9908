"""The extended LSTM and proj_size agree with the reference, with nn.LSTM, and with the papers' equations."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from helpers import TOLERANCE, all_near, error, gradients, random_state, twins
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import birnn_ext
from birnn_ext import LSTM, op_calls, reference
from birnn_ext.variants import EPS, Variant, lstm_variant

forward_op = torch.ops.birnn_ext.lstm_variant.default
backward_op = torch.ops.birnn_ext.lstm_variant_backward.default

# The arguments of forward_op that can have a gradient.
NAMES = ["gates_x", "w_hh", "w_hr", "h0", "c0", "ln_hh", "ln_c"]
PLACES = [0, 1, 2, 3, 4, 12, 13]

FEATURES = {
    "recurrent_dropout": {"recurrent_dropout": 0.4},
    "zoneout": {"zoneout": (0.3, 0.2)},
    "layer_norm": {"layer_norm": True},
    "learned_state": {"learned_state": True},
    "proj_size": {"proj_size": 3},
    "all": {"recurrent_dropout": 0.4, "zoneout": 0.3, "layer_norm": True, "learned_state": True, "proj_size": 3},
}
each_feature = pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES.keys())


def random_case(rng: random.Random, dtype: torch.dtype, device: str, sizes: tuple[int, ...] | None = None) -> list:
    """Returns arguments of a forward call without `save`, with random sizes and features."""
    steps, batch, directions, hidden = sizes or (
        rng.choice([1, 2, 3, 6]), rng.choice([1, 2, 5, 9]), rng.choice([1, 2]), rng.choice([1, 3, 7, 8, 16, 17, 33, 40]),
    )  # fmt: skip

    def flag() -> bool:
        return rng.random() < 0.5

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(device, dtype)

    def mask(*shape: int) -> Tensor:
        return (torch.rand(shape) < 0.4).to(device)

    projects = hidden > 1 and flag()
    outputs = rng.randint(1, hidden - 1) if projects else hidden
    state = flag()
    zoneout = rng.choice(["none", "masks", "means"])
    return [
        tensor(steps, batch, directions, 4 * hidden),
        tensor(directions, 4 * hidden, outputs) / outputs**0.5,
        tensor(directions, outputs, hidden) / hidden**0.5 if projects else None,
        tensor(directions, batch, outputs) if state else None,
        tensor(directions, batch, hidden) if state else None,
        torch.tensor([rng.randint(0, steps) for _ in range(batch)], device=device) if flag() else None,
        mask(steps, batch) if flag() else None,
        tensor(directions, batch, outputs).abs() if flag() else None,
        mask(steps, batch, directions, outputs) if zoneout == "masks" else None,
        mask(steps, batch, directions, hidden) if zoneout == "masks" else None,
        *((0.2, 0.3) if zoneout == "means" else (0.0, 0.0)),
        # norms of one or two values are almost constant, so their gradients are only rounding errors
        tensor(directions, 4 * hidden) if flag() and outputs > 2 else None,
        tensor(directions, 2, hidden) if flag() and hidden > 2 else None,
        EPS,
    ]


def as_double(args: list) -> list:
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def results_and_gradients(run, args: list, cotangents: list[Tensor]) -> dict[str, Tensor]:
    args = list(args)
    wanted = [k for k in PLACES if args[k] is not None]
    for k in wanted:
        args[k] = args[k].detach().requires_grad_()
    outputs = run(args)
    grads = torch.autograd.grad(
        outputs, [args[k] for k in wanted], [c.to(o) for c, o in zip(cotangents, outputs, strict=True)]
    )
    named = dict(zip(("y", "h_n", "c_n", "cells"), outputs, strict=True))
    return named | {f"d_{NAMES[PLACES.index(k)]}": g for k, g in zip(wanted, grads, strict=True)}


def compare_operators(args: list, dtype: torch.dtype) -> None:
    truth = reference.lstm_variant(*as_double(args))
    cotangents = [torch.randn(o.shape, dtype=torch.float64).to(dtype) for o in truth]
    before = op_calls()
    ours = results_and_gradients(lambda a: forward_op(*a, "all")[:4], args, cotangents)
    device = args[0].device.type
    assert op_calls()[f"{device}_backward"] == before[f"{device}_backward"] + 1
    expected = results_and_gradients(lambda a: reference.lstm_variant(*a), as_double(args), cotangents)
    plain = results_and_gradients(lambda a: reference.lstm_variant(*a), args, cotangents)
    for name, e in expected.items():
        # layer norm divides by a spread that may happen to be near 0, and then plain PyTorch is inexact, too
        small = max(1.0, 0.1 / float(e.abs().max().clamp(min=1e-30))) if e.numel() else 1.0
        norm = args[12] is not None or args[13] is not None
        allowed = max(small * TOLERANCE[dtype], norm * 5 * error(plain[name], e))
        assert error(ours[name], e) <= allowed, f"{name}: {error(ours[name], e):.2e} where {allowed:.2e} is allowed"
        assert ours[name].dtype == (torch.promote_types(dtype, torch.float32) if name == "cells" else dtype)
    for save in ("none", "cells"):
        y, h_n, c_n, cells, *kept = forward_op(*args, save)
        assert all(torch.equal(a, ours[name]) for a, name in zip((y, h_n, c_n), ("y", "h_n", "c_n"), strict=True))
        assert torch.equal(cells, ours["cells"]) if save == "cells" else cells.numel() == 0
        assert all(t.numel() == 0 for t in kept)


@pytest.mark.parametrize("case", range(16))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_operators_against_the_reference(dtype, case, device):
    """The truth is float64 arithmetic. The gradient's operator must have run, not the reference."""
    compare_operators(random_case(random.Random(case), dtype, device), dtype)


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_types(dtype, case, device):
    """Layer norm is left out, as it divides by the variance, which may be tiny (0 with one unit)."""
    args = random_case(random.Random(case), dtype, device, (5, 4, 2, 24))
    args[12] = args[13] = None
    compare_operators(args, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_operators_against_the_reference_at_length(seed, device):
    for case, dtype in itertools.product(range(10), [torch.float64, torch.float32]):
        compare_operators(random_case(random.Random(1000 + 10 * seed + case), dtype, device), dtype)


def everything(device: str, sizes: tuple[int, ...] = (3, 3, 2, 3)) -> list:
    """Returns a small case with all features but zoneout by means."""
    steps, batch, directions, hidden = sizes
    outputs = hidden - 1

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, device=device)

    def mask(*shape: int) -> Tensor:
        return (torch.rand(shape) < 0.4).to(device)

    return [
        tensor(steps, batch, directions, 4 * hidden), tensor(directions, 4 * hidden, outputs),
        tensor(directions, outputs, hidden), tensor(directions, batch, outputs), tensor(directions, batch, hidden),
        torch.arange(batch, device=device).clamp(max=steps).flip(0), mask(steps, batch),
        tensor(directions, batch, outputs), mask(steps, batch, directions, outputs),
        mask(steps, batch, directions, hidden), 0.0, 0.0, tensor(directions, 4 * hidden), tensor(directions, 2, hidden),
        EPS,
    ]  # fmt: skip


def test_gradcheck_first_and_second_order(device):
    args = everything(device)
    floating = [args[k].requires_grad_() for k in PLACES]

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        gates_x, w_hh, w_hr, h0, c0, ln_hh, ln_c = values
        return lstm_variant(gates_x, w_hh, w_hr, h0, c0, args[5], Variant(*args[6:12]), ln_hh, ln_c, True)

    assert torch.autograd.gradcheck(run, floating, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, floating, fast_mode=True)


@pytest.mark.parametrize("save", ["none", "cells", "all"])
def test_opcheck(save, device):
    args = everything(device)
    if save == "all":
        for k in PLACES:
            args[k].requires_grad_()
    torch.library.opcheck(forward_op, (*args, save))


@pytest.mark.parametrize("case", range(4))
def test_opcheck_of_the_gradient(case, device):
    args = random_case(random.Random(100 + case), torch.float64, device, (3, 2, 2, 4))
    y, h_n, _, cells, *kept = forward_op(*args, "all")
    arguments = (*args[1:3], *args[4:], cells, *kept, y, h_n, None, cells if case % 2 else None, case < 2)
    torch.library.opcheck(backward_op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_transforms_go_through_the_reference(reference_operators):
    args = everything("cpu")

    gates_x, w_hh, w_hr, ln_hh, ln_c = (args[k] for k in (0, 1, 2, 12, 13))

    def loss(one: Tensor) -> Tensor:
        y, _, _, cells = lstm_variant(one.unsqueeze(1), w_hh, w_hr, ln_hh=ln_hh, ln_c=ln_c, return_cells=True)
        return y.square().sum() + cells.sum()

    mapped = torch.func.vmap(torch.func.grad(loss), in_dims=1)(gates_x)
    leaf = gates_x.detach().requires_grad_()
    kernels = torch.stack([torch.autograd.grad(loss(leaf[:, b]), leaf)[0][:, b] for b in range(leaf.shape[1])])
    all_near([mapped], [kernels])


def test_batched_gradients(device):
    """A vectorised Jacobian calls autograd.grad(..., is_grads_batched=True)."""
    args = everything(device)
    args[0].requires_grad_()
    y = forward_op(*args, "all")[0]
    cotangents = torch.randn(2, *y.shape, dtype=y.dtype, device=device)
    (batched,) = torch.autograd.grad(y, args[0], cotangents, is_grads_batched=True, retain_graph=True)
    one_by_one = torch.stack([torch.autograd.grad(y, args[0], c, retain_graph=True)[0] for c in cotangents])
    all_near([batched], [one_by_one])


def test_batched_gradients_of_a_projection(device):
    lstm = LSTM(3, 5, proj_size=2, bidirectional=True, dtype=torch.float64, device=device)
    y = lstm(torch.randn(4, 2, 3, dtype=torch.float64, device=device))[0]
    weights = list(lstm.parameters())
    cotangents = torch.randn(2, *y.shape, dtype=y.dtype, device=device)
    batched = torch.autograd.grad(y, weights, cotangents, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(y, weights, c, retain_graph=True) for c in cotangents]
    all_near(batched, [torch.stack(each) for each in zip(*one_by_one, strict=True)])


def test_differentiating_what_was_not_saved_is_an_error():
    args = everything("cpu")
    y = forward_op(args[0].requires_grad_(), *args[1:], "cells")[0]
    with pytest.raises(RuntimeError, match='called with save="cells", so it can'):
        y.sum().backward()


def test_repeatable_bitwise(device):
    args = random_case(random.Random(3), torch.float32, device, (6, 5, 2, 33))
    cotangents = [torch.ones_like(o) for o in forward_op(*args, "cells")[:4]]
    runs = [results_and_gradients(lambda a: forward_op(*a, "all")[:4], args, cotangents) for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


ERRORS = [
    (0, lambda a: a[..., :5], ValueError, "gates_x must have shape"),
    (0, lambda a: a.long(), TypeError, "gates_x must be float64"),
    (1, lambda a: a[:, :4], ValueError, "w_hh must have shape"),
    (2, lambda a: a.float(), TypeError, "w_hr must be"),
    (3, lambda a: a[:, :1], ValueError, "h0 must have shape"),
    (4, lambda a: a[..., :1], ValueError, "c0 must have shape"),
    (5, lambda a: a + 9, ValueError, "lengths must be between 0 and T = 3, got lengths"),
    (6, lambda a: a.long(), TypeError, "reset must be"),
    (7, lambda a: a[:1], ValueError, "h_mask must have shape"),
    (8, lambda a: a[:1], ValueError, "zoneout_h must have shape"),
    (9, lambda a: a.double(), TypeError, "zoneout_c must be"),
    (12, lambda a: a[:1], ValueError, "ln_hh must have shape"),
    (13, lambda a: a[:, :1], ValueError, "ln_c must have shape"),
]


@pytest.mark.parametrize(("place", "spoil", "kind", "message"), ERRORS, ids=[message for *_, message in ERRORS])
def test_errors_of_the_operator(place, spoil, kind, message):
    args = everything("cpu")
    args[place] = spoil(args[place])
    with pytest.raises(kind, match=message):
        forward_op(*args, "none")


# --- proj_size --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("bidirectional", [True, False], ids=["bi", "uni"])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("size", [(1, 1, 3, 5, 2), (7, 1, 8, 16, 15), (4, 13, 5, 17, 1)], ids=str)
def test_projection_like_torch(size, layers, bidirectional, bias, dtype, device):
    steps, batch, features, hidden, outputs = size
    kwargs = {"bias": bias, "bidirectional": bidirectional, "proj_size": outputs, "device": device, "dtype": dtype}
    ours, theirs = twins(features, hidden, layers, **kwargs)
    x = torch.randn(steps, batch, features, device=device, dtype=dtype, requires_grad=True)
    rows = layers * (1 + bidirectional)
    h0 = torch.randn(rows, batch, outputs, device=device, dtype=dtype, requires_grad=True)
    c0 = torch.randn(rows, batch, hidden, device=device, dtype=dtype, requires_grad=True)
    results = []
    for module in (ours, theirs):
        y, (h_n, c_n) = module(x, (h0, c0))
        results.append([y, h_n, c_n, *gradients(module, (y, h_n, c_n), (x, h0, c0))])
    all_near(*results)


@pytest.mark.parametrize("layout", ["time_first", "batch_first", "unbatched"])
def test_projection_layouts(layout, device):
    ours, theirs = twins(4, 6, 2, bidirectional=True, proj_size=3, batch_first=layout == "batch_first", device=device)
    x = torch.randn((5, 4) if layout == "unbatched" else (5, 2, 4), device=device, requires_grad=True)
    results = []
    for module in (ours, theirs):
        y, (h_n, c_n) = module(x)
        results.append([y, h_n, c_n, *gradients(module, (y, h_n, c_n), (x,))])
    all_near(*results)


@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_projection_packed(enforce_sorted, device):
    ours, theirs = twins(4, 6, 2, bidirectional=True, proj_size=3, device=device)
    x = torch.randn(5, 4, 4, device=device, requires_grad=True)
    lengths = torch.tensor([5, 4, 2, 1] if enforce_sorted else [2, 5, 1, 4])
    state = (torch.randn(4, 4, 3, device=device), torch.randn(4, 4, 6, device=device))
    results = []
    for module in (ours, theirs):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
        y, (h_n, c_n) = module(packed, state)
        results.append([y.data, h_n, c_n, *gradients(module, (y.data, h_n, c_n), (x,))])
    all_near(*results)
    padded = pad_packed_sequence(theirs(packed, state)[0])[0]
    all_near([ours(x, state, lengths=lengths.to(device))[0]], [padded])


def test_projection_parameters_and_errors():
    modules = []
    for cls in (LSTM, nn.LSTM):
        torch.manual_seed(3)
        modules.append(cls(5, 7, 2, bidirectional=True, proj_size=3))
    ours, theirs = modules
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert [[tuple(w.shape) for w in ws] for ws in ours.all_weights] == [
        [tuple(w.shape) for w in ws] for ws in theirs.all_weights
    ]
    assert repr(ours) == repr(theirs)
    for a, b in (modules, modules[::-1]):
        a.load_state_dict(b.state_dict())
    x = torch.randn(4, 2, 5)
    good = (torch.zeros(4, 2, 3), torch.zeros(4, 2, 7))
    for wrong in [(good[1], good[1]), (good[0], good[0])]:
        messages = []
        for module in modules:
            with pytest.raises(RuntimeError) as found:
                module(x, wrong)
            messages.append(str(found.value))
        assert messages[0] == messages[1]
    for wrong in (-1, 7, 8):
        messages = []
        for cls in (LSTM, nn.LSTM):
            with pytest.raises(ValueError, match="proj_size") as found:
                cls(5, 7, proj_size=wrong)
            messages.append(str(found.value))
        assert messages[0] == messages[1]


def test_accelerate_takes_projections(device):
    model = nn.Sequential(nn.LSTM(4, 6, 2, proj_size=3, bidirectional=True)).to(device)
    x = torch.randn(5, 2, 4, device=device)
    expected = model(x)[0]
    report = birnn_ext.accelerate(model)
    assert report.replaced == ["0"]
    before = op_calls()[f"{device}_forward"]
    all_near([model(x)[0]], [expected])
    assert op_calls()[f"{device}_forward"] == before + 2
    assert birnn_ext.restore(model) == ["0"]
    all_near([model(x)[0]], [expected])


# --- the features, in the module --------------------------------------------------------------------------------------


def by_hand(lstm: LSTM, x: Tensor, h_mask: Tensor | None = None) -> Tensor:
    """Computes one unidirectional layer in evaluation mode, cell by cell from the papers' equations."""
    w = dict(lstm.named_parameters())
    batch = x.shape[1]
    h = x.new_zeros(batch, lstm.proj_size or lstm.hidden_size)
    c = x.new_zeros(batch, lstm.hidden_size)
    if lstm.learned_state:
        h, c = lstm.h_0.expand(batch, -1), lstm.c_0.expand(batch, -1)
    ys = []
    for step in x:
        from_x, from_h = step @ w["weight_ih_l0"].T, (h if h_mask is None else h * h_mask) @ w["weight_hh_l0"].T
        if lstm.layer_norm:
            from_x = F.layer_norm(from_x, from_x.shape[-1:]) * w["weight_ln_ih_l0"]
            from_h = F.layer_norm(from_h, from_h.shape[-1:]) * w["weight_ln_hh_l0"]
        i, f, g, o = (from_x + from_h + w["bias_ih_l0"] + w["bias_hh_l0"]).chunk(4, -1)
        new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        shown = new_c
        if lstm.layer_norm:
            shown = F.layer_norm(new_c, new_c.shape[-1:], w["weight_ln_c_l0"], w["bias_ln_c_l0"])
        new_h = o.sigmoid() * shown.tanh()
        if lstm.proj_size:
            new_h = new_h @ w["weight_hr_l0"].T
        z_h, z_c = lstm.zoneout
        h, c = z_h * h + (1 - z_h) * new_h, z_c * c + (1 - z_c) * new_c
        ys.append(h)
    return torch.stack(ys)


def randomized(lstm: LSTM) -> LSTM:
    """Replaces the neutral initial values of the parameters by random ones; returns lstm."""
    with torch.no_grad():
        for name, p in lstm.named_parameters():
            if "ln_" in name or name in ("h_0", "c_0"):
                p.add_(torch.randn(p.shape).to(p) / 4)
    return lstm


@each_feature
def test_module_by_hand(options, device):
    lstm = randomized(LSTM(4, 7, dtype=torch.float64, device=device, **options)).eval()
    x = torch.randn(5, 3, 4, dtype=torch.float64, device=device)
    leaves = [x.requires_grad_(), *lstm.parameters()]
    results = [[y, *torch.autograd.grad(y.square().sum(), leaves)] for y in (lstm(x)[0], by_hand(lstm, x))]
    all_near(*results)


@each_feature
def test_two_directions_are_two_lstms(options, device):
    """The reverse direction equals a unidirectional LSTM with its weights on the flipped sequence; so do its cells."""
    both = randomized(LSTM(4, 7, bidirectional=True, dtype=torch.float64, device=device, **options)).eval()
    one = LSTM(4, 7, dtype=torch.float64, device=device, **options).eval()
    weights = {n.removesuffix("_reverse"): p for n, p in both.state_dict().items() if n.endswith("_reverse")}
    weights |= {n: p[1:] for n, p in both.state_dict().items() if n in ("h_0", "c_0")}
    one.load_state_dict(weights)
    x = torch.randn(5, 3, 4, dtype=torch.float64, device=device)
    y, (h_n, c_n), cells = both(x, return_cell_states=True)
    y_one, (h_one, c_one), cells_one = one(x.flip(0), return_cell_states=True)
    outputs = y_one.shape[-1]
    all_near([y[..., outputs:], cells[..., 7:], h_n[1:], c_n[1:]], [y_one.flip(0), cells_one.flip(0), h_one, c_one])


@each_feature
def test_every_entrance_gives_the_same(options, device):
    """batch_first, unbatched, lengths, packed, "last", recompute and training mode give one result under one seed."""
    lstm = randomized(LSTM(4, 6, 2, dropout=0.2, bidirectional=True, dtype=torch.float64, device=device, **options))
    x = torch.randn(5, 3, 4, dtype=torch.float64, device=device)

    def run(module: LSTM, *args, **kwargs):
        torch.manual_seed(11)
        return module(*args, **kwargs)

    y, states = run(lstm, x)
    transposed = copy.deepcopy(lstm)
    transposed.batch_first = True
    y_t, states_t = run(transposed, x.transpose(0, 1))
    all_near([y_t.transpose(0, 1), *states_t], [y, *states])
    last, _ = run(lstm, x, output="last")
    all_near([last], [y[-1]])
    again = copy.deepcopy(lstm)
    again.recompute = True
    grads = [gradients(m, [run(m, x)[0]], []) for m in (lstm, again)]
    all_near(*grads)

    lengths = torch.tensor([2, 5, 0], device=device)
    y_l, states_l = run(lstm, x, lengths=lengths)
    assert all((y_l[n:, b] == 0).all() for b, n in enumerate(lengths.tolist()))
    last_l, _ = run(lstm, x, output="last", lengths=lengths)
    all_near([last_l[0], last_l[1], last_l[2]], [y_l[1, 0], y_l[4, 1], torch.zeros_like(last_l[2])])
    lstm.eval()
    one = lstm(x[:, 1])
    all_near([one[0], *one[1]], [t[:, 1] for t in (lstm(x)[0], *lstm(x)[1])])
    nonzero = lengths.clamp(min=1)
    packed = pack_padded_sequence(x, nonzero.cpu(), enforce_sorted=False)
    y_p, states_p, cells_p = lstm(packed, return_cell_states=True)
    y_l, states_l, cells_l = lstm(x, lengths=nonzero, return_cell_states=True)
    assert isinstance(cells_p, PackedSequence)
    all_near([pad_packed_sequence(y_p)[0], pad_packed_sequence(cells_p)[0], *states_p], [y_l, cells_l, *states_l])


@each_feature
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtypes_and_autocast(dtype, options, device):
    lstm = randomized(LSTM(4, 16, bidirectional=True, device=device, dtype=dtype, **options))
    x = torch.randn(5, 3, 4, device=device).to(dtype)

    def run(module: LSTM, x: Tensor):
        y, (h_n, c_n), cells = module.eval()(x, return_cell_states=True)
        return [y, h_n, c_n, cells, *gradients(module, [y, h_n, cells], [])]

    truth = run(copy.deepcopy(lstm).double(), x.double())
    results = run(lstm, x)
    assert {t.dtype for t in results} == {dtype}
    if dtype == torch.float32:
        return all_near(results, [t.float() for t in truth])
    with torch.autocast(device, dtype):
        autocast = run(copy.deepcopy(lstm).float(), x.float())
    assert [t.dtype for t in autocast] == [dtype] * 4 + [torch.float32] * (len(truth) - 4)
    for found in (results, autocast):
        for a, e in zip(found, truth, strict=True):
            # layer norm divides by the spread of values that are already rounded
            rms = float((a.double() - e).norm() / e.norm())
            assert rms < (3 if lstm.layer_norm else 1) * TOLERANCE[dtype], (rms, a.shape)
    return None


@each_feature
def test_empty_batch(options, device):
    lstm = LSTM(4, 6, 2, bidirectional=True, device=device, **options)
    x = torch.randn(3, 0, 4, device=device, requires_grad=True)
    y, (h_n, c_n), cells = lstm(x, return_cell_states=True)
    assert y.shape == (3, 0, 2 * (lstm.proj_size or 6))
    assert cells.shape == (3, 0, 12)
    assert (h_n.shape[1], c_n.shape[1]) == (0, 0)
    assert all((g == 0).all() for g in torch.autograd.grad(y.sum() + cells.sum(), list(lstm.parameters())))


@each_feature
def test_copies_pickles_and_state_dicts(options):
    lstm = randomized(LSTM(4, 6, 2, bidirectional=True, **options)).eval()
    x = torch.randn(3, 2, 4)
    expected = lstm(x)[0]
    other = LSTM(4, 6, 2, bidirectional=True, **options).eval()
    other.load_state_dict(lstm.state_dict())
    for twin in (copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm)), other):
        assert torch.equal(twin(x)[0], expected)
        assert repr(twin) == repr(lstm)
    buffer = io.BytesIO()
    torch.save(lstm.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))


def test_pickles_from_before_these_options_existed():
    lstm = LSTM(4, 6)
    x = torch.randn(3, 2, 4)
    state = copy.copy(lstm.__dict__)
    for name in ("recurrent_dropout", "zoneout", "layer_norm", "learned_state", "recompute"):
        del state[name]
    old = LSTM.__new__(LSTM)
    old.__setstate__(state)
    assert torch.equal(old(x)[0], lstm(x)[0])
    assert repr(old) == repr(lstm)


def test_repr():
    lstm = LSTM(4, 6, 2, proj_size=3, recurrent_dropout=0.1, zoneout=(0.2, 0.3), layer_norm=True, learned_state=True)
    assert repr(lstm) == (
        "LSTM(4, 6, proj_size=3, num_layers=2, recurrent_dropout=0.1, zoneout=(0.2, 0.3), layer_norm=True, "
        "learned_state=True)"
    )
    assert repr(LSTM(4, 6)) == "LSTM(4, 6)"


def test_off_means_nn_lstm(device):
    """Options that are off, or dropout in evaluation mode, leave operators, parameters and numbers the same."""
    ours, theirs = twins(4, 6, 2, bidirectional=True, device=device)
    x = torch.randn(5, 3, 4, device=device)
    with Seen() as seen:
        all_near([ours(x)[0]], [theirs(x)[0]])
        ours.recurrent_dropout = 0.5
        all_near([ours.eval()(x)[0]], [theirs(x)[0]])
        assert forward_op not in seen.operators
        ours.train()(x)
        assert forward_op in seen.operators


class Seen(TorchDispatchMode):
    """Records the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators.add(function)
        return function(*args, **(kwargs or {}))


# --- recurrent dropout, zoneout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"recurrent_dropout": 0.25}, {"zoneout": 0.25}], ids=["dropout", "zoneout"])
def test_random_masks_are_repeatable_and_off_in_evaluation(options, device):
    lstm = LSTM(4, 8, bidirectional=True, device=device, **options)
    x = torch.randn(6, 3, 4, device=device)
    torch.manual_seed(5)
    first = lstm(x)[0]
    assert not torch.equal(lstm(x)[0], first)
    torch.manual_seed(5)
    assert torch.equal(lstm(x)[0], first)
    lstm.eval()
    assert torch.equal(lstm(x)[0], lstm(x)[0])


def test_recurrent_dropout_is_one_mask_for_all_steps(device):
    """The test finds the mask from the first step, and it then explains all others. Its mean and scale are right."""
    lstm = LSTM(4, 60, recurrent_dropout=0.25, device=device, dtype=torch.float64)
    variant = lstm._variant(torch.zeros(7, 50, 4, dtype=torch.float64, device=device), None, False)
    values = variant.h_mask.unique()
    all_near([values], [torch.tensor([0, 4 / 3], dtype=torch.float64, device=device)])
    assert abs((variant.h_mask > 0).double().mean().item() - 0.75) < 0.03
    assert variant.h_mask.shape == (1, 50, 60)
    lstm._variant = lambda *_: variant
    x = torch.randn(7, 50, 4, dtype=torch.float64, device=device)
    y = lstm(x)[0]
    del lstm._variant
    lstm.eval()
    all_near([y], [by_hand(lstm, x, variant.h_mask[0])])


def test_recurrent_dropout_of_everything_leaves_no_memory_in_h(device):
    """With probability 1, W_hh never sees h, but c is still carried."""
    lstm = LSTM(4, 8, recurrent_dropout=1.0, device=device)
    plain = LSTM(4, 8, device=device)
    plain.load_state_dict(lstm.state_dict())
    with torch.no_grad():
        plain.weight_hh_l0.zero_()
    x = torch.randn(6, 3, 4, device=device)
    all_near([lstm(x)[0]], [plain(x)[0]])


def test_zoneout_keeps_values_as_often_as_it_should(device):
    lstm = LSTM(4, 20, zoneout=(0.3, 0.1), device=device)
    y, _, c = lstm(torch.randn(60, 20, 4, device=device), return_cell_states=True)
    for values, p in ((y, 0.3), (c, 0.1)):
        kept = (values[1:] == values[:-1]).float().mean().item()
        assert abs(kept - p) < 0.02


def test_zoneout_of_everything_keeps_the_state(device):
    lstm = LSTM(4, 6, zoneout=1.0, bidirectional=True, device=device)
    h0, c0 = random_state(2, 3, 6, device=device)
    for training in (True, False):
        y, (h_n, c_n) = lstm.train(training)(torch.randn(5, 3, 4, device=device), (h0, c0))
        assert torch.equal(h_n, h0)
        assert torch.equal(c_n, c0)
        assert torch.equal(y, torch.cat(list(h0), -1).expand(5, -1, -1))


# --- reset, cell states, learned state --------------------------------------------------------------------------------


@each_feature
def test_reset_equals_separate_sequences(options, device):
    """In both directions and all layers, outputs, cells and gradients equal those of each part as its own sequence."""
    options = {name: value for name, value in options.items() if name not in ("learned_state", "recurrent_dropout")}
    lstm = randomized(LSTM(4, 6, 2, bidirectional=True, dtype=torch.float64, device=device, **options)).eval()
    cuts = [[3, 4], [], [1, 2, 6], [0, 5]]
    lengths = [7, 7, 7, 6]
    x = torch.randn(7, 4, 4, dtype=torch.float64, device=device, requires_grad=True)
    reset = torch.zeros(7, 4, dtype=torch.bool)
    for b, at in enumerate(cuts):
        reset[at, b] = True
    reset[6, 3] = True  # beyond the end, so it has no effect
    reset = reset.to(device)

    y, (h_n, c_n), cells = lstm(x, reset=reset, lengths=torch.tensor(lengths, device=device), return_cell_states=True)
    ours, parts = [], []
    for b, at in enumerate(cuts):
        edges = sorted({0, *at, lengths[b]})
        for begin, end in itertools.pairwise(edges):
            part, (h, c), part_cells = lstm(x[begin:end, b], return_cell_states=True)
            ours += [y[begin:end, b], cells[begin:end, b]]
            parts += [part, part_cells]
            if end == lengths[b]:  # here the forward direction ends, in both layers
                ours += [h_n[::2, b], c_n[::2, b]]
                parts += [h[::2], c[::2]]
            if begin == 0:
                ours += [h_n[1::2, b], c_n[1::2, b]]
                parts += [h[1::2], c[1::2]]
    all_near(ours, parts)
    all_near(gradients(lstm, ours, [x]), gradients(lstm, parts, [x]))


def test_reset_of_the_first_step_forgets_the_given_state(device):
    lstm = LSTM(4, 6, device=device)
    x, state = torch.randn(5, 2, 4, device=device), random_state(1, 2, 6, device=device)
    for s in state:
        s.requires_grad_()
    reset = torch.zeros(5, 2, dtype=torch.bool, device=device)
    reset[0, 1] = True
    y, _ = lstm(x, state, reset=reset)
    all_near([y[:, 0], y[:, 1]], [lstm(x, state)[0][:, 0], lstm(x)[0][:, 1]])
    for grad in torch.autograd.grad(y.sum(), state):
        assert (grad[:, 1] == 0).all()
        assert (grad[:, 0] != 0).any()


def test_reset_layouts(device):
    lstm = LSTM(4, 6, bidirectional=True, device=device)
    x, reset = torch.randn(5, 3, 4, device=device), torch.rand(5, 3, device=device) < 0.3
    y, _ = lstm(x, reset=reset)
    all_near([lstm(x[:, 1], reset=reset[:, 1])[0]], [y[:, 1]])
    lstm.batch_first = True
    all_near([lstm(x.transpose(0, 1), reset=reset.T)[0].transpose(0, 1)], [y])
    lengths = torch.tensor([3, 5, 1])
    packed, packed_reset = (pack_padded_sequence(t, lengths, enforce_sorted=False) for t in (x, reset))
    ragged, _ = lstm(x.transpose(0, 1), reset=reset.T, lengths=lengths.to(device))
    all_near([pad_packed_sequence(lstm(packed, reset=packed_reset)[0], batch_first=True)[0]], [ragged])
    last, _ = lstm(x.transpose(0, 1), reset=reset.T, lengths=lengths.to(device), output="last")
    all_near([last], [ragged[torch.arange(3), lengths - 1]])


def test_cell_states(device):
    """c_t is the c_n of the sequence's first t steps. Its gradient is right even if it is the only one."""
    lstm = LSTM(4, 6, 2, dtype=torch.float64, device=device)
    x = torch.randn(5, 3, 4, dtype=torch.float64, device=device, requires_grad=True)
    y, states, cells = lstm(x, return_cell_states=True)
    plain = lstm(x)
    all_near([y, *states], [plain[0], *plain[1]])
    expected = torch.stack([lstm(x[: t + 1])[1][1][1] for t in range(5)])
    all_near([cells], [expected])
    all_near(gradients(lstm, [cells], [x]), gradients(lstm, [expected], [x]))
    with torch.no_grad():
        all_near([lstm(x, return_cell_states=True)[2]], [expected])


def test_results_may_be_changed_in_place():
    lstm = LSTM(4, 6, dtype=torch.float64, proj_size=3)
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    y, _, cells = lstm(x, return_cell_states=True)
    expected = torch.autograd.grad(y.sum() + cells.sum(), lstm.weight_hh_l0, retain_graph=True)
    y.data.zero_()
    cells.data.zero_()
    all_near(torch.autograd.grad(y.sum() + cells.sum(), lstm.weight_hh_l0), expected)


def test_learned_state(device):
    lstm = randomized(LSTM(4, 6, 2, bidirectional=True, learned_state=True, device=device))
    x = torch.randn(5, 3, 4, device=device)
    state = [s.unsqueeze(1).expand(-1, 3, -1) for s in (lstm.h_0, lstm.c_0)]
    plain = LSTM(4, 6, 2, bidirectional=True, device=device)
    plain.load_state_dict(lstm.state_dict(), strict=False)
    results = []
    for module, hx in ((lstm, None), (plain, tuple(state))):
        y, (h_n, c_n) = module(x, hx)
        results.append([y, h_n, c_n, *torch.autograd.grad(y.sum() + h_n.sum(), [lstm.h_0, lstm.c_0])])
    all_near(*results)
    zeros = torch.zeros_like(state[0]), torch.zeros_like(state[1])
    all_near([lstm(x, zeros)[0]], [plain(x)[0]])


def test_initial_values_do_nothing():
    """All other weights equal nn.LSTM's from the same seed, and reset_parameters restores both."""
    torch.manual_seed(3)
    theirs = nn.LSTM(4, 6, 2, bidirectional=True)
    torch.manual_seed(3)
    ours = LSTM(4, 6, 2, bidirectional=True, layer_norm=True, learned_state=True)
    for _ in range(2):
        for name, p in ours.named_parameters():
            if name.startswith("weight_ln_"):
                assert (p == 1).all(), name
            elif name.startswith("bias_ln_") or name in ("h_0", "c_0"):
                assert (p == 0).all(), name
            else:
                assert torch.equal(p, theirs.get_parameter(name)), name
        randomized(ours)
        for module in (ours, theirs):
            torch.manual_seed(4)
            module.reset_parameters()
    assert len(list(ours.parameters())) == 16 + 4 * 4 + 2


def bools(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bool)


X = torch.zeros(5, 2, 4)
MODULE_ERRORS = [
    (lambda: LSTM(4, 6, recurrent_dropout=1.5), ValueError, r"recurrent_dropout must be a number in \[0, 1\], got 1.5"),
    (lambda: LSTM(4, 6, zoneout=(0.1, -1)), ValueError, r"zoneout must be a number in \[0, 1\], got -1"),
    (lambda: LSTM(4, 6, zoneout=(0.1, 0.1, 0.1)), ValueError, "zoneout must be a number"),
    (lambda: LSTM(4, 6)(X, reset=bools(2, 5)), ValueError, r"reset must have shape \(5, 2\), got \(2, 5\)"),
    (lambda: LSTM(4, 6)(X, reset=torch.zeros(5, 2)), TypeError, "reset must be bool, got torch.float32"),
    (lambda: LSTM(4, 6)(X, reset=[0]), TypeError, "reset must be a tensor, got list"),
    (lambda: LSTM(4, 6)(X, reset=bools(5, 2).to("meta")), ValueError, "reset must be on the input's device cpu, got meta"),
    (lambda: LSTM(4, 6)(pack_padded_sequence(X, [5, 3]), reset=bools(5, 2)), TypeError, "reset must be a PackedSequence"),
    (lambda: LSTM(4, 6)(pack_padded_sequence(X, [5, 3]), reset=pack_padded_sequence(bools(5, 2), [4, 4])), ValueError, "reset must be packed as the input"),
    (lambda: LSTM(4, 6)(X, output="last", return_cell_states=True), ValueError, "return_cell_states must be False"),
    (lambda: LSTM(4, 6, learned_state=True)(X, reset=bools(5, 2)), ValueError, "reset must be None with learned_state"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), MODULE_ERRORS, ids=[message for *_, message in MODULE_ERRORS])
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_reset_packed_in_another_order_is_an_error():
    x, reset = torch.randn(5, 2, 4), torch.zeros(5, 2, dtype=torch.bool)
    lstm = LSTM(4, 3)
    packed = pack_padded_sequence(x, torch.tensor([3, 5]), enforce_sorted=False)
    lstm(packed, reset=pack_padded_sequence(reset, torch.tensor([3, 5]), enforce_sorted=False))
    with pytest.raises(ValueError, match="reset must be packed as the input"):
        lstm(packed, reset=pack_padded_sequence(reset, torch.tensor([5, 3]), enforce_sorted=False))


def test_double_backward_of_layer_norm_within_autocast(device):
    """A backward pass within the user's autocast keeps the types of the forward pass."""
    lstm = LSTM(5, 8, layer_norm=True, device=device)
    x = torch.randn(4, 3, 5, device=device)

    def penalty(autocast: bool) -> torch.Tensor:
        inputs = x.clone().requires_grad_()
        with torch.autocast(device, dtype=torch.bfloat16):
            y = lstm(inputs)[0].float()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            (dx,) = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
            return torch.autograd.grad(dx.float().square().sum(), lstm.weight_hh_l0)[0]

    within, without = penalty(True), penalty(False)
    assert error(within, without) < 0.1
