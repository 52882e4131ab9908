"""The recurrences of the LSTM, the GRU and the plain RNN in plain, differentiable PyTorch.

It is written independently of the kernels: tests compare them with it, devices that have no kernel run it, and double
backward differentiates it. Shapes: T steps, B sequences, D directions, H hidden units. The arguments are those of the
operators (csrc/schema.cpp). Values are computed in float32, or float64 for float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Turns autocast off: the types are settled here, even where autograd calls within the user's autocast."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        if not torch.amp.is_autocast_available(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tensors of a dtype are summed, and in which the kernels keep their cell states."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _active(lengths: Tensor | None, t: int) -> Tensor | None:
    """Returns the mask (B, 1) of the sequences that have a step t; None stands for all."""
    return None if lengths is None else (lengths > t).unsqueeze(-1)


def _where(mask: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return a if mask is None else torch.where(mask, a, b)


def _before(states: Tensor, first: Tensor, lengths: Tensor | None, t: int, d: int) -> Tensor:
    """Returns the state (B, H) before direction d's step t, of the states after all steps (T, B, D, H)."""
    if d == 0:
        return states[t - 1, :, d] if t > 0 else first
    if t == states.shape[0] - 1:
        return first
    return _where(_active(lengths, t + 1), states[t + 1, :, d], first)


