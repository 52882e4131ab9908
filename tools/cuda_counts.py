"""Counts what the CUDA kernels of one layer do: launches, bytes of global memory, instructions, bank conflicts.

The layer runs on a device that counts: an emulator that appends one JSON line per launch to a file, with the fields
kernel, grid, block, warp_instructions (of PTX), global_load_sectors, global_load_bytes, global_store_sectors,
shared_bank_conflicts and by_class.mma. This script adds lines of its own to the same file, which say what the launches
after them belong to. EMULATOR stands for the command that runs a program so, counting to counts.jsonl:

    EMULATOR python tools/cuda_counts.py --stats counts.jsonl --dtype bfloat16 --T 64 --H 768
    python tools/cuda_counts.py --table counts.jsonl
    python tools/cuda_counts.py --model counts.jsonl

Each pass runs twice, over T steps and over half as many. What the second half adds is that of the time loop alone.

In grid one thread of a block reads a counter until all have arrived. How often says something of the emulator only, so
these reads are left out: they are the ones that fetch a sector for 4 bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

SECTOR = 32  # bytes: global memory is counted in sectors
POLL = 8  # instructions of PTX for one more look at the counter, in grid_barrier
ROWS, TILE = 16, 16  # sequences of a group of thread blocks, hidden units of a tile
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
PERSISTENT = ["persistent-cta", "persistent-grid", "persistent-cluster"]


# --- counting ---------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    """One layer, forward and backward. All lines of the file that follow a line "case" are of that case."""
    os.environ["BIRNN_CUDA_ALGO"] = args.algorithm
    import torch

    import birnn_ext
    from birnn_ext import _C

    gpu = torch.cuda.get_device_properties(0)
    facts = gpu.multi_processor_count, gpu.shared_memory_per_block_optin, gpu.major * 10 + gpu.minor
    choice = _C.cuda_choice(args.dtype, args.H, args.B, args.D, *facts, args.algorithm)
    if choice is None:
        sys.exit(f"{args.algorithm} can't run {args.dtype}, hidden size {args.H} on {gpu.name}")
    case = {
        **{name: getattr(args, name) for name in ("dtype", "algorithm", "T", "B", "D", "H")},
        "capability": f"{gpu.major}.{gpu.minor}",
        **{name: choice[name] for name in ("ctas", "reads", "exchange")},
    }
    options = {"device": "cuda", "dtype": getattr(torch, args.dtype)}
    w_hh = torch.randn(args.D, 4 * args.H, args.H).div(args.H**0.5).to(**options)
    before = birnn_ext.op_calls()[f"cuda_{args.algorithm}"]
    with args.stats.open("a") as file:

        def say(direction: str, steps: int) -> None:
            print(json.dumps({"case": case, "pass": direction, "steps": steps}), file=file, flush=True)

        for steps in (args.T // 2, args.T):
            gates_x = torch.randn(steps, args.B, args.D, 4 * args.H).to(**options)
            dy = torch.randn(steps, args.B, args.D, args.H).to(**options)
            say("forward", steps)
            *_, gates, cells = torch.ops.birnn_ext.lstm_recurrence(gates_x, w_hh, None, None, None, True)
            say("backward", steps)
            torch.ops.birnn_ext.lstm_recurrence_backward(w_hh, None, None, gates, cells, dy, None, None, False)
            torch.cuda.synchronize()
            say("none", 0)
    assert birnn_ext.op_calls()[f"cuda_{args.algorithm}"] == before + 4, "another algorithm ran"


# --- the table --------------------------------------------------------------------------------------------------------


def least_bytes(case: dict, direction: str) -> int:
    """Every tensor once; and, in grid, what a step hands on, written once and read once."""
    T, B, D, H, size = case["T"], case["B"], case["D"], case["H"], SIZES[case["dtype"]]
    cells = 4 * T * B * D * H
    outputs, state, weights = size * T * B * D * H, size * B * D * H, size * 4 * D * H * H
    if direction == "forward":  # gates_x, W_hh -> y, h_n, c_n, gates, cells
        tensors = 4 * outputs + weights + outputs + 2 * state + 4 * outputs + cells
    else:  # gates, cells, dy, W_hh -> d_gates_x
        tensors = 4 * outputs + cells + outputs + weights + 4 * outputs
    if case["algorithm"] != "persistent-grid":
        return tensors
    return tensors + 2 * (T - 1) * step_values(case) * (size if direction == "forward" else 4)


def step_values(case: dict) -> int:
    """Values that one step hands on: h, or the sums of W_hh^T dz, of all groups; sequences and units are padded."""
    return case["D"] * math.ceil(case["B"] / ROWS) * ROWS * math.ceil(case["H"] / TILE) * TILE


def handed_bytes(case: dict, direction: str) -> int:
    """Of grid's traffic, what goes from block to block: h, read by all P; or P parts of each sum, all read once."""
    if case["algorithm"] != "persistent-grid":
        return 0
    size, times = (SIZES[case["dtype"]], 1 + case["ctas"]) if direction == "forward" else (4, 2 * case["ctas"])
    return (case["T"] - 1) * step_values(case) * size * times


