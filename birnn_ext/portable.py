"""Models for programs that know PyTorch, but not birnn_ext: `LSTM` as nn.LSTM's own operator.

Who traces, scripts, or exports by the ways before torch.export wants a file that runs elsewhere, so in these `LSTM`
leaves what nn.LSTM does; in torch.export, whose programs have our kernels, it does so within `as_nn_lstm`.
docs/elsewhere.md has all the ways.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._VF import lstm as nn_lstm_operator
from torch.fx import Proxy
from torch.jit._trace import TracerWarning, is_tracing
from torch.nn.utils.parametrize import is_parametrized

if TYPE_CHECKING:
    from birnn_ext.modules import LSTM

_asked = False

# The checks of sizes are for the example alone, and right for any other. torch does so for its own modules, too.
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
    """Whether an LSTM has to do with nn.LSTM's operator now."""
    return _asked or is_tracing()


def beyond_nn_lstm(lstm: LSTM) -> list[str]:
    """Names of the options by which an LSTM's results differ from an nn.LSTM's of the same parameters."""
    names = ["recurrent_dropout", "zoneout", "layer_norm", "learned_state"]
    return [name for name in names if getattr(lstm, name) not in (False, (0, 0))]


def check_recordable(lstm: LSTM, reset: object, return_cell_states: bool) -> None:
    """Refuses what can't be said with nn.LSTM's operator. A learned state can be, by its hx."""
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


def zero_state(lstm: LSTM, x: Tensor) -> tuple[Tensor, Tensor]:
    """The state that hx=None stands for. From the input's own sizes, which exporters keep dynamic, not a layer's."""
    rows, outputs = lstm.num_layers * (2 if lstm.bidirectional else 1), lstm.proj_size or lstm.hidden_size
    return x.new_zeros(rows, x.shape[1], outputs), x.new_zeros(rows, x.shape[1], lstm.hidden_size)


def lstm_layer(
    lstm: LSTM,
    x: Tensor,
    weights: list[Tensor],
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`birnn_ext.ops.lstm_layer` by nn.LSTM's operator, with weight_hr (P, H) behind each direction's weights if P.

    With lengths, each direction runs by itself over sequences that end in the padding.
    """
    bias, training, hidden, outputs = lstm.bias, lstm.training, lstm.hidden_size, lstm.proj_size or lstm.hidden_size
    stride = 2 + 2 * bias + bool(lstm.proj_size)
    directions = len(weights) // stride
    if lengths is None:
        y, h_n, c_n = nn_lstm_operator(x, (h0, c0), weights, bias, 1, 0.0, training, directions == 2, False)
        return y.unflatten(-1, (directions, outputs)), h_n, c_n

    step = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    beyond = step >= lengths
    in_reverse = torch.where(beyond, step, lengths - 1 - step).unsqueeze(-1)  # there and back again
    beyond = beyond.unsqueeze(-1)
    at_last = torch.where(lengths == 0, 0, lengths - 1).view(1, -1, 1).expand(1, -1, outputs)
    # A further feature of the input is 1 in the padding. There its weights shut the input gate and open the forget gate
    # for any input, as sigmoid is exactly 0 and 1 so far out: the cell state stays what it is.
    hold = x.new_tensor([-1e4, 1e4, 0, 0]).repeat_interleave(hidden).unsqueeze(1)
    ys, h_ns, c_ns = [], [], []
    for d in range(directions):
        w_ih, *others = weights[d * stride : (d + 1) * stride]
        steps = x.gather(0, in_reverse.expand(-1, -1, x.shape[2])) if d else x
        steps = torch.cat([steps.masked_fill(beyond, 0), beyond.to(x.dtype)], -1)
        state = (h0[d : d + 1], c0[d : d + 1])
        y, _, c_n = nn_lstm_operator(
            steps, state, [torch.cat([w_ih, hold], 1), *others], bias, 1, 0.0, training, False, False
        )
        h_ns.append(torch.where((lengths == 0).unsqueeze(-1), state[0], y.gather(0, at_last)))
        c_ns.append(c_n)
        y = y.masked_fill(beyond, 0)
        ys.append(y.gather(0, in_reverse.expand(-1, -1, outputs)) if d else y)
    return torch.stack(ys, 2), torch.cat(h_ns), torch.cat(c_ns)


def fx_tracer(*arguments: Any) -> Any:
    """The torch.fx.Tracer that has put a Proxy in a tensor's place, if one has."""
    for one in arguments:
        for value in one if isinstance(one, (tuple, list)) else (one,):
            if isinstance(value, Proxy):
                return value.tracer
    return None


def as_leaf(tracer: Any, lstm: LSTM, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """A call of a module in torch.fx's graph, which is what torch.fx makes of torch's own modules, as nn.LSTM."""
    path = tracer.path_of_module(lstm)
    if not path:
        raise NotImplementedError(
            "LSTM: torch.fx can't trace into an LSTM, only a module that contains it, where it is a leaf as nn.LSTM is"
        )
    given = {name: one for name, one in keywords.items() if all(one is not default for default in (None, "all", False))}
    return tracer.create_proxy("call_module", path, args, given)


def nn_lstm_state(lstm: LSTM) -> dict[str, Any]:
    """An LSTM's attributes but for those that an nn.LSTM does not have; recompute=True stays, for `accelerate`."""
    added = {"accelerated", "recurrent_dropout", "zoneout", "layer_norm", "learned_state"}
    added |= set() if lstm.recompute else {"recompute"}
    return {name: value for name, value in vars(lstm).items() if name not in added}


def scriptable(lstm: LSTM) -> nn.LSTM:
    """An nn.LSTM for torch.jit.script, which shares parameters, hooks and all else with an LSTM."""
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
