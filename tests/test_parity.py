"""Code around an nn.LSTM or nn.GRU gets the same results from ours."""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings

import pytest
import torch
from cells import GRU_CELL, LSTM_CELL, RNN_CELL, Cell, every_cell
from helpers import all_near, assert_near, gradients, leaves, random_state, twins
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from birnn_ext import accelerate, restore


def results(module: nn.Module, x: Tensor, hx=None) -> list[Tensor]:
    """Returns outputs, states and gradients."""
    outputs = leaves(module(x, hx))
    return [*outputs, *gradients(module, outputs, [x] if x.requires_grad else [])]


# --- dropout ----------------------------------------------------------------------------------------------------------


@every_cell
@pytest.mark.parametrize("bidirectional", [True, False], ids=["bi", "uni"])
def test_dropout_is_that_of_nn_lstm_under_a_seed(bidirectional, cell):
    """On the CPU cell.theirs draws its masks by the same calls, so results are equal, too."""
    ours, theirs = twins(4, 6, 3, dropout=0.4, bidirectional=bidirectional, cell=cell)
    x = torch.randn(5, 3, 4, requires_grad=True)
    seen = []
    for module in (ours, theirs, ours):
        torch.manual_seed(3)
        seen.append(results(module, x))
    all_near(seen[0], seen[1])
    assert all(map(torch.equal, seen[0], seen[2]))  # nondeterminism: pytorch #35661
    ours.eval(), theirs.eval()
    all_near(results(ours, x), results(theirs, x))


@every_cell
def test_dropout_differs_between_calls_and_leaves_the_last_layer_alone(cell, device):
    ours = cell.module(4, 6, 2, dropout=0.5, bidirectional=True, device=device)
    x = torch.randn(5, 3, 4, device=device)
    torch.manual_seed(3)
    first = [ours(x)[0] for _ in range(2)]
    torch.manual_seed(3)
    second = [ours(x)[0] for _ in range(2)]
    assert not torch.equal(*first)
    assert all(map(torch.equal, first, second))
    assert (first[0] != 0).all()
    h_n = [leaves(ours(x))[1] for _ in range(2)]
    assert torch.equal(h_n[0][:2], h_n[1][:2])  # the first layer, before any dropout
    assert not torch.equal(h_n[0][2:], h_n[1][2:])


@every_cell
def test_dropout_warning_with_one_layer(cell):
    with pytest.warns(UserWarning, match="num_layers greater than 1, but got dropout=0.5 and num_layers=1"):
        cell.module(3, 4, dropout=0.5)


# --- PackedSequence ---------------------------------------------------------------------------------------------------


@every_cell
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_sequence_keeps_its_order(enforce_sorted, batch_first, cell, device):
    """The sequences may have any order, and batch_first does not matter (pytorch #47637, #108246)."""
    ours, theirs = twins(3, 5, 2, bidirectional=True, batch_first=batch_first, device=device, cell=cell)
    lengths = [6, 5, 5, 1] if enforce_sorted else [1, 5, 6, 5]
    sequences = [torch.randn(n, 3, device=device) for n in lengths]
    packed = pack_sequence(sequences, enforce_sorted=enforce_sorted)
    state = random_state(4, 4, 5, device=device, cell=cell)
    seen = []
    for module in (ours, theirs):
        y, hx = module(packed, cell.hx(state))
        assert isinstance(y, PackedSequence)
        assert torch.equal(y.batch_sizes, packed.batch_sizes)
        assert y.batch_sizes.device.type == "cpu"
        for name in ("sorted_indices", "unsorted_indices"):
            expected = getattr(packed, name)
            assert getattr(y, name) is None if expected is None else torch.equal(getattr(y, name), expected)
        seen.append([y.data, *leaves(hx)])
    all_near(*seen)


