"""Counts floating-point operations of birnn_ext's operators, for ``torch.utils.flop_counter.FlopCounterMode``.

As in that counter, a product of (m, k) and (k, n) counts 2 m n k, and nothing else counts. The products are those of
the cells' equations and of their derivatives, over all T steps. Lengths are values, not shapes, so padding counts, too.
"""

from __future__ import annotations

from math import prod
from types import ModuleType
from typing import Any

import torch

from birnn_ext.without_kernels import H_CELLS

Shape = tuple[int, ...]


def recurrence(gates_x: Shape, w_hh: Shape, *_: Any, **__: Any) -> int:
    """Counts ``lstm_recurrence`` and those of other cells: W_hh h in each step."""
    steps, batch = gates_x[:2]
    return 2 * steps * batch * prod(w_hh)


def recurrence_backward(w_hh: Shape, *rest: Any, out_shape: Any = None) -> int:
    """Counts their backward operators: W_hh^T dz in each step, for the first one only if h0 gets a gradient.

    PyTorch itself multiplies for the weights' gradients, and counts that.
    """
    steps, batch, *_ = map(int, out_shape[0])
    state_grads: bool = rest[-1]
    return 2 * (steps - 1 + state_grads) * batch * prod(w_hh)


def layer(x: Shape, weights: list[Shape], *_: Any, **__: Any) -> int:
    """Counts ``lstm_layer`` and those of other cells: W_ih x and W_hh h."""
    steps, batch = x[:2]
    return 2 * steps * batch * sum(prod(w) for w in weights if len(w) == 2)


def lstm_layer_backward(
    x: Shape, weights: list[Shape], bias: bool, h0: Any, c0: Any, lengths: Any, y: Shape, gates: Shape, *rest: Any,
    out_shape: Any = None,
) -> int:  # fmt: skip
    """Counts ``lstm_layer_backward``."""
    return _layer_backward(x, weights, bias, gates, *rest[-3:])


def h_layer_backward(
    x: Shape, weights: list[Shape], bias: bool, h0: Any, lengths: Any, y: Shape, gates: Shape, *rest: Any,
    out_shape: Any = None,
) -> int:  # fmt: skip
    """Counts ``gru_layer_backward``."""
    return _layer_backward(x, weights, bias, gates, *rest[-3:])


def plain_layer_backward(
    x: Shape, weights: list[Shape], bias: bool, h0: Any, lengths: Any, y: Shape, *rest: Any, out_shape: Any = None
) -> int:
    """Counts that of a plain cell, which computes nothing again."""
    return _layer_backward(x, weights, bias, y, *rest[-3:])


def _layer_backward(
    x: Shape, weights: list[Shape], bias: bool, gates: Shape, x_grad: bool, weight_grads: bool, state_grads: bool
) -> int:
    """Counts the gradients that are wanted, and forward products if gates are recomputed."""
    steps, batch = x[:2]
    stride = 4 if bias else 2
    w_ih, w_hh = (sum(map(prod, weights[k::stride])) for k in (0, 1))
    recomputed = len(gates) == 1
    of_w_ih = steps * (x_grad + weight_grads + recomputed)
    of_w_hh = steps * (1 + weight_grads + recomputed) - 1 + state_grads
    return 2 * batch * (of_w_ih * w_ih + of_w_hh * w_hh)


def variant(gates_x: Shape, w_hh: Shape, w_hr: Shape | None, *_: Any, **__: Any) -> int:
    """Counts ``lstm_variant``: W_hh h and, with a projection, W_hr (o tanh(c))."""
    steps, batch = gates_x[:2]
    return 2 * steps * batch * (prod(w_hh) + (prod(w_hr) if w_hr else 0))


def variant_backward(w_hh: Shape, w_hr: Shape | None, *rest: Any, out_shape: Any = None) -> int:
    """Counts ``lstm_variant_backward``: the transposed products. PyTorch counts the weights' gradients, as above."""
    steps, batch, *_ = map(int, out_shape[0])
    state_grads: bool = rest[-1]
    return 2 * batch * ((steps - 1 + state_grads) * prod(w_hh) + (steps * prod(w_hr) if w_hr else 0))


def register(flop_counter: ModuleType) -> None:
    """Adds these formulas to PyTorch's module ``torch.utils.flop_counter``."""
    for name, formula in {
        "lstm_recurrence": recurrence,
        "lstm_recurrence_backward": recurrence_backward,
        "lstm_layer": layer,
        "lstm_layer_backward": lstm_layer_backward,
        "lstm_variant": variant,
        "lstm_variant_backward": variant_backward,
        **{f"{cell}_recurrence": recurrence for cell in H_CELLS},
        **{f"{cell}_recurrence_backward": recurrence_backward for cell in H_CELLS},
        **{f"{cell}_layer": layer for cell in H_CELLS},
        **{
            f"{cell}_layer_backward": h_layer_backward if saved else plain_layer_backward
            for cell, saved in H_CELLS.items()
        },
    }.items():
        flop_counter.register_flop_formula(getattr(torch.ops.birnn_ext, name))(formula)
