"""Every wrong call raises the right kind of error, which names the argument. None crashes or computes nonsense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from cells import every_cell
from helpers import assert_near, projected_by_pytorch, twins
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import birnn_ext
from birnn_ext import GRU, LSTM, RNN, BiRNN
from birnn_ext.ops import lstm_layer, lstm_recurrence
from birnn_ext.variants import Weights, lstm_variant_layer

forward_op = torch.ops.birnn_ext.lstm_recurrence.default
backward_op = torch.ops.birnn_ext.lstm_recurrence_backward.default
layer_op = torch.ops.birnn_ext.lstm_layer.default
layer_backward_op = torch.ops.birnn_ext.lstm_layer_backward.default


def ok(*shape: int, **kwargs) -> Tensor:
    return torch.zeros(shape, **kwargs)


def x(*, device: str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
    return ok(4, 2, 3, device=device, dtype=dtype)


def projected(x: Tensor, *weights: Tensor, bias: bool = False) -> Any:
    """Calls lstm_layer where it is a product before the recurrence's operator."""
    with projected_by_pytorch():
        return lstm_layer(x.requires_grad_(), list(weights), bias)


def hx(*, first: Tensor | None = None, second: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return ok(1, 2, 5) if first is None else first, ok(1, 2, 5) if second is None else second


def integers(*values: int, dtype: torch.dtype = torch.int64, device: str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


class Wrong(NamedTuple):
    """A call that must fail."""

    name: str
    call: Callable[..., Any]
    kind: type[Exception]
    message: str
    theirs: type[Exception] | str | tuple | None = "the same"  # what nn.LSTM raises for the same call; None if nothing


# The module's constructor. The tests call nn.LSTM with the same arguments.
CONSTRUCTORS = [
    Wrong("input_size 0", lambda cls: cls(0, 5), ValueError, "input_size must be greater than zero"),
    Wrong("input_size -3", lambda cls: cls(-3, 5), ValueError, "input_size must be greater than zero"),
    Wrong("hidden_size 0", lambda cls: cls(3, 0), ValueError, "hidden_size must be greater than zero"),
    Wrong("hidden_size -1", lambda cls: cls(3, -1), ValueError, "hidden_size must be greater than zero"),
    Wrong("hidden_size 2.5", lambda cls: cls(3, 2.5), TypeError, "hidden_size should be of type int, got: float"),
    Wrong("hidden_size text", lambda cls: cls(3, "5"), TypeError, "hidden_size should be of type int, got: str"),
    Wrong("input_size text", lambda cls: cls("3", 5), TypeError, "input_size should be of type int, got: str"),
    Wrong("num_layers 0", lambda cls: cls(3, 5, 0), ValueError, "num_layers must be greater than zero"),
    Wrong("num_layers -1", lambda cls: cls(3, 5, num_layers=-1), ValueError, "num_layers must be greater"),
    Wrong("num_layers 1.5", lambda cls: cls(3, 5, 1.5), TypeError, "float"),
    Wrong("dropout 2", lambda cls: cls(3, 5, 2, dropout=2), ValueError, "dropout should be a number in range"),
    Wrong("dropout -0.1", lambda cls: cls(3, 5, 2, dropout=-0.1), ValueError, "dropout should be a number in"),
    Wrong("dropout True", lambda cls: cls(3, 5, 2, dropout=True), ValueError, "dropout should be a number in"),
    Wrong("proj_size -1", lambda cls: cls(3, 5, proj_size=-1), ValueError, "proj_size should be a positive"),
    Wrong("proj_size 5", lambda cls: cls(3, 5, proj_size=5), ValueError, "proj_size has to be smaller than"),
    Wrong("proj_size 9", lambda cls: cls(3, 5, proj_size=9), ValueError, "proj_size has to be smaller than"),
    Wrong("dtype int32", lambda cls: cls(3, 5, dtype=torch.int32), RuntimeError, "floating point"),
    Wrong("device nowhere", lambda cls: cls(3, 5, device="nowhere"), RuntimeError, "device type"),
    Wrong("unknown argument", lambda cls: cls(3, 5, layers=2), TypeError, "layers"),
    Wrong("no hidden_size", lambda cls: cls(3), TypeError, "hidden_size"),
]  # fmt: skip

# Options and methods that nn.LSTM lacks.
OPTIONS = [
    Wrong("recurrent_dropout 2", lambda: LSTM(3, 5, recurrent_dropout=2), ValueError, "recurrent_dropout must be a number in [0, 1], got 2"),
    Wrong("recurrent_dropout True", lambda: LSTM(3, 5, recurrent_dropout=True), ValueError, "recurrent_dropout must be a number in [0, 1], got True"),
    Wrong("recurrent_dropout text", lambda: LSTM(3, 5, recurrent_dropout="0.5"), ValueError, "recurrent_dropout must be a number in [0, 1], got '0.5'"),
    Wrong("zoneout -1", lambda: LSTM(3, 5, zoneout=-1), ValueError, "zoneout must be a number in [0, 1], got -1"),
    Wrong("zoneout NaN", lambda: LSTM(3, 5, zoneout=float("nan")), ValueError, "zoneout must be a number in [0, 1], got nan"),
    Wrong("zoneout of three", lambda: LSTM(3, 5, zoneout=(0.1, 0.2, 0.3)), ValueError, "zoneout must be a number in [0, 1], got (0.1, 0.2, 0.3)"),
    Wrong("zoneout pair", lambda: LSTM(3, 5, zoneout=(0.1, 1.2)), ValueError, "zoneout must be a number in [0, 1], got 1.2"),
    Wrong("reset with learned_state", lambda: LSTM(3, 5, learned_state=True)(x(), reset=ok(4, 2, dtype=torch.bool)), ValueError, "reset must be None with learned_state=True"),
    Wrong("cells with last", lambda: LSTM(3, 5)(x(), output="last", return_cell_states=True), ValueError, "return_cell_states must be False with output=\"last\""),
    Wrong("learned h_0 of too many layers", lambda: with_weight(LSTM(3, 5, learned_state=True), "h_0", ok(2, 5))(x()), RuntimeError, "Expected hidden[0] size (1, 2, 5), got [2, 2, 5]"),
    Wrong("h_0 of H with proj_size", lambda: LSTM(3, 5, proj_size=2)(x(), hx()), RuntimeError, "Expected hidden[0] size (1, 2, 2), got [1, 2, 5]"),
    Wrong("c_0 of P with proj_size", lambda: LSTM(3, 5, proj_size=2)(x(), (ok(1, 2, 2), ok(1, 2, 2))), RuntimeError, "Expected hidden[1] size (1, 2, 5), got [1, 2, 2]"),
    Wrong("weight_hr float64", lambda: with_weight(LSTM(3, 5, proj_size=2), "weight_hr_l0", ok(2, 5).double())(x()), ValueError, "weight_hr_l0 must be torch.float32 on cpu as weight_ih_l0, got torch.float64"),
    Wrong("weight_hr shape", lambda: with_weight(LSTM(3, 5, proj_size=2), "weight_hr_l0", ok(2, 4))(x()), ValueError, "w_hr must have shape [1, 2, 5], got [1, 2, 4]"),
    Wrong("weight_ln_c shape", lambda: with_weight(LSTM(3, 5, layer_norm=True, bias=False), "weight_ln_c_l0", ok(4))(x()), ValueError, "ln_c must have shape [1, 2, 5], got [1, 2, 4]"),
    Wrong("lengths 5 of 4, zoneout", lambda: LSTM(3, 5, zoneout=0.1)(x(), lengths=integers(1, 5)), ValueError, "lengths must be between 0 and T = 4, got lengths[1] = 5"),
]  # fmt: skip

# Calls of LSTM(3, 5), and the same ones of nn.LSTM(3, 5). Most of those without hx are of GRUs, too.
CALLS = [
    Wrong("features 5", lambda m: m(ok(4, 2, 5)), RuntimeError, "input.size(-1) must be equal to input_size. Expected 3, got 5"),
    Wrong("features 0", lambda m: m(ok(4, 2, 0)), RuntimeError, "input.size(-1) must be equal to input_size. Expected 3, got 0"),
    Wrong("features 5 unbatched", lambda m: m(ok(4, 5)), RuntimeError, "input.size(-1) must be equal to input_size"),
    Wrong("1-D", lambda m: m(ok(3)), ValueError, "Expected input to be 2D or 3D, got 1D"),
    Wrong("0-D", lambda m: m(torch.tensor(1.0)), ValueError, "Expected input to be 2D or 3D, got 0D"),
    Wrong("4-D", lambda m: m(ok(1, 4, 2, 3)), ValueError, "Expected input to be 2D or 3D, got 4D"),
    Wrong("no steps", lambda m: m(ok(0, 2, 3)), RuntimeError, "Expected sequence length to be larger than 0"),
    Wrong("no steps unbatched", lambda m: m(ok(0, 3)), RuntimeError, "Expected sequence length to be larger than 0"),
    Wrong("float64 input", lambda m: m(x(dtype=torch.float64)), ValueError, "input dtype (torch.float64) does not match weight dtype (torch.float32)"),
    Wrong("float16 input", lambda m: m(x(dtype=torch.float16)), ValueError, "input dtype (torch.float16) does not match weight dtype"),
    Wrong("int64 input", lambda m: m(x(dtype=torch.int64)), ValueError, "input dtype (torch.int64) does not match weight dtype"),
    Wrong("bool input", lambda m: m(x(dtype=torch.bool)), ValueError, "input dtype (torch.bool) does not match weight dtype"),
    Wrong("complex input", lambda m: m(x(dtype=torch.complex64)), ValueError, "input dtype (torch.complex64) does not match weight dtype"),
    Wrong("meta input", lambda m: m(x(device="meta")), RuntimeError, "input must be on the weights' device cpu, got meta"),
    Wrong("meta weights", lambda m: m.to("meta")(x()), RuntimeError, "input must be on the weights' device meta, got cpu"),
    Wrong("list input", lambda m: m([1.0]), TypeError, "input must be a tensor or a PackedSequence, got list", AttributeError),
    Wrong("None input", lambda m: m(None), TypeError, "input must be a tensor or a PackedSequence, got NoneType", AttributeError),
    Wrong("array input", lambda m: m(x().numpy()), TypeError, "input must be a tensor or a PackedSequence, got ndarray", AttributeError),
    Wrong("no input", lambda m: m(), TypeError, "input"),
    Wrong("sparse input", lambda m: m(x().to_sparse()), RuntimeError, "input must be dense, got layout torch.sparse_coo"),
    Wrong("hx h_0 size", lambda m: m(x(), hx(first=ok(1, 2, 6))), RuntimeError, "Expected hidden[0] size (1, 2, 5), got [1, 2, 6]"),
    Wrong("hx c_0 size", lambda m: m(x(), hx(second=ok(1, 2, 6))), RuntimeError, "Expected hidden[1] size (1, 2, 5), got [1, 2, 6]"),
    Wrong("hx c_0 layers", lambda m: m(x(), hx(second=ok(2, 2, 5))), RuntimeError, "Expected hidden[1] size (1, 2, 5), got [2, 2, 5]"),
    Wrong("hx batch", lambda m: m(x(), hx(first=ok(1, 3, 5))), RuntimeError, "Expected hidden[0] size (1, 2, 5), got [1, 3, 5]"),
    Wrong("hx batch 1", lambda m: m(x(), (ok(1, 1, 5), ok(1, 1, 5))), RuntimeError, "Expected hidden[0] size (1, 2, 5), got [1, 1, 5]"),
    Wrong("hx 2-D", lambda m: m(x(), (ok(1, 5), ok(1, 5))), RuntimeError, "For batched 3-D input, hx and cx should also be 3-D but got (2-D, 2-D)"),
    Wrong("hx c_0 2-D", lambda m: m(x(), (ok(1, 2, 5), ok(1, 5))), RuntimeError, "For batched 3-D input, hx and cx should also be 3-D but got (3-D, 2-D)"),
    Wrong("hx 3-D unbatched", lambda m: m(ok(4, 3), hx()), RuntimeError, "For unbatched 2-D input, hx and cx should also be 2-D"),
    Wrong("hx float64", lambda m: m(x(), hx(first=ok(1, 2, 5, dtype=torch.float64))), RuntimeError, "hidden[0] must be torch.float32 as the input, got torch.float64"),
    Wrong("hx c_0 int64", lambda m: m(x(), hx(second=ok(1, 2, 5, dtype=torch.int64))), RuntimeError, "hidden[1] must be torch.float32 as the input, got torch.int64"),
    Wrong("hx meta", lambda m: m(x(), hx(second=ok(1, 2, 5, device="meta"))), RuntimeError, "hidden[1] must be on the input's device cpu, got meta"),
    Wrong("hx one tensor", lambda m: m(x(), ok(1, 2, 5)), TypeError, "hx must be None or a pair of tensors (h_0, c_0)", IndexError),
    Wrong("hx number", lambda m: m(x(), 5), TypeError, "hx must be None or a pair of tensors (h_0, c_0)"),
    Wrong("hx of one", lambda m: m(x(), (ok(1, 2, 5),)), TypeError, "hx must be None or a pair of tensors (h_0, c_0)", IndexError),
    Wrong("hx of three", lambda m: m(x(), (ok(1, 2, 5),) * 3), TypeError, "hx must be None or a pair of tensors (h_0, c_0)", RuntimeError),
    Wrong("hx with None", lambda m: m(x(), (ok(1, 2, 5), None)), TypeError, "hx must be None or a pair of tensors (h_0, c_0)", AttributeError),
    Wrong("hx of lists", lambda m: m(x(), ([0.0], [0.0])), TypeError, "hx must be None or a pair of tensors (h_0, c_0)", AttributeError),
    Wrong("hx text", lambda m: m(x(), "hc"), TypeError, "hx must be None or a pair of tensors (h_0, c_0)", AttributeError),
    Wrong("packed features", lambda m: m(pack_sequence([ok(2, 4)])), RuntimeError, "input.size(-1) must be equal to input_size. Expected 3, got 4", (None, RuntimeError)),
    Wrong("packed numbers", lambda m: m(pack_sequence([ok(2)])), ValueError, "data of a packed input must have shape (N, I), got (2,)", (RuntimeError, IndexError)),
    Wrong("packed hx batch", lambda m: m(pack_sequence([ok(2, 3)]), hx()), RuntimeError, "Expected hidden[0] size (1, 1, 5), got [1, 2, 5]", None),
    Wrong("packed hx batch, sorted", lambda m: m(pack_sequence([ok(1, 3), ok(2, 3)], False), (ok(1, 1, 5),) * 2), RuntimeError, "Expected hidden[0] size (1, 2, 5), got [1, 1, 5]"),
    Wrong("packed hx 2-D", lambda m: m(pack_sequence([ok(2, 3)]), (ok(1, 5),) * 2), RuntimeError, "Expected hidden[0] size (1, 1, 5), got [1, 5]", IndexError),
    Wrong("packed dtype", lambda m: m(pack_sequence([ok(2, 3).double()])), ValueError, "input dtype (torch.float64) does not match weight dtype", RuntimeError),
    Wrong("output first", lambda m: m(x(), output="first"), ValueError, "output must be \"all\" or \"last\", got 'first'", TypeError),
    Wrong("output None", lambda m: m(x(), output=None), ValueError, "output must be \"all\" or \"last\", got None", TypeError),
    Wrong("output list", lambda m: m(x(), output=["last"]), ValueError, "output must be \"all\" or \"last\", got ['last']", TypeError),
    Wrong("lengths list of 3", lambda m: m(x(), lengths=[1, 2, 3]), ValueError, "lengths must have shape (2,), got (3,)", TypeError),
    Wrong("lengths list of floats", lambda m: m(x(), lengths=[1, 2.0]), TypeError, "lengths must be integers, got lengths[1] of float", TypeError),
    Wrong("lengths list of bools", lambda m: m(x(), lengths=(True, 2)), TypeError, "lengths must be integers, got lengths[0] of bool", TypeError),
    Wrong("lengths list of lists", lambda m: m(x(), lengths=[[1], [2]]), TypeError, "lengths must be integers, got lengths[0] of list", TypeError),
    Wrong("lengths list, 5 of 4", lambda m: m(x(), lengths=[1, 5]), ValueError, "lengths must be between 0 and T = 4, got lengths[1] = 5", TypeError),
    Wrong("lengths list, huge", lambda m: m(x(), lengths=[2**80, 1]), ValueError, f"lengths must be between 0 and T = 4, got lengths[0] = {2**80}", TypeError),
    Wrong("lengths list, unbatched", lambda m: m(ok(4, 3), lengths=[4]), ValueError, "lengths must be None with unbatched", TypeError),
    Wrong("lengths number", lambda m: m(x(), lengths=4), TypeError, "lengths must be a tensor or a list of integers, got int", TypeError),
    Wrong("lengths text", lambda m: m(x(), lengths="12"), TypeError, "lengths must be a tensor or a list of integers, got str", TypeError),
    Wrong("lengths 1", lambda m: m(x(), lengths=integers(1)), ValueError, "lengths must have shape (2,), got (1,)", TypeError),
    Wrong("lengths 2-D", lambda m: m(x(), lengths=integers(1, 2).unsqueeze(0)), ValueError, "lengths must have shape (2,), got (1, 2)", TypeError),
    Wrong("lengths 0-D", lambda m: m(x(), lengths=torch.tensor(2)), ValueError, "lengths must have shape (2,), got ()", TypeError),
    Wrong("lengths of steps", lambda m: m(x(), lengths=integers(1, 1, 1, 1)), ValueError, "lengths must have shape (2,), got (4,)", TypeError),
    Wrong("lengths float", lambda m: m(x(), lengths=torch.tensor([1.0, 2.0])), TypeError, "lengths must be int64, got torch.float32", TypeError),
    Wrong("lengths int32", lambda m: m(x(), lengths=integers(1, 2, dtype=torch.int32)), TypeError, "lengths must be int64, got torch.int32", TypeError),
    Wrong("lengths bool", lambda m: m(x(), lengths=torch.tensor([True, True])), TypeError, "lengths must be int64, got torch.bool", TypeError),
    Wrong("lengths meta", lambda m: m(x(), lengths=integers(1, 2, device="meta")), ValueError, "lengths must be on the input's device cpu or on the CPU, got meta", TypeError),
    Wrong("lengths 5 of 4", lambda m: m(x(), lengths=integers(1, 5)), ValueError, "lengths must be between 0 and T = 4, got lengths[1] = 5", TypeError),
    Wrong("lengths -1", lambda m: m(x(), lengths=integers(-1, 4)), ValueError, "lengths must be between 0 and T = 4, got lengths[0] = -1", TypeError),
    Wrong("lengths huge", lambda m: m(x(), lengths=integers(4, 2**62)), ValueError, "lengths must be between 0 and T = 4, got lengths[1] = 4611686018427387904", TypeError),
    Wrong("lengths lowest", lambda m: m(x(), lengths=integers(-(2**63), 4)), ValueError, "lengths must be between 0 and T = 4, got lengths[0] = -9223372036854775808", TypeError),
    Wrong("lengths 5 of 4, last", lambda m: m(x(), lengths=integers(1, 5), output="last"), ValueError, "lengths must be between 0 and T = 4, got lengths[1] = 5", TypeError),
    Wrong("lengths -1, last", lambda m: m(x(), lengths=integers(-1, 4), output="last"), ValueError, "lengths must be between 0 and T = 4, got lengths[0] = -1", TypeError),
    Wrong("lengths 5 of 4, no_grad", lambda m: torch.no_grad()(m)(x(), lengths=integers(1, 5)), ValueError, "lengths must be between 0 and T = 4, got lengths[1] = 5", TypeError),
    Wrong("lengths 5 of 4, bfloat16", lambda m: m.bfloat16()(x(dtype=torch.bfloat16), lengths=integers(1, 5)), ValueError, "lengths must be between 0 and T = 4, got lengths[1] = 5", TypeError),
    Wrong("lengths unbatched", lambda m: m(ok(4, 3), lengths=integers(4)), ValueError, "lengths must be None with unbatched", TypeError),
    Wrong("lengths packed", lambda m: m(pack_sequence([ok(2, 3)]), lengths=integers(2)), ValueError, "lengths must be None with a PackedSequence", TypeError),
    Wrong("reset list", lambda m: m(x(), reset=[True]), TypeError, "reset must be a tensor, got list", TypeError),
    Wrong("reset shape", lambda m: m(x(), reset=ok(2, 4, dtype=torch.bool)), ValueError, "reset must have shape (4, 2), got (2, 4)", TypeError),
    Wrong("reset int64", lambda m: m(x(), reset=ok(4, 2, dtype=torch.int64)), TypeError, "reset must be bool, got torch.int64", TypeError),
    Wrong("reset meta", lambda m: m(x(), reset=ok(4, 2, dtype=torch.bool, device="meta")), ValueError, "reset must be on the input's device cpu, got meta", TypeError),
    Wrong("reset with a packed input", lambda m: m(pack_sequence([ok(2, 3)]), reset=ok(2, dtype=torch.bool)), TypeError, "reset must be a PackedSequence with a packed input, got Tensor", TypeError),
    Wrong("reset packed otherwise", lambda m: m(pack_sequence([ok(2, 3)]), reset=pack_sequence([ok(1, dtype=torch.bool)])), ValueError, "reset must be packed as the input, with data of shape (N,)", TypeError),
    Wrong("packed reset with a tensor", lambda m: m(x(), reset=pack_sequence([ok(2, dtype=torch.bool)])), TypeError, "reset must be a tensor, got PackedSequence", TypeError),
    Wrong("requires_grad on integers", lambda m: m(x(dtype=torch.int64).requires_grad_()), RuntimeError, "floating point"),
    Wrong("unknown argument", lambda m: m(x(), mask=x()), TypeError, "mask"),
]  # fmt: skip

GRU_CALLS = [wrong for wrong in CALLS if "hx" not in wrong.name and wrong.name != "packed dtype"] + [
    Wrong("packed dtype", lambda m: m(pack_sequence([ok(2, 3).double()])), ValueError, "input dtype (torch.float64) does not match weight dtype"),
    Wrong("hx size", lambda m: m(x(), ok(1, 2, 6)), RuntimeError, "Expected hidden size (1, 2, 5), got [1, 2, 6]"),
    Wrong("hx layers", lambda m: m(x(), ok(2, 2, 5)), RuntimeError, "Expected hidden size (1, 2, 5), got [2, 2, 5]"),
    Wrong("hx 2-D", lambda m: m(x(), ok(1, 5)), RuntimeError, "For batched 3-D input, hx should also be 3-D but got 2-D tensor"),
    Wrong("hx 3-D unbatched", lambda m: m(ok(4, 3), ok(1, 2, 5)), RuntimeError, "For unbatched 2-D input, hx should also be 2-D but got 3-D tensor"),
    Wrong("hx float64", lambda m: m(x(), ok(1, 2, 5).double()), RuntimeError, "hidden must be torch.float32 as the input, got torch.float64"),
    Wrong("hx meta", lambda m: m(x(), ok(1, 2, 5, device="meta")), RuntimeError, "hidden must be on the input's device cpu, got meta"),
    Wrong("hx pair", lambda m: m(x(), hx()), TypeError, "hx must be None or a tensor h_0, got tuple", AttributeError),
    Wrong("hx number", lambda m: m(x(), 5), TypeError, "hx must be None or a tensor h_0, got int", AttributeError),
    Wrong("packed hx 2-D", lambda m: m(pack_sequence([ok(2, 3)]), ok(1, 5)), RuntimeError, "Expected hidden size (1, 1, 5), got [1, 5]"),
    Wrong("return_cell_states", lambda m: m(x(), return_cell_states=True), TypeError, "return_cell_states"),
]  # fmt: skip


def with_weight(lstm: nn.LSTM, name: str, weight: Tensor | None) -> nn.LSTM:
    delattr(lstm, name)
    setattr(lstm, name, weight)
    return lstm


def two_directions() -> LSTM:
    return LSTM(3, 5, bidirectional=True)


# Weights that were replaced, backward passes, and the rest of the package.
OTHERS = [
    Wrong("weight float64", lambda: with_weight(LSTM(3, 5), "weight_hh_l0", ok(20, 5).double())(x()), ValueError, "weight_hh_l0 must be torch.float32 on cpu as weight_ih_l0, got torch.float64"),
    Wrong("weight meta", lambda: with_weight(LSTM(3, 5), "weight_hh_l0", ok(20, 5, device="meta"))(x()), ValueError, "weight_hh_l0 must be torch.float32 on cpu as weight_ih_l0, got torch.float32 on meta"),
    Wrong("bias float16", lambda: with_weight(LSTM(3, 5), "bias_ih_l0", ok(20).half())(x()), ValueError, "bias_ih_l0 must be torch.float32 on cpu as weight_ih_l0, got torch.float16"),
    Wrong("reverse weight float64", lambda: with_weight(two_directions(), "weight_ih_l0_reverse", ok(20, 3).double())(x()), ValueError, "weight_ih_l0_reverse must be torch.float32"),
    Wrong("weight_ih shape", lambda: with_weight(LSTM(3, 5), "weight_ih_l0", ok(20, 4))(x()), ValueError, "w_ih must have shape [20, 3], got [20, 4]"),
    Wrong("weight_hh shape", lambda: with_weight(LSTM(3, 5), "weight_hh_l0", ok(24, 5))(x()), ValueError, "w_hh must have shape [20, 5], got [24, 5]"),
    Wrong("weight_hh 1-D", lambda: with_weight(LSTM(3, 5), "weight_hh_l0", ok(100))(x()), ValueError, "w_hh must have shape (4H, H), got [100]"),
    Wrong("bias shape", lambda: with_weight(LSTM(3, 5), "bias_hh_l0", ok(5))(x()), ValueError, "bias_hh must have shape [20], got [5]"),
    Wrong("in-place change", lambda: changed_in_place(), RuntimeError, "modified by an inplace operation"),
    Wrong("backward twice", lambda: backward_twice(), RuntimeError, "backward through the graph a second time"),
    Wrong("BiRNN 1-D", lambda: BiRNN(3, 5, 1, 2)(ok(3)), ValueError, "Expected input to be 2D or 3D, got 1D"),
    Wrong("BiRNN features", lambda: BiRNN(3, 5, 1, 2)(ok(2, 4, 9)), RuntimeError, "input.size(-1) must be equal to input_size. Expected 3, got 9"),
    Wrong("BiRNN hidden 0", lambda: BiRNN(3, 0, 1, 2), ValueError, "hidden_size must be greater than zero"),
    Wrong("accelerate a class", lambda: birnn_ext.accelerate(nn.LSTM), TypeError, "model must be a torch.nn.Module, got type"),
    Wrong("accelerate None", lambda: birnn_ext.accelerate(None), TypeError, "model must be a torch.nn.Module, got NoneType"),
    Wrong("restore a list", lambda: birnn_ext.restore([nn.LSTM(3, 5)]), TypeError, "model must be a torch.nn.Module, got list"),
    Wrong("state_dict of another size", lambda: LSTM(3, 5).load_state_dict(nn.LSTM(3, 6).state_dict()), RuntimeError, "size mismatch for weight_ih_l0"),
    Wrong("state_dict of more layers", lambda: LSTM(3, 5).load_state_dict(nn.LSTM(3, 5, 2).state_dict()), RuntimeError, "Unexpected key(s) in state_dict: \"weight_ih_l1\""),
    # These call the operators directly.
    Wrong("recurrence gates_x 3-D", lambda: lstm_recurrence(ok(4, 2, 8), ok(1, 8, 2)), ValueError, "gates_x must have shape (T, B, D, 4H), got [4, 2, 8]"),
    Wrong("recurrence gates_x 9", lambda: lstm_recurrence(ok(4, 2, 1, 9), ok(1, 8, 2)), ValueError, "gates_x must have shape (T, B, D, 4H)"),
    Wrong("recurrence no units", lambda: lstm_recurrence(ok(4, 2, 1, 0), ok(1, 0, 0)), ValueError, "gates_x must have shape (T, B, D, 4H)"),
    Wrong("recurrence no steps", lambda: lstm_recurrence(ok(0, 2, 1, 8), ok(1, 8, 2)), ValueError, "gates_x must have at least one time step"),
    Wrong("recurrence 3 directions", lambda: lstm_recurrence(ok(4, 2, 3, 8), ok(3, 8, 2)), ValueError, "gates_x must have 1 or 2 directions"),
    Wrong("recurrence 0 directions", lambda: lstm_recurrence(ok(4, 2, 0, 8), ok(0, 8, 2)), ValueError, "gates_x must have 1 or 2 directions"),
    Wrong("recurrence w_hh shape", lambda: lstm_recurrence(ok(4, 2, 1, 8), ok(1, 8, 3)), ValueError, "w_hh must have shape [1, 8, 2], got [1, 8, 3]"),
    Wrong("recurrence w_hh directions", lambda: lstm_recurrence(ok(4, 2, 1, 8), ok(2, 8, 2)), ValueError, "w_hh must have shape [1, 8, 2], got [2, 8, 2]"),
    Wrong("recurrence w_hh float64", lambda: lstm_recurrence(ok(4, 2, 1, 8), ok(1, 8, 2).double()), TypeError, "w_hh must be Float, got Double"),
    Wrong("recurrence integers", lambda: lstm_recurrence(ok(4, 2, 1, 8).int(), ok(1, 8, 2)), TypeError, "gates_x must be float64, float32, float16 or bfloat16, got Int"),
    Wrong("recurrence complex", lambda: lstm_recurrence(ok(4, 2, 1, 8).cfloat(), ok(1, 8, 2)), TypeError, "gates_x must be float64, float32, float16 or bfloat16, got ComplexFloat"),
    Wrong("recurrence h0 shape", lambda: lstm_recurrence(ok(4, 2, 1, 8), ok(1, 8, 2), ok(1, 3, 2)), ValueError, "h0 must have shape [1, 2, 2], got [1, 3, 2]"),
    Wrong("recurrence c0 float16", lambda: lstm_recurrence(ok(4, 2, 1, 8), ok(1, 8, 2), None, ok(1, 2, 2).half()), TypeError, "c0 must be Float, got Half"),
    Wrong("recurrence lengths shape", lambda: lstm_recurrence(ok(4, 2, 1, 8), ok(1, 8, 2), lengths=integers(1, 1, 1)), ValueError, "lengths must have shape [2], got [3]"),
    Wrong("recurrence lengths float", lambda: lstm_recurrence(ok(4, 2, 1, 8), ok(1, 8, 2), lengths=ok(2)), TypeError, "lengths must be Long, got Float"),
    Wrong("recurrence lengths 5", lambda: lstm_recurrence(ok(4, 2, 1, 8), ok(1, 8, 2), lengths=integers(5, 1)), ValueError, "lengths must be between 0 and T = 4, got lengths[0] = 5"),
    Wrong("recurrence meta w_hh", lambda: forward_op(ok(4, 2, 1, 8), ok(1, 8, 2, device="meta"), None, None, None, "none"), ValueError, "all tensors must be on one device, got ['cpu', 'meta']"),
    Wrong("recurrence None", lambda: forward_op(None, ok(1, 8, 2), None, None, None, "none"), RuntimeError, "tensor does not have a device"),
    Wrong("recurrence text", lambda: forward_op("gates", ok(1, 8, 2), None, None, None, "none"), RuntimeError, "gates_x"),
    Wrong("recurrence backward without save", lambda: backward_op(ok(1, 8, 2), None, None, ok(0), ok(0), None, None, None, False), ValueError, 'gates must be those of a forward call with save="all"'),
    Wrong("recurrence backward cells", lambda: backward_op(ok(1, 8, 2), None, None, ok(4, 2, 1, 8), ok(4, 2, 1, 3), None, None, None, False), ValueError, "cells must have shape [4, 2, 1, 2], got [4, 2, 1, 3]"),
    Wrong("recurrence backward cells float64", lambda: backward_op(ok(1, 8, 2), None, None, ok(4, 2, 1, 8), ok(4, 2, 1, 2).double(), None, None, None, False), TypeError, "cells must be Float, got Double"),
    Wrong("recurrence backward dy", lambda: backward_op(ok(1, 8, 2), None, None, ok(4, 2, 1, 8), ok(4, 2, 1, 2), ok(4, 2, 1, 1), None, None, False), ValueError, "dy must have shape [4, 2, 1, 2], got [4, 2, 1, 1]"),
    Wrong("recurrence backward lengths 9", lambda: backward_op(ok(1, 8, 2), None, integers(9, 1), ok(4, 2, 1, 8), ok(4, 2, 1, 2), None, None, None, False), ValueError, "lengths must be between 0 and T = 4, got lengths[0] = 9"),
    Wrong("layer x 2-D", lambda: lstm_layer(ok(4, 3), [ok(8, 3), ok(8, 2)], False), ValueError, "x must have shape (T, B, I), got [4, 3]"),
    Wrong("layer no weights", lambda: lstm_layer(ok(4, 2, 3), [], False), ValueError, "weights must be 2 or 4 tensors, got 0"),
    Wrong("layer 3 weights", lambda: lstm_layer(ok(4, 2, 3), [ok(8, 3), ok(8, 2), ok(8)], False), ValueError, "weights must be 2 or 4 tensors, got 3"),
    Wrong("layer 2 of 4 weights", lambda: lstm_layer(ok(4, 2, 3), [ok(8, 3), ok(8, 2)], True), ValueError, "weights must be 4 or 8 tensors, got 2"),
    Wrong("layer w_ih shape", lambda: lstm_layer(ok(4, 2, 3), [ok(8, 4), ok(8, 2)], False), ValueError, "w_ih must have shape [8, 3], got [8, 4]"),
    Wrong("layer h0 shape", lambda: lstm_layer(ok(4, 2, 3), [ok(8, 3), ok(8, 2)], False, ok(1, 2, 3), ok(1, 2, 2)), ValueError, "h0 must have shape [1, 2, 2], got [1, 2, 3]"),
    Wrong("projected x 2-D", lambda: projected(ok(4, 3), ok(8, 3), ok(8, 2)), ValueError, "x must have shape (T, B, I), got [4, 3]"),
    Wrong("projected 3 weights", lambda: projected(ok(4, 2, 3), ok(8, 3), ok(8, 2), ok(8)), ValueError, "weights must be 2 or 4 tensors, got 3"),
    Wrong("projected w_ih shape", lambda: projected(ok(4, 2, 3), ok(8, 4), ok(8, 2)), ValueError, "w_ih of all directions must have shape [8, 3], got [8, 4]"),
    Wrong("projected w_ih dtype", lambda: projected(ok(4, 2, 3), ok(8, 3).double(), ok(8, 2)), TypeError, "w_ih must be torch.float32 as x, got torch.float64"),
    Wrong("projected biases shape", lambda: projected(ok(4, 2, 3), ok(8, 3), ok(8, 2), ok(1), ok(1), bias=True), ValueError, "bias of all directions must have shape [8], got [1]"),
    Wrong("extended layer w_ih 2-D", lambda: lstm_variant_layer(ok(4, 2, 3), Weights(ok(8, 3), ok(1, 8, 2), None)), ValueError, "w_ih of all directions must have shape [24, 3], got [24]"),
    Wrong("layer save 3", lambda: layer_op(ok(4, 2, 3), [ok(8, 3), ok(8, 2)], False, None, None, None, "some"), ValueError, 'save must be "none", "cells" or "all", got "some"'),
    Wrong("layer backward y", lambda: layer_backward(y=ok(4, 2, 1, 3)), ValueError, "y must have shape [4, 2, 1, 2], got [4, 2, 1, 3]"),
    Wrong("layer backward cells", lambda: layer_backward(cells=ok(0)), ValueError, "cells must have shape [4, 2, 1, 2], got [0]"),
    Wrong("layer backward gates", lambda: layer_backward(gates=ok(4, 2, 1, 7)), ValueError, "gates must have shape [4, 2, 1, 8], got [4, 2, 1, 7]"),
    Wrong("layer backward dy", lambda: layer_backward(dy=ok(1)), ValueError, "dy must have shape [4, 2, 1, 2], got [1]"),
    Wrong("layer backward lengths -1", lambda: layer_backward(lengths=integers(4, -1)), ValueError, "lengths must be between 0 and T = 4, got lengths[1] = -1"),
]  # fmt: skip


def changed_in_place() -> None:
    lstm, given = LSTM(3, 5), x().requires_grad_()
    y, _ = lstm(given)
    with torch.no_grad():
        lstm.weight_hh_l0.add_(1)
    y.sum().backward()


def backward_twice() -> None:
    y, _ = LSTM(3, 5)(x())
    y.sum().backward()
    y.sum().backward()


def layer_backward(**kwargs: Any) -> None:
    arguments = {
        "x": ok(4, 2, 3), "weights": [ok(8, 3), ok(8, 2)], "bias": False, "h0": None, "c0": None, "lengths": None,
        "y": ok(4, 2, 1, 2), "gates": ok(4, 2, 1, 8), "cells": ok(4, 2, 1, 2), "dy": ok(4, 2, 1, 2), "dh_n": None,
        "dc_n": None, "x_grad": True, "weight_grads": True, "state_grads": False,
    }  # fmt: skip
    layer_backward_op(**{**arguments, **kwargs})


def raised_by(call: Callable[..., Any], *args: Any) -> Exception | None:
    try:
        call(*args)
    except Exception as error:
        return error
    return None


def check(error: Exception | None, wrong: Wrong) -> None:
    assert type(error) is wrong.kind, repr(error)
    assert wrong.message in str(error)


def parametrize(table: list[Wrong]):
    return pytest.mark.parametrize("wrong", table, ids=[wrong.name for wrong in table])


def check_theirs(error: Exception | None, wrong: Wrong) -> None:
    """Our errors are of nn.LSTM's kind, unless the table says that nn.LSTM fails by accident, or not at all."""
    expected = wrong.kind if wrong.theirs == "the same" else wrong.theirs  # a tuple if versions of torch differ
    assert (type(error) if error else None) in (expected if isinstance(expected, tuple) else (expected,)), repr(error)


@parametrize(CONSTRUCTORS)
def test_constructor(wrong):
    ours, theirs = (raised_by(wrong.call, cls) for cls in (LSTM, nn.LSTM))
    if wrong.message in str(theirs):
        check(ours, wrong)
        check_theirs(theirs, wrong)
    else:  # an older torch lets more pass, and we call its constructor
        assert "input_size" in wrong.name
        assert (type(ours), str(ours)) == (type(theirs), str(theirs))


@parametrize(CALLS)
def test_call(wrong):
    check(raised_by(wrong.call, LSTM(3, 5)), wrong)
    check_theirs(raised_by(wrong.call, nn.LSTM(3, 5)), wrong)


OTHERS_OURS = {nn.GRU: GRU, nn.RNN: RNN}
of_others = pytest.mark.parametrize("theirs", OTHERS_OURS, ids=["gru", "rnn"])


@of_others
@parametrize([wrong for wrong in CONSTRUCTORS if "proj_size" not in wrong.name])
def test_constructor_of_others(theirs, wrong):
    ours, theirs = (raised_by(wrong.call, cls) for cls in (OTHERS_OURS[theirs], theirs))
    assert type(ours) is type(theirs)
    if wrong.message in str(theirs):
        check(ours, wrong)
    else:  # as above
        assert "input_size" in wrong.name


@of_others
def test_others_have_no_projection(theirs):
    for size in (0, 2):
        ours, refused = (raised_by(lambda cls: cls(3, 5, proj_size=size), cls) for cls in (OTHERS_OURS[theirs], theirs))  # noqa: B023
        assert (type(ours), str(ours)) == (type(refused), str(refused))


@parametrize(GRU_CALLS)
@of_others
def test_call_of_others(theirs, wrong):
    check(raised_by(wrong.call, OTHERS_OURS[theirs](3, 5)), wrong)
    check_theirs(raised_by(wrong.call, theirs(3, 5)), wrong)


def test_nonlinearities():
    for arguments in ((1, "sine"), (1, None), (1, 3)):
        ours, theirs = (raised_by(lambda cls: cls(3, 5, *arguments), cls) for cls in (RNN, nn.RNN))  # noqa: B023
        assert (type(ours), str(ours)) == (ValueError, str(theirs))
    with pytest.raises(ValueError, match='rnn_layer: nonlinearity must be "tanh" or "relu", got \'sine\''):
        birnn_ext.ops.rnn_layer(torch.zeros(3, 2, 4), [], False, nonlinearity="sine")
    with pytest.raises(ValueError, match=r"^rnn_layer: weights must be 2 or 4 tensors, got 0"):
        birnn_ext.ops.rnn_layer(torch.zeros(3, 2, 4), [], False, nonlinearity="relu")


@parametrize(OPTIONS + OTHERS)
def test_others(wrong):
    check(raised_by(wrong.call), wrong)


def test_the_table_is_long():
    assert len(CONSTRUCTORS) + len(CALLS) + len(OPTIONS) + len(OTHERS) >= 60


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("where", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0", "x", "h_0"])
@every_cell
def test_nan_and_infinity_raise_no_error(cell, where, value, device):
    """The same outputs become NaN as in PyTorch's module. On CUDA an infinity may make more outputs NaN: a float32 is the sum of
    two TF32 values there, and the second part of infinity is NaN (docs/cuda.md)."""
    ours, theirs = twins(3, 5, bidirectional=True, device=device, cell=cell)
    given, state = torch.rand(4, 2, 3, device=device), torch.rand(2, 2, 5, device=device)
    if where in ("x", "h_0"):
        {"x": given, "h_0": state}[where][0, 0, 0] = value
    else:
        for module in (ours, theirs):
            with torch.no_grad():
                getattr(module, where).view(-1)[0] = value
    results = [module(given, cell.hx((state, state)[: cell.states]))[0] for module in (ours, theirs)]
    nans = [y.isnan() for y in results]
    if device == "cuda" and value == float("inf"):
        assert (nans[0] | ~nans[1]).all()
    else:
        assert torch.equal(*nans)
    if value != value:
        assert nans[0].any()
    assert_near(*(y.masked_fill(nans[0], 0) for y in results))