class NoDeviceRead(TorchDispatchMode):
    """Fails if an operator copies from a CUDA device to the host, which would wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = torch.utils._pytree.tree_leaves(result)
        # packing keeps its lengths and batch sizes on the CPU
        packing = func.overloadpacket in (torch.ops.aten._pack_padded_sequence, torch.ops.aten._pad_packed_sequence)
        on_device = any(t.is_cuda for t in inputs) and not packing
        assert not (on_device and any(not isinstance(o, Tensor) or not o.is_cuda for o in outputs if o is not None)), (
            f"{func} reads from the device"
        )
        # the sizes of these results depend on values, so PyTorch reads them
        assert not (on_device and func.overloadpacket in (torch.ops.aten.nonzero, torch.ops.aten.masked_select)), func
        return result


@every_cell
@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["sorted", "unsorted", "lengths", "list", "on the CPU"])
def test_ragged_batches_do_not_wait_for_the_device(kind, cell):
    ours = cell.module(3, 5, 2, bidirectional=True, device="cuda")
    x = torch.randn(6, 4, 3, device="cuda", requires_grad=True)
    lengths = [6, 5, 2, 1] if kind == "sorted" else [1, 5, 6, 2]
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=kind == "sorted")
    on_device = torch.tensor(lengths, device="cuda")
    state = random_state(4, 4, 5, device="cuda", cell=cell)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with NoDeviceRead():
            if kind in ("lengths", "list", "on the CPU"):
                given = {"lengths": on_device, "list": lengths, "on the CPU": torch.tensor(lengths)}[kind]
                results = leaves(ours(x, cell.hx(state), lengths=given))
            else:
                y, hx = ours(packed, cell.hx(state))
                results = [y.data, *leaves(hx)]
            sum(result.sum() for result in results).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(AssertionError, match="reads from the device"), NoDeviceRead():
        results[1][0, 0, 0].item()


@every_cell
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_packed_sequence_in_other_types(dtype, cell, device):
    ours = cell.module(3, 5, 2, bidirectional=True, device=device, dtype=dtype)
    x = torch.randn(4, 3, 3, device=device, dtype=dtype)
    y, hx = ours(pack_padded_sequence(x, [4, 2, 1]))
    padded, padded_hx = ours(x, lengths=torch.tensor([4, 2, 1], device=device))
    assert y.data.dtype == dtype
    assert torch.equal(y.data, pack_padded_sequence(padded, [4, 2, 1]).data)
    assert all(map(torch.equal, leaves(hx), leaves(padded_hx)))


# --- shapes and errors ------------------------------------------------------------------------------------------------

X = torch.zeros(4, 2, 3)
WRONG_CALLS = {
    "features": lambda m: m(torch.zeros(4, 2, 5)),
    "1-D": lambda m: m(torch.zeros(3)),
    "4-D": lambda m: m(torch.zeros(1, 4, 2, 3)),
    "no steps": lambda m: m(torch.zeros(0, 2, 3)),
    "h0 of another batch": lambda m: m(X, (torch.zeros(4, 3, 5), torch.zeros(4, 2, 5))),
    "c0 of another batch": lambda m: m(X, (torch.zeros(4, 2, 5), torch.zeros(4, 1, 5))),
    "h0 of other units": lambda m: m(X, (torch.zeros(4, 2, 6), torch.zeros(4, 2, 5))),
    "c0 of other layers": lambda m: m(X, (torch.zeros(4, 2, 5), torch.zeros(2, 2, 5))),
    "unbatched h0": lambda m: m(X, (torch.zeros(4, 5), torch.zeros(4, 5))),
    "batched h0, unbatched input": lambda m: m(X[:, 0], (torch.zeros(4, 1, 5), torch.zeros(4, 1, 5))),
    "unbatched h0 of other layers": lambda m: m(X[:, 0], (torch.zeros(2, 5), torch.zeros(4, 5))),
    "another dtype": lambda m: m(X.double()),
    "integers": lambda m: m(X.long()),
}  # fmt: skip


WRONG_CALLS_OF_A_GRU = {
    **{name: call for name, call in WRONG_CALLS.items() if "0" not in name},
    "h0 of another batch": lambda m: m(X, torch.zeros(4, 3, 5)),
    "h0 of other units": lambda m: m(X, torch.zeros(4, 2, 6)),
    "h0 of other layers": lambda m: m(X, torch.zeros(2, 2, 5)),
    "unbatched h0": lambda m: m(X, torch.zeros(4, 5)),
    "batched h0, unbatched input": lambda m: m(X[:, 0], torch.zeros(4, 1, 5)),
    "unbatched h0 of other layers": lambda m: m(X[:, 0], torch.zeros(2, 5)),
}
EVERY_WRONG_CALL = [pytest.param(LSTM_CELL, call, id=f"lstm: {name}") for name, call in WRONG_CALLS.items()]
EVERY_WRONG_CALL += [pytest.param(GRU_CELL, call, id=f"gru: {name}") for name, call in WRONG_CALLS_OF_A_GRU.items()]


@pytest.mark.parametrize(("cell", "call"), EVERY_WRONG_CALL)
def test_wrong_sizes_raise_as_pytorchs_module_does(cell, call):
    """The error has the same kind, and names every size that PyTorch's message names."""
    ours, theirs = twins(3, 5, 2, bidirectional=True, cell=cell)
    with pytest.raises(Exception) as expected:
        call(theirs)
    with pytest.raises(expected.type) as actual:
        call(ours)
    sizes = {word.strip("().,[]") for word in str(expected.value).split() if any(map(str.isdigit, word))}
    assert all(size in str(actual.value) for size in sizes), f"{actual.value}\nPyTorch: {expected.value}"


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize(
    ("cell", "shapes"),
    [
        (LSTM_CELL, [(4, 1, 5), (4, 1, 5)]),
        (LSTM_CELL, [(4, 2, 5), (4, 3, 5)]),
        (LSTM_CELL, [(3, 2, 5), (4, 2, 5)]),
        (GRU_CELL, [(4, 1, 5)]),
        (GRU_CELL, [(4, 3, 5)]),
        (GRU_CELL, [(3, 2, 5)]),
    ],
    ids=str,
)
def test_wrong_sizes_with_a_packed_sequence(cell, shapes, enforce_sorted):
    """PyTorch does not check these: it raises unrelated errors for some, and accepts states of a larger batch."""
    ours = cell.module(3, 5, 2, bidirectional=True)
    packed = pack_sequence([torch.zeros(2, 3), torch.zeros(2, 3)], enforce_sorted=enforce_sorted)
    wrong = next(list(shape) for shape in shapes if shape != (4, 2, 5))
    with pytest.raises(RuntimeError, match=rf"Expected hidden\S* size \(4, 2, 5\), got {re.escape(str(wrong))}"):
        ours(packed, cell.hx(tuple(map(torch.zeros, shapes))))
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size. Expected 3, got 5"):
        ours(pack_sequence([torch.zeros(4, 5)], enforce_sorted=enforce_sorted))


