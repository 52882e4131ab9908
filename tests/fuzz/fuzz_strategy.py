"""How the fuzzer draws cases."""

from __future__ import annotations

from fuzz_case import LAYOUTS, Case
from hypothesis import strategies as st

MASK = st.one_of(st.just(-1), st.integers(0, 2**28 - 1))


def sizes(largest: int, smallest: int = 1) -> st.SearchStrategy[int]:
    """Mostly small, with the neighbours of vector widths and tiles."""
    edges = [n for n in (7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65) if n <= largest]
    return st.one_of(
        st.integers(1, min(6, largest)), st.integers(smallest, largest), *([st.sampled_from(edges)] if edges else [])
    )


@st.composite
def cases(draw: st.DrawFn, device: str = "cpu") -> Case:
    """Any configuration; on an emulated CUDA device small ones."""
    cuda = device == "cuda"
    dtype = draw(st.sampled_from(["float32", "float64", "float16", "bfloat16"]))
    batched = draw(st.integers(0, 7)) > 0
    fields = {
        "T": draw(sizes(8 if cuda else 65, 0)),
        "B": draw(sizes(20 if cuda else 65, 0)) if batched else 1,
        "I": draw(sizes(33 if cuda else 65, 0)),
        "H": draw(sizes(65, 0)),
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
        "used": draw(st.integers(0, 7)),
        "threads": 1 if cuda else draw(st.integers(1, 4)),
        "seed": draw(st.integers(0, 2**16)),
        "device": device,
    }
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
    return Case(**fields)
