"""The route of a layer: which code runs it, decided in one place, once for each call of a layer.

`choose_route` looks at the device, the dtype, PyTorch's modes (gradients, torch.func, forward mode, export) and what is
asked, and says what it found as data. `birnn_ext.layer` follows the route and asks nothing again.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from birnn_ext import _C
from birnn_ext._torch_private import (
    call_while_tracing,
    carries_tangent,
    dynamo_is_at_work,
    functionalizes,
    within_forward_mode,
    within_torch_func,
)
from birnn_ext.without_kernels import no_kernel

BUILT_FOR_CUDA = bool(_C.build_info()["cuda"])  # a constant, as torch.compile can't trace the question


class Way(Enum):
    """What runs a layer, or its recurrence alone after an input projection."""

    LAYER = "the operator of a layer, or of a stack of layers"
    AGAIN = "the layer now, and once more in the backward pass"
    OPERATOR = "the recurrence's operator, after an input projection"
    FUNCTION = "the recurrence's operator within an autograd.Function, after an input projection"
    REFERENCE = "the recurrence in plain PyTorch, after an input projection"
    TORCH = "PyTorch's own operator"
    ONNX = "ONNX's operator"


class Route(NamedTuple):
    """Which way a layer goes, and why."""

    way: Way
    why: str  # with Way.REFERENCE the end of a sentence that begins with an operator's name
    save: str = "none"  # what the operator is to keep for a backward pass: csrc/schema.cpp


@call_while_tracing  # Dynamo would say no, where torch.onnx asks it to trace what torch.export could not
def is_writing_onnx() -> bool:
    """Tells whether torch.onnx exports a program now, in which a module must leave ONNX's operator."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def choose_route(
    x: Tensor,
    others: Sequence[Tensor | None],
    *,
    extended: bool = False,
    cells: bool = False,
    recompute: bool = False,
    projected: bool = False,
    recorded: bool = False,
) -> Route:
    """Chooses the route of a layer.

    Args:
        x: (T, B, I), the layer's input.
        others: its weights and initial states, None for those that there are not.
        extended: whether it goes beyond nn.LSTM, and so needs the operator lstm_variant.
        cells: whether the cell states of all steps are wanted.
        recompute: whether memory is to be saved by computing again in the backward pass.
        projected: whether something is to be done between the input projection and the recurrence.
        recorded: whether it must be PyTorch's own operator, for programs without birnn_ext.
    """
    if recorded:
        return Route(Way.TORCH, "PyTorch records a program that is to run without birnn_ext")
    projected = projected or extended
    if not projected and is_writing_onnx():
        return Route(Way.ONNX, "PyTorch writes an ONNX file")
    differentiated = _differentiated(x, *others)
    transformed = within_torch_func()
    if (
        not (projected or transformed)
        and _has_layer_operator(x, differentiated and recompute)
        and only_plain_pytorch((x, *others), transformed) is None
    ):
        save = ("cells" if recompute else "all") if differentiated else "none"
        return Route(Way.LAYER, "the device has an operator for the whole layer", save)
    # Within torch.func a checkpoint does not work, and forward mode stops at one before torch 2.11. torch.compile fails
    # within a checkpoint of lstm_variant, with an internal error of torch 2.14.
    if (
        recompute
        and torch.is_grad_enabled()
        and not (transformed or within_forward_mode())
        and not (extended and torch.compiler.is_compiling())
    ):
        return Route(Way.AGAIN, "recompute=True, where no operator computes the gates again by itself")
    return choose_recurrence_route((x, *others), extended=extended, cells=cells)


def _has_layer_operator(x: Tensor, recompute: bool) -> bool:
    if x.shape[-1:] == (0,):
        return False
    # On CUDA it keeps the gates, so there is another way to recompute them.
    return x.is_cpu or (x.is_cuda and BUILT_FOR_CUDA and not recompute)


def choose_recurrence_route(floating: Sequence[Tensor | None], *, extended: bool = False, cells: bool = False) -> Route:
    """Chooses the route of a recurrence that is called with its input projection.

    Args:
        floating: all tensors that a gradient may be wanted of, None for those that there are not; the first is one.
        extended: whether it is lstm_variant, rather than a recurrence without extensions.
        cells: whether the cell states of all steps are wanted.
    """
    transformed = within_torch_func()
    why = only_plain_pytorch(floating, transformed)
    if why is None and extended:
        device = next(t.device for t in floating if t is not None)
        if transformed:
            why = "has no rule for torch.func's transforms"
        elif device.type not in ("cpu", "meta") and not (device.type == "cuda" and BUILT_FOR_CUDA):
            why = no_kernel(device)
    if why is not None:
        return Route(Way.REFERENCE, why)
    if transformed:
        save = "all" if torch.is_grad_enabled() else "none"
        return Route(Way.FUNCTION, "torch.func's transforms know no autograd formulas of operators", save)
    save = "all" if _differentiated(*floating) else "cells" if cells else "none"
    return Route(Way.OPERATOR, "the device has kernels, or the dispatcher's fallback serves it", save)


def _differentiated(*tensors: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in tensors)


def only_plain_pytorch(tensors: Sequence[Tensor | None], transformed: bool) -> str | None:
    """Says what is being done that only plain PyTorch can follow; None if nothing is."""
    # PyTorch would drop tangents without a word.
    if within_forward_mode() and (transformed or any(t is not None and carries_tangent(t) for t in tensors)):
        return "has no forward-mode derivative"
    if not transformed:
        return None
    # torch.compile can't trace a Function's vmap rule (an internal error of torch 2.14), not even where a graph break
    # has left the outer frames to Python.
    if dynamo_is_at_work():
        return "has no rule for torch.func's transforms under torch.compile"
    if functionalizes():
        return "has no rule for torch.func.functionalize"
    return None