@every_cell
@pytest.mark.parametrize("batch_first", [True, False])
def test_empty_batch(batch_first, cell, device):
    """cell.theirs raised an error here (pytorch #50192)."""
    ours, theirs = twins(3, 5, 2, bidirectional=True, batch_first=batch_first, cell=cell)
    ours = ours.to(device)
    x = torch.zeros((0, 4, 3) if batch_first else (4, 0, 3))
    state = (torch.zeros(4, 0, 5),) * cell.states
    for hx in (None, state):
        found = leaves(ours(x.to(device), cell.hx(hx and tuple(s.to(device) for s in hx))))
        expected = leaves(theirs(x, cell.hx(hx)))
        assert [t.shape for t in found] == [t.shape for t in expected]
    last, _ = ours(x.to(device), output="last")
    assert last.shape == (0, 10)
    found = leaves(ours(x.to(device), lengths=torch.zeros(0, dtype=torch.int64, device=device)))
    assert [t.shape for t in found] == [t.shape for t in expected]


@every_cell
def test_all_sequences_empty(cell, device):
    ours = cell.module(3, 5, 2, bidirectional=True, device=device)
    x = torch.randn(4, 2, 3, device=device, requires_grad=True)
    state = random_state(4, 2, 5, device=device, cell=cell)
    y, *states = leaves(ours(x, cell.hx(state), lengths=torch.zeros(2, dtype=torch.int64, device=device)))
    assert (y == 0).all()
    assert all(map(torch.equal, states, state))
    y.sum().backward()
    assert (x.grad == 0).all()
    assert all((p.grad == 0).all() for p in ours.parameters())


@every_cell
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_types_of_results(dtype, cell, device):
    ours = cell.module(3, 5, 2, bidirectional=True, device=device, dtype=dtype)
    x = torch.randn(4, 2, 3, device=device, dtype=dtype, requires_grad=True)
    y, *states = leaves(ours(x))
    assert {y.dtype, *(s.dtype for s in states)} == {dtype}
    y.sum().backward()
    assert all(t.grad.dtype == dtype and t.grad.device == x.device for t in (x, *ours.parameters()))


@every_cell
def test_large_numbers_of_sequences(cell, device):
    """cell.theirs had an illegal access at B = 10240 (pytorch #65301)."""
    ours = cell.module(1, 1, device=device)
    x = torch.randn(2, 10240, 1, device=device)
    y, _ = ours(x)
    assert_near(y[:, -3:], ours(x[:, -3:].contiguous())[0])


# --- an input that changes, or that allows no gradients --------------------------------------------------------------

KEEPING = [{}, {"recompute": True}, {"dtype": torch.bfloat16}, {"dtype": torch.bfloat16, "recompute": True}]
OF_LSTM = [{"zoneout": 0.1}, {"zoneout": 0.1, "recompute": True}]
EVERY_KEEPING = [(LSTM_CELL, o) for o in KEEPING + OF_LSTM] + [(GRU_CELL, o) for o in KEEPING]
each_keeping = pytest.mark.parametrize(
    ("cell", "options"), EVERY_KEEPING, ids=[f"{cell.name}: {options}" for cell, options in EVERY_KEEPING]
)


