"""Checks the arguments of `LSTM.forward`, brings them into the form that the layers take, and arranges the results.

Errors are nn.LSTM's where nn.LSTM has the argument. It checks lengths on the host at once, and never waits for a GPU.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from birnn_ext.layer import Sequences
from birnn_ext.portable import check_recordable, is_recording, zero_state

State = tuple[Tensor, Tensor]


class Call(NamedTuple):
    """A call that is ready to run."""

    sequences: Sequences
    hx: State | None  # (D * num_layers, B, P) and (D * num_layers, B, H)
    last: bool  # whether output="last"
    cells: bool  # whether return_cell_states
    recorded: bool  # whether to leave nn.LSTM's operator in a program that PyTorch records
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
    lstm: nn.LSTM,
    ours: object,
    input: Tensor | PackedSequence,
    hx: State | None,
    lengths: Tensor | Sequence[int] | None,
    output: str,
    reset: Tensor | PackedSequence | None,
    return_cell_states: bool,
) -> Call | Elsewhere:
    """Checks the arguments of `LSTM.forward`, which documents them.

    Args:
        lstm: the module that is called.
        ours: `LSTM.forward`, to tell whether the module has a forward of its own.
        input: as for `LSTM.forward`.
        hx: likewise.
        lengths: likewise.
        output: likewise.
        reset: likewise.
        return_cell_states: likewise.
    """
    tracer = _fx_tracer(input, hx, lengths, reset)
    if tracer is not None:
        keywords = {"lengths": lengths, "output": output, "reset": reset, "return_cell_states": return_cell_states}
        return Elsewhere(_fx_leaf(tracer, lstm, ours, (input, hx), keywords))
    if output not in ("all", "last"):
        raise ValueError(f'LSTM: output must be "all" or "last", got {output!r}')
    if return_cell_states and output == "last":
        raise ValueError('LSTM: return_cell_states must be False with output="last"')
    if reset is not None and lstm.learned_state:
        raise ValueError("LSTM: reset must be None with learned_state=True: it clears the state to 0")
    if hx is not None and not (
        isinstance(hx, (tuple, list)) and len(hx) == 2 and all(isinstance(state, Tensor) for state in hx)
    ):
        raise TypeError("LSTM: hx must be None or a pair of tensors (h_0, c_0)")
    recorded = is_recording()
    if recorded:
        check_recordable(lstm, reset, return_cell_states)
        if lengths is None and output == "all" and not lstm.learned_state:
            return Elsewhere(nn.LSTM.forward(lstm, input, hx))
    if isinstance(input, PackedSequence):
        sequences, hx, form = _unpacked(lstm, input, hx, lengths, reset)
    else:
        sequences, hx, form = _time_first(lstm, input, hx, lengths, reset)
    x = sequences.x
    if x.shape[0] == 0:
        raise RuntimeError("LSTM: Expected sequence length to be larger than 0 in RNN")
    if hx is None and lstm.learned_state:
        learned = (cast(Tensor, lstm.h_0), cast(Tensor, lstm.c_0))
        h_0, c_0 = (state.unsqueeze(1).expand(-1, x.shape[1], -1) for state in learned)
        hx = (h_0, c_0)
    if hx is None and recorded:
        hx = zero_state(lstm, x)
    _check_sizes(lstm, x, hx)
    return Call(sequences, hx, output == "last", return_cell_states, recorded, form)


def arranged(lstm: nn.LSTM, call: Call, y: Tensor, states: State | None, cells: Tensor | None) -> tuple[Any, ...]:
    """Arranges the results of a call as its input was.

    Args:
        lstm: the module that was called.
        call: the call.
        y: (T, B, D * P), with output="last" (B, D * P).
        states: the final states, or None.
        cells: (T, B, D * H), or None.
    """
    batched, batch_first, packed, lengths = call.form
    if packed is not None:
        if states is not None:
            states = lstm.permute_hidden(states, packed.unsorted_indices)
        if call.last:
            return (y if packed.unsorted_indices is None else y[packed.unsorted_indices]), states
        assert lengths is not None
        pack = _packer(packed, lengths)
        return (pack(y), states) if cells is None else (pack(y), states, pack(cells))
    if not batched:
        y = y.squeeze(0 if call.last else 1)
        cells = cells if cells is None else cells.squeeze(1)
        if states is not None:
            states = (states[0].squeeze(1), states[1].squeeze(1))
    elif batch_first and not call.last:
        y = y.transpose(0, 1)
        cells = cells if cells is None else cells.transpose(0, 1)
    return (y, states) if cells is None else (y, states, cells)


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


def _fx_leaf(tracer: Any, lstm: nn.LSTM, ours: object, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Makes the call a node in torch.fx's graph, as torch.fx does with torch's own modules, nn.LSTM among them."""
    if type(lstm).forward is not ours:  # a leaf would be called with what this has made of the input
        raise NotImplementedError(
            f"LSTM: torch.fx can't trace through the forward of {type(lstm).__name__}; name it a leaf in a "
            "torch.fx.Tracer's is_leaf_module"
        )
    path = tracer.path_of_module(lstm)
    if not path:
        raise NotImplementedError(
            "LSTM: torch.fx can't trace into an LSTM, only a module that contains it, where it is a leaf as nn.LSTM is"
        )
    given = {name: one for name, one in keywords.items() if all(one is not default for default in (None, "all", False))}
    return tracer.create_proxy("call_module", path, args, given)


