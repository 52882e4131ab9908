"""The operators: the LSTM recurrence of one layer, both directions, forward and backward.

`torch.ops.birnn_ext.lstm_recurrence` and `.lstm_recurrence_backward` are compiled for CPU and CUDA (csrc/). This module
gives them everything else: shapes for fake tensors, autograd, and the reference implementation on devices that have no
kernel. The input projection before the recurrence and the weight gradients after it are ordinary matrix products.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from birnn_ext import _C, reference
from birnn_ext._info import reference_calls

Tensors3 = tuple[Tensor, Tensor, Tensor]
Tensors5 = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def lstm_recurrence(
    gates_x: Tensor,
    w_hh: Tensor,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensors3:
    """Runs an LSTM layer's time steps, given its input projection.

    For D = 2, direction 1 runs the same recurrence backwards in time. Gate order is i, f, g, o, as in `torch.nn.LSTM`;
    the equations are in csrc/core/cells/lstm.h. Differentiable any number of times in all floating-point arguments, in
    forward mode too.

    Args:
        gates_x: (T, B, D, 4H), W_ih x_t + b_ih + b_hh; T >= 1, D is 1 or 2; float64, float32, float16 or bfloat16.
        w_hh: (D, 4H, H), of gates_x's dtype and device, as all floating-point arguments.
        h0: (D, B, H), the initial outputs; None stands for zeros.
        c0: (D, B, H), the initial cell states; None stands for zeros.
        lengths: (B,) int64 on the same device, in any order: sequence b is its first lengths[b] steps, 0 to T.

    Returns:
        y (T, B, D, H), the output of every step, 0 beyond a sequence's end; h_n and c_n (D, B, H), the states after
        each sequence's own last step.

    Raises:
        ValueError: a shape or device does not fit, or a length is out of range (on CUDA: a device-side assertion).
        TypeError: a dtype does not fit.
    """
    floating = [t for t in (gates_x, w_hh, h0, c0) if t is not None]
    why = _needs_reference(*floating)
    if why:
        _count_reference("lstm_recurrence", "reference_forward", why)
        return reference.lstm_recurrence(gates_x, w_hh, h0, c0, lengths, False)[:3]
    outputs: Tensors5
    if _within_torch_func():
        outputs = _Recurrence.apply(gates_x, w_hh, h0, c0, lengths, torch.is_grad_enabled())
    else:
        save = torch.is_grad_enabled() and any(t.requires_grad for t in floating)
        outputs = torch.ops.birnn_ext.lstm_recurrence(gates_x, w_hh, h0, c0, lengths, save)
    return outputs[:3]


def lstm_layer(
    x: Tensor,
    weights: list[Tensor],
    bias: bool,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    lengths: Tensor | None = None,
    recompute: bool = False,
) -> Tensors3:
    """Runs an LSTM layer with its input projection: one operator on the CPU, elsewhere a matrix product before it.

    Differentiable as `lstm_recurrence`. On the CPU the kernels compute the input projection step by step, so that it
    never visits memory, and the gradients of weights and input round by round; in 16-bit types where there is nothing
    to be differentiated, and not rounded.

    Args:
        x: (T, B, I), T >= 1; float64, float32, float16 or bfloat16.
        weights: of each direction w_ih (4H, I), w_hh (4H, H) and, with bias, bias_ih (4H,) and bias_hh (4H,), as
            `torch.nn.LSTM` orders them; of x's dtype and device, as h0 and c0 are.
        bias: whether there are biases.
        h0: (D, B, H), the initial outputs; None stands for zeros.
        c0: (D, B, H), the initial cell states; None stands for zeros.
        lengths: (B,) int64 as for `lstm_recurrence`.
        recompute: keep only the cell states for the backward pass (beside x and y), a fifth, and compute the gates
            anew there; where the layer is not one operator, keep x alone and run the layer again. Within torch.func's
            transforms, which allow neither, this has no effect.

    Returns:
        y (T, B, D, H), h_n and c_n (D, B, H).

    Raises:
        ValueError, TypeError: as `lstm_recurrence`.
    """
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        from birnn_ext.onnx import standard_lstm

        return standard_lstm(x, weights, bias, h0, c0, lengths)
    floating = (t for t in (x, *weights, h0, c0) if t is not None)
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in floating)
    if differentiated:
        # As nn.LSTM's backward pass, ours keeps a copy of what is a view with the batch first, which users may then
        # change in place, or have made in inference mode.
        x = x.contiguous()
    if _is_one_operator(x, weights, h0, c0, differentiated):
        save = (2 if recompute else 1) if differentiated else 0
        outputs: Tensors5 = torch.ops.birnn_ext.lstm_layer(x, weights, bias, h0, c0, lengths, save)
        return outputs[:3]
    if recompute and _can_recompute():
        y_and_states: Tensors3 = checkpoint(
            lstm_layer, x, weights, bias, h0, c0, lengths, use_reentrant=False, preserve_rng_state=False
        )
        return y_and_states
    if lengths is not None:  # whatever lies beyond a sequence's end must not reach the weights' gradients
        beyond = torch.arange(x.shape[0], device=x.device).unsqueeze(1) >= lengths
        x = x.masked_fill(beyond.unsqueeze(-1), 0)
    stride = 4 if bias else 2
    w_ih, w_hh = weights[::stride], weights[1::stride]
    b_ih, b_hh = (torch.cat(weights[k::stride]) if bias else None for k in (2, 3))
    gates_x = _biased_projection(x, torch.cat(w_ih), b_ih, b_hh).unflatten(-1, (len(w_ih), -1))
    return lstm_recurrence(gates_x, torch.stack(w_hh), h0, c0, lengths)


def _biased_projection(x: Tensor, w_ih: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> Tensor:
    """x w_ih^T + b_ih + b_hh, rounded once.

    In 16 bits the sum of the biases alone would be rounded, too, and make 1.6 times nn.LSTM's error in a single step.
    So they are columns of w_ih, and x has columns of ones. Rows are multiples of 16 bytes, for the fastest products.
    """
    if b_ih is None or b_hh is None:
        return project(x, w_ih, None)
    if x.element_size() > 2:
        return project(x, w_ih, b_ih + b_hh)
    unused = -(x.shape[-1] + 2) % 8
    weights = torch.cat([w_ih, torch.stack([b_ih, b_hh], -1), w_ih.new_zeros(len(w_ih), unused)], -1)
    return project(F.pad(x, (0, 2 + unused), value=1.0), weights, None)


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Projects all steps at once: x (T, B, I), weight (n, I) and bias (n,) -> (T, B, n).

    One matrix product whatever x's strides. Of three dimensions with the batch first in memory, F.linear makes one for
    each sequence, each with a copy of the weights, where these need no gradient.
    """
    steps, batch, features = x.shape
    projected: Tensor = F.linear(x.reshape(steps * batch, features), weight, bias).unflatten(0, (steps, batch))
    return projected