def allowed_in_both(batch: int, batch_first: bool) -> list[bool]:
    """Tells whether both keep a copy of their input."""
    return [batch_first and batch > 1] * 2


def same_call(cell: Cell, options: dict, batch: int, batch_first: bool) -> list[tuple[nn.RNNBase, Tensor]]:
    """Returns our module and PyTorch's, each with its input."""
    x = torch.randn((batch, 5, 3) if batch_first else (5, batch, 3), dtype=options.get("dtype"))
    theirs = {k: v for k, v in options.items() if k == "dtype"}
    pairs = ((cell.module, options), (cell.theirs, theirs))
    return [(cls(3, 4, batch_first=batch_first, **o), x.clone()) for cls, o in pairs]


@pytest.mark.parametrize(("batch", "batch_first"), [(4, True), (1, True), (4, False)])
@each_keeping
def test_an_input_may_change_in_place_where_it_may_with_nn_lstm(cell, options, batch, batch_first):
    """If the batch is first, each keeps a copy. Otherwise the backward pass raises that the input has changed."""
    allowed = []
    for module, x in same_call(cell, options, batch, batch_first):
        y, _ = module(x)
        expected = torch.autograd.grad(y.sum(), module.parameters(), retain_graph=True)
        x += 1
        try:
            assert all(map(torch.equal, torch.autograd.grad(y.sum(), module.parameters()), expected))
            allowed.append(True)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            allowed.append(False)
    assert allowed == allowed_in_both(batch, batch_first)


@pytest.mark.parametrize("changed", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0", "state"])
@pytest.mark.parametrize(
    ("cell", "options"), [*EVERY_KEEPING, (LSTM_CELL, {"layer_norm": True, "recompute": True})], ids=str
)
def test_what_changed_in_place_never_gives_wrong_gradients(cell, options, changed, device):
    """nn.LSTM raises. So do ours, unless they keep a copy, whose gradients are those of the values before."""
    lstm = cell.module(3, 4, bidirectional=True, device=device, **options)
    x = torch.randn(5, 2, 3, device=device, dtype=options.get("dtype"), requires_grad=True)
    state = random_state(2, 2, 4, cell, device=device, dtype=options.get("dtype"))
    y, _ = lstm(x, cell.hx(state))
    inputs = [x, *lstm.parameters()]
    expected = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    with torch.no_grad():
        (state[0] if changed == "state" else getattr(lstm, changed)).add_(1)
    try:
        assert all(map(torch.equal, torch.autograd.grad(y.sum(), inputs), expected))
        kept_a_copy = True
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        kept_a_copy = False
    if options.get("recompute"):
        assert not kept_a_copy


@pytest.mark.parametrize(("batch", "batch_first"), [(4, True), (1, True), (4, False)])
@each_keeping
def test_an_input_made_in_inference_mode_trains_where_it_does_with_nn_lstm(cell, options, batch, batch_first):
    allowed = []
    for module, x in same_call(cell, options, batch, batch_first):
        with torch.inference_mode():
            made = x.clone()
        try:
            seen = []
            for z in (made, x):
                torch.manual_seed(3)  # for zoneout's masks
                seen.append(torch.autograd.grad(module(z)[0].sum(), module.parameters()))
            assert all(map(torch.equal, *seen))
            allowed.append(True)
        except RuntimeError as error:
            assert "Inference tensors cannot be saved for backward" in str(error)
            allowed.append(False)
    assert allowed == allowed_in_both(batch, batch_first)


# --- arguments, attributes and methods --------------------------------------------------------------------------------

ARGUMENTS = [
    ((3, 5), {}),
    ((3, 5, 2, False, True, 0.25, True), {}),
    ((3, 5, 2), {"dropout": 0.5, "batch_first": True}),
    ((), {"input_size": 3, "hidden_size": 5, "bidirectional": True}),
]


@every_cell
@pytest.mark.parametrize(("args", "kwargs"), ARGUMENTS, ids=str)
def test_attributes_and_representation(args, kwargs, cell):
    if cell is RNN_CELL:
        args = (*args[:3], "relu", *args[3:]) if len(args) > 3 else args
    ours, theirs = cell.module(*args, **kwargs), cell.theirs(*args, **kwargs)
    assert isinstance(ours, cell.theirs)
    assert isinstance(ours, nn.RNNBase)
    assert repr(ours) == repr(theirs)
    assert ours.extra_repr() == theirs.extra_repr()
    for name in cell.theirs.__constants__:
        assert getattr(ours, name) == getattr(theirs, name)
    for name in ("_flat_weights_names", "_all_weights"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert len(ours.all_weights) == len(theirs.all_weights)
    assert all(
        a.shape == b.shape
        for layer, expected in zip(ours.all_weights, theirs.all_weights, strict=True)
        for a, b in zip(layer, expected, strict=True)
    )
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))


