"""Functions: one layer of an LSTM, and its recurrence alone, of both directions.

They are differentiable any number of times. What runs them is chosen by `birnn_ext.route`.
"""

from __future__ import annotations

from torch import Tensor

from birnn_ext.layer import LayerWeights, Options, Sequences, run_layer, run_recurrence
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
    y, h_n, c_n, _ = run_recurrence(route, gates_x, w_hh, (h0, c0), lengths)
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
    kinds = _KINDS if bias else _KINDS[:2]
    if len(weights) not in (len(kinds), 2 * len(kinds)):
        raise ValueError(f"lstm_layer: weights must be {len(kinds)} or {2 * len(kinds)} tensors, got {len(weights)}")
    given = LayerWeights(weights, kinds)
    y, h_n, c_n, _ = run_layer(Sequences(x, lengths), given, (h0, c0), options=Options(recompute=recompute))
    return y, h_n, c_n
