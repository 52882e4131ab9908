"""Models for programs that know PyTorch, but not birnn_ext: when `LSTM` leaves nn.LSTM's own operator, and what can.

Who traces, scripts, or exports by the ways before torch.export wants a file that runs elsewhere, so there `LSTM` leaves
what nn.LSTM does. In torch.export, whose programs have our kernels, it does so within `as_nn_lstm`. docs/elsewhere.md
has all the ways.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from birnn_ext._torch_private import TracerWarning, is_tracing

_asked = False

# The checks of sizes look at the example alone, and are right for any other. PyTorch ignores the warning for its own
# modules, too.
warnings.filterwarnings("ignore", category=TracerWarning, module="birnn_ext")


@contextmanager
def as_nn_lstm() -> Iterator[None]:
    """Within it, `LSTM` computes by nn.LSTM's own operator, in the whole process.

    For programs that are to run where birnn_ext is not: ``torch.export.export`` within it leaves no operator of ours,
    and needs a fixed number of time steps as it does for nn.LSTM. `torch.jit.trace`, `torch.jit.script` and
    ``torch.onnx.export(dynamo=False)`` do without.

    Results are the same within rounding, ``lengths`` and ``output="last"`` included.

    Raises:
        NotImplementedError: at the call of an LSTM that uses what can't be said with that operator: zoneout,
            layer_norm, recurrent_dropout in training mode, reset or return_cell_states.
    """
    global _asked
    before, _asked = _asked, True
    try:
        yield
    finally:
        _asked = before


def is_recording() -> bool:
    """Tells whether an LSTM must leave nn.LSTM's operator now."""
    return _asked or is_tracing()


def beyond_nn_lstm(lstm: nn.LSTM) -> list[str]:
    """Names of the options by which an LSTM's results differ from an nn.LSTM's of the same parameters."""
    names = ["recurrent_dropout", "zoneout", "layer_norm", "learned_state"]
    return [name for name in names if getattr(lstm, name) not in (False, (0, 0))]


def check_recordable(lstm: nn.LSTM, reset: object, return_cell_states: bool) -> None:
    """Refuses what can't be said with nn.LSTM's operator. A learned state can: it is the operator's hx."""
    no = [name for name in beyond_nn_lstm(lstm) if name != "learned_state"]
    if not lstm.training and "recurrent_dropout" in no:
        no.remove("recurrent_dropout")
    no += ["reset"] if reset is not None else []
    no += ["return_cell_states"] if return_cell_states else []
    if no:
        raise NotImplementedError(
            f"LSTM: {', '.join(no)} can't be recorded: torch.jit.trace, torch.onnx.export(dynamo=False) and as_nn_lstm "
            "record nn.LSTM's own operator, which has no such thing; torch.export has birnn_ext's operators"
        )


def zero_state(lstm: nn.LSTM, x: Tensor) -> tuple[Tensor, Tensor]:
    """Makes the state that hx=None stands for, of the input's own sizes, which exporters keep dynamic."""
    rows, outputs = lstm.num_layers * (2 if lstm.bidirectional else 1), lstm.proj_size or lstm.hidden_size
    return x.new_zeros(rows, x.shape[1], outputs), x.new_zeros(rows, x.shape[1], lstm.hidden_size)


def nn_lstm_state(lstm: nn.LSTM) -> dict[str, Any]:
    """Returns an LSTM's attributes without those that an nn.LSTM lacks; recompute=True stays, for `accelerate`."""
    added = {"accelerated", "recurrent_dropout", "zoneout", "layer_norm", "learned_state"}
    added |= set() if lstm.recompute else {"recompute"}
    return {name: value for name, value in vars(lstm).items() if name not in added}


def scriptable(lstm: nn.LSTM) -> nn.LSTM:
    """Makes an nn.LSTM for torch.jit.script, which shares parameters, hooks and all else with an LSTM."""
    no = beyond_nn_lstm(lstm)
    if no:
        raise NotImplementedError(f"LSTM: torch.jit.script compiles an nn.LSTM, which has no {', '.join(no)}")
    if is_parametrized(lstm):
        raise NotImplementedError(
            "LSTM: torch.jit.script can't compile a parametrized nn.LSTM; remove_parametrizations first, or trace it"
        )
    twin = nn.LSTM.__new__(nn.LSTM)
    vars(twin).update(nn_lstm_state(lstm))
    twin._init_flat_weights()
    return twin