def _is_one_operator(
    x: Tensor, weights: list[Tensor], h0: Tensor | None, c0: Tensor | None, differentiated: bool
) -> bool:
    if x.device.type != "cpu" or x.shape[-1:] == (0,):
        return False
    if differentiated and x.dtype not in (torch.float32, torch.float64):
        return False
    return not _within_torch_func() and _needs_reference(x, *weights, h0, c0) is None


def _can_recompute() -> bool:
    """Whether a checkpoint is of use, and works: forward mode stops at one before torch 2.11."""
    return torch.is_grad_enabled() and forward_ad._current_level < 0 and not _within_torch_func()


def _within_torch_func() -> bool:
    """Whether a transform such as vmap or grad is at work: they know no autograd formulas of operators."""
    return torch._C._are_functorch_transforms_active()


def _needs_reference(*tensors: Tensor | None) -> str | None:
    """What is being done that only plain PyTorch can follow, if anything: then the reference serves."""
    within_torch_func = _within_torch_func()
    # PyTorch would drop tangents without a word.
    if forward_ad._current_level >= 0 and (
        within_torch_func or any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)
    ):
        return "has no forward-mode derivative"
    if not within_torch_func:
        return None
    # torch.compile can't trace a Function's vmap rule (an internal error of torch 2.14), not even where a graph break
    # has left the outer frames to Python.
    if torch.compiler.is_compiling() or torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None:
        return "has no rule for torch.func's transforms under torch.compile"
    if TransformType.Functionalize in [level.key() for level in torch._C._functorch.get_interpreter_stack()]:
        return "has no rule for torch.func.functionalize"
    return None


# --- fake tensors -----------------------------------------------------------------------------------------------------


def _check_devices(*tensors: Tensor | None) -> None:
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        raise ValueError(f"birnn_ext: all tensors must be on one device, got {sorted(map(str, devices))}")