def passes(path: Path) -> Iterator[tuple[dict, str, int, list[dict]]]:
    """(case, direction, steps, launches of our kernels) of each pass in the file."""
    current: tuple[dict, str, int, list[dict]] | None = None
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        if "case" in entry:
            if current:
                yield current
            current = (entry["case"], entry["pass"], entry["steps"], []) if entry["steps"] else None
        elif current and "birnn" in entry["kernel"]:
            sizes = {"blocks": math.prod(entry["grid"]), "threads": math.prod(entry["block"])}
            current[3].append({**entry, **sizes})


def total(launches: Sequence[dict], *names: str) -> int:
    return sum(launch[name] for launch in launches for name in names)


def polls(case: dict, direction: str, launches: Sequence[dict]) -> int:
    """Reads of grid's counter. All else is read in whole sectors, but for W_hh's columns in the backward pass."""
    if case["algorithm"] != "persistent-grid":
        return 0
    unused = SECTOR * total(launches, "global_load_sectors") - total(launches, "global_load_bytes")
    if direction == "backward" and SIZES[case["dtype"]] == 2:  # 8 neighbouring columns: 16 bytes
        unused -= total(launches, "blocks") // case["ctas"] * 4 * case["H"] ** 2 * 2
    return round(unused / (SECTOR - 4))


@dataclass
class Count:
    """What a pass did: bytes of global memory, instructions, mma among them, extra turns at shared memory's banks."""

    moved: float
    instructions: float
    mma: float
    conflicts: float

    @classmethod
    def of(cls, case: dict, direction: str, launches: Sequence[dict]) -> Count:
        extra = polls(case, direction, launches)
        return cls(
            SECTOR * (total(launches, "global_load_sectors", "global_store_sectors") - extra),
            total(launches, "warp_instructions") - POLL * extra,
            sum(launch["by_class"].get("mma", 0) for launch in launches),
            total(launches, "shared_bank_conflicts"),
        )


COLUMNS = [
    ("capability, algorithm (P)", "---"),
    ("dtype B,T,D,H", "---"),
    ("pass", "---"),
    ("launches", "---:"),
    ("moved, MB", "---:"),
    ("least, MB", "---:"),
    ("moved / least", "---:"),
    ("handed on, MB", "---:"),
    ("warps", "---:"),
    ("instructions a step", "---:"),
    ("mma a step", "---:"),
    ("bank conflicts", "---:"),
    ("a step", "---:"),
]


def whole_passes(path: Path) -> Iterator[tuple[dict, str, list[dict], Count, Count]]:
    """(case, direction, launches, their count, the count of one step of the time loop) of each pass of all steps."""
    half: dict[str, Count] = {}  # by direction
    for case, direction, steps, launches in passes(path):
        count = Count.of(case, direction, launches)
        if steps < case["T"]:
            half[direction] = count
            continue
        added = steps - steps // 2
        step = Count(*((a - b) / added for a, b in zip(astuple(count), astuple(half[direction]), strict=True)))
        yield case, direction, launches, count, step


