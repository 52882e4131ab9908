"""`accelerate` turns the recurrent modules of PyTorch in any model into ours; `restore` undoes it."""

from __future__ import annotations

import sys
import types
import warnings
from abc import ABCMeta
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from inspect import getattr_static
from typing import Any

import torch
from torch import nn

from birnn_ext._torch_private import script_graphs
from birnn_ext.base import drop_flat_weights
from birnn_ext.cell import CELLS
from birnn_ext.modules import GRU, LSTM, RNN
from birnn_ext.portable import attributes_for_torch, beyond_torch
from birnn_ext.recurrent import Recurrent

OURS: dict[type[nn.RNNBase], type[Recurrent]] = {nn.LSTM: LSTM, nn.GRU: GRU, nn.RNN: RNN}


@dataclass
class Acceleration:
    """A report of what `accelerate` did; printing it gives a line for each module.

    Attributes:
        replaced: names of the modules that are ours now, as in ``model.named_modules()``; "" is the model itself.
        left: names of the recurrent modules that are as they were, and why.
    """

    replaced: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"replaced {name or '(the model itself)'}" for name in self.replaced]
        lines += [f"left {name or '(the model itself)'}: {why}" for name, why in self.left.items()]
        return "\n".join(lines) or "found no nn.LSTM, nn.GRU or nn.RNN"


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def accelerate(model: nn.Module) -> Acceleration:
    """Turns every `torch.nn.LSTM`, `torch.nn.GRU` and `torch.nn.RNN` in a model into ours, in place.

    The modules stay the same objects, with the same Parameters, buffers, hooks and state_dict keys: only their class
    changes. So modules that are shared or that other code refers to, optimizers and checkpoints are not disturbed.

    A module of a class derived from nn.LSTM gets a class of the same name that is derived from that one and from
    `birnn_ext.LSTM`. Its own code goes on as before, and what it asks of ``super()`` comes from us. It is left as it is
    if we can't tell that this comes to the same (here for the LSTM; it is the same for the others):

    - its forward, if it has one, does not call ``super().forward`` (``nn.LSTM.forward(self, ...)`` would not reach us),
    - its forward, or what that calls of its class and its package, uses inner workings of nn.LSTM, such as
      ``_flat_weights``, ``_VF`` or ``check_forward_args``; reading and setting the weights themselves is no obstacle,
    - its class replaces a method that nn.LSTM's forward calls,
    - it has an attribute of a name that `birnn_ext.LSTM` uses for something else, such as ``layer_norm``.

    Classes that PyTorch makes at run time (parametrizations, fully_shard) are made anew, on top of ours.

    Args:
        model: any module, which may itself be one of PyTorch's three.

    Returns:
        Which modules were replaced, and which were left and why; printing it gives a line for each. A module that the
        model holds under several names is named once. Those in TorchScript and in exported graphs are named as left.

    Raises:
        TypeError: model is not a module.
    """
    _check_model(model)
    report = Acceleration()
    for name, module in model.named_modules():
        if isinstance(module, Recurrent):
            continue
        known = isinstance(module, tuple(OURS))
        why = _why_left(module) if known else _why_program_is_left(module)
        if why:
            report.left[name] = why
        elif known:
            module.__class__ = _ours(type(module))
            drop_flat_weights(module)
            module.accelerated = True
            report.replaced.append(name)
    return report


