"""The recurrence with what nn.LSTM does without: `lstm_variant`, and a layer around it.

`torch.ops.birnn_ext.lstm_variant` and `.lstm_variant_backward` are compiled for CPU and CUDA (csrc/core/variant.h has
the equations and their papers). Further derivatives, torch.func's transforms and other devices go through the
reference in plain PyTorch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from birnn_ext import _C, reference
from birnn_ext.ops import (
    _can_recompute,
    _cell_dtype,
    _check_devices,
    _count_reference,
    _needs_reference,
    _no_kernel,
    _weight_grad,
    _within_torch_func,
    project,
)

_DEVICES = ("cpu", "cuda", "meta") if _C.build_info()["cuda"] else ("cpu", "meta")  # that have the operator
EPS = 1e-5  # added to the variances of layer norm, as nn.LayerNorm does


class Variant(NamedTuple):
    """What a layer does beyond nn.LSTM. None, and a mean of 0, stand for nothing."""

    reset: Tensor | None = None  # (T, B) bool: step t begins a new sequence, with h = c = 0
    h_mask: Tensor | None = None  # (D, B, P): multiplies h_{t-1} on its way to W_hh
    zoneout_h: Tensor | None = None  # (T, B, D, P) bool: where h stays as it was
    zoneout_c: Tensor | None = None  # (T, B, D, H) bool: likewise c
    zoneout_h_mean: float = 0.0  # without a mask: h_t is this part of h_{t-1}
    zoneout_c_mean: float = 0.0

    def direction(self, d: int) -> Variant:
        """Its share in one direction."""
        return self._replace(
            h_mask=None if self.h_mask is None else self.h_mask[d : d + 1],
            zoneout_h=None if self.zoneout_h is None else self.zoneout_h[:, :, d : d + 1],
            zoneout_c=None if self.zoneout_c is None else self.zoneout_c[:, :, d : d + 1],
        )

    def first_reverse_step(self, lengths: Tensor | None) -> Variant:
        """Its share in the first step of the reverse direction, which is each sequence's last."""

        def at_last(mask: Tensor | None) -> Tensor | None:
            if mask is None or lengths is None:
                return mask if mask is None else mask[-1:]
            return mask[(lengths - 1).clamp(min=0), torch.arange(mask.shape[1], device=mask.device)].unsqueeze(0)

        share = self.direction(1)
        return share._replace(reset=None, zoneout_h=at_last(share.zoneout_h), zoneout_c=at_last(share.zoneout_c))


class Weights(NamedTuple):
    """A layer's parameters, of D directions."""

    w_ih: Tensor  # (D, 4H, I)
    w_hh: Tensor  # (D, 4H, P)
    bias: Tensor | None  # (D, 4H): both biases' sum
    w_hr: Tensor | None = None  # (D, P, H): the projection; without it P is H
    ln_ih: Tensor | None = None  # (D, 4H): layer norm's factors for W_ih x,
    ln_hh: Tensor | None = None  # (D, 4H): for W_hh h,
    ln_c: Tensor | None = None  # (D, 2, H): and factor and summand for c