@every_cell
def test_inherited_checks_and_sizes(cell):
    ours, theirs = twins(3, 5, 2, bidirectional=True, batch_first=True, cell=cell)
    states = cell.hx((torch.zeros(4, 2, 5),) * cell.states)
    packed = pack_sequence([torch.zeros(4, 3), torch.zeros(2, 3)])
    for module in (ours, theirs):
        assert module.get_expected_hidden_size(torch.zeros(7, 4, 3), None) == (4, 7, 5)
        if cell is LSTM_CELL:
            assert module.get_expected_cell_size(packed.data, packed.batch_sizes) == (4, 2, 5)
        module.check_input(torch.zeros(7, 4, 3), None)
        module.check_forward_args(packed.data, states, packed.batch_sizes)
        with pytest.raises(RuntimeError, match="input must have 3 dimensions, got 2"):
            module.check_input(torch.zeros(4, 3), None)
        with pytest.raises(ValueError, match=r"does not match weight dtype|input must have the type"):
            module.check_input(torch.zeros(7, 4, 3, dtype=torch.float64), None)


@every_cell
def test_reset_parameters(cell):
    ours, theirs = twins(3, 5, 2, bidirectional=True, cell=cell)
    before = [p.clone() for p in ours.parameters()]
    for module in (ours, theirs):
        torch.manual_seed(11)
        module.reset_parameters()
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    assert not any(map(torch.equal, ours.parameters(), before))
    assert all(p.abs().max() <= 5**-0.5 for p in ours.parameters())


@every_cell
def test_in_a_sequential(cell):
    class Output(nn.Module):
        def forward(self, results):
            return results[0]

    x = torch.randn(4, 2, 3)
    ours, theirs = twins(3, 5, bidirectional=True, cell=cell)
    tail = nn.Sequential(Output(), nn.Linear(10, 2))
    all_near([nn.Sequential(ours, tail)(x)], [nn.Sequential(theirs, tail)(x)])


