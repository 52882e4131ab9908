"""All that birnn_ext uses of PyTorch without a promise that it stays: names that begin with an underscore.

Tried with torch 2.10 and 2.14; where a name goes or changes its meaning, this file is the one to mend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C._functorch import TransformType
from torch.autograd import forward_ad
from torch.jit._trace import TracerWarning, is_tracing

from birnn_ext._after_import import after_import

__all__ = [
    "TracerWarning",
    "call_while_tracing",
    "carries_tangent",
    "dynamo_is_at_work",
    "functionalizes",
    "is_batched",
    "is_tracing",
    "let_dynamo_trace",
    "nn_operator",
    "script_graphs",
    "within_forward_mode",
    "within_torch_func",
]

F = TypeVar("F", bound=Callable[..., Any])


def within_torch_func() -> bool:
    """Tells whether a transform such as vmap or grad is at work. Transforms know no autograd formulas of operators."""
    return torch._C._are_functorch_transforms_active()


def functionalizes() -> bool:
    """Tells whether `torch.func.functionalize` is among the transforms at work."""
    return TransformType.Functionalize in [level.key() for level in torch._C._functorch.get_interpreter_stack()]


def is_batched(t: Tensor) -> bool:
    """Tells whether vmap maps over a tensor."""
    return torch._C._functorch.is_batchedtensor(t)


def within_forward_mode() -> bool:
    """Tells whether forward-mode automatic differentiation is at work."""
    return forward_ad._current_level >= 0


def carries_tangent(t: Tensor) -> bool:
    """Tells whether a tensor has a tangent, within forward mode."""
    return forward_ad.unpack_dual(t).tangent is not None


def dynamo_is_at_work() -> bool:
    """Tells whether torch.compile compiles this frame, or frames that it has left to Python by a graph break."""
    return torch.compiler.is_compiling() or torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None


def script_graphs(module: torch.jit.ScriptModule) -> Iterator[Any]:
    """The graphs of a TorchScript module's methods."""
    for name in module._c._method_names():
        yield module._c._get_method(name).graph


def nn_operator(name: str) -> Callable[..., Any]:
    """Returns the operator of PyTorch's module, such as "lstm" or "rnn_tanh"."""
    operator: Callable[..., Any] = getattr(torch._VF, name)
    return operator


# Dynamo breaks the graph at any instance of nn.RNNBase, unless `torch._dynamo.config.allow_rnn` is set, as it would
# unroll nn.LSTM step by step. Ours is a few operators whatever the number of steps, so the setting is on while Dynamo
# looks at one of ours, and only then: it treats nn.LSTM as before.

_BUILDER = "torch._dynamo.variables.builder"  # decides how Dynamo represents a Python object


def _admit(cls: type[nn.Module], builder: ModuleType) -> None:
    wrap_module = builder.VariableBuilder.wrap_module

    def wrap(self: Any, value: nn.Module) -> Any:
        if not isinstance(value, cls):
            return wrap_module(self, value)
        with builder.config.patch(allow_rnn=True):
            return wrap_module(self, value)

    builder.VariableBuilder.wrap_module = wrap


def let_dynamo_trace(cls: type[nn.Module]) -> None:
    """Makes torch.compile trace instances of cls, a subclass of nn.RNNBase whose forward is its own."""
    after_import(_BUILDER, partial(_admit, cls))  # importing Dynamo takes as long as importing torch


def call_while_tracing(function: F) -> F:
    """Makes torch.compile call a function while it traces, where it takes the result for a constant."""
    # torch.compiler.assume_constant_result does the same, and imports Dynamo, which takes as long as importing torch.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