def _cell_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("birnn_ext::lstm_recurrence")
def _(
    gates_x: Tensor, w_hh: Tensor, h0: Tensor | None, c0: Tensor | None, lengths: Tensor | None, save: bool
) -> Tensors5:
    _check_devices(gates_x, w_hh, h0, c0, lengths)
    steps, batch, directions, _ = gates_x.shape
    hidden = w_hh.shape[-1]
    cell_dtype = _cell_dtype(gates_x.dtype)
    y = gates_x.new_empty(steps, batch, directions, hidden)
    state = gates_x.new_empty(directions, batch, hidden)
    if save:
        gates, cells = gates_x.new_empty(gates_x.shape), torch.empty_like(y, dtype=cell_dtype)
    else:
        gates, cells = gates_x.new_empty(0), gates_x.new_empty(0, dtype=cell_dtype)
    return y, state, torch.empty_like(state), gates, cells


@torch.library.register_fake("birnn_ext::lstm_recurrence_backward")
def _(
    w_hh: Tensor,
    c0: Tensor | None,
    lengths: Tensor | None,
    gates: Tensor,
    cells: Tensor,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    state_grads: bool,
) -> Tensors3:
    _, batch, directions, _ = gates.shape
    d_state = gates.new_empty(directions, batch, w_hh.shape[-1]) if state_grads else gates.new_empty(0)
    return gates.new_empty(gates.shape), d_state, torch.empty_like(d_state)


@torch.library.register_fake("birnn_ext::lstm_layer")
def _(
    x: Tensor,
    weights: list[Tensor],
    bias: bool,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    save: int,
) -> Tensors5:
    _check_devices(x, *weights, h0, c0, lengths)
    steps, batch, _ = x.shape
    directions, hidden = len(weights) // (4 if bias else 2), weights[1].shape[1]
    y = x.new_empty(steps, batch, directions, hidden)
    state = x.new_empty(directions, batch, hidden)
    gates = x.new_empty(steps, batch, directions, 4 * hidden) if save == 1 else x.new_empty(0)
    cells = x.new_empty(y.shape if save else (0,), dtype=_cell_dtype(x.dtype))
    return y, state, torch.empty_like(state), gates, cells


