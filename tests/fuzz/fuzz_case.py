"""One case of the differential fuzzer: a configuration, and its check against PyTorch's module in float64.

Options that these lack are checked against the reference.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from helpers import TOLERANCE, leaves
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import birnn_ext
from birnn_ext import reference
from birnn_ext.cell import CELLS
from birnn_ext.variants import EPS, Variant

# Thousands of cases find larger rounding errors than the suite's, such as in a sum of 16-bit terms that cancel.
TOLERANCES = {dtype: t * (2 if dtype.itemsize == 2 else 1) for dtype, t in TOLERANCE.items()}
# If an error exceeds the tolerance, it may be this many times PyTorch's largest error over all tensors. (Comparing
# tensor by tensor would depend on chance, as one of two equally good ways may give a small gradient almost exactly.)
WORSE_THAN_TORCH = 4
# Errors are relative to a tensor's largest value, or to this part of the largest among all outputs (all gradients) if
# that is more, as a sum of terms that cancel has the errors of its terms.
SMALLEST_SCALE = 0.1

LAYOUTS = ("plain", "transposed", "gaps", "expanded", "offset")
OUTPUTS = ("y", "h_n", "c_n", "cells")

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A configuration. Its repr holds only what differs from the defaults, and can be pasted."""

    T: int = 2
    B: int = 1
    I: int = 1  # noqa: E741, the usual name
    H: int = 1
    cell: str = "lstm"  # as its operators' names begin
    layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    batch_first: bool = False
    batched: bool = True
    dtype: str = "float32"
    autocast: str = ""  # the type, if any
    recompute: bool = False
    accelerated: bool = False  # a module of PyTorch's that accelerate() has converted
    proj_size: int = 0
    recurrent_dropout: float = 0.0
    zoneout: tuple[float, float] = (0.0, 0.0)
    layer_norm: bool = False
    learned_state: bool = False
    reset: tuple[tuple[int, int], ...] = ()  # (t, b) of the steps that begin a new sequence
    cells: bool = False  # return_cell_states
    training: bool = True
    hx: str = ""  # its layout in memory; "" for no hx
    x_layout: str = "plain"
    lengths: tuple[int, ...] | None = None
    padding: str = ""  # x beyond a sequence's end; "" for more random values
    packed: str = ""  # "sorted" or "unsorted": the input is a PackedSequence
    output: str = "all"
    gain: float = 1.0  # factor of the initial weights
    grads: int = -1  # a bit for each of x, h_0, c_0 and the parameters: whether it requires gradients
    used: int = 15  # a bit for each of y, h_n, c_n and cells: whether gradients come from it
    dy_layout: str = "plain"
    threads: int = 1
    seed: int = 0
    device: str = "cpu"

    def __repr__(self) -> str:
        fields = [(f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self)]
        return f"Case({', '.join(f'{name}={value!r}' for name, value, default in fields if value != default)})"

    def _repr_pretty_(self, printer, cycle: bool) -> None:  # hypothesis prints this
        printer.text(repr(self))

    def reproducer(self) -> str:
        """Returns a line for the shell, to run in the repository's root."""
        isa = os.environ.get("BIRNN_CPU_ISA")
        return f'{f"BIRNN_CPU_ISA={isa} " if isa else ""}python tests/fuzz "{self!r}"'

    @property
    def ours(self) -> type[nn.RNNBase]:
        return getattr(birnn_ext, self.cell.partition("_")[0].upper())

    @property
    def theirs(self) -> type[nn.RNNBase]:
        return getattr(nn, self.cell.partition("_")[0].upper())

    @property
    def states(self) -> str:
        """Returns the letters of the states."""
        return "hc" if self.cell == "lstm" else "h"

    def as_hx(self, states: Any) -> Any:
        """Returns states as the modules take them."""
        return states if states is None or self.cell == "lstm" else states[0]

    @property
    def options(self) -> dict[str, Any]:
        """Returns the options that PyTorch's module lacks."""
        cell = next(cell for cell in CELLS if cell.operator == self.cell)
        return {name: getattr(self, name) for name in cell.options}

    @property
    def beyond_torch(self) -> bool:
        return bool(
            self.recurrent_dropout
            or any(self.zoneout)
            or self.layer_norm
            or self.learned_state
            or self.reset
            or self.cells
        )

    @property
    def computed_in(self) -> torch.dtype:
        return getattr(torch, self.autocast if self.autocast and self.dtype != "float64" else self.dtype)

    @property
    def results_in(self) -> torch.dtype:
        """On the CPU nn.GRU's results under autocast have the wider type of autocast's and the input's."""
        return getattr(torch, self.dtype) if self.cell == "gru" and self.device == "cpu" else self.computed_in


