"""A layer by operators that other programs have: PyTorch's own, and those of the ONNX standard."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from birnn_ext.cell import Cell

Results = tuple[Tensor, tuple[Tensor, ...]]  # y (T, B, D, P), and the final states (D, B, .)


def nn_layer(
    cell: Cell,
    module: nn.RNNBase,
    x: Tensor,
    weights: Sequence[Sequence[Tensor]],
    states: tuple[Tensor, ...],
    lengths: Tensor | None,
) -> Results:
    """Runs a layer by PyTorch's own operator.

    With lengths, each direction runs by itself over sequences that end in the padding.

    Args:
        cell: which one.
        module: the module, whose sizes and mode the operator is told.
        x: (T, B, I).
        weights: of each direction all parameters, as PyTorch's module orders them.
        states: the initial ones, (D, B, P) and (D, B, H).
        lengths: (B,), or None for T each.
    """
    bias, training, outputs = module.bias, module.training, module.proj_size or module.hidden_size

    def run(x: Tensor, states: Sequence[Tensor], flat: list[Tensor], bidirectional: bool) -> tuple[Tensor, ...]:
        hx = states[0] if len(states) == 1 else tuple(states)
        results: tuple[Tensor, ...] = cell.nn_operator(x, hx, flat, bias, 1, 0.0, training, bidirectional, False)
        return results

    if lengths is None:
        y, *final = run(x, states, [w for of_direction in weights for w in of_direction], len(weights) == 2)
        return y.unflatten(-1, (len(weights), outputs)), tuple(final)

    step = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    beyond = step >= lengths
    in_reverse = torch.where(beyond, step, lengths - 1 - step).unsqueeze(-1)  # there and back again
    beyond = beyond.unsqueeze(-1)
    at_last = torch.where(lengths == 0, 0, lengths - 1).view(1, -1, 1).expand(1, -1, outputs)
    # A further feature of the input is 1 in the padding, where its weights hold the last c. The last h is found in y.
    holds = len(states) > 1
    hold = x.new_tensor(cell.hold).repeat_interleave(module.hidden_size).unsqueeze(1) if holds else None
    ys, finals = [], []
    for d, (w_ih, *others) in enumerate(weights):
        steps = x.gather(0, in_reverse.expand(-1, -1, x.shape[2])) if d else x
        steps = steps.masked_fill(beyond, 0)
        if hold is not None:
            steps, w_ih = torch.cat([steps, beyond.to(x.dtype)], -1), torch.cat([w_ih, hold], 1)
        first = [state[d : d + 1] for state in states]
        y, _, *held = run(steps, first, [w_ih, *others], False)
        h_n = torch.where((lengths == 0).unsqueeze(-1), first[0], y.gather(0, at_last))
        finals.append((h_n, *held))
        y = y.masked_fill(beyond, 0)
        ys.append(y.gather(0, in_reverse.expand(-1, -1, outputs)) if d else y)
    return torch.stack(ys, 2), tuple(torch.cat(each) for each in zip(*finals, strict=True))


def onnx_layer(
    cell: Cell,
    x: Tensor,
    w_ih: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    biases: Sequence[Sequence[Tensor]],
    states: Sequence[Tensor | None],
    lengths: Tensor | None,
) -> Results:
    """Runs a layer by ONNX's operator: https://onnx.ai/onnx/operators/onnx__LSTM.html, and likewise.

    This is for torch.onnx alone, as the operator has shapes, but does not run.

    Args:
        cell: which one.
        x: (T, B, I).
        w_ih: of each direction (G * H, I), where G is the number of gates.
        w_hh: of each direction (G * H, H).
        biases: those of W_ih and those of W_hh, of each direction (G * H,); empty for none.
        states: the initial ones (D, B, H), each None for zeros.
        lengths: (B,), or None for T each.
    """
    dtype = x.dtype
    used = torch.float32 if dtype == torch.bfloat16 else dtype
    hidden = w_hh[0].shape[1]

    def in_their_order(of_directions: Sequence[Tensor]) -> Tensor:
        """Stacks the directions to (D, G * H, ...), with the gates in ONNX's order."""
        gates = torch.stack(list(of_directions)).to(used).chunk(len(cell.onnx_order), 1)
        return torch.cat([gates[k] for k in cell.onnx_order], 1)

    all_w_ih, all_w_hh = in_their_order(w_ih), in_their_order(w_hh)
    b = torch.cat([in_their_order(one) for one in biases], 1) if biases else None
    steps, batch, _ = x.shape
    directions = all_w_hh.shape[0]
    first = [None if s is None else s.to(used) for s in states]
    direction = "bidirectional" if directions == 2 else "forward"
    attributes = {name: [v] * directions if isinstance(v, str) else v for name, v in cell.onnx_attributes.items()}
    y, *final = torch.onnx.ops.symbolic_multi_out(
        cell.name,
        (x.to(used), all_w_ih, all_w_hh, b, None if lengths is None else lengths.to(torch.int32), *first),
        {"hidden_size": hidden, "direction": direction, **attributes},
        dtypes=(used,) * (1 + len(first)),
        shapes=((steps, directions, batch, hidden), *((directions, batch, hidden),) * len(first)),
    )
    if lengths is not None:  # ONNX Runtime gives an empty sequence a state of 0
        empty = (lengths == 0).unsqueeze(-1)
        final = [n if s is None else torch.where(empty, s, n) for s, n in zip(states, final, strict=True)]
    return y.transpose(1, 2).to(dtype), tuple(s.to(dtype) for s in final)
