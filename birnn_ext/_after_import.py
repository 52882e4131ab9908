"""`after_import` adds something to a module of another package without importing that module.

Many programs never import it, and importing some modules takes as long as importing torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec


class _Finder(MetaPathFinder):
    """Finds the modules that someone waits for as Python does, and calls back once their loaders have run."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Callable[[ModuleType], None]]] = {}

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                for then in self.waiting.pop(fullname, []):
                    then(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # for this import alone
        return spec


_finder = _Finder()


def after_import(name: str, then: Callable[[ModuleType], None]) -> None:
    """Calls a function with a module as soon as that is imported, which may be now.

    Args:
        name: the module's full name, such as ``"torch.utils.flop_counter"``.
        then: what is called, once. The import fails if it does.
    """
    if name in sys.modules:
        then(sys.modules[name])
        return
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _finder.waiting.setdefault(name, []).append(then)