# --- the sequences ----------------------------------------------------------------------------------------------------


def _time_first(
    lstm: nn.LSTM, input: object, hx: State | None, lengths: object, reset: object
) -> tuple[Sequences, State | None, Form]:
    """Brings a tensor, with what goes with it, into the order (T, B, .)."""
    if not isinstance(input, Tensor):
        raise TypeError(f"LSTM: input must be a tensor or a PackedSequence, got {type(input).__name__}")
    if input.dim() not in (2, 3):
        raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
    batched = input.dim() == 3
    x = input if batched else input.unsqueeze(1)
    if batched and lstm.batch_first:
        x = x.transpose(0, 1)
    if hx is not None:
        _check_state_dims(hx, batched)
        if not batched:
            hx = (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
    if lengths is not None:
        if not batched:
            raise ValueError("LSTM: lengths must be None with unbatched (2-D) input")
        lengths = _lengths_for(lengths, x)
    begins = None
    if reset is not None:
        begins = _check_reset(reset, input)
        begins = begins.unsqueeze(1) if not batched else begins.transpose(0, 1) if lstm.batch_first else begins
    return Sequences(x, lengths, begins), hx, Form(batched, lstm.batch_first)


def _unpacked(
    lstm: nn.LSTM, packed: PackedSequence, hx: State | None, lengths: object, reset: object
) -> tuple[Sequences, State | None, Form]:
    """Pads a PackedSequence, in its packed (sorted) order, into which the states go, too."""
    if lengths is not None:
        raise ValueError("LSTM: lengths must be None with a PackedSequence, which has its own")
    begins = None
    if reset is not None:
        if not isinstance(reset, PackedSequence):
            raise TypeError(f"LSTM: reset must be a PackedSequence with a packed input, got {type(reset).__name__}")
        same = reset.data.shape == packed.data.shape[:1] and torch.equal(reset.batch_sizes, packed.batch_sizes)
        theirs, ours = reset.sorted_indices, packed.sorted_indices
        in_order = theirs is ours if theirs is None or ours is None else torch.equal(theirs, ours)
        if not (same and in_order):
            raise ValueError("LSTM: reset must be packed as the input, with data of shape (N,)")
        _check_reset(reset.data, packed.data)
        begins = pad_packed_sequence(PackedSequence(reset.data, reset.batch_sizes))[0]
    if packed.data.dim() != 2:
        raise ValueError(f"LSTM: data of a packed input must have shape (N, I), got {tuple(packed.data.shape)}")
    x, on_cpu = pad_packed_sequence(PackedSequence(packed.data, packed.batch_sizes))
    if hx is not None:
        _check_sizes(lstm, x, hx)  # before it is put into order: that may hide a wrong size
        hx = lstm.permute_hidden(hx, packed.sorted_indices)
    return Sequences(x, on_cpu.to(x.device, non_blocking=True), begins), hx, Form(packed=packed, lengths=on_cpu)


def _packer(packed: PackedSequence, lengths: Tensor) -> Any:
    def pack(padded: Tensor) -> PackedSequence:
        data = pack_padded_sequence(padded, lengths).data
        return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)

    return pack


