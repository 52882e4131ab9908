"""Functions: one layer of an LSTM, a GRU or a plain RNN, and its recurrence alone, of both directions.

They are differentiable any number of times. What runs them is chosen by `birnn_ext.route`.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from birnn_ext.cell import GRU_CELL, LSTM_CELL, RNN_RELU_CELL, RNN_TANH_CELL, Cell
from birnn_ext.layer import LayerWeights, Options, Results, Sequences, State, run_layer, run_recurrence
from birnn_ext.route import choose_recurrence_route

_KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def lstm_recurrence(
    gates_x: Tensor,
    w_hh: Tensor,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs an LSTM layer's time steps, given its input projection.

    For D = 2, direction 1 runs the same recurrence backwards in time. Gate order is i, f, g, o, as in `torch.nn.LSTM`;
    the equations are in csrc/core/cells/lstm.h. Differentiable any number of times in all floating-point arguments, in
    forward mode too.

    Args:
        gates_x: (T, B, D, 4H), W_ih x_t + b_ih + b_hh; T >= 1, D is 1 or 2; float64, float32, float16 or bfloat16.
        w_hh: (D, 4H, H), of gates_x's dtype and device, as all floating-point arguments.
        h0: (D, B, H), the initial outputs; None stands for zeros.
        c0: (D, B, H), the initial cell states; None stands for zeros.
        lengths: (B,) int64 on the same device, in any order: sequence b is its first lengths[b] steps, 0 to T.

    Returns:
        y (T, B, D, H), the output of every step, 0 beyond a sequence's end; h_n and c_n (D, B, H), the states after
        each sequence's own last step.

    Raises:
        ValueError: a shape or device does not fit, or a length is out of range (on CUDA: a device-side assertion).
        TypeError: a dtype does not fit.
    """
    route = choose_recurrence_route((gates_x, w_hh, h0, c0))
    y, (h_n, c_n) = run_recurrence(LSTM_CELL, route, gates_x, (w_hh,), (h0, c0), lengths)
    return y, h_n, c_n