def lstm_variant(
    gates_x: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    lengths: Tensor | None = None,
    variant: Variant = Variant(),  # noqa: B008, it is immutable
    ln_hh: Tensor | None = None,
    ln_c: Tensor | None = None,
    return_cells: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Runs an LSTM layer's time steps, given its input projection, with a projection of h and `Variant`'s features.

    Differentiable any number of times in gates_x, w_hh, w_hr, h0, c0, ln_hh and ln_c.

    Args:
        gates_x: (T, B, D, 4H), T >= 1, D is 1 or 2; float64, float32, float16 or bfloat16. All floating-point arguments
            are of its dtype, and all arguments on its device.
        w_hh: (D, 4H, P); P is H without a projection.
        w_hr: (D, P, H), the projection (Sak et al., arXiv:1402.1128), h_t = W_hr (o tanh(c_t)); None for none.
        h0: (D, B, P), the initial outputs; None stands for zeros.
        c0: (D, B, H), the initial cell states; None stands for zeros.
        lengths: (B,) int64, in any order: sequence b is its first lengths[b] steps, 0 to T.
        variant: masks for dropout (Gal & Ghahramani, arXiv:1512.05287), zoneout (Krueger et al., arXiv:1606.01305) and
            resets. A reset at step t clears the state before step t, and the reverse direction's after it.
        ln_hh: (D, 4H): with it W_hh h is normalised (Ba et al., arXiv:1607.06450), then multiplied by it.
        ln_c: (D, 2, H): with it c, on its way to the output, is normalised, then multiplied by ln_c[:, 0], and
            ln_c[:, 1] is added.
        return_cells: whether all cell states are wanted.

    Returns:
        y (T, B, D, P), 0 beyond a sequence's end; h_n (D, B, P) and c_n (D, B, H); and c of all steps (T, B, D, H),
        float32 or float64 and 0 beyond ends, or None.

    Raises:
        ValueError: a shape or device does not fit, or a length is out of range (on CUDA: a device-side assertion).
        TypeError: a dtype does not fit.
    """
    tensors = (gates_x, w_hh, w_hr, h0, c0, lengths, *variant[:4])
    constants = (*variant[4:], ln_hh, ln_c, EPS)
    floating = [t for t in (gates_x, w_hh, w_hr, h0, c0, ln_hh, ln_c) if t is not None]
    why = _needs_reference(*floating)
    if why is None and _within_torch_func():
        why = "has no rule for torch.func's transforms"
    if why is None and gates_x.device.type not in _DEVICES:
        why = _no_kernel(gates_x.device)
    if why:
        _count_reference("lstm_variant", "reference_forward", why)
        y, h_n, c_n, cells = reference.lstm_variant(*tensors, *constants)
    else:
        save = 2 if torch.is_grad_enabled() and any(t.requires_grad for t in floating) else int(return_cells)
        y, h_n, c_n, cells, *_ = torch.ops.birnn_ext.lstm_variant(*tensors, *constants, save)
    return y, h_n, c_n, cells if return_cells else None


def lstm_variant_layer(
    x: Tensor,
    weights: Weights,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    lengths: Tensor | None = None,
    variant: Variant = Variant(),  # noqa: B008, it is immutable
    return_cells: bool = False,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Runs an LSTM layer with its input projection, a matrix product before `lstm_variant`.

    Args:
        x: (T, B, I), T >= 1.
        weights: of x's dtype and device.
        h0: as for `lstm_variant`.
        c0: likewise.
        lengths: likewise.
        variant: likewise.
        return_cells: likewise.
        recompute: keep x, weights and masks alone for the backward pass, and run the layer again there. Within
            torch.func's transforms and torch.compile this has no effect.

    Returns:
        y (T, B, D, P), h_n (D, B, P), c_n (D, B, H) and cells (T, B, D, H) or None, as `lstm_variant`.

    Raises:
        ValueError, TypeError: as `lstm_variant`.
    """
    # torch.compile fails within a checkpoint of this operator, with an internal error of torch 2.14
    if recompute and _can_recompute() and not torch.compiler.is_compiling():
        results: tuple[Tensor, Tensor, Tensor, Tensor | None] = checkpoint(
            lstm_variant_layer, x.contiguous(), weights, h0, c0, lengths, variant, return_cells,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
        return results
    if lengths is not None:  # whatever lies beyond a sequence's end must not reach the weights' gradients
        beyond = torch.arange(x.shape[0], device=x.device).unsqueeze(1) >= lengths
        x = x.masked_fill(beyond.unsqueeze(-1), 0)
    w_ih, w_hh, bias, w_hr, ln_ih, ln_hh, ln_c = weights
    added = bias.flatten() if bias is not None and ln_ih is None else None
    gates_x = project(x, w_ih.flatten(0, 1), added).unflatten(-1, w_ih.shape[:2])
    if ln_ih is not None:  # autocast would leave it in float32
        gates_x = F.layer_norm(gates_x, gates_x.shape[-1:], eps=EPS).to(x.dtype) * ln_ih
        gates_x = gates_x if bias is None else gates_x + bias
    return lstm_variant(gates_x, w_hh, w_hr, h0, c0, lengths, variant, ln_hh, ln_c, return_cells)


# --- fake tensors -----------------------------------------------------------------------------------------------------


@torch.library.register_fake("birnn_ext::lstm_variant")
def _(
    gates_x: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    h_mask: Tensor | None,
    zoneout_h: Tensor | None,
    zoneout_c: Tensor | None,
    zoneout_h_mean: float,
    zoneout_c_mean: float,
    ln_hh: Tensor | None,
    ln_c: Tensor | None,
    eps: float,
    save: int,
) -> tuple[Tensor, ...]:
    _check_devices(gates_x, w_hh, w_hr, h0, c0, lengths, reset, h_mask, zoneout_h, zoneout_c, ln_hh, ln_c)
    steps, batch, directions, size = gates_x.shape
    hidden, outputs = size // 4, w_hh.shape[-1]
    cells = (steps, batch, directions, hidden) if save else (0,)
    gates = gates_x.shape if save == 2 else (0,)
    norm = save == 2 and ln_hh is not None
    wide = _cell_dtype(gates_x.dtype)
    return (
        gates_x.new_empty(steps, batch, directions, outputs),
        gates_x.new_empty(directions, batch, outputs),
        gates_x.new_empty(directions, batch, hidden),
        gates_x.new_empty(cells, dtype=wide),
        gates_x.new_empty(gates),
        gates_x.new_empty(gates if norm else (0,)),
        gates_x.new_empty(gates_x.shape[:3] if norm else (0,), dtype=wide),
    )


@torch.library.register_fake("birnn_ext::lstm_variant_backward")
def _(
    w_hh: Tensor,
    w_hr: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    h_mask: Tensor | None,
    zoneout_h: Tensor | None,
    zoneout_c: Tensor | None,
    zoneout_h_mean: float,
    zoneout_c_mean: float,
    ln_hh: Tensor | None,
    ln_c: Tensor | None,
    eps: float,
    cells: Tensor,
    gates: Tensor,
    normed: Tensor,
    rstd: Tensor,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    d_cells: Tensor | None,
    state_grads: bool,
) -> tuple[Tensor, ...]:
    steps, batch, directions, size = gates.shape
    hidden, outputs = size // 4, w_hh.shape[-1]

    def empty(wanted: bool, *shape: int, like: Tensor = gates) -> Tensor:
        return like.new_empty(shape if wanted else (0,))

    return (
        empty(True, *gates.shape),
        empty(ln_hh is not None or reset is not None, *gates.shape),
        empty(state_grads, directions, batch, outputs),
        empty(state_grads, directions, batch, hidden),
        empty(w_hr is not None, steps, batch, directions, outputs),
        empty(w_hr is not None, steps, batch, directions, hidden),
        empty(ln_hh is not None, directions, batch, size, like=cells),
        empty(ln_c is not None, directions, batch, 2, hidden, like=cells),
    )


# --- autograd ---------------------------------------------------------------------------------------------------------


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.zoneout_h_mean, ctx.zoneout_c_mean, ln_hh, ln_c, ctx.eps, ctx.save = inputs
    y, _, _, *kept = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, ln_hh, ln_c, y, *kept)


def _forward_grad(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    if ctx.save != 2:
        raise RuntimeError(
            f"birnn_ext::lstm_variant was called with save={ctx.save}, so it can't be differentiated; "
            "call it with save=2"
        )
    cotangents = gradients[:4]  # of y, h_n, c_n and cells; the others are our own
    batched = any(t is not None and torch._C._functorch.is_batchedtensor(t) for t in cotangents)
    if torch.is_grad_enabled() or batched:
        return _differentiable_grad(ctx, cotangents)
    _, w_hh, w_hr, h0, c0, lengths, *masks, ln_hh, ln_c, y, cells, gates, normed, rstd = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dz, d_products, dh0, dc0, d_projected, hidden, d_ln_hh, d_ln_c = torch.ops.birnn_ext.lstm_variant_backward(
        w_hh, w_hr, c0, lengths, *masks, ctx.zoneout_h_mean, ctx.zoneout_c_mean, ln_hh, ln_c, ctx.eps,
        cells, gates, normed, rstd, *cotangents, needs[3] or needs[4],
    )  # fmt: skip
    grads: list[Tensor | None] = [None] * len(needs)
    grads[0] = dz
    with torch.autocast(dz.device.type, enabled=False):  # types are settled
        if needs[1]:
            h_mask = masks[1]
            if h_mask is not None:
                y, h0 = y * h_mask.transpose(0, 1), None if h0 is None else h0 * h_mask
            grads[1] = _weight_grad(dz if d_products.dim() == 1 else d_products, y, h0, lengths)
        if needs[2]:
            directions = range(w_hr.shape[0])
            grads[2] = torch.stack(
                [d_projected[:, :, d].flatten(0, 1).T @ hidden[:, :, d].flatten(0, 1) for d in directions]
            )
    grads[3], grads[4] = dh0 if needs[3] else None, dc0 if needs[4] else None
    grads[12] = d_ln_hh.sum(1).to(dz.dtype) if needs[12] else None
    grads[13] = d_ln_c.sum(1).to(dz.dtype) if needs[13] else None
    return tuple(grads)


def _differentiable_grad(ctx: Any, cotangents: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The same gradients through the reference, which can be differentiated again, and mapped over."""
    *tensors, ln_hh, ln_c = ctx.saved_tensors[:12]
    inputs = [*tensors, ctx.zoneout_h_mean, ctx.zoneout_c_mean, ln_hh, ln_c, ctx.eps]
    wanted = [k for k, needed in enumerate(ctx.needs_input_grad) if needed]
    used = [k for k, cotangent in enumerate(cotangents) if cotangent is not None]

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        for k, value in zip(wanted, values, strict=True):
            inputs[k] = value
        results = reference.lstm_variant(*inputs)
        return tuple(results[k] for k in used)

    grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if used:
        vjp = torch.func.vjp(run, *(inputs[k] for k in wanted))[1]
        found = vjp(tuple(cotangents[k] for k in used))
        for k, grad in zip(wanted, found, strict=True):
            grads[k] = grad
    return tuple(grads)


torch.library.register_autograd("birnn_ext::lstm_variant", _forward_grad, setup_context=_save_forward)