def _lengths_for(lengths: object, x: Tensor) -> Tensor:
    """Makes lengths for x (T, B, I), on its device, and checks those that are on the host."""
    if isinstance(lengths, (list, tuple)):
        for b, length in enumerate(lengths):
            if isinstance(length, bool) or not isinstance(length, numbers.Integral):
                raise TypeError(f"LSTM: lengths must be integers, got lengths[{b}] of {type(length).__name__}")
        _check_length_values(lengths, x.shape[0])  # before int64 has to hold them
        lengths = torch.tensor(lengths, dtype=torch.int64)
    elif not isinstance(lengths, Tensor):
        raise TypeError(f"LSTM: lengths must be a tensor or a list of integers, got {type(lengths).__name__}")
    if lengths.shape != x.shape[1:2]:
        raise ValueError(f"LSTM: lengths must have shape ({x.shape[1]},), got {tuple(lengths.shape)}")
    if lengths.dtype != torch.int64:
        raise TypeError(f"LSTM: lengths must be int64, got {lengths.dtype}")
    if lengths.device == x.device:
        return lengths
    if lengths.device.type != "cpu":
        raise ValueError(f"LSTM: lengths must be on the input's device {x.device} or on the CPU, got {lengths.device}")
    _check_length_values(lengths, x.shape[0])
    return lengths.to(x.device, non_blocking=True)


def _check_length_values(lengths: Tensor | Sequence[int], steps: int) -> None:
    if torch.compiler.is_compiling():  # it would guard on each; the operator checks them, too
        return
    for b, length in enumerate(lengths.tolist() if isinstance(lengths, Tensor) else lengths):
        if not 0 <= length <= steps:
            raise ValueError(f"LSTM: lengths must be between 0 and T = {steps}, got lengths[{b}] = {length}")


# --- checks -----------------------------------------------------------------------------------------------------------


def check_probability(name: str, value: float) -> None:
    """Raises a ValueError for an argument of the constructor that is no probability."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value <= 1:
        raise ValueError(f"LSTM: {name} must be a number in [0, 1], got {value!r}")


def _check_state_dims(hx: State, batched: bool) -> None:
    if hx[0].dim() != (3 if batched else 2) or hx[1].dim() != hx[0].dim():
        dims, kind = (3, "batched 3-D") if batched else (2, "unbatched 2-D")
        raise RuntimeError(
            f"For {kind} input, hx and cx should also be {dims}-D but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
        )


def _check_reset(reset: object, input: Tensor) -> Tensor:
    if not isinstance(reset, Tensor):
        raise TypeError(f"LSTM: reset must be a tensor, got {type(reset).__name__}")
    if reset.shape != input.shape[:-1]:
        raise ValueError(f"LSTM: reset must have shape {tuple(input.shape[:-1])}, got {tuple(reset.shape)}")
    if reset.dtype != torch.bool:
        raise TypeError(f"LSTM: reset must be bool, got {reset.dtype}")
    if reset.device != input.device:
        raise ValueError(f"LSTM: reset must be on the input's device {input.device}, got {reset.device}")
    return reset


def _autocast(*tensors: Tensor) -> bool:
    """Tells whether autocast gives all of them one dtype, so that theirs may differ."""
    return all(autocast_dtype(t) is not None for t in tensors)


def _check_sizes(lstm: nn.LSTM, x: Tensor, hx: State | None) -> None:
    weight = cast(Tensor, lstm.weight_ih_l0)
    if x.layout != torch.strided:
        raise RuntimeError(f"LSTM: input must be dense, got layout {x.layout}")
    if x.shape[2] != lstm.input_size:
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {lstm.input_size}, got {x.shape[2]}")
    if x.is_quantized:
        raise TypeError(
            f"LSTM: input must not be quantized, got {x.dtype}; to have an LSTM quantized, make it an nn.LSTM by "
            "birnn_ext.restore(model) before torch.ao.quantization.prepare"
        )
    if x.dtype != weight.dtype and not _autocast(x, weight):
        raise ValueError(
            f"LSTM: RNN input dtype ({x.dtype}) does not match weight dtype ({weight.dtype}). "
            f"Convert input: input.to({weight.dtype}), or convert model: model.to({x.dtype})"
        )
    if x.device != weight.device:
        raise RuntimeError(f"LSTM: input must be on the weights' device {weight.device}, got {x.device}")
    if hx is None:
        return
    for name, state, size in zip(
        ("hidden[0]", "hidden[1]"), hx, (lstm.proj_size or lstm.hidden_size, lstm.hidden_size), strict=True
    ):
        expected = (lstm.num_layers * (2 if lstm.bidirectional else 1), x.shape[1], size)
        if state.shape != expected:
            raise RuntimeError(f"Expected {name} size {expected}, got {list(state.shape)}")
        if state.dtype != x.dtype and not _autocast(x, weight, state):
            raise RuntimeError(f"LSTM: {name} must be {x.dtype} as the input, got {state.dtype}")
        if state.device != x.device:
            raise RuntimeError(f"LSTM: {name} must be on the input's device {x.device}, got {state.device}")