def table(path: Path) -> str:
    lines = [[name for name, _ in COLUMNS], [rule for _, rule in COLUMNS]]
    for case, direction, launches, count, step in whole_passes(path):
        least, handed = least_bytes(case, direction), handed_bytes(case, direction)
        lines.append(
            [
                f"{case['capability']} {case['algorithm']} ({case['ctas']})",
                f"{case['dtype']} {','.join(str(case[name]) for name in 'BTDH')}",
                direction,
                str(len(launches)),
                f"{count.moved / 1e6:.2f}",
                f"{least / 1e6:.2f}",
                f"{count.moved / least:.2f}",
                f"{handed / 1e6:.2f}" if handed else "",
                str(sum(launch["blocks"] * launch["threads"] // 32 for launch in launches)),
                f"{step.instructions:.0f}",
                f"{step.mma:.0f}",
                f"{count.conflicts:.0f}",
                f"{step.conflicts:g}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- a model of a step's time -----------------------------------------------------------------------------------------


@dataclass
class Gpu:
    name: str
    clock: float  # ticks in a microsecond
    mma: float  # ticks of a scheduler for one, from the dense peak in 16 bits


GPUS = {"8.0": Gpu("A100", 1410, 8), "9.0": Gpu("H100", 1755, 4)}  # by compute capability
CELLS = 900  # ticks: a warp's cells, a guess
BANKS = 128  # bytes a tick from shared memory
SCHEDULERS = 4


def model(path: Path) -> str:
    """Ticks of the busiest of a multiprocessor's schedulers, or of its shared memory, from what was counted."""
    columns = ["tensor cores", "shared memory", "instructions", "at least, us", "at most, us"]
    lines = [["GPU, algorithm, dtype, H", "pass", *columns], ["---", "---", *["---:"] * len(columns)]]
    for case, direction, launches, _, step in whole_passes(path):
        if case["capability"] not in GPUS:
            sys.exit(f"cuda_counts: the model knows compute capability 8.0 and 9.0, not {case['capability']}")
        gpu = GPUS[case["capability"]]
        warps = launches[0]["threads"] // 32
        busiest = math.ceil(warps / SCHEDULERS) / warps / sum(launch["blocks"] for launch in launches)
        products, instructions = step.mma * busiest * gpu.mma, step.instructions * busiest
        memory = case["reads"][0 if direction == "forward" else 1] / BANKS
        least, most = (
            (ticks + CELLS) / gpu.clock + case["exchange"]
            for ticks in (max(products, memory), max(products, memory, instructions))
        )
        what = (
            f"{gpu.name} {case['algorithm'].removeprefix('persistent-')} ({case['ctas']}), {case['dtype']} {case['H']}"
        )
        figures = [f"{ticks:.0f}" for ticks in (products, memory, instructions)]
        lines.append([what, direction, *figures, f"{least:.1f}", f"{most:.1f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--stats", type=Path, metavar="FILE", help="run a layer; the device counts to this file")
    action.add_argument("--table", type=Path, metavar="FILE", help="print the table of all layers in this file")
    action.add_argument("--model", type=Path, metavar="FILE", help="print what a step of them would take, by a model")
    parser.add_argument("--algorithm", choices=PERSISTENT, default="persistent-cta")
    parser.add_argument("--dtype", choices=SIZES, default="float32")
    parser.add_argument("--T", type=int, default=28, help="steps, an even number")
    parser.add_argument("--B", type=int, default=16, help="sequences")
    parser.add_argument("--D", type=int, choices=[1, 2], default=2, help="directions")
    parser.add_argument("--H", type=int, default=128, help="hidden units")
    args = parser.parse_args()
    if args.T < 4 or args.T % 2:
        parser.error("--T must be even, and 4 at least")
    if args.table:
        print(table(args.table))
    elif args.model:
        print(model(args.model))
    else:
        run(args)


if __name__ == "__main__":
    main()