def laid_out(t: Tensor, layout: str) -> Tensor:
    """Returns t in another memory layout. "expanded" repeats t's first row in its second dimension."""
    if layout == "transposed":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "gaps":
        return torch.stack([t, t], -1)[..., 0]
    if layout == "expanded":
        return t[:, :1].expand_as(t)
    if layout == "offset":  # the address is no multiple of a vector's size
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
    return t.contiguous()


@dataclass
class Data:
    """The data of both sides: float64 values that the type of the computation can hold."""

    leaves: Tensors  # x (T, B, I), h_0 and (of an LSTM) c_0 if there is a state, the parameters
    wanted: list[str]  # the leaves that require gradients
    cotangents: Tensors  # of y (T, B, D * H) or (B, D * H), h_n, c_n

    def __init__(self, case: Case, nudge: float = 0.0) -> None:
        """Each leaf is multiplied by 1 + nudge or 1 - nudge, by chance."""
        torch.manual_seed(case.seed)
        directions = 2 if case.bidirectional else 1
        outputs = case.proj_size or case.H
        rows = case.layers * directions
        state = {"h": (rows, case.B, outputs), "c": (rows, case.B, case.H)}

        def random(shape: tuple[int, ...], layout: str) -> Tensor:
            t = torch.randn(shape, dtype=torch.float64).to(case.computed_in).double()
            return laid_out(t, "expanded" if layout == "expanded" else "plain")

        hx = {f"{k}_0": random(state[k], case.hx) for k in case.states} if case.hx else {}
        module = make(case.ours, case, torch.float64, **case.options)
        parameters = {}
        for name, p in module.named_parameters():
            own = name in ("h_0", "c_0") or "_ln_" in name  # these would be 0 or 1 at first
            value = p.detach() * case.gain if not own else p.detach() + torch.randn_like(p) / 4
            parameters[f"learned {name}" if name in ("h_0", "c_0") else name] = value.to(case.computed_in).double()
        self.leaves = {"x": random((case.T, case.B, case.I), case.x_layout), **hx, **parameters}
        names = ["x", "h_0", "c_0", *parameters]
        self.wanted = [name for k, name in enumerate(names) if case.grads >> k & 1 and name in self.leaves]
        y = (case.T, case.B, directions * outputs)
        self.cotangents = {
            "y": random(y if case.output == "all" else y[1:], case.dy_layout),
            "h_n": random(state["h"], "plain"),
            "c_n": random(state["c"], "plain"),
            "cells": random((case.T, case.B, directions * case.H), case.dy_layout),
        }
        if nudge:
            self.leaves = {n: t * (1 + nudge * torch.randn_like(t).sign()) for n, t in self.leaves.items()}


def make(cls: type[nn.RNNBase], case: Case, dtype: torch.dtype, device: str = "cpu", **kwargs) -> nn.RNNBase:
    if case.cell == "lstm":
        kwargs["proj_size"] = case.proj_size
    if case.cell.startswith("rnn"):
        kwargs["nonlinearity"] = case.cell.partition("_")[2]
    return cls(
        case.I, case.H, case.layers, bias=case.bias, batch_first=case.batch_first, bidirectional=case.bidirectional,
        device=device, dtype=dtype, **kwargs,
    )  # fmt: skip


def with_gradients(case: Case, outputs: Tensors, given: Tensors, data: Data) -> tuple[Tensors, Tensors]:
    """Returns outputs, and gradients of all wanted leaves; these are 0 if no output depends on a leaf."""
    used = [n for k, n in enumerate(OUTPUTS) if case.used >> k & 1 and n in outputs and outputs[n].requires_grad]
    wanted = {name: given[name] for name in data.wanted}
    grads: tuple[Tensor | None, ...] = (None,) * len(wanted)
    if used and wanted:
        cotangents = [
            laid_out(data.cotangents[n].to(outputs[n]), case.dy_layout if n in ("y", "cells") else "plain")
            for n in used
        ]
        grads = torch.autograd.grad([outputs[n] for n in used], list(wanted.values()), cotangents, allow_unused=True)
    return outputs, {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(wanted.items(), grads, strict=True)
    }