def lstm_layer(
    x: Tensor,
    weights: list[Tensor],
    bias: bool,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    lengths: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs an LSTM layer with its input projection: one operator on the CPU and CUDA, elsewhere a product before it.

    Differentiable as `lstm_recurrence`. On the CPU the kernels compute the input projection step by step, so that it
    is not rounded and never visits memory, and the gradients of weights and input round by round. On CUDA it is a
    matrix product for each direction.

    Args:
        x: (T, B, I), T >= 1; float64, float32, float16 or bfloat16.
        weights: of each direction w_ih (4H, I), w_hh (4H, H) and, with bias, bias_ih (4H,) and bias_hh (4H,), as
            `torch.nn.LSTM` orders them; of x's dtype and device, as h0 and c0 are.
        bias: whether there are biases.
        h0: (D, B, H), the initial outputs; None stands for zeros.
        c0: (D, B, H), the initial cell states; None stands for zeros.
        lengths: (B,) int64 as for `lstm_recurrence`.
        recompute: keep only the cell states for the backward pass (beside x and y), a fifth, and compute the gates
            anew there; where the layer is not one operator, keep x alone and run the layer again. Within torch.func's
            transforms, which allow neither, this has no effect.

    Returns:
        y (T, B, D, H), h_n and c_n (D, B, H).

    Raises:
        ValueError, TypeError: as `lstm_recurrence`.
    """
    y, (h_n, c_n), _ = _run_layer(LSTM_CELL, x, weights, bias, (h0, c0), lengths, recompute)
    return y, h_n, c_n


def gru_recurrence(
    gates_x: Tensor,
    w_hh: Tensor,
    bias_hh: Tensor | None = None,
    h0: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs a GRU layer's time steps, given its input projection.

    The gates' order is r, z, n, and the equations are those of `torch.nn.GRU`. Otherwise it is as `lstm_recurrence`.

    Args:
        gates_x: (T, B, D, 3H), W_ih x_t + b_ih; T >= 1, D is 1 or 2; float64, float32, float16 or bfloat16.
        w_hh: (D, 3H, H), of gates_x's dtype and device, as all floating-point arguments.
        bias_hh: (D, 3H), added to W_hh h; None for none. That of n is within the product with r.
        h0: (D, B, H), the initial outputs; None stands for zeros.
        lengths: (B,) int64 on the same device, in any order: sequence b is its first lengths[b] steps, 0 to T.

    Returns:
        y (T, B, D, H), the output of every step, 0 beyond a sequence's end; h_n (D, B, H), the state after each
        sequence's own last step.

    Raises:
        ValueError, TypeError: as `lstm_recurrence`.
    """
    route = choose_recurrence_route((gates_x, w_hh, bias_hh, h0))
    y, (h_n,) = run_recurrence(GRU_CELL, route, gates_x, (w_hh, bias_hh), (h0,), lengths)
    return y, h_n


def gru_layer(
    x: Tensor,
    weights: list[Tensor],
    bias: bool,
    h0: Tensor | None = None,
    lengths: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """Runs a GRU layer with its input projection, as `lstm_layer` does an LSTM's.

    Args:
        x: (T, B, I), T >= 1; float64, float32, float16 or bfloat16.
        weights: of each direction w_ih (3H, I), w_hh (3H, H) and, with bias, bias_ih (3H,) and bias_hh (3H,), as
            `torch.nn.GRU` orders them; of x's dtype and device, as h0 is.
        bias: whether there are biases.
        h0: (D, B, H), the initial outputs; None stands for zeros.
        lengths: (B,) int64 as for `gru_recurrence`.
        recompute: as for `lstm_layer`. Where the layer is one operator, x and y are all that is kept.

    Returns:
        y (T, B, D, H) and h_n (D, B, H).

    Raises:
        ValueError, TypeError: as `gru_recurrence`.
    """
    y, (h_n,), _ = _run_layer(GRU_CELL, x, weights, bias, (h0,), lengths, recompute)
    return y, h_n


def rnn_recurrence(
    gates_x: Tensor,
    w_hh: Tensor,
    bias_hh: Tensor | None = None,
    h0: Tensor | None = None,
    lengths: Tensor | None = None,
    nonlinearity: Literal["tanh", "relu"] = "tanh",
) -> tuple[Tensor, Tensor]:
    """Runs a plain RNN layer's time steps, given its input projection.

    The equation is that of `torch.nn.RNN`. Otherwise it is as `lstm_recurrence`.

    Args:
        gates_x: (T, B, D, H), W_ih x_t + b_ih; T >= 1, D is 1 or 2; float64, float32, float16 or bfloat16.
        w_hh: (D, H, H), of gates_x's dtype and device, as all floating-point arguments.
        bias_hh: (D, H), added to W_hh h; None for none.
        h0: (D, B, H), the initial outputs; None stands for zeros.
        lengths: (B,) int64 on the same device, in any order: sequence b is its first lengths[b] steps, 0 to T.
        nonlinearity: "tanh" or "relu".

    Returns:
        y (T, B, D, H) and h_n (D, B, H), as `gru_recurrence`.

    Raises:
        ValueError, TypeError: as `lstm_recurrence`; a nonlinearity is neither of the two.
    """
    cell = _plain("rnn_recurrence", nonlinearity)
    route = choose_recurrence_route((gates_x, w_hh, bias_hh, h0))
    y, (h_n,) = run_recurrence(cell, route, gates_x, (w_hh, bias_hh), (h0,), lengths)
    return y, h_n


def rnn_layer(
    x: Tensor,
    weights: list[Tensor],
    bias: bool,
    h0: Tensor | None = None,
    lengths: Tensor | None = None,
    recompute: bool = False,
    nonlinearity: Literal["tanh", "relu"] = "tanh",
) -> tuple[Tensor, Tensor]:
    """Runs a plain RNN layer with its input projection, as `lstm_layer` does an LSTM's.

    Args:
        x: (T, B, I), T >= 1; float64, float32, float16 or bfloat16.
        weights: of each direction w_ih (H, I), w_hh (H, H) and, with bias, bias_ih (H,) and bias_hh (H,), as
            `torch.nn.RNN` orders them; of x's dtype and device, as h0 is.
        bias: whether there are biases.
        h0: (D, B, H), the initial outputs; None stands for zeros.
        lengths: (B,) int64 as for `rnn_recurrence`.
        recompute: as for `lstm_layer`. Where the layer is one operator, x and y are all that is kept anyway.
        nonlinearity: "tanh" or "relu".

    Returns:
        y (T, B, D, H) and h_n (D, B, H).

    Raises:
        ValueError, TypeError: as `rnn_recurrence`.
    """
    cell = _plain("rnn_layer", nonlinearity)
    y, (h_n,), _ = _run_layer(cell, x, weights, bias, (h0,), lengths, recompute)
    return y, h_n


def _plain(name: str, nonlinearity: str) -> Cell:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f'{name}: nonlinearity must be "tanh" or "relu", got {nonlinearity!r}')
    return RNN_RELU_CELL if nonlinearity == "relu" else RNN_TANH_CELL


def _run_layer(
    cell: Cell, x: Tensor, weights: list[Tensor], bias: bool, state: State, lengths: Tensor | None, recompute: bool
) -> Results:
    kinds = _KINDS if bias else _KINDS[:2]
    if len(weights) not in (len(kinds), 2 * len(kinds)):
        name = f"{cell.name.lower()}_layer"
        raise ValueError(f"{name}: weights must be {len(kinds)} or {2 * len(kinds)} tensors, got {len(weights)}")
    given = LayerWeights(weights, kinds)
    return run_layer(cell, Sequences(x, lengths), given, state, options=Options(recompute=recompute))
