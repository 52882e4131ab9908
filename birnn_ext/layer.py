"""One layer: `run_layer` runs it along its route, and the types say what it is given.

The modules call it for each of their layers. The functions of `birnn_ext.ops` and `birnn_ext.variants` call it, too.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from birnn_ext import reference
from birnn_ext.cell import Cell
from birnn_ext.other_operators import nn_layer, onnx_layer
from birnn_ext.route import Route, Way, choose_route
from birnn_ext.without_kernels import count_reference

EPS = 1e-5  # added to the variances of layer norm, as nn.LayerNorm does

_BIASES = ("bias_ih", "bias_hh")

State = tuple[Tensor | None, ...]  # h0 (D, B, P) and, of an LSTM, c0 (D, B, H); None stands for zeros
FinalState = tuple[Tensor, ...]  # likewise, after each sequence's last step
Results = tuple[Tensor, FinalState, Tensor | None]  # y, the final states, and the cell states where they are wanted


# --- what a layer is given --------------------------------------------------------------------------------------------


class Sequences(NamedTuple):
    """A batch of sequences: a layer's input, and where in it the sequences end and begin."""

    x: Tensor  # (T, B, I)
    lengths: Tensor | None = None  # (B,) int64: sequence b is its first lengths[b] steps; None stands for T each
    reset: Tensor | None = None  # (T, B) bool: step t begins a new sequence; an LSTM's operator gets it in `Variant`

    def without_padding(self) -> Tensor:
        """Returns x, with zeros beyond the ends: what lies there must not reach the weights' gradients."""
        if self.lengths is None:
            return self.x
        beyond = torch.arange(self.x.shape[0], device=self.x.device).unsqueeze(1) >= self.lengths
        return self.x.masked_fill(beyond.unsqueeze(-1), 0)

    def last_step(self) -> Sequences:
        """Returns sequences of one step each, their last, and of none where they have none."""
        if self.lengths is None:
            return Sequences(self.x[-1:])
        batch = torch.arange(self.x.shape[1], device=self.x.device)
        x = self.x[(self.lengths - 1).clamp(min=0), batch].unsqueeze(0)
        return Sequences(x, self.lengths.clamp(max=1))


class LayerWeights(NamedTuple):
    """A layer's parameters, as its module holds them and the operator of a layer takes them."""

    tensors: list[Tensor]  # those of direction 0, then those of direction 1, each in PyTorch's order
    kinds: tuple[str, ...]  # of one direction: "weight_ih" and so on, as PyTorch names them

    def each(self, kind: str) -> list[Tensor]:
        """Returns the parameters of one kind, of each direction; none if the layer has no such parameter."""
        return self.tensors[self.kinds.index(kind) :: len(self.kinds)] if kind in self.kinds else []

    def by_direction(self) -> list[list[Tensor]]:
        """Returns the parameters of each direction."""
        stride = len(self.kinds)
        return [self.tensors[k : k + stride] for k in range(0, len(self.tensors), stride)]

    def direction(self, d: int) -> LayerWeights:
        """Returns one direction's share."""
        return LayerWeights(self.by_direction()[d], self.kinds)

    def stacked(self) -> Weights:
        """Returns the parameters as the operator lstm_variant takes them."""
        of = {kind: torch.stack(self.each(kind)) for kind in self.kinds}
        bias = of["bias_ih"] + of["bias_hh"] if "bias_ih" in of else None
        ln_c = of.get("weight_ln_c")
        if ln_c is not None:
            ln_c = torch.stack([ln_c, of["bias_ln_c"] if "bias_ln_c" in of else torch.zeros_like(ln_c)], 1)
        w_hr, ln_ih, ln_hh = (of.get(kind) for kind in ("weight_hr", "weight_ln_ih", "weight_ln_hh"))
        return Weights(of["weight_ih"], of["weight_hh"], bias, w_hr, ln_ih, ln_hh, ln_c)


class Weights(NamedTuple):
    """The parameters of an LSTM's layer, of D directions."""

    w_ih: Tensor  # (D, 4H, I)
    w_hh: Tensor  # (D, 4H, P)
    bias: Tensor | None  # (D, 4H): both biases' sum
    w_hr: Tensor | None = None  # (D, P, H): the projection; without it P is H
    ln_ih: Tensor | None = None  # (D, 4H): layer norm's factors for W_ih x,
    ln_hh: Tensor | None = None  # (D, 4H): for W_hh h,
    ln_c: Tensor | None = None  # (D, 2, H): and factor and summand for c