def restore(model: nn.Module) -> list[str]:
    """Turns every `birnn_ext.LSTM`, `GRU` and `RNN` in a model into PyTorch's module of that name, in place.

    What `accelerate` has turned gets the class back that it had, and a model that was written with ours becomes one for
    tools that know PyTorch's by its type, such as quantization. As with `accelerate` the modules stay the same objects.
    A model that calls them with what PyTorch's have no argument for, ``lengths`` or ``output="last"``, no longer runs;
    `BiRNN` does.

    Args:
        model: any module, which may itself be one of ours.

    Returns:
        The names of the modules that were turned. A warning names those that can't be: they have an option that
        PyTorch's lacks, such as zoneout, or their class is neither ours nor made by `accelerate`, PyTorch's
        parametrizations or fully_shard.

    Raises:
        TypeError: model is not a module.
    """
    _check_model(model)
    names = []
    for name, module in model.named_modules():
        if not isinstance(module, Recurrent):
            continue
        theirs, no = _theirs(type(module)), beyond_torch(module)
        if theirs is None or no:
            why = (
                f"nn.{module.CELL.name} has no {', '.join(no)}"
                if no
                else f"its class {type(module).__name__} is not one that accelerate has made; if something has changed "
                "it since, undo that first"
            )
            warnings.warn(f"birnn_ext.restore: {name or 'the model itself'} is left, as {why}", stacklevel=2)
        else:
            module.__dict__ = attributes_for_torch(module)
            module.__class__ = theirs
            module._init_flat_weights()
            names.append(name)
    return names


# --- classes ----------------------------------------------------------------------------------------------------------


def _reduce_ex(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickles and copies a module by the user's class, as no import finds the class that `_ours` made of it."""
    made = next(cls for cls in type(module).__mro__ if _is_made(cls))
    theirs: Any = made.__bases__[0]
    function, arguments, *rest = theirs.__reduce_ex__(module, protocol)
    return _rebuild, (function, *(theirs if a is made else a for a in arguments)), *rest


def _rebuild(function: Callable[..., nn.Module], *arguments: Any) -> nn.Module:
    module = function(*arguments)
    module.__class__ = _ours(type(module))
    return module


def _is_made(cls: type) -> bool:
    """Tells whether `_ours` has made this class, of a user's class that is its first base."""
    return vars(cls).get("__reduce_ex__") is _reduce_ex


def _ours(cls: type) -> Any:  # it returns a type; mypy does not see that the class of a module may change
    """Returns the class that instances of a class get when they are accelerated."""
    if cls in OURS:
        return OURS[cls]
    if _is_pytorchs(cls):
        return _with_bases(cls, _ours)
    derived: list[type] = cls.__subclasses__()
    for known in derived:
        if _is_made(known):
            return known
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls)(cls.__name__, (cls, OURS[_torchs(cls)]), {**names, "__reduce_ex__": _reduce_ex})


def _torchs(cls: type) -> type[nn.RNNBase]:
    """Returns the class of PyTorch's that a class is, or is derived from."""
    return next(theirs for theirs in OURS if issubclass(cls, theirs))


def _theirs(cls: type) -> Any:
    """Returns the class that instances of a class had before they were accelerated; None if that can't be told."""
    if cls in OURS.values():
        return _torchs(cls)
    if _is_made(cls):
        return cls.__bases__[0]
    return _with_bases(cls, _theirs) if _is_pytorchs(cls) else None


def _is_pytorchs(cls: type) -> bool:
    """Tells whether PyTorch has derived this class from a module's at run time, as parametrizations do."""
    return cls.__module__.startswith("torch.")


def _with_bases(cls: type, convert: Callable[[type], Any]) -> type | None:
    """Makes a class like cls whose bases that are recurrent modules are converted; None if one can't be converted."""
    bases = tuple(convert(base) if issubclass(base, tuple(OURS)) else base for base in cls.__bases__)
    if None in bases:
        return None
    of_the_class = ("__dict__", "__weakref__")
    return type(cls)(cls.__name__, bases, {name: v for name, v in vars(cls).items() if name not in of_the_class})


# --- what is left -----------------------------------------------------------------------------------------------------

# These are the inner workings of PyTorch's modules: what their forward calls, and where it finds the weights. A
# subclass may do what it likes with the rest, which is the same in ours.
_INNER = {name for cls in (nn.RNNBase, *OURS) for name in vars(cls) if not name.startswith("__")} | {
    "_VF", "_all_weights", "_flat_weight_refs", "_flat_weights", "_flat_weights_names",
}  # fmt: skip
_INNER -= {"forward", "reset_parameters", "extra_repr", "flatten_parameters"}
_NAMES = {  # names that we give a meaning
    theirs: {"accelerated", *dir(ours)} - {*dir(theirs), "_flat_weights"} for theirs, ours in OURS.items()
}