def by_torch(case: Case, dtype: torch.dtype, device: str = "cpu", nudge: float = 0.0) -> tuple[Tensors, Tensors]:
    """Returns PyTorch's results. It refuses sequences without steps, whose results are added afterwards."""
    module = make(case.theirs, dataclasses.replace(case, batch_first=False), dtype, device)
    data = Data(case, nudge)
    module.load_state_dict(
        {n.removeprefix("learned "): t for n, t in data.leaves.items() if n not in ("x", "h_0", "c_0")}
    )
    given = {name: data.leaves[name].to(device, dtype) for name in ("x", "h_0", "c_0") if name in data.leaves}
    given.update(module.named_parameters())
    for name, leaf in given.items():
        leaf.requires_grad_(name in data.wanted)
    x = given["x"]
    hx = [given[f"{k}_0"] for k in case.states] if case.hx else None
    if case.lengths is None:
        y, *states = leaves(module(x, case.as_hx(hx)))
        last = y[-1]
    else:
        lengths = torch.tensor(case.lengths, dtype=torch.int64)
        some = lengths.nonzero()[:, 0]
        outputs = case.proj_size or case.H
        y = x.new_zeros(case.T, case.B, outputs * (2 if case.bidirectional else 1))
        sizes = (outputs, case.H)[: len(case.states)]
        states = hx or [x.new_zeros(len(module.all_weights), case.B, n) for n in sizes]
        if len(some):
            packed = pack_padded_sequence(x[:, some], lengths[some], enforce_sorted=False)
            packed, new = module(packed, case.as_hx(hx and [s[:, some] for s in hx]))
            y = y.index_copy(1, some, pad_packed_sequence(packed, total_length=case.T)[0])
            states = [old.index_copy(1, some, s) for old, s in zip(states, leaves(new), strict=True)]
        last = y[(lengths - 1).clamp(min=0), torch.arange(case.B)]
    outputs = {"y": y, **{f"{k}_n": s for k, s in zip(case.states, states, strict=True)}}
    if case.output == "last":
        outputs = {"y": last} if case.bidirectional else {**outputs, "y": last}
    return with_gradients(case, outputs, given, data)


def with_resets(
    cell: str,
    gates_x: Tensor,
    w_hh: Tensor,
    bias_hh: Tensor | None,
    h0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor,
) -> tuple[Tensor, Tensor]:
    """Runs a cell's reference step by step, and clears the state where a sequence begins anew."""
    recurrence = getattr(reference, f"{cell}_recurrence")
    steps, batch, directions, _ = gates_x.shape
    lengths = torch.full((batch,), steps) if lengths is None else lengths
    first = gates_x.new_zeros(directions, batch, w_hh.shape[-1]) if h0 is None else h0
    ys, h_n = [], []
    for d in range(directions):
        h, of_direction = first[d : d + 1], {}
        weights = (w_hh[d : d + 1], None if bias_hh is None else bias_hh[d : d + 1])
        for t in range(steps) if d == 0 else range(steps - 1, -1, -1):
            begins = t + d  # the step before which, in time, the state is cleared
            if begins < steps:
                h = h.masked_fill((reset[begins] & (lengths > begins)).view(1, -1, 1), 0)
            one = gates_x[t : t + 1, :, d : d + 1]
            of_direction[t], h, *_ = recurrence(one, *weights, h, (lengths > t).long(), "none")
        ys.append(torch.cat([of_direction[t] for t in range(steps)]))
        h_n.append(h)
    return torch.cat(ys, 2), torch.cat(h_n)