@every_cell
def test_flatten_parameters_may_be_called_at_any_time(cell, device):
    """cell.theirs warned or failed here (pytorch #40193)."""
    ours = cell.module(3, 5, 2, bidirectional=True, device=device)
    x = torch.randn(4, 2, 3, device=device)
    expected = ours(x)[0]
    pointers = [p.data_ptr() for p in ours.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "weights are not part of single contiguous chunk of memory"
        ours.flatten_parameters()
        assert torch.equal(ours(x)[0], expected)
        assert torch.equal(copy.deepcopy(ours)(x)[0], expected)
    assert [p.data_ptr() for p in ours.parameters()] == pointers


# --- copies and checkpoints -------------------------------------------------------------------------------------------


@every_cell
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_strict_both_ways(bias, cell, device):
    ours = cell.module(3, 5, 2, bias=bias, bidirectional=True, device=device)
    theirs = cell.theirs(3, 5, 2, bias=bias, bidirectional=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata
    x = torch.randn(4, 2, 3)
    for source, target in ((ours, theirs), (theirs, ours)):
        source.reset_parameters()
        buffer = io.BytesIO()
        torch.save(source.state_dict(), buffer)
        buffer.seek(0)
        result = target.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
        assert not result.missing_keys + result.unexpected_keys
        all_near([ours(x.to(device))[0].cpu()], [theirs(x)[0]])
    state = ours.state_dict()
    del state["weight_hh_l1_reverse"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight_hh_l1_reverse"'):
        ours.load_state_dict(state)


@every_cell
@pytest.mark.parametrize("assign", [True, False])
def test_old_state_dict_without_metadata(assign, cell):
    """PyTorch's first versions saved plain dictionaries."""
    ours, theirs = cell.module(3, 5, bidirectional=True), cell.theirs(3, 5, bidirectional=True)
    ours.load_state_dict(dict(theirs.state_dict()), assign=assign)
    assert (ours.weight_hh_l0.data_ptr() == theirs.weight_hh_l0.data_ptr()) is assign
    x = torch.randn(4, 2, 3)
    all_near([ours(x)[0]], [theirs(x)[0]])


def old_pickle(module: nn.RNNBase, era: str) -> bytes:
    """Returns a pickled module as an older PyTorch wrote it."""
    state = module.__getstate__()
    if era == "before 1.8":
        del state["proj_size"]
    elif era == "before 0.4":  # it stored the weights themselves in place of their names
        del state["proj_size"]
        del state["_flat_weights_names"]
        state["all_weights"] = module.all_weights
        del state["_all_weights"]
    revived = object.__new__(type(module))
    vars(revived).update(state, _flat_weight_refs=[])
    # today's __getstate__ would add more
    reduce = (copy_reconstruct, (type(module), {k: v for k, v in vars(revived).items() if k != "_flat_weight_refs"}))
    return pickle.dumps(reduce)


def copy_reconstruct(cls: type, state: dict) -> nn.Module:
    module = cls.__new__(cls)
    module.__setstate__(state)
    return module


@pytest.mark.parametrize("era", ["today", "before 1.8", "before 0.4"])
@pytest.mark.parametrize("ours_in_file", [True, False], ids=["ours", "PyTorch's"])
@every_cell
def test_old_pickles(cell, ours_in_file, era):
    """Pickles of nn.LSTM load as nn.LSTM, and accelerate converts them."""
    ours, theirs = twins(3, 5, 2, bidirectional=True, cell=cell)
    function, arguments = pickle.loads(old_pickle(ours if ours_in_file else theirs, era))
    module = function(*arguments)
    assert type(module) is (cell.module if ours_in_file else cell.theirs)
    accelerate(module)
    assert type(module) is cell.module
    x = torch.randn(4, 2, 3, requires_grad=True)
    all_near(results(module, x), results(theirs, x))
    assert repr(module) == repr(theirs)
    module.double()
    all_near([module(x.double())[0]], [theirs.double()(x.double())[0]])


@every_cell
def test_copies_hold_their_own_weights(cell, device):
    ours = cell.module(3, 5, 2, bidirectional=True, device=device)
    x = torch.randn(4, 2, 3, device=device)
    for twin in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        copy.deepcopy(pickle.loads(pickle.dumps(ours))),
    ):
        before = ours(x)[0]
        assert torch.equal(twin(x)[0], before)
        with torch.no_grad():
            twin.weight_hh_l0.add_(1)
        assert torch.equal(ours(x)[0], before)
        assert not torch.equal(twin(x)[0], before)
        assert all(a is b for a, b in zip(twin._flat_weights, twin.parameters(), strict=True))


@every_cell
def test_accelerate_keeps_no_reference_to_replaced_weights(cell):
    model = cell.theirs(3, 5)
    accelerate(model)
    model.weight_hh_l0 = nn.Parameter(torch.zeros(cell.gates * 5, 5))
    assert not any(
        isinstance(value, list) and any(isinstance(v, Tensor) for v in value) for value in vars(model).values()
    )
    restore(model)
    assert all(a is b for a, b in zip(model._flat_weights, model.parameters(), strict=True))
    x = torch.randn(4, 2, 3)
    fresh = cell.theirs(3, 5)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model(x)[0], fresh(x)[0])


@every_cell
def test_devices_and_types_in_place(cell, device):
    ours, theirs = twins(3, 5, bidirectional=True, cell=cell)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    parameters = list(ours.parameters())
    ours.to(device).double()
    assert all(a is b for a, b in zip(ours.parameters(), parameters, strict=True))  # the optimizer still has them
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    all_near([ours(x.to(device))[0].cpu()], [theirs.double()(x)[0]])
    before = ours(x.to(device))[0]
    before.sum().backward()
    optimizer.step()
    assert not torch.equal(ours(x.to(device))[0], before)
    assert ours.half().weight_hh_l0.dtype == torch.float16
    assert ours.to(torch.bfloat16).weight_hh_l0.dtype == torch.bfloat16


@every_cell
def test_share_memory(cell):
    ours = cell.module(3, 5, bidirectional=True)
    x = torch.randn(4, 2, 3)
    expected = ours(x)[0]
    assert ours.share_memory() is ours
    assert all(p.is_shared() for p in ours.parameters())
    assert torch.equal(ours(x)[0], expected)


@every_cell
def test_skip_init_and_meta(cell, device):
    ours = nn.utils.skip_init(cell.module, 3, 5, 2, bidirectional=True, device=device)
    assert all(p.device.type == device for p in ours.parameters())
    with torch.device("meta"):
        late = cell.module(3, 5, 2, bidirectional=True)
    late.to_empty(device=device)
    late.reset_parameters()
    ours.load_state_dict(late.state_dict(), assign=True)
    x = torch.randn(4, 2, 3, device=device)
    assert torch.equal(ours(x)[0], late(x)[0])


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@every_cell
def test_swap_tensors(swapping, cell, device):
    ours, theirs = cell.module(3, 5, 2, bidirectional=True), cell.theirs(3, 5, 2, bidirectional=True)
    for module in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        parameters = list(module.parameters())
        module.load_state_dict(theirs.state_dict())
        module.to(device).double()
        assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
        x = torch.randn(4, 2, 3)
        assert_near(module(x.double().to(device))[0].cpu(), theirs(x)[0].double(), dtype=torch.float32)


@every_cell
def test_swap_tensors_after_accelerate(swapping, cell):
    model = cell.theirs(3, 5)
    x = torch.randn(4, 2, 3)
    expected = model(x)[0].detach()  # the graph would keep the parameters alive
    accelerate(model)
    model.load_state_dict(model.state_dict())
    model.double()
    assert_near(model(x.double())[0], expected.double(), dtype=torch.float32)


# --- weights that are not plain parameters ----------------------------------------------------------------------------


@every_cell
def test_shared_weights(cell, device):
    ours, theirs = twins(4, 4, 2, device=device, cell=cell)
    for module in (ours, theirs):
        module.weight_hh_l1 = module.weight_hh_l0
        module.bias_hh_l1 = module.bias_ih_l0
    assert len(list(ours.parameters())) == 6
    x = torch.randn(3, 2, 4, device=device, requires_grad=True)
    all_near(results(ours, x), results(theirs, x))
    with torch.no_grad():
        ours.weight_hh_l0.mul_(2), theirs.weight_hh_l0.mul_(2)
    all_near(results(ours, x), results(theirs, x))


PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
}


