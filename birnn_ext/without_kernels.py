"""The operators where no kernel runs: fake tensors get the shapes of the results, other devices the reference."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from birnn_ext import _C, reference
from birnn_ext._info import reference_calls
from birnn_ext._torch_private import call_while_tracing
from birnn_ext.reference import accumulate_dtype

Tensors3 = tuple[Tensor, Tensor, Tensor]
Tensors5 = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


# --- fake tensors -----------------------------------------------------------------------------------------------------


def _check_devices(*tensors: Tensor | None) -> None:
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        raise ValueError(f"birnn_ext: all tensors must be on one device, got {sorted(map(str, devices))}")


@torch.library.register_fake("birnn_ext::lstm_recurrence")
def _(
    gates_x: Tensor, w_hh: Tensor, h0: Tensor | None, c0: Tensor | None, lengths: Tensor | None, save: str
) -> Tensors5:
    _check_devices(gates_x, w_hh, h0, c0, lengths)
    steps, batch, directions, _ = gates_x.shape
    hidden = w_hh.shape[-1]
    y = gates_x.new_empty(steps, batch, directions, hidden)
    state = gates_x.new_empty(directions, batch, hidden)
    gates = gates_x.new_empty(gates_x.shape if save == "all" else (0,))
    cells = gates_x.new_empty(y.shape if save != "none" else (0,), dtype=accumulate_dtype(gates_x.dtype))
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
    save: str,
) -> Tensors5:
    _check_devices(x, *weights, h0, c0, lengths)
    steps, batch, _ = x.shape
    directions, hidden = len(weights) // (4 if bias else 2), weights[1].shape[1]
    y = x.new_empty(steps, batch, directions, hidden)
    state = x.new_empty(directions, batch, hidden)
    gates = x.new_empty(steps, batch, directions, 4 * hidden) if save == "all" else x.new_empty(0)
    cells = x.new_empty(y.shape if save != "none" else (0,), dtype=accumulate_dtype(x.dtype))
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


# --- the cells whose state is their output: all have operators of the same arguments and results


H_CELLS = {"gru": 4, "rnn_tanh": 0, "rnn_relu": 0}  # how many values a step saves of a unit, beside y


def _gates(cell: str, y: Tensor, save: str) -> Tensor:
    """Makes what a forward operator keeps."""
    *sizes, hidden = y.shape
    saved = H_CELLS[cell]
    return y.new_empty((*sizes, saved * hidden) if saved and save == "all" else (0,))


def _register_fakes(cell: str) -> None:
    @torch.library.register_fake(f"birnn_ext::{cell}_recurrence")
    def _(
        gates_x: Tensor, w_hh: Tensor, bias_hh: Tensor | None, h0: Tensor | None, lengths: Tensor | None, save: str
    ) -> Tensors3:
        _check_devices(gates_x, w_hh, bias_hh, h0, lengths)
        steps, batch, directions, _ = gates_x.shape
        y = gates_x.new_empty(steps, batch, directions, w_hh.shape[-1])
        return y, y.new_empty(directions, batch, w_hh.shape[-1]), _gates(cell, y, save)

    @torch.library.register_fake(f"birnn_ext::{cell}_recurrence_backward")
    def _(
        w_hh: Tensor,
        h0: Tensor | None,
        lengths: Tensor | None,
        y: Tensor,
        gates: Tensor,
        dy: Tensor | None,
        dh_n: Tensor | None,
        state_grads: bool,
    ) -> Tensors3:
        steps, batch, directions, hidden = y.shape
        d_q = y.new_empty(y.shape if H_CELLS[cell] else (0,))
        dh0 = y.new_empty((directions, batch, hidden) if state_grads else (0,))
        return y.new_empty(steps, batch, directions, w_hh.shape[1]), d_q, dh0

    @torch.library.register_fake(f"birnn_ext::{cell}_layer")
    def _(
        x: Tensor, weights: list[Tensor], bias: bool, h0: Tensor | None, lengths: Tensor | None, save: str
    ) -> Tensors3:
        _check_devices(x, *weights, h0, lengths)
        steps, batch, _ = x.shape
        directions, hidden = len(weights) // (4 if bias else 2), weights[1].shape[1]
        y = x.new_empty(steps, batch, directions, hidden)
        return y, x.new_empty(directions, batch, hidden), _gates(cell, y, save)

    @torch.library.register_fake(f"birnn_ext::{cell}_layer_backward")
    def _(
        x: Tensor,
        weights: list[Tensor],
        bias: bool,
        h0: Tensor | None,
        lengths: Tensor | None,
        y: Tensor,
        gates: Tensor,
        dy: Tensor | None,
        dh_n: Tensor | None,
        x_grad: bool,
        weight_grads: bool,
        state_grads: bool,
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        _, batch, directions, hidden = y.shape
        dx = x.new_empty(x.shape if x_grad else (0,))
        d_weights = [w.new_empty(w.shape if weight_grads else (0,)) for w in weights]
        return dx, d_weights, x.new_empty((directions, batch, hidden) if state_grads else (0,))


for _cell in H_CELLS:
    _register_fakes(_cell)


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
    save: str,
) -> tuple[Tensor, ...]:
    _check_devices(gates_x, w_hh, w_hr, h0, c0, lengths, reset, h_mask, zoneout_h, zoneout_c, ln_hh, ln_c)
    steps, batch, directions, size = gates_x.shape
    hidden, outputs = size // 4, w_hh.shape[-1]
    cells = (steps, batch, directions, hidden) if save != "none" else (0,)
    gates = gates_x.shape if save == "all" else (0,)
    norm = save == "all" and ln_hh is not None
    wide = accumulate_dtype(gates_x.dtype)
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


# --- the reference ----------------------------------------------------------------------------------------------------

_said: set[str] = set()


@call_while_tracing  # torch.compile can't trace warnings.warn
def _warn(text: str, stacklevel: int) -> None:
    warnings.warn(text, stacklevel=stacklevel + 1)


def count_reference(name: str, counter: str, why: str, stacklevel: int = 3) -> None:
    """Counts a call of the reference in place of a kernel, and warns at the first call for a reason.

    Args:
        name: the operator in whose place it runs.
        counter: which of `reference_calls` counts it.
        why: what keeps the kernels from it, as the end of a sentence that begins with the operator's name.
        stacklevel: whose line the warning names, as in `warnings.warn`.
    """
    if why not in _said:
        _said.add(why)
        _warn(
            f"birnn_ext::{name} {why}. Using the reference implementation in plain PyTorch, which is slow.", stacklevel
        )
    reference_calls[counter] += 1


def no_kernel(device: torch.device) -> str:
    """Says why the extension has no kernels for a device.

    ROCm's devices are called "cuda", too, and no build has kernels for them.

    Raises:
        RuntimeError: another build would have kernels for the device.
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


def _fall_back_to_reference(name: str, kind: str) -> None:
    """Makes the reference's function of an operator's name serve it on devices without kernels."""

    @torch.library.impl(f"birnn_ext::{name}", "CompositeExplicitAutograd")
    def _(*args: Any) -> tuple[Tensor, ...]:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        count_reference(name, kind, no_kernel(device))
        results: tuple[Tensor, ...] = getattr(reference, name)(*args)
        return results


for _cell in ("lstm", *H_CELLS):
    _fall_back_to_reference(f"{_cell}_recurrence", "reference_forward")
    _fall_back_to_reference(f"{_cell}_recurrence_backward", "reference_backward")