@torch.library.register_fake("birnn_ext::lstm_layer_backward")
def _(
    x: Tensor,
    weights: list[Tensor],
    bias: bool,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x_grad: bool,
    weight_grads: bool,
    state_grads: bool,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    _, batch, directions, hidden = y.shape
    dx = x.new_empty(x.shape) if x_grad else x.new_empty(0)
    d_weights = [w.new_empty(w.shape) if weight_grads else w.new_empty(0) for w in weights]
    d_state = x.new_empty(directions, batch, hidden) if state_grads else x.new_empty(0)
    return dx, d_weights, d_state, torch.empty_like(d_state)


# --- devices without a kernel -----------------------------------------------------------------------------------------


def _count_reference(name: str, counter: str, why: str) -> None:
    """Counts a call of the reference, and says so at the first for a reason."""
    if why not in _said:
        _said.add(why)
        warnings.warn(
            f"birnn_ext::{name} {why}. Using the reference implementation in plain PyTorch, which is slow.",
            stacklevel=3,
        )
    reference_calls[counter] += 1


_said: set[str] = set()


def _no_kernel(device: torch.device) -> str:
    """What to say of a device that the extension has no kernels for; an error where it could have them.

    ROCm, whose devices are "cuda" too, can't have them.
    """
    missing = _C.build_info()["cuda_missing"]
    if missing and device.type == "cuda" and torch.version.hip is None:
        raise RuntimeError(
            f"birnn_ext has no kernels for tensors on '{device}', as it was built for the CPU only: {missing}. "
            "`BIRNN_CUDA=1 pip install --no-build-isolation .` in its source folder builds them, or says what is "
            "missing; until then birnn_ext.restore(model) undoes accelerate"
        )
    built = "for the CPU only" if missing else "for CPU and CUDA"
    return f"has no compiled kernel for device '{device.type}': the extension was built {built}"


@torch.library.impl("birnn_ext::lstm_recurrence", "CompositeExplicitAutograd")
def _(
    gates_x: Tensor, w_hh: Tensor, h0: Tensor | None, c0: Tensor | None, lengths: Tensor | None, save: bool
) -> Tensors5:
    _count_reference("lstm_recurrence", "reference_forward", _no_kernel(gates_x.device))
    return reference.lstm_recurrence(gates_x, w_hh, h0, c0, lengths, save)


@torch.library.impl("birnn_ext::lstm_recurrence_backward", "CompositeExplicitAutograd")
def _(
    w_hh: Tensor,
    c0: Tensor | None,
    lengths: Tensor | None,
    gates: Tensor,
    cells: Tensor,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    state_grads: bool,
) -> Tensors3:
    _count_reference("lstm_recurrence_backward", "reference_backward", _no_kernel(gates.device))
    return reference.lstm_recurrence_backward(w_hh, c0, lengths, gates, cells, dy, dh_n, dc_n, state_grads)


# --- autograd ---------------------------------------------------------------------------------------------------------


def _weight_grad(dz: Tensor, y: Tensor, h0: Tensor | None, lengths: Tensor | None) -> Tensor:
    """dW_hh (D, 4H, H) = sum over steps of dz_t h_{t-1}^T, one matrix product per direction.

    dz (T, B, D, 4H) is 0 beyond a sequence's end, y (T, B, D, H) too.
    """
    steps, batch, directions, _ = dz.shape
    # a step is batch rows; torch.compile takes T - 1 steps badly, and PyTorch's older vmap knows no flatten
    dz_rows, y_rows = (t.reshape(steps * batch, directions, t.shape[-1]) for t in (dz, y))
    grads = []
    for d in range(directions):
        if d == 0:
            grad = dz_rows[batch:, 0].T @ y_rows[: y_rows.shape[0] - batch, 0]
        else:
            grad = dz_rows[: dz_rows.shape[0] - batch, 1].T @ y_rows[batch:, 1]
        if h0 is not None:
            if d == 0:
                first = dz[0, :, 0]
            elif lengths is None:
                first = dz[-1, :, 1]
            else:
                first = dz[(lengths - 1).clamp(min=0), torch.arange(batch, device=dz.device), 1]
            grad = torch.addmm(grad, first.T, h0[d])  # inductor would make one of a sum, with other bits
        grads.append(grad)
    return torch.stack(grads)


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensors5) -> None:
    _, w_hh, h0, c0, lengths, ctx.save = inputs
    y, _, _, gates, cells = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(w_hh, h0, c0, lengths, y, gates, cells)


def _forward_grad(
    ctx: Any,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    d_gates: Tensor | None,
    d_cells: Tensor | None,
) -> tuple[Tensor | None, ...]:
    if not ctx.save:
        raise RuntimeError(
            "birnn_ext::lstm_recurrence was called with save=False, so it can't be differentiated; "
            "call it with save=True, or birnn_ext.ops.lstm_recurrence, which knows when to save"
        )
    w_hh, h0, c0, lengths, y, gates, cells = ctx.saved_tensors
    needs_w, needs_h0, needs_c0 = ctx.needs_input_grad[1:4]
    state_grads = needs_h0 or needs_c0
    args = (w_hh, c0, lengths, gates, cells, dy, dh_n, dc_n, state_grads)
    if d_gates is None and d_cells is None:
        dz, dh0, dc0 = _recurrence_backward(*args)
    else:  # double backward
        dz, dh0, dc0 = reference.lstm_recurrence_backward(*args, d_gates, d_cells)
    with torch.autocast(dz.device.type, enabled=False):  # types are settled
        d_w_hh = _weight_grad(dz, y, h0, lengths) if needs_w else None
    return dz, d_w_hh, dh0 if needs_h0 else None, dc0 if needs_c0 else None, None, None


def _recurrence_backward(*args: Any) -> Tensors3:
    why = _needs_reference(*args[:-1])
    if why:
        _count_reference("lstm_recurrence_backward", "reference_backward", why)
        return reference.lstm_recurrence_backward(*args)
    run = _RecurrenceBackward.apply if _within_torch_func() else torch.ops.birnn_ext.lstm_recurrence_backward
    grads: Tensors3 = run(*args)
    return grads


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensors3) -> None:
    *tensors, ctx.state_grads = inputs
    ctx.save_for_backward(*tensors)


