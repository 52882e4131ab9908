"""Checks the arguments of a module's forward, brings them into the form that layers take, and arranges the results.

Errors are those of PyTorch's module where that has the argument. Lengths on the host are checked at once, and nothing
waits for a GPU.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from birnn_ext.base import Base
from birnn_ext.cell import Cell
from birnn_ext.layer import Sequences
from birnn_ext.portable import check_onnx, check_recordable, is_recording, zero_states
from birnn_ext.route import is_writing_onnx

States = tuple[Tensor, ...]


class Call(NamedTuple):
    """A call that is ready to run."""

    sequences: Sequences
    states: States | None  # (D * num_layers, B, P) and, of an LSTM, (D * num_layers, B, H)
    last: bool  # whether output="last"
    cells: bool  # whether return_cell_states
    recorded: bool  # whether to leave PyTorch's own operator in a program that it records
    form: Form


class Form(NamedTuple):
    """How the user arranged the input, and so how the results are to be arranged."""

    batched: bool = True
    batch_first: bool = False
    packed: PackedSequence | None = None
    lengths: Tensor | None = None  # of the packed sequences, on the CPU


class Elsewhere(NamedTuple):
    """A call that does not run here, and what it returns."""

    result: Any


def read_call(
    module: Base,
    ours: object,
    input: Tensor | PackedSequence,
    hx: Any,
    lengths: Tensor | Sequence[int] | None,
    output: str,
    reset: Tensor | PackedSequence | None,
    return_cell_states: bool = False,
) -> Call | Elsewhere:
    """Checks the arguments of a call, which `LSTM.forward` documents.

    Args:
        module: the module that is called.
        ours: forward of the class that it is called through, to tell whether the module has one of its own.
        input: as for `LSTM.forward`.
        hx: the initial states: a tensor if there is one, else a tuple of them.
        lengths: as for `LSTM.forward`.
        output: likewise.
        reset: likewise.
        return_cell_states: likewise.
    """
    cell = module.CELL
    tracer = _fx_tracer(input, hx, lengths, reset)
    if tracer is not None:
        keywords = {"lengths": lengths, "output": output, "reset": reset, "return_cell_states": return_cell_states}
        return Elsewhere(_fx_leaf(tracer, module, ours, (input, hx), keywords))
    if output not in ("all", "last"):
        raise ValueError(f'{cell.name}: output must be "all" or "last", got {output!r}')
    if return_cell_states and output == "last":
        raise ValueError(f'{cell.name}: return_cell_states must be False with output="last"')
    if reset is not None and module.learned_state:
        raise ValueError(f"{cell.name}: reset must be None with learned_state=True: it clears the state to 0")
    states = None if hx is None else _states_of(cell, hx)
    recorded = is_recording()
    if recorded:
        check_recordable(module, reset, return_cell_states)
        if lengths is None and output == "all" and not module.learned_state:
            return Elsewhere(cell.theirs.forward(module, input, hx))
    elif is_writing_onnx():
        check_onnx(module, reset, return_cell_states)
    if isinstance(input, PackedSequence):
        sequences, states, form = _unpacked(module, input, states, lengths, reset)
    else:
        sequences, states, form = _time_first(module, input, states, lengths, reset)
    x = sequences.x
    if x.shape[0] == 0:
        raise RuntimeError(f"{cell.name}: Expected sequence length to be larger than 0 in RNN")
    if states is None and module.learned_state:
        states = tuple(getattr(module, name).unsqueeze(1).expand(-1, x.shape[1], -1) for name in cell.states)
    if states is None and recorded:
        states = zero_states(module, x)
    _check_sizes(module, x, states)
    return Call(sequences, states, output == "last", return_cell_states, recorded, form)


def arranged(module: Base, call: Call, y: Tensor, states: States | None, cells: Tensor | None) -> tuple[Any, ...]:
    """Arranges the results of a call as its input was.

    Args:
        module: the module that was called.
        call: the call.
        y: (T, B, D * P), with output="last" (B, D * P).
        states: the final states, or None.
        cells: (T, B, D * H), or None.
    """
    batched, batch_first, packed, lengths = call.form
    if packed is not None:
        order = packed.unsorted_indices
        hx = hx_of(None if states is None else _in_order(states, order))
        if call.last:
            return (y if order is None else y[order]), hx
        assert lengths is not None
        pack = _packer(packed, lengths)
        return (pack(y), hx) if cells is None else (pack(y), hx, pack(cells))
    if not batched:
        y = y.squeeze(0 if call.last else 1)
        cells = cells if cells is None else cells.squeeze(1)
        states = states if states is None else tuple(state.squeeze(1) for state in states)
    elif batch_first and not call.last:
        y = y.transpose(0, 1)
        cells = cells if cells is None else cells.transpose(0, 1)
    return (y, hx_of(states)) if cells is None else (y, hx_of(states), cells)


def _states_of(cell: Cell, hx: Any) -> States:
    """Returns a caller's states as a tuple, which has one unless it is an LSTM's."""
    count = len(cell.states)
    if count == 1:
        if not isinstance(hx, Tensor):
            raise TypeError(f"{cell.name}: hx must be None or a tensor h_0, got {type(hx).__name__}")
        return (hx,)
    if not (isinstance(hx, (tuple, list)) and len(hx) == count and all(isinstance(state, Tensor) for state in hx)):
        raise TypeError(f"{cell.name}: hx must be None or a pair of tensors (h_0, c_0)")
    return tuple(hx)


def hx_of(states: States | None) -> Any:
    """Returns states as the caller knows them: an LSTM's pair, others' tensor."""
    return states[0] if states is not None and len(states) == 1 else states


def _in_order(states: States, indices: Tensor | None) -> States:
    return states if indices is None else tuple(state.index_select(1, indices) for state in states)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Says what autocast turns x into; None where it leaves x alone, as it does with float64 and integers."""
    device = x.device.type
    # meta has no autocast, and asking about it is an error; torch 2.10's compile can't ask which have
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device) if x.is_floating_point() and x.dtype != torch.float64 else None