@without_autocast
def lstm_recurrence(
    gates_x: Tensor, w_hh: Tensor, h0: Tensor | None, c0: Tensor | None, lengths: Tensor | None, save: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes `birnn_ext.ops.lstm_recurrence`; returns (y, h_n, c_n, gates, cells), the last two as save says."""
    steps, batch, directions, size = gates_x.shape
    hidden = size // 4
    dtype, acc = gates_x.dtype, accumulate_dtype(gates_x.dtype)
    zeros = gates_x.new_zeros(batch, hidden, dtype=acc)
    per_direction = []
    for d in range(directions):
        h = zeros if h0 is None else h0[d].to(acc)
        c = zeros if c0 is None else c0[d].to(acc)
        w = w_hh[d].to(acc)
        ys, gates, cells = [], [], []
        times = range(steps) if d == 0 else range(steps - 1, -1, -1)
        for t in times:
            mask = _active(lengths, t)
            i, f, g, o = (gates_x[t, :, d].to(acc) + h @ w.T).chunk(4, -1)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            c_t = f * c + i * g
            h_t = o * c_t.tanh()
            c, h = _where(mask, c_t, c), _where(mask, h_t, h)
            ys.append(_where(mask, h_t, zeros))
            four = torch.cat([i, f, g, o], -1)
            gates.append(_where(mask, four, torch.zeros_like(four)))
            cells.append(_where(mask, c_t, zeros))
        if d == 1:
            ys, gates, cells = ys[::-1], gates[::-1], cells[::-1]
        per_direction.append((torch.stack(ys), torch.stack(gates), torch.stack(cells), h, c))
    y, all_gates, all_cells = (torch.stack(part, 2) for part in list(zip(*per_direction, strict=True))[:3])
    h_n, c_n = (torch.stack(part) for part in list(zip(*per_direction, strict=True))[3:])
    if save != "all":
        all_gates = gates_x.new_empty(0)
    if save == "none":
        all_cells = gates_x.new_empty(0, dtype=acc)
    return y.to(dtype), h_n.to(dtype), c_n.to(dtype), all_gates.to(dtype), all_cells


@without_autocast
def lstm_recurrence_backward(
    w_hh: Tensor,
    c0: Tensor | None,
    lengths: Tensor | None,
    gates: Tensor,
    cells: Tensor,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    state_grads: bool,
    d_gates: Tensor | None = None,
    d_cells: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the operator lstm_recurrence_backward; returns (d_gates_x, dh0, dc0).

    d_gates (T, B, D, 4H) and d_cells (T, B, D, H): gradients that reach the saved gates and cells directly, as happens
    in double backward; None for none.
    """
    steps, batch, directions, size = gates.shape
    hidden = size // 4
    dtype, acc = gates.dtype, cells.dtype
    zeros = cells.new_zeros(batch, hidden)
    per_direction = []
    for d in range(directions):
        w = w_hh[d].to(acc)
        c_first = zeros if c0 is None else c0[d].to(acc)
        # dh and dc are gradients of the state after the step at hand. A sequence without that step passes them on.
        dh = zeros if dh_n is None else dh_n[d].to(acc)
        dc = zeros if dc_n is None else dc_n[d].to(acc)
        dzs: list[Tensor] = []
        times = range(steps - 1, -1, -1) if d == 0 else range(steps)
        for t in times:
            mask = _active(lengths, t)
            i, f, g, o = gates[t, :, d].to(acc).chunk(4, -1)
            c_prev = _before(cells, c_first, lengths, t, d)
            tanh_c = cells[t, :, d].tanh()
            dh_t = dh if dy is None else dh + dy[t, :, d].to(acc)
            do = dh_t * tanh_c
            dc_t = dc + dh_t * o * (1 - tanh_c * tanh_c)
            if d_cells is not None:
                dc_t = dc_t + d_cells[t, :, d]
            di, df, dg = dc_t * g, dc_t * c_prev, dc_t * i
            if d_gates is not None:
                more = d_gates[t, :, d].to(acc).chunk(4, -1)
                di, df, dg, do = di + more[0], df + more[1], dg + more[2], do + more[3]
            dz = torch.cat([di * i * (1 - i), df * f * (1 - f), dg * (1 - g * g), do * o * (1 - o)], -1)
            dz = _where(mask, dz, torch.zeros_like(dz))
            dh, dc = _where(mask, dz @ w, dh), _where(mask, dc_t * f, dc)
            dzs.append(dz)
        per_direction.append((torch.stack(dzs[::-1] if d == 0 else dzs), dh, dc))
    dz_all, dh0, dc0 = (list(part) for part in zip(*per_direction, strict=True))
    d_gates_x = torch.stack(dz_all, 2).to(dtype)
    if not state_grads:
        return d_gates_x, gates.new_empty(0), gates.new_empty(0)
    return d_gates_x, torch.stack(dh0).to(dtype), torch.stack(dc0).to(dtype)


@without_autocast
def gru_recurrence(
    gates_x: Tensor,
    w_hh: Tensor,
    bias_hh: Tensor | None,
    h0: Tensor | None,
    lengths: Tensor | None,
    save: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the operator gru_recurrence; returns (y, h_n, gates), the gates if save is "all"."""
    steps, batch, directions, size = gates_x.shape
    hidden = size // 3
    dtype, acc = gates_x.dtype, accumulate_dtype(gates_x.dtype)
    zeros = gates_x.new_zeros(batch, hidden, dtype=acc)
    per_direction = []
    for d in range(directions):
        h = zeros if h0 is None else h0[d].to(acc)
        w = w_hh[d].to(acc)
        states, gates = [], []
        for t in range(steps) if d == 0 else range(steps - 1, -1, -1):
            mask = _active(lengths, t)
            of_r, of_z, of_n = gates_x[t, :, d].to(acc).chunk(3, -1)
            products = h @ w.T if bias_hh is None else h @ w.T + bias_hh[d].to(acc)
            r, z, q = products.chunk(3, -1)
            r, z = (of_r + r).sigmoid(), (of_z + z).sigmoid()
            n = (of_n + r * q).tanh()
            h_t = (1 - z) * n + z * h
            h = _where(mask, h_t, h)
            states.append(_where(mask, h_t, zeros))
            four = torch.cat([r, z, n, q], -1)
            gates.append(_where(mask, four, torch.zeros_like(four)))
        if d == 1:
            states, gates = states[::-1], gates[::-1]
        per_direction.append((torch.stack(states), torch.stack(gates), h))
    all_states, all_gates, h_n = (
        torch.stack(part, dim) for part, dim in zip(zip(*per_direction, strict=True), (2, 2, 0), strict=True)
    )
    if save != "all":
        all_gates = gates_x.new_empty(0)
    return all_states.to(dtype), h_n.to(dtype), all_gates.to(dtype)


@without_autocast
def gru_recurrence_backward(
    w_hh: Tensor,
    h0: Tensor | None,
    lengths: Tensor | None,
    y: Tensor,
    gates: Tensor,
    dy: Tensor | None,
    dh_n: Tensor | None,
    state_grads: bool,
    d_gates: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the operator gru_recurrence_backward; returns (d_gates_x, d_q, dh0).

    d_gates (T, B, D, 4H) is as for `lstm_recurrence_backward`.
    """
    steps, batch, directions, hidden = y.shape
    dtype, acc = y.dtype, accumulate_dtype(y.dtype)
    states = y.to(acc)
    zeros = states.new_zeros(batch, hidden)
    per_direction = []
    for d in range(directions):
        w = w_hh[d].to(acc)
        h_first = zeros if h0 is None else h0[d].to(acc)
        dh = zeros if dh_n is None else dh_n[d].to(acc)
        dzs: list[Tensor] = []
        dqs: list[Tensor] = []
        for t in range(steps - 1, -1, -1) if d == 0 else range(steps):
            mask = _active(lengths, t)
            r, z, n, q = gates[t, :, d].to(acc).chunk(4, -1)
            dh_t = dh if dy is None else dh + dy[t, :, d].to(acc)
            dz = dh_t * (_before(states, h_first, lengths, t, d) - n)
            dn = dh_t * (1 - z)
            more = None if d_gates is None else d_gates[t, :, d].to(acc).chunk(4, -1)
            if more is not None:
                dz, dn = dz + more[1], dn + more[2]
            dn = dn * (1 - n * n)
            dr, dq = dn * q, dn * r
            if more is not None:
                dr, dq = dr + more[0], dq + more[3]
            dr, dz = dr * r * (1 - r), dz * z * (1 - z)
            dr, dz, dn, dq = (_where(mask, grad, zeros) for grad in (dr, dz, dn, dq))
            dh = _where(mask, dh_t * z + torch.cat([dr, dz, dq], -1) @ w, dh)
            dzs.append(torch.cat([dr, dz, dn], -1))
            dqs.append(dq)
        if d == 0:
            dzs, dqs = dzs[::-1], dqs[::-1]
        per_direction.append((torch.stack(dzs), torch.stack(dqs), dh))
    d_gates_x, d_q, dh0 = (
        torch.stack(part, dim).to(dtype) for part, dim in zip(zip(*per_direction, strict=True), (2, 2, 0), strict=True)
    )
    return d_gates_x, d_q, dh0 if state_grads else y.new_empty(0)


@without_autocast
def _rnn_recurrence(
    function: Callable[[Tensor], Tensor],
    gates_x: Tensor,
    w_hh: Tensor,
    bias_hh: Tensor | None,
    h0: Tensor | None,
    lengths: Tensor | None,
    save: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the operator of a plain recurrence; returns (y, h_n, gates), gates being empty."""
    steps, batch, directions, hidden = gates_x.shape
    dtype, acc = gates_x.dtype, accumulate_dtype(gates_x.dtype)
    zeros = gates_x.new_zeros(batch, hidden, dtype=acc)
    states, h_ns = [], []
    for d in range(directions):
        h = zeros if h0 is None else h0[d].to(acc)
        w = w_hh[d].to(acc)
        of_direction = []
        for t in range(steps) if d == 0 else range(steps - 1, -1, -1):
            mask = _active(lengths, t)
            z = gates_x[t, :, d].to(acc) + h @ w.T
            h_t = function(z if bias_hh is None else z + bias_hh[d].to(acc))
            h = _where(mask, h_t, h)
            of_direction.append(_where(mask, h_t, zeros))
        states.append(torch.stack(of_direction if d == 0 else of_direction[::-1]))
        h_ns.append(h)
    all_states, h_n = torch.stack(states, 2), torch.stack(h_ns)
    return all_states.to(dtype), h_n.to(dtype), gates_x.new_empty(0)


@without_autocast
def _rnn_recurrence_backward(
    through: Callable[[Tensor, Tensor], Tensor],
    w_hh: Tensor,
    h0: Tensor | None,
    lengths: Tensor | None,
    y: Tensor,
    gates: Tensor,
    dy: Tensor | None,
    dh_n: Tensor | None,
    state_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the operator of its gradients; returns (d_gates_x, d_q, dh0), d_q being empty.

    through(dh, h) takes the gradient of h, the function's value, to that of its argument.
    """
    steps, batch, directions, hidden = y.shape
    dtype, acc = y.dtype, accumulate_dtype(y.dtype)
    states = y.to(acc)
    zeros = states.new_zeros(batch, hidden)
    dzs, dhs = [], []
    for d in range(directions):
        dh = zeros if dh_n is None else dh_n[d].to(acc)
        of_direction = []
        for t in range(steps - 1, -1, -1) if d == 0 else range(steps):
            mask = _active(lengths, t)
            dh_t = dh if dy is None else dh + dy[t, :, d].to(acc)
            dz = _where(mask, through(dh_t, states[t, :, d]), zeros)
            dh = _where(mask, dz @ w_hh[d].to(acc), dh)
            of_direction.append(dz)
        dzs.append(torch.stack(of_direction[::-1] if d == 0 else of_direction))
        dhs.append(dh)
    d_gates_x, dh0 = torch.stack(dzs, 2).to(dtype), torch.stack(dhs).to(dtype)
    return d_gates_x, y.new_empty(0), dh0 if state_grads else y.new_empty(0)


rnn_tanh_recurrence = functools.partial(_rnn_recurrence, torch.tanh)
rnn_tanh_recurrence_backward = functools.partial(_rnn_recurrence_backward, lambda dh, h: dh * (1 - h * h))
rnn_relu_recurrence = functools.partial(_rnn_recurrence, torch.relu)
rnn_relu_recurrence_backward = functools.partial(_rnn_recurrence_backward, lambda dh, h: dh.masked_fill(h <= 0, 0))


@without_autocast
def lstm_variant(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes `birnn_ext.variants.lstm_variant`; returns (y, h_n, c_n, cells)."""
    steps, batch, directions, size = gates_x.shape
    hidden, outputs = size // 4, w_hh.shape[-1]
    dtype, acc = gates_x.dtype, accumulate_dtype(gates_x.dtype)
    no_h, no_c = (gates_x.new_zeros(batch, n, dtype=acc) for n in (outputs, hidden))

    def kept(mask: Tensor | None, mean: float, t: int, d: int) -> Tensor | float:
        return mean if mask is None else mask[t, :, d].to(acc)

    per_direction = []
    for d in range(directions):
        h = no_h if h0 is None else h0[d].to(acc)
        c = no_c if c0 is None else c0[d].to(acc)
        ys, cells = [], []
        for t in range(steps) if d == 0 else range(steps - 1, -1, -1):
            begins = t + d  # the step at which a new sequence begins, if this one comes to it without a state
            if reset is not None and begins < steps:
                active = _active(lengths, begins)
                clear = reset[begins].unsqueeze(-1) if active is None else reset[begins].unsqueeze(-1) & active
                h, c = torch.where(clear, no_h, h), torch.where(clear, no_c, c)
            products = (h if h_mask is None else h * h_mask[d].to(acc)) @ w_hh[d].to(acc).T
            if ln_hh is not None:
                products = F.layer_norm(products, (size,), eps=eps) * ln_hh[d].to(acc)
            i, f, g, o = (gates_x[t, :, d].to(acc) + products).chunk(4, -1)
            new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            shown = new_c
            if ln_c is not None:
                shown = F.layer_norm(new_c, (hidden,), ln_c[d, 0].to(acc), ln_c[d, 1].to(acc), eps)
            new_h = o.sigmoid() * shown.tanh()
            if w_hr is not None:
                new_h = new_h @ w_hr[d].to(acc).T
            z_h, z_c = kept(zoneout_h, zoneout_h_mean, t, d), kept(zoneout_c, zoneout_c_mean, t, d)
            new_h, new_c = z_h * h + (1 - z_h) * new_h, z_c * c + (1 - z_c) * new_c
            mask = _active(lengths, t)
            h, c = _where(mask, new_h, h), _where(mask, new_c, c)
            ys.append(_where(mask, new_h, no_h))
            cells.append(_where(mask, new_c, no_c))
        if d == 1:
            ys, cells = ys[::-1], cells[::-1]
        per_direction.append((torch.stack(ys), torch.stack(cells), h, c))
    y, all_cells, h_n, c_n = (
        torch.stack(part, dim) for part, dim in zip(zip(*per_direction, strict=True), (2, 2, 0, 0), strict=True)
    )
    return y.to(dtype), h_n.to(dtype), c_n.to(dtype), all_cells