class Variant(NamedTuple):
    """Masks and factors by which an LSTM's layer goes beyond nn.LSTM. None, and a mean of 0, stand for nothing."""

    reset: Tensor | None = None  # (T, B) bool: step t begins a new sequence, with h = c = 0
    h_mask: Tensor | None = None  # (D, B, P): multiplies h_{t-1} on its way to W_hh
    zoneout_h: Tensor | None = None  # (T, B, D, P) bool: where h stays as it was
    zoneout_c: Tensor | None = None  # (T, B, D, H) bool: likewise c
    zoneout_h_mean: float = 0.0  # without a mask: h_t is this part of h_{t-1}
    zoneout_c_mean: float = 0.0

    def direction(self, d: int) -> Variant:
        """Returns one direction's share."""
        return self._replace(
            h_mask=None if self.h_mask is None else self.h_mask[d : d + 1],
            zoneout_h=None if self.zoneout_h is None else self.zoneout_h[:, :, d : d + 1],
            zoneout_c=None if self.zoneout_c is None else self.zoneout_c[:, :, d : d + 1],
        )

    def first_reverse_step(self, lengths: Tensor | None) -> Variant:
        """Returns the share of the reverse direction's first step, which is each sequence's last."""

        def at_last(mask: Tensor | None) -> Tensor | None:
            if mask is None or lengths is None:
                return mask if mask is None else mask[-1:]
            return mask[(lengths - 1).clamp(min=0), torch.arange(mask.shape[1], device=mask.device)].unsqueeze(0)

        share = self.direction(1)
        return share._replace(reset=None, zoneout_h=at_last(share.zoneout_h), zoneout_c=at_last(share.zoneout_c))


class Options(NamedTuple):
    """How a layer is to be run."""

    cells: bool = False  # return the cell states of all steps
    recompute: bool = False  # keep less for the backward pass, and compute again there
    recorded: nn.RNNBase | None = None  # the module to leave as PyTorch's own operator in a program that it records


# --- a layer along its route ------------------------------------------------------------------------------------------


def run_last(
    cell: Cell,
    sequences: Sequences,
    weights: LayerWeights,
    state: State,
    variant: Variant | None = None,
    options: Options = Options(),  # noqa: B008, it is immutable
) -> tuple[Tensor, FinalState]:
    """Runs a layer as far as its output at each sequence's last step needs it.

    The reverse direction begins at that step, so one step of it is all that is needed.

    Returns:
        The output (B, D * P), and the forward direction's final states (1, B, .).
    """

    def state_of(d: int) -> State:
        return tuple(None if s is None else s[d : d + 1] for s in state)

    _, lengths, _ = sequences
    share = None if variant is None else variant.direction(0)
    _, final, _ = run_layer(cell, sequences, weights.direction(0), state_of(0), share, options)
    h_n = final[0][0]
    outputs = [h_n if lengths is None else h_n.masked_fill((lengths == 0).unsqueeze(-1), 0)]
    if len(weights.by_direction()) == 2:
        share = None if variant is None else variant.first_reverse_step(lengths)
        y, *_ = run_layer(cell, sequences.last_step(), weights.direction(1), state_of(1), share, options)
        outputs.append(y[0, :, 0])
    return torch.cat(outputs, -1), final


