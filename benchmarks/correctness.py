"""Measures how far outputs and gradients are from float64, ours beside nn.LSTM's of the same type, on random cases.

The truth is nn.LSTM in float64, from weights and inputs that the type can hold. An error is the largest in a tensor,
relative to its largest value or, if that is more, to a tenth of the largest among all outputs (all gradients). The
cases and the errors are those of tests/fuzz/fuzz_case.py.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from measuring import markdown
from tqdm import tqdm

from fuzz_case import Case, by_ours, by_torch, errors  # isort: skip, measuring adds its folder to the path

DTYPES = ("float64", "float32", "float16", "bfloat16")
KINDS = ("outputs", "states", "gradients")
Errors = dict[tuple[str, str], list[tuple[float, float]]]  # by dtype and kind: a pair (ours, nn.LSTM's) for each tensor


def random_case(chance: random.Random, dtype: str, device: str) -> Case:
    return Case(
        T=chance.randint(1, 64),
        B=chance.randint(1, 64),
        I=chance.randint(1, 64),
        H=chance.randint(1, 160),
        layers=chance.randint(1, 3),
        bidirectional=chance.random() < 0.7,
        bias=chance.random() < 0.8,
        hx="plain" if chance.random() < 0.7 else "",
        dtype=dtype,
        seed=chance.randrange(2**16),
        device=device,
    )


def kind_of(name: str) -> str:
    return {"y": "outputs", "h_n": "states", "c_n": "states"}.get(name, "gradients")


def measure(count: int, device: str) -> Errors:
    """Returns the errors of count configurations for each type."""
    found: Errors = {(dtype, kind): [] for dtype in DTYPES for kind in KINDS}
    for dtype in DTYPES:
        chance = random.Random(0)
        for _ in tqdm(range(count), f"errors in {dtype}", unit="case"):
            case = random_case(chance, dtype, device)
            truth = by_torch(case, torch.float64)
            theirs = truth if dtype == "float64" else by_torch(case, case.computed_in, device)
            for true, us, they in zip(truth, by_ours(case), theirs, strict=True):
                ours, torchs = errors(us, true), errors(they, true)
                for name in true:
                    found[dtype, kind_of(name)].append((ours[name], torchs[name]))
    return found


def table(found: Errors) -> str:
    rows = [["", "largest, birnn_ext", "largest, nn.LSTM", "median, birnn_ext", "median, nn.LSTM"]]
    for (dtype, kind), pairs in found.items():
        sides = list(zip(*pairs, strict=True))
        figures = [f"{of(side):.1e}" for of in (max, median) for side in sides]
        if dtype == "float64":  # nn.LSTM in float64 is the truth
            figures[1] = figures[3] = ""
        rows.append([f"{dtype}, {kind}", *figures])
    return markdown(rows)


def draw(found: Errors, path: Path) -> None:
    """Draws a dot for each tensor, at nn.LSTM's error and ours, if neither is 0. Each kind has a row of panels."""
    from matplotlib.figure import Figure

    dtypes = [dtype for dtype in DTYPES if dtype != "float64"]
    figure = Figure(figsize=(9, 8.6), layout="constrained")
    figure.suptitle("Error of each tensor against float64: below the line birnn_ext's is the smaller")
    panels = figure.subplots(len(KINDS), len(dtypes), sharex="col", sharey="col")
    for row, kind in zip(panels, KINDS, strict=True):
        for axes, dtype in zip(row, dtypes, strict=True):
            pairs = [pair for pair in found[dtype, kind] if min(pair) > 0]
            theirs, ours = [they for _, they in pairs], [us for us, _ in pairs]
            axes.loglog(theirs, ours, ".", color="#0072B2", alpha=0.4, markersize=4, markeredgewidth=0)
            below = sum(us < they for us, they in pairs) / max(1, len(pairs))
            text = f"{len(pairs):,} tensors,\n{100 * below:.0f} % below"
            axes.text(0.03, 0.97, text, transform=axes.transAxes, va="top", fontsize=9)
    for column, dtype in zip(panels.T, dtypes, strict=True):
        column[0].set_title(dtype)
        column[-1].set_xlabel("error of nn.LSTM")
        low, high = (of(column[0].get_xlim() + column[0].get_ylim()) for of in (min, max))
        for axes in column:
            axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
            axes.axline((low, low), (high, high), color="black", linewidth=0.8)
            axes.grid(color="0.9")
    for row, kind in zip(panels, KINDS, strict=True):
        row[0].set_ylabel(f"{kind}\nerror of birnn_ext")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100, help="configurations of each type")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    args = parser.parse_args(arguments)
    print(table(measure(args.cases, args.device)))


if __name__ == "__main__":
    main()
