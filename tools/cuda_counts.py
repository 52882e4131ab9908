"""Counts the work in a step of the persistent CUDA kernels, beside studies of the same.

Without a GPU the number of instructions that one warp runs in a step stands for its time, because steps wait for each
other, and so do most of a warp's instructions. The layers run on an emulator that appends one JSON line per launch to a
file, with the fields kernel, grid, block, cluster, warp_instructions (of PTX), global_load_bytes, global_store_bytes,
shared_bank_conflicts and by_class. EMULATOR stands for a command that runs a program on it and counts to counts.jsonl:

    EMULATOR python tools/cuda_counts.py counts.jsonl
    EMULATOR python tools/cuda_counts.py counts.jsonl --only "bfloat16 768" --algorithm persistent-grid

Each pass runs over 4 and over 8 steps, and a step is a quarter of the difference. The table has two lines for each
pass: the study, and the kernels of this build with their ratio to the study in brackets. With `--cell gru` they are the
LSTM and the GRU of this build, of the same size. The counts of waiting (at a counter, at a barrier in shared memory)
depend on the emulator.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

STEPS = (4, 8)


@dataclass
class Count:
    """The warps of all blocks, and their work in a step. Shared memory is counted in instructions of a warp."""

    warps: float
    instructions: float
    of_a_warp: float
    mma: float
    shared_loads: float
    shared_stores: float
    bank_conflicts: float  # turns of shared memory beyond the first
    st_async: float  # instructions that store to another block's shared memory
    global_bytes: float

    @classmethod
    def of(cls, launches: Sequence[dict]) -> Count:
        def kind(name: str) -> int:
            return sum(launch["by_class"].get(name, 0) for launch in launches)

        def total(*names: str) -> int:
            return sum(launch[name] for launch in launches for name in names)

        warps = sum(math.prod(launch["grid"]) * math.prod(launch["block"]) // 32 for launch in launches)
        return cls(
            warps,
            total("warp_instructions"),
            total("warp_instructions") / warps,
            kind("mma"),
            kind("ld.shared"),
            kind("st.shared"),
            total("shared_bank_conflicts"),
            kind("st.other"),
            total("global_load_bytes", "global_store_bytes"),
        )

    @classmethod
    def of_a_step(cls, few: Sequence[dict], many: Sequence[dict]) -> Count:
        """Takes launches over STEPS[0] and over STEPS[1] steps."""
        a, b = cls.of(few), cls.of(many)
        added = {f.name: (getattr(b, f.name) - getattr(a, f.name)) / (STEPS[1] - STEPS[0]) for f in fields(cls)}
        return cls(**{**added, "warps": b.warps})


@dataclass
class Study:
    """A layer of two directions that saves its results, and the counts of a kernel that was written for this size only,
    to see how fast one can be."""

    dtype: str
    H: int
    B: int
    direction: str
    algorithm: str
    count: Count

    def __str__(self) -> str:
        return f"{self.dtype} {self.H}, B {self.B}, {self.direction}"


# docs/cuda.md tells how fast these kernels were.
CLUSTER, GRID = "persistent-cluster", "persistent-grid"
STUDIES = [
    Study("bfloat16", 128, 100, "forward", CLUSTER, Count(832, 149356, 180, 6656, 13312, 6656, 14976, 832, 563200)),
    Study("bfloat16", 256, 16, "forward", CLUSTER, Count(256, 47688, 186, 4096, 5120, 2048, 10752, 256, 180224)),
    Study("bfloat16", 512, 16, "forward", CLUSTER, Count(512, 109736, 214, 16384, 14336, 4096, 43008, 1024, 360448)),
    Study("bfloat16", 768, 16, "forward", CLUSTER, Count(768, 217064, 283, 36864, 44544, 6144, 66560, 1536, 540672)),
    Study("bfloat16", 128, 100, "backward", CLUSTER, Count(832, 202010, 243, 6656, 13312, 6656, 9984, 832, 563200)),
    Study("bfloat16", 256, 16, "backward", CLUSTER, Count(256, 64022, 250, 4096, 4352, 2048, 6144, 512, 180224)),
    Study("bfloat16", 512, 16, "backward", CLUSTER, Count(512, 162778, 318, 16384, 9728, 4096, 24576, 2048, 360448)),
    Study("bfloat16", 768, 16, "backward", CLUSTER, Count(768, 277031, 361, 36864, 36096, 6144, 37120, 3072, 540672)),
    Study("float32", 128, 100, "forward", CLUSTER, Count(832, 634092, 762, 39936, 13312, 6656, 14976, 832, 1024000)),
    Study("bfloat16", 1024, 16, "forward", GRID, Count(1024, 359842, 351, 65536, 49152, 32768, 32768, 0, 792000)),
]


# --- counting ---------------------------------------------------------------------------------------------------------


def counted(stats: Path, kernels: str, run: Callable[[], object]) -> list[dict]:
    """Returns the launches that the emulator recorded during `run`, of kernels whose names match."""
    import torch

    torch.cuda.synchronize()
    before = stats.stat().st_size if stats.exists() else 0
    run()
    torch.cuda.synchronize()
    if not stats.exists() or stats.stat().st_size == before:
        sys.exit(f"cuda_counts: the device has counted nothing to {stats}")
    with stats.open() as file:
        file.seek(before)
        launches = [json.loads(line) for line in file]
    matching = [launch for launch in launches if re.search(kernels, launch["kernel"])]
    if not matching:
        names = {launch["kernel"][:80] for launch in launches}
        sys.exit(f"cuda_counts: no kernel's name matches {kernels!r}: {', '.join(sorted(names))}")
    return matching


def measure(study: Study, cell: str, algorithm: str, stats: Path, kernels: str) -> tuple[list[dict], Count]:
    """Returns the launches over STEPS[1] steps, and the counts of a step."""
    os.environ["BIRNN_CUDA_ALGO"] = algorithm
    import torch

    import birnn_ext

    options = {"device": "cuda", "dtype": getattr(torch, study.dtype)}
    gates = {"lstm": 4, "gru": 3}[cell]
    w_hh = torch.randn(2, gates * study.H, study.H).div(study.H**0.5).to(**options)
    forward = getattr(torch.ops.birnn_ext, f"{cell}_recurrence")
    backward = getattr(torch.ops.birnn_ext, f"{cell}_recurrence_backward")
    launches = []
    for steps in STEPS:
        gates_x = torch.randn(steps, study.B, 2, gates * study.H).to(**options)
        dy = torch.randn(steps, study.B, 2, study.H).to(**options)
        y, _, *saved = forward(gates_x, w_hh, None, None, None, "all")
        if study.direction == "forward":
            launches.append(counted(stats, kernels, lambda: forward(gates_x, w_hh, None, None, None, "all")))  # noqa: B023
        else:
            given = (None, None, *saved[1:], dy, None, None) if cell == "lstm" else (None, None, y, *saved, dy, None)
            arguments = (w_hh, *given, False)
            launches.append(counted(stats, kernels, lambda: backward(*arguments)))  # noqa: B023
    ran = {name for name, calls in birnn_ext.op_calls().items() if name.startswith("cuda_persistent") and calls}
    assert f"cuda_{algorithm}" in ran, f"{ran} ran"
    return launches[1], Count.of_a_step(*launches)


# --- the table --------------------------------------------------------------------------------------------------------

HEAD = ["layer, pass", "kernel", "warps", "warp instructions", "of a warp", "mma", "shared loads / stores"]
HEAD += ["bank conflicts", "st.async", "global bytes"]


def cells(count: Count, study: Count | None = None) -> list[str]:
    def cell(name: str) -> str:
        value, of_study = getattr(count, name), getattr(study or count, name)
        ratio = f" ({value / of_study:.2f})" if study and of_study else ""
        return f"{value:.0f}{ratio}"

    names = ["warps", "instructions", "of_a_warp", "mma"]
    shared = f"{cell('shared_loads')} / {cell('shared_stores')}"
    return [*map(cell, names), shared, *map(cell, ["bank_conflicts", "st_async", "global_bytes"])]


def name_of(algorithm: str, launches: Sequence[dict]) -> str:
    """Returns the algorithm with the number of blocks and the size of a cluster."""
    blocks = sum(math.prod(launch["grid"]) for launch in launches)
    cluster = math.prod(launches[0].get("cluster") or [1])
    return f"{algorithm}, {blocks} blocks" + (f" in clusters of {cluster}" if cluster > 1 else "")


def row(words: Sequence[str]) -> str:
    return f"| {' | '.join(words)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stats", type=Path, help="the file that the device counts to")
    parser.add_argument("--only", default="", metavar="TEXT", help='only layers with it: "bfloat16 768", "forward"')
    parser.add_argument("--algorithm", metavar="NAME", help="in place of the one that the study is like")
    parser.add_argument("--cell", choices=["lstm", "gru"], default="lstm", help="gru: compare it with the LSTM")
    parser.add_argument("--kernels", default="birnn", metavar="REGEX", help="names of kernels that count")
    args = parser.parse_args()
    print(row(HEAD), row(["---", "---", *["---:"] * (len(HEAD) - 2)]), sep="\n")
    for study in STUDIES:
        if args.only not in str(study):
            continue
        algorithm = args.algorithm or study.algorithm
        other, name = study.count, "study"
        if args.cell != "lstm":
            launches, other = measure(study, "lstm", algorithm, args.stats, args.kernels)
            name = f"lstm, {name_of(algorithm, launches)}"
        print(row([str(study), name, *cells(other)]), flush=True)
        launches, count = measure(study, args.cell, algorithm, args.stats, args.kernels)
        name = name_of(algorithm, launches)
        print(row(["", name if args.cell == "lstm" else f"{args.cell}, {name}", *cells(count, other)]), flush=True)


if __name__ == "__main__":
    main()
