"""The extended LSTM: a projection of h, dropout and zoneout within the recurrence, layer norm, and resets.

The operators `torch.ops.birnn_ext.lstm_variant` and `.lstm_variant_backward` are compiled for CPU and CUDA;
csrc/core/variant.h has the equations and names their papers.
"""

from __future__ import annotations

from torch import Tensor

from birnn_ext.cell import LSTM_CELL
from birnn_ext.layer import EPS, Options, Sequences, Variant, Weights, run_layer, run_variant
from birnn_ext.route import choose_recurrence_route

__all__ = ["EPS", "Variant", "Weights", "lstm_variant", "lstm_variant_layer"]


def lstm_variant(
    gates_x: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    lengths: Tensor | None = None,
    variant: Variant = Variant(),  # noqa: B008, it is immutable
    ln_hh: Tensor | None = None,
    ln_c: Tensor | None = None,
    return_cells: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Runs an LSTM layer's time steps, given its input projection, with a projection of h and `Variant`'s features.

    Differentiable any number of times in gates_x, w_hh, w_hr, h0, c0, ln_hh and ln_c.

    Args:
        gates_x: (T, B, D, 4H), T >= 1, D is 1 or 2; float64, float32, float16 or bfloat16. All floating-point arguments
            are of its dtype, and all arguments on its device.
        w_hh: (D, 4H, P); P is H without a projection.
        w_hr: (D, P, H), the projection (Sak et al., arXiv:1402.1128), h_t = W_hr (o tanh(c_t)); None for none.
        h0: (D, B, P), the initial outputs; None stands for zeros.
        c0: (D, B, H), the initial cell states; None stands for zeros.
        lengths: (B,) int64, in any order: sequence b is its first lengths[b] steps, 0 to T.
        variant: masks for dropout (Gal & Ghahramani, arXiv:1512.05287), zoneout (Krueger et al., arXiv:1606.01305) and
            resets. A reset at step t clears the state before step t, and the reverse direction's after it.
        ln_hh: (D, 4H): with it W_hh h is normalised (Ba et al., arXiv:1607.06450), then multiplied by it.
        ln_c: (D, 2, H): with it c, on its way to the output, is normalised, then multiplied by ln_c[:, 0], and
            ln_c[:, 1] is added.
        return_cells: whether all cell states are wanted.

    Returns:
        y (T, B, D, P), 0 beyond a sequence's end; h_n (D, B, P) and c_n (D, B, H); and c of all steps (T, B, D, H),
        float32 or float64 and 0 beyond ends, or None.

    Raises:
        ValueError: a shape or device does not fit, or a length is out of range (on CUDA: a device-side assertion).
        TypeError: a dtype does not fit.
    """
    floating = (gates_x, w_hh, w_hr, h0, c0, ln_hh, ln_c)
    route = choose_recurrence_route(floating, extended=True, cells=return_cells)
    y, (h_n, c_n), cells = run_variant(
        route, gates_x, w_hh, w_hr, (h0, c0), lengths, variant, ln_hh, ln_c, return_cells
    )
    return y, h_n, c_n, cells


def lstm_variant_layer(
    x: Tensor,
    weights: Weights,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    lengths: Tensor | None = None,
    variant: Variant = Variant(),  # noqa: B008, it is immutable
    return_cells: bool = False,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Runs an LSTM layer with its input projection, a matrix product before `lstm_variant`.

    Args:
        x: (T, B, I), T >= 1.
        weights: of x's dtype and device.
        h0: as for `lstm_variant`.
        c0: likewise.
        lengths: likewise.
        variant: likewise.
        return_cells: likewise.
        recompute: keep x, weights and masks alone for the backward pass, and run the layer again there. Within
            torch.func's transforms and torch.compile this has no effect.

    Returns:
        y (T, B, D, P), h_n (D, B, P), c_n (D, B, H) and cells (T, B, D, H) or None, as `lstm_variant`.

    Raises:
        ValueError, TypeError: as `lstm_variant`.
    """
    options = Options(cells=return_cells, recompute=recompute)
    sequences = Sequences(x, lengths, variant.reset)
    y, (h_n, c_n), cells = run_layer(LSTM_CELL, sequences, weights, (h0, c0), variant, options)
    return y, h_n, c_n, cells
