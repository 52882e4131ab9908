"""Our modules pass PyTorch's own cases for nn.LSTM, nn.GRU and nn.RNN (their ModuleInfo), with the checks of PyTorch's
test_modules.py."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from cells import GRU_CELL, LSTM_CELL, RNN_CELL, Cell, every_cell_fast
from helpers import all_near
from torch import Tensor, nn
from torch.testing._internal.common_modules import ModuleErrorEnum, ModuleInput, module_db

# That import forbids the whole process to set flags such as torch.backends.fp32_precision, as other tests do.
torch.backends.disable_global_flags.__globals__["__allow_nonbracketed_mutation_flag"] = True

CELLS = (LSTM_CELL, GRU_CELL, RNN_CELL)
INFO = {cell: next(info for info in module_db if info.module_cls is cell.theirs) for cell in CELLS}


def cases(cell: Cell, device: str, dtype: torch.dtype, training: bool) -> list[ModuleInput]:
    info = INFO[cell]
    return info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=True, training=training)


def name_of(case: ModuleInput) -> str:
    arguments = "-".join(f"{name}_{value}" for name, value in case.constructor_input.kwargs.items())
    return arguments + ("-hx" if len(case.forward_input.args) == 2 else "")


NAMES = {cell: [name_of(case) for case in cases(cell, "cpu", torch.float32, True)] for cell in INFO}
EVERY_CASE = [
    pytest.param(cell, number, id=f"{cell.name}-{name}", marks=[pytest.mark.slow] if cell is RNN_CELL else [])
    for cell in INFO
    for number, name in enumerate(NAMES[cell])
]
each_case = pytest.mark.parametrize(("cell", "number"), EVERY_CASE)
each_case_fast = pytest.mark.parametrize(("cell", "number"), [pytest.param(*p.values, id=p.id) for p in EVERY_CASE])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def build(case: ModuleInput, cls: type[nn.RNNBase], training: bool = True, **kwargs) -> nn.RNNBase:
    return cls(*case.constructor_input.args, **case.constructor_input.kwargs, **kwargs).train(training)


def tensors(nested) -> Iterator[Tensor]:
    for one in nested:
        if isinstance(one, Tensor):
            yield one
        else:
            yield from tensors(one)


def outputs_and_gradients(module: nn.RNNBase, args) -> list[Tensor]:
    outputs = list(tensors(module(*args)))
    loss = sum((o.double() * (k + o.double()).cos()).sum().cpu() for k, o in enumerate(outputs))
    return [*outputs, *torch.autograd.grad(loss, [*tensors(args), *module.parameters()])]


@every_cell_fast
def test_there_are_cases(cell):
    assert INFO[cell].dtypes == (torch.float32, torch.float64)
    names = NAMES[cell]
    assert len(names) == len(set(names)) >= 16


@each_mode
@each_dtype
@each_case_fast
def test_forward_and_gradients(number, dtype, training, cell, device):
    case = cases(cell, device, dtype, training)[number]
    ours, theirs = (build(case, cls, training, device=device, dtype=dtype) for cls in (cell.module, cell.theirs))
    theirs.load_state_dict(ours.state_dict())
    args = case.forward_input.args
    versions = [t._version for t in tensors(args)]
    all_near(tensors(ours(*args)), tensors(case.reference_fn(ours, *args)))
    relu = case.constructor_input.kwargs.get("nonlinearity") == "relu"
    if not (relu and dtype == torch.float32):  # a gradient of a net of two units is a sum of terms 200 times as large
        all_near(outputs_and_gradients(ours, args), outputs_and_gradients(theirs, args))
    assert [t._version for t in tensors(args)] == versions  # nothing changed in place


@each_case
def test_non_contiguous_tensors(number, cell, device):
    case = cases(cell, device, torch.float64, True)[number]
    ours = build(case, cell.module, device=device, dtype=torch.float64)
    args = case.forward_input.args

    def strided(nested):
        if not isinstance(nested, Tensor):
            return tuple(map(strided, nested))
        return torch.stack([nested.detach()] * 2, -1)[..., 0].requires_grad_()

    assert not any(t.is_contiguous() for t in tensors(strided(args)))
    all_near(outputs_and_gradients(ours, strided(args)), outputs_and_gradients(ours, args))


@each_case
def test_double_backward(number, cell, device):
    """The oracle is nn.LSTM on the CPU, as cuDNN has no double backward."""
    case, on_cpu = (cases(cell, where, torch.float64, True)[number] for where in (device, "cpu"))
    ours, theirs = (
        build(case, cell.module, device=device, dtype=torch.float64),
        build(case, cell.theirs, dtype=torch.float64),
    )
    theirs.load_state_dict(ours.state_dict())
    results = []
    for module, args in ((ours, case.forward_input.args), (theirs, on_cpu.forward_input.args)):
        leaves = [*tensors(args), *module.parameters()]
        with torch.no_grad():
            for leaf, value in zip(leaves, tensors(case.forward_input.args), strict=False):
                leaf.copy_(value)
        loss = sum(o.square().sum() for o in tensors(module(*args)))
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        results.append([g.cpu() for g in torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)])
    all_near(*results)


def check_gradients(cell: Cell, number: int, training: bool, check, **kwargs) -> None:
    """Checks gradients of all outputs for inputs and parameters."""
    case = cases(cell, "cpu", torch.float64, training)[number]
    ours = build(case, cell.module, training, dtype=torch.float64)
    names, parameters = zip(*ours.named_parameters(), strict=True)
    args = case.forward_input.args
    count = len(list(tensors(args)))

    def run(*flat):
        x, *hx = flat[:count]
        weights = dict(zip(names, flat[count:], strict=True))
        return tuple(tensors(torch.func.functional_call(ours, weights, (x, cell.hx(hx or None)))))

    assert check(run, (*tensors(args), *parameters), **kwargs)


@each_mode
@each_case
def test_grad(number, training, cell):
    check_gradients(cell, number, training, torch.autograd.gradcheck, fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
@pytest.mark.parametrize(("cell", "number"), EVERY_CASE[::5])
def test_grad_and_gradgrad_of_every_element(number, check, cell):
    """This takes some cases; test_grad takes all, with a random direction for each."""
    check_gradients(cell, number, True, check)


@each_case
def test_factory_kwargs(number, cell, device):
    case = cases(cell, device, torch.float64, True)[number]
    ours = build(case, cell.module, device=device, dtype=torch.float64)
    assert all(p.device.type == device and p.dtype == torch.float64 for p in ours.parameters())
    with torch.device(device):
        assert all(p.device.type == device for p in build(case, cell.module).parameters())
    with torch.device("meta"):
        assert all(p.is_meta for p in build(case, cell.module).parameters())


@each_case_fast
def test_repr(number, cell):
    case = cases(cell, "cpu", torch.float32, True)[number]
    ours, theirs = build(case, cell.module), build(case, cell.theirs)
    assert repr(ours) == str(ours) == repr(theirs)


@each_mode
@each_case
def test_pickle_and_deepcopy(number, training, cell, device):
    case = cases(cell, device, torch.float32, training)[number]
    ours = build(case, cell.module, training, device=device)
    expected = outputs_and_gradients(ours, case.forward_input.args)
    for copied in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert copied.training is training
        assert all(map(torch.equal, outputs_and_gradients(copied, case.forward_input.args), expected))


@each_case
def test_memory_format_changes_nothing(number, cell, device):
    case = cases(cell, device, torch.float32, True)[number]
    ours = build(case, cell.module, device=device)
    expected = outputs_and_gradients(ours, case.forward_input.args)
    for memory_format in (torch.channels_last, torch.contiguous_format, torch.preserve_format):
        ours.to(memory_format=memory_format)
        assert all(map(torch.equal, outputs_and_gradients(ours, case.forward_input.args), expected))


@each_case
def test_to_empty(number, cell, device):
    case = cases(cell, device, torch.float32, True)[number]
    source = build(case, cell.module, device=device)
    ours = build(case, cell.module, device="meta").to_empty(device=device)
    assert all(p.device.type == device for p in ours.parameters())
    ours.load_state_dict(source.state_dict())
    assert torch.equal(ours(*case.forward_input.args)[0], source(*case.forward_input.args)[0])


@pytest.mark.cuda
@each_case
def test_device_moves_and_parity_of_devices(number, cell):
    case = cases(cell, "cpu", torch.float64, True)[number]
    ours = build(case, cell.module, dtype=torch.float64)
    results, parameters = [], list(ours.parameters())
    for device in ("cpu", "cuda", "cpu", "cuda"):
        ours.to(device)
        assert all(a is b for a, b in zip(ours.parameters(), parameters, strict=True))
        assert all(p.device.type == device for p in ours.parameters())

        def moved(nested, device=device):
            return tuple(t.detach().to(device).requires_grad_() if isinstance(t, Tensor) else moved(t) for t in nested)

        results.append([t.cpu() for t in outputs_and_gradients(ours, moved(case.forward_input.args))])
    for k in (1, 2, 3):
        all_near(results[k], results[0])


@every_cell_fast
@each_mode
@each_dtype
def test_errors(dtype, training, cell, device):
    info = INFO[cell]
    for case in info.module_error_inputs_func(info, device=device, dtype=dtype, requires_grad=False, training=training):
        wrong = case.module_error_input
        if case.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(case.error_type, match=case.error_regex):
                build(wrong, cell.module, training)
        else:
            ours = build(wrong, cell.module, training)
            with pytest.raises(case.error_type, match=case.error_regex):
                ours(*wrong.forward_input.args)
