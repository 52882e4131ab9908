"""Models for programs that know PyTorch, but not birnn_ext: when a module leaves PyTorch's own operator, and what can.

Who traces, scripts, or exports by the ways before torch.export wants a file that runs elsewhere, so there `LSTM` leaves
what nn.LSTM does, and so on. In torch.export, whose programs have our kernels, they do so within
`as_nn_lstm`. docs/elsewhere.md has all the ways.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from birnn_ext._torch_private import TracerWarning, is_tracing
from birnn_ext.base import Base

_asked = False

# The checks of sizes look at the example alone, and are right for any other. PyTorch ignores the warning for its own
# modules, too.
warnings.filterwarnings("ignore", category=TracerWarning, module="birnn_ext")


@contextmanager
def as_nn_lstm() -> Iterator[None]:
    """Within it, `LSTM` computes by nn.LSTM's own operator, `GRU` by nn.GRU's and `RNN` by nn.RNN's, everywhere.

    For programs that are to run where birnn_ext is not: ``torch.export.export`` within it leaves no operator of ours,
    and needs a fixed number of time steps as it does for nn.LSTM. `torch.jit.trace`, `torch.jit.script` and
    ``torch.onnx.export(dynamo=False)`` do without.

    Results are the same within rounding, ``lengths`` and ``output="last"`` included.

    `as_nn_gru` and `as_nn_rnn` are the same function.

    Raises:
        NotImplementedError: at the call of a module that uses what can't be said with that operator: zoneout,
            layer_norm, recurrent_dropout in training mode, reset or return_cell_states.
    """
    global _asked
    before, _asked = _asked, True
    try:
        yield
    finally:
        _asked = before


as_nn_gru = as_nn_rnn = as_nn_lstm


def is_recording() -> bool:
    """Tells whether a module must leave PyTorch's own operator now."""
    return _asked or is_tracing()


def beyond_torch(module: Base) -> list[str]:
    """Names of the options by which a module's results differ from those of PyTorch's with the same parameters."""
    options = module.CELL.options.items()
    return [name for name, default in options if name != "recompute" and getattr(module, name) != default]


class NotInOnnx(NotImplementedError):
    """A module does what ONNX's operator can't express."""


def check_onnx(module: Base, reset: object, return_cell_states: bool) -> None:
    """Refuses what can't be said with ONNX's operator."""
    no = _beyond_operators(module, reset, return_cell_states) + (["proj_size"] if module.proj_size else [])
    if no:
        raise NotInOnnx(f"{module.CELL.name}: ONNX's {module.CELL.name} operator has no {', '.join(no)}")


def _beyond_operators(module: Base, reset: object, return_cell_states: bool) -> list[str]:
    """Names what a call asks for that other operators have not. A learned state they have: it is their hx."""
    no = [name for name in beyond_torch(module) if name != "learned_state"]
    if not module.training and "recurrent_dropout" in no:
        no.remove("recurrent_dropout")
    no += ["reset"] if reset is not None else []
    return no + (["return_cell_states"] if return_cell_states else [])


def check_recordable(module: Base, reset: object, return_cell_states: bool) -> None:
    """Refuses what can't be said with PyTorch's operator."""
    no = _beyond_operators(module, reset, return_cell_states)
    if no:
        name = module.CELL.name
        raise NotImplementedError(
            f"{name}: {', '.join(no)} can't be recorded: torch.jit.trace, torch.onnx.export(dynamo=False) and "
            f"as_nn_{name.lower()} record nn.{name}'s own operator, which has no such thing; torch.export has "
            "birnn_ext's operators"
        )


def zero_states(module: Base, x: Tensor) -> tuple[Tensor, ...]:
    """Makes the states that hx=None stands for, of the input's own sizes, which exporters keep dynamic."""
    rows, sizes = module.num_layers * (2 if module.bidirectional else 1), [module.proj_size or module.hidden_size]
    sizes += [module.hidden_size] * (len(module.CELL.states) - 1)
    return tuple(x.new_zeros(rows, x.shape[1], size) for size in sizes)


def attributes_for_torch(module: Base) -> dict[str, Any]:
    """Returns a module's attributes without those that PyTorch's lacks; recompute=True stays, for `accelerate`."""
    added = {"accelerated", *module.CELL.options}
    if module.recompute:
        added.remove("recompute")
    return {name: value for name, value in vars(module).items() if name not in added}


def scriptable(module: Base) -> nn.RNNBase:
    """Makes a module of PyTorch's for torch.jit.script, which shares parameters, hooks and all else with ours."""
    cell, no = module.CELL, beyond_torch(module)
    name = cell.name
    if no:
        raise NotImplementedError(f"{name}: torch.jit.script compiles an nn.{name}, which has no {', '.join(no)}")
    if is_parametrized(module):
        raise NotImplementedError(
            f"{name}: torch.jit.script can't compile a parametrized nn.{name}; remove_parametrizations first, or trace "
            "it"
        )
    twin = cell.theirs.__new__(cell.theirs)
    vars(twin).update(attributes_for_torch(module))
    twin._init_flat_weights()
    return twin