@every_cell
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:.*spectral_norm:FutureWarning")
@pytest.mark.parametrize("apply", PARAMETRIZATIONS.values(), ids=PARAMETRIZATIONS)
def test_parametrizations(apply, cell, device):
    """Training steps show that each call reads the current weights (pytorch #32860, about weight norm)."""
    ours, theirs = twins(3, 8, 2, bidirectional=True, cell=cell)
    for module in (ours, theirs):
        for name in ("weight_hh_l0", "weight_ih_l1_reverse"):
            torch.manual_seed(1)
            apply(module, name)
    theirs.load_state_dict(ours.state_dict())
    ours = ours.to(device)
    x = torch.randn(4, 2, 3)
    losses = []
    for module in (ours, theirs):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        inputs = x.to(next(module.parameters()).device)
        for _ in range(3):
            with nn.utils.parametrize.cached():  # each read of a spectral norm iterates once more
                loss = module(inputs)[0].square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().cpu())
    all_near(losses[:3], losses[3:])
    assert len({float(loss) for loss in losses[:3]}) == 3
    all_near((p.cpu() for p in ours.parameters()), theirs.parameters())


@every_cell
def test_parametrized_modules_can_be_copied(cell):
    ours = parametrizations.weight_norm(cell.module(3, 5, bidirectional=True), "weight_hh_l0")
    x = torch.randn(4, 2, 3)
    expected = ours(x)[0]
    assert torch.equal(copy.deepcopy(ours)(x)[0], expected)
    fresh = parametrizations.weight_norm(cell.module(3, 5, bidirectional=True), "weight_hh_l0")
    fresh.load_state_dict(ours.state_dict())
    assert_near(fresh(x)[0], expected)
    nn.utils.parametrize.remove_parametrizations(ours, "weight_hh_l0")
    assert_near(ours(x)[0], expected)


@every_cell
@pytest.mark.parametrize("method", [prune.l1_unstructured, prune.random_unstructured])
def test_pruning(method, cell, device):
    ours, theirs = twins(3, 8, bidirectional=True, device=device, cell=cell)
    for module in (ours, theirs):
        for name in ("weight_hh_l0", "weight_ih_l0_reverse"):
            torch.manual_seed(1)
            method(module, name, amount=0.5)
    assert (ours.weight_hh_l0 == 0).sum() == cell.gates * 32
    x = torch.randn(4, 2, 3, device=device, requires_grad=True)
    all_near(results(ours, x), results(theirs, x))
    for module in (ours, theirs):
        prune.remove(module, "weight_hh_l0")
        prune.remove(module, "weight_ih_l0_reverse")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    all_near([ours(x)[0]], [theirs(x)[0]])