def _why_left(module: nn.RNNBase) -> str | None:
    torchs = _torchs(type(module))
    if "forward" in vars(module):
        return "its forward has been replaced, by a hook of another library perhaps"
    for name in sorted(_NAMES[torchs]):
        if name == "recompute" and vars(module).get(name) is True:
            continue  # `restore` leaves it so; no result depends on it
        if hasattr(module, name):
            return f"it has an attribute {name}, a name that birnn_ext.{torchs.__name__} uses for something else"
    mro = type(module).__mro__
    for cls in mro[: mro.index(torchs)]:
        why = None if _is_pytorchs(cls) else _why_class_is_left(cls, type(module))
        if why:
            return f"its class {cls.__name__} {why}"
    return None


def _why_class_is_left(cls: type, of: type) -> str | None:
    """Says why a class keeps modules of the class `of`, whose bases include it, from being accelerated; else None."""
    if type(cls) not in (type, ABCMeta) or "__init_subclass__" in vars(cls):
        return "has a metaclass or an __init_subclass__, which may not want another class"
    home = sys.modules.get(cls.__module__)
    if (
        home is not None
        and "<locals>" not in cls.__qualname__
        and not hasattr(home, cls.__qualname__.partition(".")[0])
    ):
        return "was made at run time, by another library perhaps"
    inner = f"one of nn.{_torchs(of).__name__}'s inner workings"
    for name in sorted(_INNER & vars(cls).keys()):
        return f"has {name}, {inner}, of its own"
    forward = vars(cls).get("forward")
    if forward is None:
        return None
    names = set(_names(forward, of))
    if not {"super", "forward"} <= names:
        return "has a forward that does not call super().forward"
    for name in sorted(_INNER & names):
        return f"has a forward that uses {name}, {inner}"
    return None


def _names(forward: object, cls: type) -> Iterator[str]:
    """Yields all names and strings in a method's code, and in the code of what it names in its class and package."""
    todo, seen = [forward], set()
    while todo:
        function = todo.pop()
        if isinstance(function, property):
            todo += [function.fget, function.fset]
        function = getattr(function, "__func__", function)  # a staticmethod or a classmethod holds it
        if not isinstance(function, types.FunctionType) or function in seen:
            continue
        seen.add(function)
        for cell in function.__closure__ or ():  # a decorator keeps what it wraps there
            with suppress(ValueError):  # the cell is empty
                todo.append(cell.cell_contents)
        codes = [function.__code__]
        while codes:
            code = codes.pop()
            codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
            names = {*code.co_names, *(constant for constant in code.co_consts if isinstance(constant, str))}
            yield from names
            for name in names:
                for found in (getattr_static(cls, name, None), function.__globals__.get(name)):
                    package = str(getattr(found, "__module__", None)).partition(".")[0]
                    if package == cls.__module__.partition(".")[0] or isinstance(found, property):
                        todo.append(found)


def _why_program_is_left(module: nn.Module) -> str | None:
    """Says why a module can't be changed whose forward is a program with PyTorch's operator; else None."""
    if isinstance(module, torch.jit.ScriptModule):
        graphs = list(script_graphs(module))
        for cell in CELLS:
            if any(graph.findAllNodes(f"aten::{cell.operator}") for graph in graphs):
                return (
                    f"it is TorchScript, which can't be changed, and has nn.{cell.name}'s operator: "
                    "torch.export of the accelerated Python model keeps ours"
                )
    elif isinstance(module, torch.fx.GraphModule):
        operators = [getattr(torch.ops.aten, cell.operator) for cell in CELLS]
        if any(getattr(node.target, "overloadpacket", None) in operators for node in module.graph.nodes):
            return "it is an exported graph, which can't be changed: accelerate the model before it is exported"
    return None
