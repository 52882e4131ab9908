"""Gradients of the recurrences' operators, as autograd knows them and as torch.func's transforms do.

A first derivative comes from the backward operators; further ones, and those of batched gradients, from the reference.
The gradients of the operators of layers and stacks are in csrc, where they cost less time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from birnn_ext import reference
from birnn_ext._torch_private import is_batched
from birnn_ext.route import Way, choose_recurrence_route
from birnn_ext.without_kernels import H_CELLS, count_reference

Gradients = tuple[Tensor | None, ...]

# --- what the formulas share ------------------------------------------------------------------------------------------


@reference.without_autocast
def _weight_grad(dz: Tensor, y: Tensor, h0: Tensor | None, lengths: Tensor | None) -> Tensor:
    """Computes dW_hh (D, G * H, H), the sum over steps of dz_t h_{t-1}^T, by one matrix product per direction.

    dz (T, B, D, G * H) is 0 beyond a sequence's end, and so is y (T, B, D, H).
    """
    steps, batch, directions, _ = dz.shape
    # A step is batch rows. torch.compile takes T - 1 steps badly, and PyTorch's older vmap knows no flatten.
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


def _gradients_of_reference(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Any],
    wanted: Sequence[int],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Differentiates a recurrence through the reference, whose gradients can be differentiated and mapped over again.

    Args:
        function: the reference's function.
        inputs: its arguments.
        wanted: the places of those whose gradients are wanted.
        cotangents: the gradients of its results, None for those that nothing depends on.

    Returns:
        A gradient for each input, or None.
    """
    given = list(inputs)
    used = [k for k, cotangent in enumerate(cotangents) if cotangent is not None]

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        for k, value in zip(wanted, values, strict=True):
            given[k] = value
        results = function(*given)
        return tuple(results[k] for k in used)

    grads: list[Tensor | None] = [None] * len(given)
    if used:
        vjp = torch.func.vjp(run, *(given[k] for k in wanted))[1]
        found = vjp(tuple(cotangents[k] for k in used))
        for k, grad in zip(wanted, found, strict=True):
            grads[k] = grad
    return grads