@every_cell
@pytest.mark.filterwarnings("ignore:.*functional_call.*:FutureWarning")
@pytest.mark.parametrize("call", [torch.func.functional_call, nn.utils.stateless.functional_call])
def test_functional_call(call, cell, device):
    ours, theirs = twins(3, 5, bidirectional=True, device=device, cell=cell)
    x = torch.randn(4, 2, 3, device=device)
    weights = {name: torch.randn_like(p).requires_grad_() for name, p in ours.named_parameters()}
    before = ours(x)[0]
    results = []
    for module in (ours, theirs):
        y, *states = leaves(call(module, weights, (x,)))
        results.append([y, *states, *torch.autograd.grad(y.sum() + states[-1].sum(), weights.values())])
    all_near(*results)
    assert torch.equal(ours(x)[0], before)


@every_cell
@pytest.mark.parametrize("frozen", ["weight_ih", "weight_hh", "bias", "_reverse", "_l0"])
def test_some_parameters_need_no_gradient(frozen, cell, device):
    ours, theirs = twins(3, 5, 2, bidirectional=True, device=device, cell=cell)
    x = torch.randn(4, 2, 3, device=device)
    grads = []
    for module in (ours, theirs):
        for name, p in module.named_parameters():
            p.requires_grad_(frozen not in name)
        module(x)[0].square().sum().backward()
        grads.append({name: p.grad for name, p in module.named_parameters()})
    assert all((grad is None) == (frozen in name) for name, grad in grads[0].items())
    all_near(*([g for g in one.values() if g is not None] for one in grads))


@every_cell
def test_hooks(cell, device):
    """Hooks of modules and of parameters run as with cell.theirs."""
    ours, theirs = twins(3, 5, bidirectional=True, device=device, cell=cell)
    x = torch.randn(4, 2, 3, device=device, requires_grad=True)
    seen = []
    for module in (ours, theirs):
        log: list = []
        module.register_forward_pre_hook(lambda m, args, log=log: log.append(args[0]))
        module.register_forward_hook(lambda m, args, out, log=log: log.extend(leaves(out)))
        module.register_full_backward_pre_hook(lambda m, grads, log=log: log.append(grads[0]))
        module.register_full_backward_hook(lambda m, gx, gy, log=log: log.append(gx[0]))
        module.weight_hh_l0.register_hook(lambda grad, log=log: log.append(grad))
        module.weight_ih_l0.register_post_accumulate_grad_hook(lambda p, log=log: log.append(p.grad))
        y, _ = module(x)
        y.square().sum().backward()
        seen.append(log)
    assert len(seen[0]) == len(seen[1]) == 6 + cell.states
    for a in seen[0]:  # gradients may arrive in another order
        assert any(a.shape == b.shape and (a - b).abs().max() <= 1e-5 * b.abs().max() for b in seen[1])


# --- what takes modules apart -----------------------------------------------------------------------------------------


@every_cell
def test_data_parallel(cell, device):
    """With fewer than two devices the module itself runs."""
    ours = cell.module(3, 5, batch_first=True, bidirectional=True, device=device)
    x = torch.randn(4, 6, 3, device=device)
    model = nn.DataParallel(ours, device_ids=[0] if device == "cuda" else None)
    all_near([model(x)[0]], [ours(x)[0]])


@every_cell
def test_replicas_of_data_parallel(cell):
    """torch.nn.parallel.replicate makes a shallow copy on each device, with plain tensors as parameters."""
    ours = cell.module(3, 5, bidirectional=True)
    replica = ours._replicate_for_data_parallel()
    for name, p in ours.named_parameters():
        setattr(replica, name, p.clone())
    replica._former_parameters = dict(ours.named_parameters())
    x = torch.randn(4, 2, 3)
    y, _ = replica(x)
    all_near(torch.autograd.grad(y.sum(), ours.parameters()), torch.autograd.grad(ours(x)[0].sum(), ours.parameters()))


@every_cell
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantize_dynamic_leaves_it_in_float_and_quantizes_what_was_restored(cell):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = cell.theirs(3, 5, bidirectional=True)
            self.head = nn.Linear(10, 2)

        def forward(self, x):
            return self.head(self.lstm(x)[0])

    model = Model()
    accelerate(model)
    x = torch.randn(4, 2, 3)
    quantized = torch.ao.quantization.quantize_dynamic(model, {cell.theirs, nn.Linear})
    assert type(quantized.lstm) is cell.module
    assert torch.equal(quantized.lstm(x)[0], model.lstm(x)[0])
    assert isinstance(quantized.head, torch.ao.nn.quantized.dynamic.Linear)
    restore(model)
    quantized = torch.ao.quantization.quantize_dynamic(model, {cell.theirs, nn.Linear})
    # PyTorch quantizes no nn.RNN
    assert isinstance(quantized.lstm, getattr(torch.ao.nn.quantized.dynamic, cell.theirs.__name__, nn.RNN))
    assert (quantized(x) - model(x)).abs().max() < 0.1
