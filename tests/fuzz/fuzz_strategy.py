"""The fuzzer draws its cases from these hypothesis strategies."""

from __future__ import annotations

from typing import Any

from fuzz_case import LAYOUTS, Case
from hypothesis import strategies as st

MASK = st.one_of(st.just(-1), st.integers(0, 2**28 - 1))


def sizes(largest: int, smallest: int = 1) -> st.SearchStrategy[int]:
    """Draws mostly small sizes, and the neighbours of vector widths and tiles."""
    edges = [n for n in (7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65) if n <= largest]
    return st.one_of(
        st.integers(1, min(6, largest)), st.integers(smallest, largest), *([st.sampled_from(edges)] if edges else [])
    )


@st.composite
def beyond_torch(draw: st.DrawFn, fields: dict[str, Any]) -> dict[str, Any]:
    """Adds options that PyTorch's modules lack. The reference is slow, so sizes become smaller."""
    steps, batch, hidden = (min(fields[name], n) for name, n in (("T", 8), ("B", 9), ("H", 40)))
    more: dict[str, Any] = {"T": steps, "B": batch, "H": hidden}
    if fields.get("lengths") is not None:
        more["lengths"] = tuple(min(n, steps) for n in fields["lengths"][:batch])
        if fields["packed"]:
            more["lengths"] = (steps, *more["lengths"][1:])
    if fields.get("proj_size", 0) >= hidden:
        more["proj_size"] = hidden - 1
    lstm = fields["cell"] == "lstm"
    if lstm:
        more["recurrent_dropout"] = draw(st.sampled_from([0.0, 0.0, 0.3]))
        more["zoneout"] = draw(st.sampled_from([(0.0, 0.0), (0.0, 0.0), (0.3, 0.2), (0.0, 0.5), (1.0, 0.0)]))
    # a norm of few values, or of rounded ones, divides by a spread that may be almost 0
    exact = fields["dtype"] == "float64" or (fields["dtype"] == "float32" and not fields.get("autocast"))
    more["layer_norm"] = lstm and exact and hidden > 3 and draw(st.booleans())
    # with "last" the masks are for some of the steps only
    more["training"] = fields["output"] == "all" and draw(st.booleans())
    more["cells"] = lstm and fields["output"] == "all" and draw(st.booleans())
    more["learned_state"] = draw(st.booleans())
    if not more["learned_state"] and steps and batch and draw(st.booleans()):
        places = st.tuples(st.integers(0, steps - 1), st.integers(0, batch - 1))
        more["reset"] = tuple(draw(st.lists(places, min_size=1, max_size=6, unique=True)))
    return more


@st.composite
def cases(draw: st.DrawFn, device: str = "cpu") -> Case:
    """Draws any configuration; for an emulated CUDA device a small one."""
    cuda = device == "cuda"
    dtype = draw(st.sampled_from(["float32", "float64", "float16", "bfloat16"]))
    batched = draw(st.integers(0, 7)) > 0
    fields = {
        "T": draw(sizes(8 if cuda else 65, 0)),
        "B": draw(sizes(20 if cuda else 65, 0)) if batched else 1,
        "I": draw(sizes(33 if cuda else 65, 0)),
        "H": draw(sizes(65, 0)),
        "cell": draw(st.sampled_from(["lstm", "gru", "rnn_tanh", "rnn_relu"])),
        "layers": draw(st.sampled_from([1, 1, 1, 2, 2, 3])),
        "bidirectional": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "batched": batched,
        "dtype": dtype,
        "hx": draw(st.sampled_from(["", "", "", *LAYOUTS])),
        "x_layout": draw(st.sampled_from(LAYOUTS)),
        "dy_layout": draw(st.sampled_from(LAYOUTS)),
        "output": draw(st.sampled_from(["all", "all", "last"])),
        "gain": draw(st.sampled_from([1.0, 1.0, 0.1, 3.0])),
        "grads": draw(MASK),
        "used": draw(st.integers(0, 15)),
        "threads": 1 if cuda else draw(st.integers(1, 4)),
        "seed": draw(st.integers(0, 2**16)),
        "device": device,
    }
    if fields["cell"] == "rnn_relu":  # it may explode, and near 0 another rounding is another derivative
        dtype = fields["dtype"] = "float64"
        fields["gain"] = 1.0
    if dtype in ("float32", "float64") and draw(st.integers(0, 5)) == 0:
        fields["autocast"] = draw(st.sampled_from(["bfloat16", "float16"]))
    module = draw(st.sampled_from(["", "", "recompute", "accelerated"]))
    if module:
        fields[module] = True
    steps, batch = fields["T"], fields["B"]
    if batched and steps > 0 and draw(st.booleans()):
        packed = draw(st.sampled_from(["", "", "sorted", "unsorted"])) if batch > 0 else ""
        length = st.integers(1 if packed else 0, steps)
        lengths = draw(st.lists(length, min_size=batch, max_size=batch))
        if packed:
            lengths[draw(st.integers(0, batch - 1))] = steps
        fields["packed"] = packed
        fields["lengths"] = tuple(sorted(lengths, reverse=True) if packed == "sorted" else lengths)
        fields["padding"] = draw(st.sampled_from(["", "nan", "inf", "7"]))
    hidden = fields["H"]
    if hidden > 1 and fields["cell"] == "lstm" and draw(st.integers(0, 3)) == 0:
        fields["proj_size"] = draw(st.integers(1, hidden - 1))
    if module != "accelerated" and draw(st.integers(0, 3)) == 0:
        fields |= draw(beyond_torch(fields))
        if dtype in ("float16", "bfloat16") or fields.get("autocast"):
            # Where a gate is nearly shut or open, rounding it to 16 bits loses its derivative. The saved gates are
            # rounded so, and nn.LSTM's, too, but not those of the reference, which is the measure here.
            fields["gain"] = min(fields["gain"], 1.0)
    return Case(**fields)
