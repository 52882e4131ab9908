"""birnn_ext registers itself with other packages as soon as both are imported, in any order. No call is needed.

Each integration adds entries for our own operators and modules. It imports no package that the program does not import.

- ``torch.utils.flop_counter.FlopCounterMode`` counts our operators (`birnn_ext.integrations.flops`).
- thop, ptflops, calflops and DeepSpeed's profiler look up a module's rule by its type; `birnn_ext.LSTM` gets nn.LSTM's,
  `birnn_ext.GRU` nn.GRU's, `birnn_ext.RNN` nn.RNN's.
- Opacus gets per-sample gradients of our modules (`birnn_ext.integrations.opacus`).

For another tool that looks up modules by their type in a table, add these lines:

    import birnn_ext, torch
    table[birnn_ext.LSTM] = table[torch.nn.LSTM]
    table[birnn_ext.GRU] = table[torch.nn.GRU]
    table[birnn_ext.RNN] = table[torch.nn.RNN]
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

from birnn_ext._after_import import after_import
from birnn_ext.acceleration import OURS

RULES_BY_TYPE = {
    "thop.profile": "register_hooks",
    "ptflops.pytorch_ops": "MODULES_MAPPING",
    "calflops.pytorch_ops": "MODULE_HOOK_MAPPING",
    "deepspeed.profiling.flops_profiler.profiler": "MODULE_HOOK_MAPPING",
}


def _share_rule(module: ModuleType) -> None:
    rules = getattr(module, RULES_BY_TYPE[module.__name__])
    for theirs, ours in OURS.items():
        rules.setdefault(ours, rules[theirs])


def _call(name: str, function: str) -> Callable[[ModuleType], None]:
    """Returns a call of a function in one of our modules, which imports that module only then."""
    return lambda module: getattr(import_module(f"{__name__}.{name}"), function)(module)


def _when_imported(name: str, register: Callable[[ModuleType], None]) -> None:
    """Registers after the import of a package, which must not fail because of us if the package has changed."""

    def then(module: ModuleType) -> None:
        try:
            register(module)
        except Exception as error:
            warnings.warn(
                f"birnn_ext.integrations: {name} of this version does not know birnn_ext's modules ({error!r}); "
                "birnn_ext.restore gives it PyTorch's",
                stacklevel=2,
            )

    after_import(name, then)


for name in RULES_BY_TYPE:
    _when_imported(name, _share_rule)
_when_imported("torch.utils.flop_counter", _call("flops", "register"))
_when_imported("opacus.grad_sample.grad_sample_module", _call("opacus", "register"))
_when_imported("opacus.validators.module_validator", _call("opacus", "register_validator"))