def by_reference(
    case: Case, dtype: torch.dtype, variants: list[Variant], nudge: float = 0.0
) -> tuple[Tensors, Tensors]:
    """Returns birnn_ext.reference's results on the CPU. variants has each layer's extended options and their masks."""
    data = Data(case, nudge)
    given = {name: t.to(dtype).requires_grad_(name in data.wanted) for name, t in data.leaves.items()}
    directions = ["", "_reverse"] if case.bidirectional else [""]
    x, lengths = given["x"], None if case.lengths is None else torch.tensor(case.lengths, dtype=torch.int64)
    first = [given.get(f"{k}_0") for k in case.states]
    if first[0] is None and case.learned_state:
        first = [given[f"learned {k}_0"].unsqueeze(1).expand(-1, case.B, -1) for k in case.states]
    finals = []
    for layer in range(case.layers):

        def of(kind: str, layer: int = layer) -> Tensor | None:
            names = [f"{kind}_l{layer}{suffix}" for suffix in directions]
            return torch.stack([given[name] for name in names]) if names[0] in given else None

        state = [None if s is None else s.unflatten(0, (case.layers, -1))[layer] for s in first]

        gates_x = torch.einsum("tbi,dgi->tbdg", x, of("weight_ih"))
        if case.layer_norm:
            gates_x = F.layer_norm(gates_x, gates_x.shape[-1:], eps=EPS) * of("weight_ln_ih")
        if case.cell != "lstm":
            gates_x = gates_x + of("bias_ih") if case.bias else gates_x
            weights = (of("weight_hh"), of("bias_hh"))
            y, h = with_resets(case.cell, gates_x, *weights, *state, lengths, resets(case))
            x = y.flatten(2)
            finals.append((h,))
            continue
        if case.bias:
            gates_x = gates_x + of("bias_ih") + of("bias_hh")
        ln_c = of("weight_ln_c")
        if ln_c is not None:
            shift = of("bias_ln_c")
            ln_c = torch.stack([ln_c, torch.zeros_like(ln_c) if shift is None else shift], 1)
        *masks, mean_h, mean_c = variants[layer]
        masks = [None if m is None else m.cpu().to(dtype if m.is_floating_point() else torch.bool) for m in masks]
        y, h, c, cells = reference.lstm_variant(
            gates_x,
            of("weight_hh"),
            of("weight_hr"),
            *state,
            lengths,
            *masks,
            mean_h,
            mean_c,
            of("weight_ln_hh"),
            ln_c,
            EPS,
        )
        x = y.flatten(2)
        finals.append((h, c))
    outputs = {
        "y": x,
        **{f"{k}_n": torch.cat(parts) for k, parts in zip(case.states, zip(*finals, strict=True), strict=True)},
        **({"cells": cells.flatten(2)} if case.cells else {}),
    }
    if case.output == "last":
        ends = torch.full((case.B,), case.T) if lengths is None else lengths
        last = x[(ends - 1).clamp(min=0), torch.arange(case.B)]
        outputs = {"y": last} if case.bidirectional else {**outputs, "y": last}
    return with_gradients(case, outputs, given, data)


def resets(case: Case) -> Tensor:
    reset = torch.zeros(case.T, case.B, dtype=torch.bool)
    if case.reset:
        reset[tuple(torch.tensor(case.reset).T)] = True
    return reset


def by_ours(case: Case) -> tuple[Tensors, Tensors]:
    dtype = getattr(torch, case.dtype)
    if case.accelerated:
        module = make(case.theirs, case, dtype, case.device)
        birnn_ext.accelerate(module)
    else:
        module = make(case.ours, case, dtype, case.device, **case.options)
    data = Data(case)
    module.load_state_dict(
        {n.removeprefix("learned "): t for n, t in data.leaves.items() if n not in ("x", "h_0", "c_0")}
    )

    def leaf(name: str, layout: str) -> Tensor:
        return laid_out(data.leaves[name].to(case.device, dtype), layout).detach()

    given = {"x": leaf("x", case.x_layout), **{f"{k}_0": leaf(f"{k}_0", case.hx) for k in case.states if case.hx}}
    if case.lengths is not None and case.padding:
        beyond = torch.arange(case.T).unsqueeze(1) >= torch.tensor(case.lengths, dtype=torch.int64)
        filled = given["x"].masked_fill(beyond.unsqueeze(-1).to(case.device), float(case.padding))
        given["x"] = laid_out(filled, "plain" if case.x_layout == "expanded" else case.x_layout)
    given.update((f"learned {n}" if n in ("h_0", "c_0") else n, p) for n, p in module.named_parameters())
    for name, t in given.items():
        t.requires_grad_(name in data.wanted)

    x, hx, kwargs = given["x"], [given[f"{k}_0"] for k in case.states] if case.hx else None, {}
    if not case.batched:
        x, hx = x[:, 0], hx and [s[:, 0] for s in hx]
    elif case.batch_first:
        x = x.transpose(0, 1)
    if case.packed:
        x = pack_padded_sequence(x, case.lengths, case.batch_first, enforce_sorted=case.packed == "sorted")
    elif case.lengths is not None:
        kwargs["lengths"] = torch.tensor(case.lengths, dtype=torch.int64, device=case.device)
    if case.reset:
        reset = resets(case)
        reset = (reset if case.batched else reset[:, 0]).to(case.device)
        reset = reset.T if case.batch_first and case.batched else reset
        if case.packed:
            reset = pack_padded_sequence(reset, case.lengths, case.batch_first, enforce_sorted=case.packed == "sorted")
        kwargs["reset"] = reset
    if case.cells:
        kwargs["return_cell_states"] = True
    module.train(case.training)
    autocast = torch.autocast(case.device, getattr(torch, case.autocast or "bfloat16"), enabled=bool(case.autocast))
    with autocast:
        y, states, *cells = module(x, case.as_hx(hx), output=case.output, **kwargs)
    outputs = {
        "y": y,
        **dict(zip(("h_n", "c_n"), leaves(states), strict=False)),
        **dict(zip(["cells"], cells, strict=False)),
    }
    for name in ("y", "cells")[: 1 + case.cells] if case.output == "all" else ():
        if isinstance(outputs[name], PackedSequence):
            outputs[name], _ = pad_packed_sequence(outputs[name], case.batch_first, total_length=case.T)
        if case.batched and case.batch_first:
            outputs[name] = outputs[name].transpose(0, 1)
    for name, t in outputs.items():
        assert t.dtype == case.results_in, f"{name} is {t.dtype}"
        assert t.device.type == case.device, f"{name} is on {t.device}"
    if not case.batched:
        outputs = {n: t.unsqueeze(0 if n == "y" and case.output == "last" else 1) for n, t in outputs.items()}
    outputs, grads = with_gradients(case, outputs, given, data)
    for name, t in grads.items():
        assert t.dtype == given[name].dtype, f"gradient of {name} is {t.dtype}"
    return outputs, grads