def run_layer(
    cell: Cell,
    sequences: Sequences,
    weights: LayerWeights | Weights,
    state: State,
    variant: Variant | None = None,
    options: Options = Options(),  # noqa: B008, it is immutable
) -> Results:
    """Runs a layer, with its input projection, along the route that `choose_route` chooses.

    Args:
        cell: which one.
        sequences: x (T, B, I), T >= 1, with lengths.
        weights: of x's dtype and device, as the states are; stacked ones only with a variant.
        state: the initial state.
        variant: what an LSTM's layer does beyond nn.LSTM; None for nothing.
        options: how it is to be run.

    Returns:
        y (T, B, D, P), the final states (D, B, .), and the cell states (T, B, D, H) where they are wanted.
    """
    x, lengths, reset = sequences
    cells, recompute, recorded = options
    parameters = weights.tensors if isinstance(weights, LayerWeights) else weights
    route = choose_route(
        x, (*parameters, *state), extended=variant is not None, cells=cells, recompute=recompute,
        projected=reset is not None, recorded=recorded is not None,
    )  # fmt: skip
    if route.save != "none" or route.way is Way.AGAIN:
        # As nn.LSTM's backward pass, ours keeps a copy of what is a view with the batch first. Users may then change
        # theirs in place, or may have made it in inference mode.
        x = x.contiguous()
    sequences = Sequences(x, lengths, reset)
    if route.way is Way.AGAIN:
        return _run_again(cell, sequences, weights, state, variant, options._replace(recompute=False))
    if route.way in (Way.OPERATOR, Way.FUNCTION, Way.REFERENCE):
        if variant is not None:
            return _run_projected_variant(route, sequences, weights, state, variant, cells)
        assert isinstance(weights, LayerWeights)
        return *_run_projected(cell, route, sequences, weights, state), None
    assert isinstance(weights, LayerWeights)
    if route.way is Way.LAYER:
        y, *results = cell.layer(x, parameters, "bias_ih" in weights.kinds, *state, lengths, route.save)
        return y, tuple(results[: len(cell.states)]), None
    if route.way is Way.TORCH:
        assert recorded is not None
        first = tuple(s for s in state if s is not None)
        return *nn_layer(cell, recorded, x, weights.by_direction(), first, lengths), None
    biases = [weights.each(kind) for kind in _BIASES if kind in weights.kinds]
    return *onnx_layer(cell, x, weights.each("weight_ih"), weights.each("weight_hh"), biases, state, lengths), None


def _run_again(
    cell: Cell,
    sequences: Sequences,
    weights: LayerWeights | Weights,
    state: State,
    variant: Variant | None,
    options: Options,
) -> Results:
    """Runs the layer now, keeping its arguments alone, and once more in the backward pass."""
    parameters = weights.tensors if isinstance(weights, LayerWeights) else weights
    states, count = len(state), len(parameters)

    # A checkpoint notices a change in place of the tensors that are its arguments, not of those within others.
    def run(x: Tensor, lengths: Tensor | None, *others: Any) -> Results:
        given, others = others[:states], others[states:]
        own: LayerWeights | Weights
        if isinstance(weights, LayerWeights):
            own = LayerWeights(list(others[:count]), weights.kinds)
        else:
            own = Weights(*others[:count])
        masks = None if variant is None else Variant(*others[count:])
        return run_layer(cell, Sequences(x, lengths, sequences.reset), own, given, masks, options)

    x, lengths, _ = sequences
    results: Results = checkpoint(
        run, x, lengths, *state, *parameters, *(variant or ()), use_reentrant=False, preserve_rng_state=False
    )
    return results


def _run_projected(
    cell: Cell, route: Route, sequences: Sequences, weights: LayerWeights, state: State
) -> tuple[Tensor, FinalState]:
    """Projects the input of all steps at once, and runs the recurrence."""
    lengths, reset = sequences.lengths, sequences.reset
    biases = {kind: torch.cat(weights.each(kind)) for kind in _BIASES if kind in weights.kinds}
    own = biases.pop("bias_hh", None) if cell.own_bias else None
    each_w_ih, w_hh = weights.each("weight_ih"), torch.stack(weights.each("weight_hh"))
    directions = len(each_w_ih)
    gates_x = _project(sequences, torch.cat(each_w_ih), *biases.values()).unflatten(-1, (directions, -1))
    of_recurrence: tuple[Tensor | None, ...] = (w_hh,)
    if cell.own_bias:
        of_recurrence = (w_hh, None if own is None else own.unflatten(0, (directions, -1)))
    if reset is None:
        return run_recurrence(cell, route, gates_x, of_recurrence, state, lengths)
    if cell.clear is None:
        return _run_step_by_step(cell, route, gates_x, of_recurrence, state, lengths, reset)
    state = _without_cleared(state, lengths, reset)
    gates_x, lengths = _with_clearing_steps(cell, gates_x, lengths, reset)
    y, final = run_recurrence(cell, route, gates_x, of_recurrence, state, lengths)
    return y[1::2], final


