"""A layer by operators that other programs have: nn.LSTM's, and the LSTM of the ONNX standard."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from birnn_ext._torch_private import nn_lstm_operator

Tensors3 = tuple[Tensor, Tensor, Tensor]


def nn_lstm_layer(
    lstm: nn.LSTM, x: Tensor, weights: Sequence[Sequence[Tensor]], h0: Tensor, c0: Tensor, lengths: Tensor | None
) -> Tensors3:
    """Runs a layer by nn.LSTM's operator.

    With lengths, each direction runs by itself over sequences that end in the padding.

    Args:
        lstm: the module, whose sizes and mode the operator is told.
        x: (T, B, I).
        weights: of each direction all parameters, as nn.LSTM orders them.
        h0: (D, B, P).
        c0: (D, B, H).
        lengths: (B,), or None for T each.

    Returns:
        y (T, B, D, P), h_n (D, B, P) and c_n (D, B, H).
    """
    bias, training, hidden, outputs = lstm.bias, lstm.training, lstm.hidden_size, lstm.proj_size or lstm.hidden_size
    if lengths is None:
        flat = [w for of_direction in weights for w in of_direction]
        bidirectional = len(weights) == 2
        y, h_n, c_n = nn_lstm_operator(x, (h0, c0), flat, bias, 1, 0.0, training, bidirectional, False)
        return y.unflatten(-1, (len(weights), outputs)), h_n, c_n

    step = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    beyond = step >= lengths
    in_reverse = torch.where(beyond, step, lengths - 1 - step).unsqueeze(-1)  # there and back again
    beyond = beyond.unsqueeze(-1)
    at_last = torch.where(lengths == 0, 0, lengths - 1).view(1, -1, 1).expand(1, -1, outputs)
    # A further feature of the input is 1 in the padding. There its weights shut the input gate and open the forget gate
    # for any input, as sigmoid is exactly 0 and 1 so far out: the cell state stays what it is.
    hold = x.new_tensor([-1e4, 1e4, 0, 0]).repeat_interleave(hidden).unsqueeze(1)
    ys, h_ns, c_ns = [], [], []
    for d, (w_ih, *others) in enumerate(weights):
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


def onnx_layer(
    x: Tensor,
    w_ih: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    biases: Sequence[Sequence[Tensor]],
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
) -> Tensors3:
    """Runs a layer by ONNX's LSTM operator: https://onnx.ai/onnx/operators/onnx__LSTM.html.

    This is for torch.onnx alone, as the operator has shapes, but does not run.

    Args:
        x: (T, B, I).
        w_ih: of each direction (4H, I).
        w_hh: of each direction (4H, H).
        biases: those of W_ih and those of W_hh, of each direction (4H,); empty for none.
        h0: (D, B, H), or None for zeros.
        c0: likewise.
        lengths: (B,), or None for T each.

    Returns:
        y (T, B, D, H), h_n and c_n (D, B, H).
    """
    dtype = x.dtype
    used = torch.float32 if dtype == torch.bfloat16 else dtype
    hidden = w_hh[0].shape[1]

    def in_their_order(of_directions: Sequence[Tensor]) -> Tensor:
        """Stacks the directions to (D, 4H, ...), with the gates in ONNX's order: i, o, f, c."""
        w = torch.stack(list(of_directions)).to(used)
        return torch.cat([w[:, :hidden], w[:, 3 * hidden :], w[:, hidden : 3 * hidden]], 1)

    all_w_ih, all_w_hh = in_their_order(w_ih), in_their_order(w_hh)
    b = torch.cat([in_their_order(one) for one in biases], 1) if biases else None
    steps, batch, _ = x.shape
    directions = all_w_hh.shape[0]
    states = [None if s is None else s.to(used) for s in (h0, c0)]
    y, h_n, c_n = torch.onnx.ops.symbolic_multi_out(
        "LSTM",
        (x.to(used), all_w_ih, all_w_hh, b, None if lengths is None else lengths.to(torch.int32), *states),
        {"hidden_size": hidden, "direction": "bidirectional" if directions == 2 else "forward"},
        dtypes=(used,) * 3,
        shapes=((steps, directions, batch, hidden), *((directions, batch, hidden),) * 2),
    )
    if lengths is not None and h0 is not None and c0 is not None:  # ONNX Runtime gives an empty sequence a state of 0
        empty = (lengths == 0).unsqueeze(-1)
        h_n, c_n = torch.where(empty, h0, h_n), torch.where(empty, c0, c_n)
    return y.transpose(1, 2).to(dtype), h_n.to(dtype), c_n.to(dtype)
