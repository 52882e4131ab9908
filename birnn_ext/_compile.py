"""Lets torch.compile trace `birnn_ext.LSTM`.

Dynamo breaks the graph at any instance of nn.LSTM, unless `torch._dynamo.config.allow_rnn` is set: it would unroll
nn.LSTM step by step. Ours is a few operators whatever the number of steps, so that setting is on while Dynamo looks at
one of ours, and only then: nn.LSTM is treated as before.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from types import ModuleType

from torch import nn

_BUILDER = "torch._dynamo.variables.builder"  # decides how Dynamo represents a Python object


def _admit(cls: type[nn.Module], builder: ModuleType) -> None:
    wrap_module = builder.VariableBuilder.wrap_module

    def wrap(self, value: nn.Module):
        if not isinstance(value, cls):
            return wrap_module(self, value)
        with builder.config.patch(allow_rnn=True):
            return wrap_module(self, value)

    builder.VariableBuilder.wrap_module = wrap


class _AfterImport(MetaPathFinder):
    """Admits a class as soon as Dynamo is imported, which takes as long as importing torch, so it is not done here."""

    def __init__(self, cls: type[nn.Module]) -> None:
        self.cls = cls

    def find_spec(self, fullname, path, target=None):
        if fullname != _BUILDER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _admit(self.cls, module)

            spec.loader.exec_module = exec_module
        return spec


def let_dynamo_trace(cls: type[nn.Module]) -> None:
    """Makes torch.compile trace instances of cls, a subclass of nn.LSTM whose forward is its own."""
    if _BUILDER in sys.modules:
        _admit(cls, sys.modules[_BUILDER])
    else:
        sys.meta_path.insert(0, _AfterImport(cls))
