"""How far outputs and gradients are from float64: ours beside nn.LSTM's of the same type, on random configurations.

The truth is nn.LSTM in float64, from weights and inputs that the type can hold. An error is the largest of a tensor,
relative to its largest value or, if that is more, to a tenth of the largest of all outputs (of all gradients):
tests/fuzz/fuzz_case.py, whose cases these are.
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

from fuzz_case import Case, by_ours, by_torch, errors  # isort: skip, measuring says where it is

DTYPES = ("float64", "float32", "float16", "bfloat16")
KINDS = ("outputs", "states", "gradients")
Errors = dict[tuple[str, str], list[tuple[float, float]]]  # by dtype and kind: ours, nn.LSTM's for each tensor


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
    """Errors of count configurations for each type."""
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
        if dtype == "float64":  # the truth itself
            figures[1] = figures[3] = ""
        rows.append([f"{dtype}, {kind}", *figures])
    return markdown(rows)


def draw(found: Errors, path: Path) -> None:
    """A dot for each tensor: nn.LSTM's error and ours, where neither is 0."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    dtypes = [dtype for dtype in DTYPES if dtype != "float64"]
    for axes, dtype in zip(figure.subplots(1, len(dtypes)), dtypes, strict=True):
        for kind in KINDS:
            pairs = [pair for pair in found[dtype, kind] if min(pair) > 0]
            axes.loglog([theirs for _, theirs in pairs], [ours for ours, _ in pairs], ".", markersize=3, label=kind)
        low, high = (of(axes.get_xlim() + axes.get_ylim()) for of in (min, max))
        axes.axline((low, low), (high, high), color="black", linewidth=0.8)
        axes.set(title=dtype, xlabel="error of nn.LSTM", ylabel="error of birnn_ext", aspect="equal")
        axes.set(xlim=(low, high), ylim=(low, high))
    figure.axes[0].legend(fontsize=8)
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