def _backward_grad(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    inputs = list(ctx.saved_tensors)
    wanted = [k for k, needed in enumerate(ctx.needs_input_grad[: len(inputs)]) if needed]

    def run(*tensors: Tensor) -> Tensors3:
        for k, tensor in zip(wanted, tensors, strict=True):
            inputs[k] = tensor
        return reference.lstm_recurrence_backward(*inputs, ctx.state_grads)  # type: ignore[call-arg]  # 8 inputs

    vjp = torch.func.vjp(run, *(inputs[k] for k in wanted))[1]
    grads: list[Tensor | None] = [None] * (len(inputs) + 1)
    for k, grad in zip(wanted, vjp(cotangents), strict=True):
        grads[k] = grad
    return tuple(grads)


torch.library.register_autograd("birnn_ext::lstm_recurrence", _forward_grad, setup_context=_save_forward)
torch.library.register_autograd("birnn_ext::lstm_recurrence_backward", _backward_grad, setup_context=_save_backward)


# --- torch.func -------------------------------------------------------------------------------------------------------


VmapResult = tuple[tuple[Tensor, ...], tuple[int | None, ...]]  # outputs, and where their samples are


def _vmap_rule(call: Callable[..., tuple[Tensor, ...]], w_hh_at: int, lengths_at: int) -> Callable[..., VmapResult]:
    """The rule of torch.func.vmap for one of the two operators: samples become sequences of one larger batch.

    Every tensor has its batch of sequences in dimension 1, but for w_hh, which has none, and lengths, where it is 0.
    Samples with weights of their own, as in an ensemble, can't share a batch: they take a call each.

    Args:
        call: the operator, or the Function that stands for it.
        w_hh_at: place of w_hh among the operator's arguments.
        lengths_at: place of lengths.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> VmapResult:
        samples = info.batch_size
        if in_dims[w_hh_at] is not None:
            results = [
                call(*(arg if dim is None else arg.select(dim, k) for arg, dim in zip(args, in_dims, strict=True)))
                for k in range(samples)
            ]
            outputs = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
            return outputs, (0,) * len(outputs)

        batch = 0

        def fold(place: int, arg: Any, dim: int | None) -> Any:
            nonlocal batch
            if place == w_hh_at or not isinstance(arg, Tensor):
                return arg
            at = 0 if place == lengths_at else 1
            if dim is None:
                arg = arg.unsqueeze(at).expand(*arg.shape[:at], samples, *arg.shape[at:])
            else:
                arg = arg.movedim(dim, at)
            batch = arg.shape[at + 1]
            return arg.flatten(at, at + 1)

        folded = [fold(place, *arg_and_dim) for place, arg_and_dim in enumerate(zip(args, in_dims, strict=True))]
        # An output of dimension 1 is one that was not asked for, and is empty.
        outputs = tuple(out if out.dim() == 1 else out.unflatten(1, (samples, batch)) for out in call(*folded))
        return outputs, tuple(None if out.dim() == 1 else 1 for out in outputs)

    return rule


class _Recurrence(torch.autograd.Function):
    """The operator lstm_recurrence with its autograd formula in the form that torch.func's transforms know."""

    @staticmethod
    def forward(*args: Any) -> Tensors5:
        outputs: Tensors5 = torch.ops.birnn_ext.lstm_recurrence(*args)
        return outputs

    setup_context = staticmethod(_save_forward)
    backward = staticmethod(_forward_grad)

    @staticmethod
    def vmap(*args: Any) -> VmapResult:
        return _vmap_rule(_Recurrence.apply, w_hh_at=1, lengths_at=4)(*args)


class _RecurrenceBackward(torch.autograd.Function):
    """As `_Recurrence`, for lstm_recurrence_backward."""

    @staticmethod
    def forward(*args: Any) -> Tensors3:
        grads: Tensors3 = torch.ops.birnn_ext.lstm_recurrence_backward(*args)
        return grads

    setup_context = staticmethod(_save_backward)
    backward = staticmethod(_backward_grad)

    @staticmethod
    def vmap(*args: Any) -> VmapResult:
        return _vmap_rule(_RecurrenceBackward.apply, w_hh_at=0, lengths_at=2)(*args)


# For vmap over the operators themselves, called directly.
torch.library.register_vmap(
    "birnn_ext::lstm_recurrence", _vmap_rule(torch.ops.birnn_ext.lstm_recurrence, w_hh_at=1, lengths_at=4)
)
torch.library.register_vmap(
    "birnn_ext::lstm_recurrence_backward",
    _vmap_rule(torch.ops.birnn_ext.lstm_recurrence_backward, w_hh_at=0, lengths_at=2),
)