def _run_backward(name: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Runs the backward operator of a recurrence, along a route of its own."""
    route = choose_recurrence_route(args[:-1])
    if route.way is Way.REFERENCE:
        count_reference(name, "reference_backward", route.why)
        run = getattr(reference, name)
    elif route.way is Way.FUNCTION:
        run = _FUNCTIONS[name].apply
    else:
        run = getattr(torch.ops.birnn_ext, name)
    grads: tuple[Tensor, ...] = run(*args)
    return grads


def _check_saved(name: str, save: str) -> None:
    if save != "all":
        raise RuntimeError(
            f'birnn_ext::{name} was called with save="{save}", so it can\'t be differentiated; '
            f'call it with save="all", or birnn_ext.ops.{name}, which knows when to save'
        )


# --- lstm_recurrence --------------------------------------------------------------------------------------------------


def _save_lstm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, w_hh, h0, c0, lengths, ctx.save = inputs
    y, _, _, gates, cells = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(w_hh, h0, c0, lengths, y, gates, cells)


def _lstm_grad(
    ctx: Any,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    d_gates: Tensor | None,
    d_cells: Tensor | None,
) -> Gradients:
    _check_saved("lstm_recurrence", ctx.save)
    w_hh, h0, c0, lengths, y, gates, cells = ctx.saved_tensors
    needs_w, needs_h0, needs_c0 = ctx.needs_input_grad[1:4]
    args = (w_hh, c0, lengths, gates, cells, dy, dh_n, dc_n, needs_h0 or needs_c0)
    if d_gates is None and d_cells is None:
        dz, dh0, dc0 = _run_backward("lstm_recurrence_backward", args)
    else:  # double backward
        dz, dh0, dc0 = reference.lstm_recurrence_backward(*args, d_gates, d_cells)
    d_w_hh = _weight_grad(dz, y, h0, lengths) if needs_w else None
    return dz, d_w_hh, dh0 if needs_h0 else None, dc0 if needs_c0 else None, None, None


# --- the recurrences whose state is their output ----------------------------------------------------------------------


def _save_h(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, w_hh, _, h0, lengths, ctx.save = inputs
    y, _, gates = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(w_hh, h0, lengths, y, gates)


def _h_grad(name: str) -> Callable[..., Gradients]:
    """Makes the formula of the operator of this name."""

    def grad(ctx: Any, dy: Tensor | None, dh_n: Tensor | None, d_gates: Tensor | None) -> Gradients:
        _check_saved(name, ctx.save)
        w_hh, h0, lengths, y, gates = ctx.saved_tensors
        needs_w, needs_bias, needs_h0 = ctx.needs_input_grad[1:4]
        args = (w_hh, h0, lengths, y, gates, dy, dh_n, needs_h0)
        if d_gates is None or gates.dim() != 4:  # of a plain cell they are empty, and vmap may give them a dimension
            d_gates_x, d_q, dh0 = _run_backward(f"{name}_backward", args)
        else:  # double backward
            d_gates_x, d_q, dh0 = getattr(reference, f"{name}_backward")(*args, d_gates)
        d_w_hh = d_bias_hh = None
        if needs_w or needs_bias:
            dz = d_gates_x
            if d_q.dim() == 4:  # it stands for the last gate's recurrent part
                dz = torch.cat([d_gates_x[..., : -y.shape[-1]], d_q], -1)
            d_w_hh = _weight_grad(dz, y, h0, lengths) if needs_w else None
            d_bias_hh = dz.sum((0, 1), dtype=reference.accumulate_dtype(dz.dtype)).to(dz.dtype) if needs_bias else None
        return d_gates_x, d_w_hh, d_bias_hh, dh0 if needs_h0 else None, None, None

    return grad


# --- all, as autograd and torch.func know them ------------------------------------------------------------------------

VmapResult = tuple[tuple[Tensor, ...], tuple[int | None, ...]]  # outputs, and where their samples are


def _vmap_rule(
    call: Callable[..., tuple[Tensor, ...]], weights_at: Sequence[int], lengths_at: int
) -> Callable[..., VmapResult]:
    """Makes the rule of torch.func.vmap for a recurrence's operator: samples become sequences of one larger batch.

    Every tensor has its batch of sequences in dimension 1, but for weights, which have none, and lengths, where it is
    0. Samples with weights of their own, as in an ensemble, can't share a batch: they take a call each.

    Args:
        call: the operator, or the Function that stands for it.
        weights_at: places of the weights among the operator's arguments.
        lengths_at: place of lengths.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> VmapResult:
        samples = info.batch_size
        if any(in_dims[k] is not None for k in weights_at):
            results = [
                call(*(arg if dim is None else arg.select(dim, k) for arg, dim in zip(args, in_dims, strict=True)))
                for k in range(samples)
            ]
            outputs = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
            return outputs, (0,) * len(outputs)

        batch = 0

        def fold(place: int, arg: Any, dim: int | None) -> Any:
            nonlocal batch
            if place in weights_at or not isinstance(arg, Tensor):
                return arg
            at = 0 if place == lengths_at else 1
            if arg.dim() - (dim is not None) == at:  # it was not kept, and is empty
                return arg if dim is None else arg.select(dim, 0)
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


def _differentiable(
    name: str,
    save: Callable[..., None],
    grad: Callable[..., Gradients],
    weights_at: Sequence[int],
    lengths_at: int,
) -> type[torch.autograd.Function]:
    """Tells autograd and vmap of a recurrence's operator, and makes a Function of it that torch.func's transforms know.

    Args:
        name: of the operator.
        save: keeps in ctx what grad needs, as a Function's setup_context.
        grad: computes the gradients, as a Function's backward.
        weights_at: as for `_vmap_rule`.
        lengths_at: likewise.
    """
    operator = getattr(torch.ops.birnn_ext, name)

    class Recurrence(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            outputs: tuple[Tensor, ...] = operator(*args)
            return outputs

        setup_context = staticmethod(save)
        backward = staticmethod(grad)

        @staticmethod
        def vmap(*args: Any) -> VmapResult:
            return _vmap_rule(Recurrence.apply, weights_at, lengths_at)(*args)

    # vmap uses this for the operator itself, called directly.
    torch.library.register_vmap(f"birnn_ext::{name}", _vmap_rule(operator, weights_at, lengths_at))
    torch.library.register_autograd(f"birnn_ext::{name}", grad, setup_context=save)
    return Recurrence


def _differentiable_backward(name: str, weights_at: Sequence[int], lengths_at: int) -> type[torch.autograd.Function]:
    """Does the same with a backward operator, whose gradients are those of the reference."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.state_grads = inputs
        ctx.save_for_backward(*tensors)

    def grad(ctx: Any, *cotangents: Tensor) -> Gradients:
        wanted = [k for k, needed in enumerate(ctx.needs_input_grad) if needed]
        inputs = (*ctx.saved_tensors, ctx.state_grads)
        return tuple(_gradients_of_reference(getattr(reference, name), inputs, wanted, cotangents))

    return _differentiable(name, save, grad, weights_at, lengths_at)


RECURRENCES = {
    "lstm_recurrence": _differentiable("lstm_recurrence", _save_lstm, _lstm_grad, weights_at=(1,), lengths_at=4),
    **{
        name: _differentiable(name, _save_h, _h_grad(name), weights_at=(1, 2), lengths_at=4)
        for name in (f"{cell}_recurrence" for cell in H_CELLS)
    },
}
_FUNCTIONS = {
    name: _differentiable_backward(name, weights_at=(0,), lengths_at=2)
    for name in (f"{forward}_backward" for forward in RECURRENCES)
}


# --- lstm_variant -----------------------------------------------------------------------------------------------------


def _save_variant(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.zoneout_h_mean, ctx.zoneout_c_mean, ln_hh, ln_c, ctx.eps, ctx.save = inputs
    y, _, _, *kept = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, ln_hh, ln_c, y, *kept)


@reference.without_autocast
def _projection_grad(d_projected: Tensor, hidden: Tensor) -> Tensor:
    """Computes dW_hr (D, P, H) from (T, B, D, P) and (T, B, D, H), by one matrix product per direction."""
    steps, batch, directions, _ = d_projected.shape
    dh, h = (t.reshape(steps * batch, directions, t.shape[-1]) for t in (d_projected, hidden))  # as in _weight_grad
    return torch.stack([dh[:, d].T @ h[:, d] for d in range(directions)])


def _variant_grad(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    if ctx.save != "all":
        raise RuntimeError(
            f'birnn_ext::lstm_variant was called with save="{ctx.save}", so it can\'t be differentiated; '
            'call it with save="all"'
        )
    cotangents = gradients[:4]  # of y, h_n, c_n and cells; the others are our own
    batched = any(t is not None and is_batched(t) for t in cotangents)
    if torch.is_grad_enabled() or batched:
        *tensors, ln_hh, ln_c = ctx.saved_tensors[:12]
        inputs = (*tensors, ctx.zoneout_h_mean, ctx.zoneout_c_mean, ln_hh, ln_c, ctx.eps)
        wanted = [k for k, needed in enumerate(ctx.needs_input_grad) if needed]
        return (*_gradients_of_reference(reference.lstm_variant, inputs, wanted, cotangents), None)
    _, w_hh, w_hr, h0, c0, lengths, *masks, ln_hh, ln_c, y, cells, gates, normed, rstd = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dz, d_products, dh0, dc0, d_projected, hidden, d_ln_hh, d_ln_c = torch.ops.birnn_ext.lstm_variant_backward(
        w_hh, w_hr, c0, lengths, *masks, ctx.zoneout_h_mean, ctx.zoneout_c_mean, ln_hh, ln_c, ctx.eps,
        cells, gates, normed, rstd, *cotangents, needs[3] or needs[4],
    )  # fmt: skip
    grads: list[Tensor | None] = [None] * len(needs)
    grads[0] = dz
    if needs[1]:
        h_mask = masks[1]
        if h_mask is not None:
            y, h0 = y * h_mask.transpose(0, 1), None if h0 is None else h0 * h_mask
        grads[1] = _weight_grad(dz if d_products.dim() == 1 else d_products, y, h0, lengths)
    if needs[2]:
        grads[2] = _projection_grad(d_projected, hidden)
    grads[3], grads[4] = dh0 if needs[3] else None, dc0 if needs[4] else None
    grads[12] = d_ln_hh.sum(1).to(dz.dtype) if needs[12] else None
    grads[13] = d_ln_c.sum(1).to(dz.dtype) if needs[13] else None
    return tuple(grads)


torch.library.register_autograd("birnn_ext::lstm_variant", _variant_grad, setup_context=_save_variant)