def _without_cleared(state: State, lengths: Tensor | None, reset: Tensor) -> State:
    """Clears the forward direction's initial state where the first step begins anew, also one that is not finite."""
    at_once = reset[0] if lengths is None else reset[0] & (lengths > 0)
    kept = ~at_once.unsqueeze(-1)
    return tuple(s if s is None else torch.cat([torch.where(kept, s[:1], 0), s[1:]]) for s in state)


def _with_clearing_steps(
    cell: Cell, gates_x: Tensor, lengths: Tensor | None, reset: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Puts a step before each step, which clears the state where a sequence begins anew, and else leaves it as it is.

    So the kernels need to know of nothing, and all derivatives are right. It takes twice the steps. Its gates are
    infinite, so that no finite state outweighs them. One that is not finite they can't clear: it is multiplied by W_hh
    before any gate.
    """
    clears = reset[..., None, None].repeat(1, 1, gates_x.shape[2], 1)
    if gates_x.shape[2] == 2:
        clears[0, :, 1] = False  # the reverse direction is through: what lies after its last step is its final state
    assert cell.clear is not None and cell.hold is not None
    clear, hold = (
        gates_x.new_tensor([gate and math.copysign(math.inf, gate) for gate in of_gates]).repeat_interleave(
            gates_x.shape[-1] // cell.gates
        )
        for of_gates in (cell.clear, cell.hold)
    )
    between = torch.where(clears, clear, hold)
    doubled = torch.stack([between, gates_x], 1).flatten(0, 1)
    return doubled, None if lengths is None else 2 * lengths


def _run_step_by_step(
    cell: Cell,
    route: Route,
    gates_x: Tensor,
    weights: tuple[Tensor | None, ...],
    state: State,
    lengths: Tensor | None,
    reset: Tensor,
) -> tuple[Tensor, FinalState]:
    """Runs a recurrence by a call for each step, and clears the state where a sequence begins anew."""
    steps, batch, directions, _ = gates_x.shape
    zeros = gates_x.new_zeros(1, batch, gates_x.shape[-1] // cell.gates)
    ys, finals = [], []
    for d in range(directions):
        own = tuple(None if w is None else w[d : d + 1] for w in weights)
        final = tuple(zeros if s is None else s[d : d + 1] for s in state)
        of_direction = []
        for t in range(steps) if d == 0 else range(steps - 1, -1, -1):
            begins = t + d  # the step at which a new sequence begins, if this one comes to it without a state
            if begins < steps:
                clear = reset[begins] if lengths is None else reset[begins] & (lengths > begins)
                final = tuple(s.masked_fill(clear.unsqueeze(-1), 0) for s in final)
            has_step = None if lengths is None else (lengths > t).long()
            y, final = run_recurrence(cell, route, gates_x[t : t + 1, :, d : d + 1], own, final, has_step)
            of_direction.append(y)
        ys.append(torch.cat(of_direction if d == 0 else of_direction[::-1]))
        finals.append(final)
    return torch.cat(ys, 2), tuple(torch.cat(each) for each in zip(*finals, strict=True))


def _run_projected_variant(
    route: Route,
    sequences: Sequences,
    weights: LayerWeights | Weights,
    state: State,
    variant: Variant,
    cells: bool,
) -> Results:
    """Does the same with the extended LSTM's recurrence."""
    stacked = weights.stacked() if isinstance(weights, LayerWeights) else weights
    w_ih, bias = stacked.w_ih, stacked.bias
    added = [bias.flatten()] if bias is not None and stacked.ln_ih is None else []
    gates_x = _project(sequences, w_ih.flatten(0, 1), *added).unflatten(-1, w_ih.shape[:2])
    if stacked.ln_ih is not None:  # autocast would leave it in float32
        gates_x = F.layer_norm(gates_x, gates_x.shape[-1:], eps=EPS).to(sequences.x.dtype) * stacked.ln_ih
        gates_x = gates_x if bias is None else gates_x + bias
    return run_variant(
        route, gates_x, stacked.w_hh, stacked.w_hr, state, sequences.lengths, variant, stacked.ln_hh, stacked.ln_c,
        cells,
    )  # fmt: skip


def _project(sequences: Sequences, w_ih: Tensor, *biases: Tensor) -> Tensor:
    """Multiplies the input of all steps with w_ih (n, I) and adds the biases (n,), one or two; returns (T, B, n).

    In 16 bits the sum of two biases would be rounded before it is added, which makes 1.6 times nn.LSTM's error in a
    single step. So they are columns of w_ih there, and x has columns of ones. Rows are multiples of 16 bytes, for the
    fastest products.

    It is one matrix product whatever x's strides. If x had three dimensions, with the batch first in memory, and the
    weights needed no gradient, F.linear would make one product for each sequence, each with a copy of the weights.
    """
    _check_projection(sequences.x, w_ih, biases)
    x = sequences.without_padding()
    bias = None
    if len(biases) == 2 and x.element_size() <= 2:
        unused = -(x.shape[-1] + 2) % 8
        w_ih = torch.cat([w_ih, torch.stack(biases, -1), w_ih.new_zeros(len(w_ih), unused)], -1)
        x = F.pad(x, (0, 2 + unused), value=1.0)
    elif biases:
        bias = biases[0] + biases[1] if len(biases) == 2 else biases[0]
    steps, batch, features = x.shape
    projected: Tensor = F.linear(x.reshape(steps * batch, features), w_ih, bias).unflatten(0, (steps, batch))
    return projected


def _check_projection(x: Tensor, w_ih: Tensor, biases: tuple[Tensor, ...]) -> None:
    """Checks what the product takes, with the names of the arguments, and what it would broadcast."""
    if x.dim() != 3:
        raise ValueError(f"birnn_ext: x must have shape (T, B, I), got {list(x.shape)}")
    rows, dtype, device = w_ih.shape[:1], x.dtype, x.device
    for t in (w_ih, *biases):
        name, shape = ("w_ih", (*rows, x.shape[2])) if t is w_ih else ("bias", rows)
        if t.shape != shape:
            raise ValueError(f"birnn_ext: {name} of all directions must have shape {list(shape)}, got {list(t.shape)}")
        if t.dtype != dtype:
            raise TypeError(f"birnn_ext: {name} must be {dtype} as x, got {t.dtype}")
        if t.device != device:
            raise ValueError(f"birnn_ext: {name} must be on x's device {device}, got {t.device}")


def run_recurrence(
    cell: Cell,
    route: Route,
    gates_x: Tensor,
    weights: tuple[Tensor | None, ...],
    state: State,
    lengths: Tensor | None,
) -> tuple[Tensor, FinalState]:
    """Runs a recurrence along its route, which is one that follows a projection.

    Args:
        cell: which one.
        route: by `choose_route` or `choose_recurrence_route`.
        gates_x: (T, B, D, G * H), where G is the number of gates.
        weights: w_hh (D, G * H, H) and, unless it is an LSTM's, bias_hh (D, G * H) or None.
        state: the initial state.
        lengths: (B,), or None for T each.

    Returns:
        y (T, B, D, H), and the final states (D, B, H).
    """
    if route.way is Way.REFERENCE:
        count_reference(f"{cell.operator}_recurrence", "reference_forward", route.why, stacklevel=4)
        run, save = cell.reference, "none"
    else:
        run, save = cell.function if route.way is Way.FUNCTION else cell.recurrence, route.save
    y, *results = run(gates_x, *weights, *state, lengths, save)
    return y, tuple(results[: len(cell.states)])


def run_variant(
    route: Route,
    gates_x: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    state: State,
    lengths: Tensor | None,
    variant: Variant,
    ln_hh: Tensor | None,
    ln_c: Tensor | None,
    cells: bool,
) -> Results:
    """Runs the extended LSTM's recurrence likewise; `birnn_ext.variants.lstm_variant` documents the arguments."""
    args: Any = (gates_x, w_hh, w_hr, *state, lengths, *variant, ln_hh, ln_c, EPS)
    if route.way is Way.REFERENCE:
        count_reference("lstm_variant", "reference_forward", route.why, stacklevel=4)
        y, h_n, c_n, all_cells = reference.lstm_variant(*args)
    else:
        y, h_n, c_n, all_cells, *_ = torch.ops.birnn_ext.lstm_variant(*args, route.save)
    return y, (h_n, c_n), all_cells if cells else None
