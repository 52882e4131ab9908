"""Lets torch.compile trace `birnn_ext.LSTM`.

Dynamo breaks the graph at any instance of nn.LSTM, unless `torch._dynamo.config.allow_rnn` is set: it would unroll
nn.LSTM step by step. Ours is a few operators whatever the number of steps, so that setting is on while Dynamo looks at
one of ours, and only then: nn.LSTM is treated as before.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

from torch import nn

from birnn_ext._after_import import after_import

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
    """Makes torch.compile trace instances of cls, a subclass of nn.LSTM whose forward is its own."""
    after_import(_BUILDER, partial(_admit, cls))  # Dynamo takes as long to import as torch