def errors(actual: Tensors, expected: Tensors) -> dict[str, float]:
    """Returns each tensor's error, relative to its largest value (see SMALLEST_SCALE)."""
    assert list(actual) == list(expected)
    largest = {name: float(t.detach().abs().max()) if t.numel() else 0.0 for name, t in expected.items()}
    found = {}
    for name, t in expected.items():
        ours = actual[name].detach().double().cpu()
        assert ours.shape == t.shape, f"{name} has shape {tuple(ours.shape)}, expected {tuple(t.shape)}"
        scale = max(largest[name], SMALLEST_SCALE * max(largest.values()), 1e-30)
        found[name] = float((ours - t.detach()).abs().max()) / scale if t.numel() else 0.0
    return found


def with_variants(case: Case) -> tuple[tuple[Tensors, Tensors], list[Variant]]:
    """Returns our results and each layer's extended options, whose masks the reference needs, too."""
    variants: list[Variant] = []
    real = birnn_ext.LSTM._variant
    order = None  # each sequence's place in the masks of a packed batch, which are for sorted sequences
    if case.packed == "unsorted":
        x = torch.empty(case.T, case.B)
        order = pack_padded_sequence(x, torch.tensor(case.lengths), enforce_sorted=False).unsorted_indices

    def keep(*args: Any) -> Variant | None:
        variant = real(*args)
        masks = [m if m is None or order is None else m.cpu()[:, order] for m in (variant or Variant())[:4]]
        variants.append(Variant(*masks, *(variant or Variant())[4:]))
        return variant

    birnn_ext.LSTM._variant = keep
    try:
        results = by_ours(case)
        # A stack that runs as one operator asks for no variants, as no layer has any.
        return results, variants or [Variant()] * case.layers
    finally:
        birnn_ext.LSTM._variant = real


def kind_of_error(run) -> type[Exception] | None:
    try:
        run()
    except (RuntimeError, ValueError, TypeError) as error:
        return type(error)
    return None


def compare(case: Case) -> None:
    if 0 in (case.T, case.I, case.H):
        expected, found = kind_of_error(lambda: by_torch(case, torch.float64)), kind_of_error(lambda: by_ours(case))
        assert expected is found, f"PyTorch's raises {expected}, ours {found}"
        return
    actual, variants = with_variants(case)

    def by_peer(dtype: torch.dtype, nudge: float = 0.0) -> tuple[Tensors, Tensors]:
        if case.beyond_torch:
            return by_reference(case, dtype, variants, nudge)
        return by_torch(case, dtype, nudge=nudge)

    expected = by_peer(torch.float64)
    for kind, (a, e) in zip(("output", "gradient of"), zip(actual, expected, strict=True), strict=True):
        found, tolerance = errors(a, e), TOLERANCES[case.computed_in]
        if any(not f <= tolerance for f in found.values()):
            theirs = max(errors(by_peer(case.computed_in)[kind != "output"], e).values())
            # Some cases magnify every rounding: large weights, several layers, sums that cancel. An error may be as large
            # as what a change of all inputs and parameters by one unit in the last place does, up or down by chance.
            moved = max(errors(by_peer(torch.float64, torch.finfo(case.computed_in).eps)[kind != "output"], e).values())
            tolerance = max(tolerance, WORSE_THAN_TORCH * theirs, moved)
        for name, f in found.items():
            assert f <= tolerance, f"{kind} {name}: relative error {f:.2e}, tolerance {tolerance:.0e}"


def check(case: Case) -> None:
    """Raises an AssertionError, with a line that reproduces it, if ours and PyTorch's results differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        compare(case)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\nreproduce by: {case.reproducer()}") from error
    finally:
        torch.set_num_threads(before)