# --- torch.fx ---------------------------------------------------------------------------------------------------------


def _fx_tracer(*arguments: Any) -> Any:
    """Finds the torch.fx.Tracer that has put a Proxy in a tensor's place, if one has."""
    for one in arguments:
        for value in one if isinstance(one, (tuple, list)) else (one,):
            if isinstance(value, Proxy):
                return value.tracer
    return None


def _fx_leaf(tracer: Any, module: Base, ours: object, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Makes the call a node in torch.fx's graph, as torch.fx does with torch's own modules, nn.LSTM among them."""
    name = module.CELL.name
    if type(module).forward is not ours:  # a leaf would be called with what this has made of the input
        raise NotImplementedError(
            f"{name}: torch.fx can't trace through the forward of {type(module).__name__}; name it a leaf in a "
            "torch.fx.Tracer's is_leaf_module"
        )
    path = tracer.path_of_module(module)
    if not path:
        raise NotImplementedError(
            f"{name}: torch.fx can't trace into {module.CELL.article} {name}, only a module that contains it, where it "
            f"is a leaf as nn.{name} is"
        )
    given = {name: one for name, one in keywords.items() if all(one is not default for default in (None, "all", False))}
    return tracer.create_proxy("call_module", path, args, given)


# --- the sequences ----------------------------------------------------------------------------------------------------


def _time_first(
    module: Base, input: object, states: States | None, lengths: object, reset: object
) -> tuple[Sequences, States | None, Form]:
    """Brings a tensor, with what goes with it, into the order (T, B, .)."""
    name = module.CELL.name
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}: input must be a tensor or a PackedSequence, got {type(input).__name__}")
    if input.dim() not in (2, 3):
        raise ValueError(f"{name}: Expected input to be 2D or 3D, got {input.dim()}D instead")
    batched = input.dim() == 3
    x = input if batched else input.unsqueeze(1)
    if batched and module.batch_first:
        x = x.transpose(0, 1)
    if states is not None:
        _check_state_dims(states, batched)
        if not batched:
            states = tuple(state.unsqueeze(1) for state in states)
    if lengths is not None:
        if not batched:
            raise ValueError(f"{name}: lengths must be None with unbatched (2-D) input")
        lengths = _lengths_for(name, lengths, x)
    begins = None
    if reset is not None:
        begins = _check_reset(name, reset, input)
        begins = begins.unsqueeze(1) if not batched else begins.transpose(0, 1) if module.batch_first else begins
    return Sequences(x, lengths, begins), states, Form(batched, module.batch_first)


def _unpacked(
    module: Base, packed: PackedSequence, states: States | None, lengths: object, reset: object
) -> tuple[Sequences, States | None, Form]:
    """Pads a PackedSequence, in its packed (sorted) order, into which the states go, too."""
    name = module.CELL.name
    if lengths is not None:
        raise ValueError(f"{name}: lengths must be None with a PackedSequence, which has its own")
    begins = None
    if reset is not None:
        if not isinstance(reset, PackedSequence):
            raise TypeError(f"{name}: reset must be a PackedSequence with a packed input, got {type(reset).__name__}")
        same = reset.data.shape == packed.data.shape[:1] and torch.equal(reset.batch_sizes, packed.batch_sizes)
        theirs, ours = reset.sorted_indices, packed.sorted_indices
        in_order = theirs is ours if theirs is None or ours is None else torch.equal(theirs, ours)
        if not (same and in_order):
            raise ValueError(f"{name}: reset must be packed as the input, with data of shape (N,)")
        _check_reset(name, reset.data, packed.data)
        begins = pad_packed_sequence(PackedSequence(reset.data, reset.batch_sizes))[0]
    if packed.data.dim() != 2:
        raise ValueError(f"{name}: data of a packed input must have shape (N, I), got {tuple(packed.data.shape)}")
    x, on_cpu = pad_packed_sequence(PackedSequence(packed.data, packed.batch_sizes))
    if states is not None:
        _check_sizes(module, x, states)  # before it is put into order: that may hide a wrong size
        states = _in_order(states, packed.sorted_indices)
    return Sequences(x, on_cpu.to(x.device, non_blocking=True), begins), states, Form(packed=packed, lengths=on_cpu)


def _packer(packed: PackedSequence, lengths: Tensor) -> Any:
    def pack(padded: Tensor) -> PackedSequence:
        data = pack_padded_sequence(padded, lengths).data
        return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)

    return pack


def _lengths_for(name: str, lengths: object, x: Tensor) -> Tensor:
    """Makes lengths for x (T, B, I), on its device, and checks those that are on the host."""
    if isinstance(lengths, (list, tuple)):
        for b, length in enumerate(lengths):
            if isinstance(length, bool) or not isinstance(length, numbers.Integral):
                raise TypeError(f"{name}: lengths must be integers, got lengths[{b}] of {type(length).__name__}")
        _check_length_values(name, lengths, x.shape[0])  # before int64 has to hold them
        lengths = torch.tensor(lengths, dtype=torch.int64)
    elif not isinstance(lengths, Tensor):
        raise TypeError(f"{name}: lengths must be a tensor or a list of integers, got {type(lengths).__name__}")
    if lengths.shape != x.shape[1:2]:
        raise ValueError(f"{name}: lengths must have shape ({x.shape[1]},), got {tuple(lengths.shape)}")
    if lengths.dtype != torch.int64:
        raise TypeError(f"{name}: lengths must be int64, got {lengths.dtype}")
    if lengths.device == x.device:
        return lengths
    if lengths.device.type != "cpu":
        raise ValueError(
            f"{name}: lengths must be on the input's device {x.device} or on the CPU, got {lengths.device}"
        )
    _check_length_values(name, lengths, x.shape[0])
    return lengths.to(x.device, non_blocking=True)


def _check_length_values(name: str, lengths: Tensor | Sequence[int], steps: int) -> None:
    if torch.compiler.is_compiling():  # it would guard on each; the operator checks them, too
        return
    for b, length in enumerate(lengths.tolist() if isinstance(lengths, Tensor) else lengths):
        if not 0 <= length <= steps:
            raise ValueError(f"{name}: lengths must be between 0 and T = {steps}, got lengths[{b}] = {length}")


# --- checks -----------------------------------------------------------------------------------------------------------


def check_probability(name: str, value: float) -> None:
    """Raises a ValueError for an argument of the constructor that is no probability."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value <= 1:
        raise ValueError(f"LSTM: {name} must be a number in [0, 1], got {value!r}")


def _check_state_dims(states: States, batched: bool) -> None:
    dims = 3 if batched else 2
    if any(state.dim() != dims for state in states):
        kind = "batched 3-D" if batched else "unbatched 2-D"
        found = [f"{state.dim()}-D" for state in states]
        names, got = (
            ("hx", f"{found[0]} tensor") if len(states) == 1 else ("hx and cx", f"({', '.join(found)}) tensors")
        )
        raise RuntimeError(f"For {kind} input, {names} should also be {dims}-D but got {got}")


def _check_reset(name: str, reset: object, input: Tensor) -> Tensor:
    if not isinstance(reset, Tensor):
        raise TypeError(f"{name}: reset must be a tensor, got {type(reset).__name__}")
    if reset.shape != input.shape[:-1]:
        raise ValueError(f"{name}: reset must have shape {tuple(input.shape[:-1])}, got {tuple(reset.shape)}")
    if reset.dtype != torch.bool:
        raise TypeError(f"{name}: reset must be bool, got {reset.dtype}")
    if reset.device != input.device:
        raise ValueError(f"{name}: reset must be on the input's device {input.device}, got {reset.device}")
    return reset


def _autocast(*tensors: Tensor) -> bool:
    """Tells whether autocast gives all of them one dtype, so that theirs may differ."""
    return all(autocast_dtype(t) is not None for t in tensors)


def _check_sizes(module: Base, x: Tensor, states: States | None) -> None:
    cell, weight = module.CELL, module.weight_ih_l0
    name = cell.name
    if x.layout != torch.strided:
        raise RuntimeError(f"{name}: input must be dense, got layout {x.layout}")
    if x.shape[2] != module.input_size:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {module.input_size}, got {x.shape[2]}"
        )
    if x.is_quantized:
        raise TypeError(
            f"{name}: input must not be quantized, got {x.dtype}; to have {cell.article} {name} quantized, make it an "
            f"nn.{name} by birnn_ext.restore(model) before torch.ao.quantization"
        )
    if x.dtype != weight.dtype and not _autocast(x, weight):
        raise ValueError(
            f"{name}: RNN input dtype ({x.dtype}) does not match weight dtype ({weight.dtype}). "
            f"Convert input: input.to({weight.dtype}), or convert model: model.to({x.dtype})"
        )
    if x.device != weight.device:
        raise RuntimeError(f"{name}: input must be on the weights' device {weight.device}, got {x.device}")
    if states is None:
        return
    sizes = (module.proj_size or module.hidden_size, module.hidden_size)
    for k, state in enumerate(states):
        called = "hidden" if len(states) == 1 else f"hidden[{k}]"
        expected = (module.num_layers * (2 if module.bidirectional else 1), x.shape[1], sizes[k])
        if state.shape != expected:
            raise RuntimeError(f"Expected {called} size {expected}, got {list(state.shape)}")
        if state.dtype != x.dtype and not _autocast(x, weight, state):
            raise RuntimeError(f"{name}: {called} must be {x.dtype} as the input, got {state.dtype}")
        if state.device != x.device:
            raise RuntimeError(f"{name}: {called} must be on the input's device {x.device}, got {state.device}")
