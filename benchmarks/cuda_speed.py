"""Times birnn_ext beside cuDNN on a GPU: forward, and forward + backward, with each algorithm that can run the layer.

    python benchmarks/cuda_speed.py --json benchmarks/results/cuda_h100.json
    python benchmarks/cuda_speed.py --table benchmarks/results/cuda_h100.json  # prints it again; needs no GPU

Every contestant's output is compared with nn.LSTM's before a row is timed. Then the contestants take turns, round by
round, so that a drift of clocks and temperature affects all alike. A figure is the median of the rounds, in
milliseconds per call by CUDA events. It includes all that a user pays for: Python, launches, allocation. The algorithm
that birnn_ext chooses by itself is bold. "us a step" is the GPU's time for the recurrence alone with that algorithm,
without the host's time, as a CUDA graph replays it: forward without saving, or forward with saving + backward. FlashRNN
takes part if it is installed, in one direction and bfloat16, together with the projection that it leaves to PyTorch. A
cell is empty if the algorithm can't run the layer on this GPU. Rows are printed as they are ready. A failure is named
in its cell, and makes the exit status 1.

All rows together take about four minutes (--minutes). A row takes its share of the time that is left, in as many and as
long turns as fit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from measuring import commit, error, markdown, twins
from torch import Tensor, nn

import birnn_ext
from birnn_ext import _C, op_calls

ALGORITHMS = ["stepwise", "persistent-cta", "persistent-grid", "persistent-cluster"]
CUDNN, FLASH = "nn.LSTM", "FlashRNN"
VARIABLE = "BIRNN_CUDA_ALGO"  # it names the algorithm to use
WARM_UP = 3  # calls, in which libraries initialise and clocks rise
ROUNDS = 9  # at most
TURN = 50.0  # ms at most, for which short work is repeated
FOR_STEPS = 0.25  # the recurrence's share of a row's time
# Outputs may differ from nn.LSTM's by this much, relative to the largest. It only shows that nothing is wrong.
TOLERANCE = {"float32": 1e-4, "float32, TF32": 1e-2, "float16": 2e-2, "bfloat16": 1e-1}

Work = Callable[[], Tensor]  # it returns its output, for the comparison


class Shape(NamedTuple):
    B: int
    T: int
    I: int  # noqa: E741
    H: int
    layers: int
    D: int = 2


SHAPES = [
    Shape(100, 28, 28, 128, 2),
    Shape(16, 1024, 768, 768, 1),
    Shape(16, 1024, 768, 768, 1, 1),  # the one that FlashRNN's authors published
    Shape(64, 200, 256, 512, 1),
    Shape(1, 28, 28, 128, 2),
    Shape(32, 100, 128, 256, 2),
    Shape(16, 256, 1024, 1024, 1),
    # hidden sizes that are no multiples of tiles, and large batches
    *(Shape(32, 100, hidden, hidden, 1) for hidden in (100, 200, 400, 650)),
    *(Shape(batch, 100, 512, 512, 1) for batch in (16, 128, 256)),
    Shape(256, 100, 128, 128, 1),
    Shape(256, 100, 1024, 1024, 1),
    # in one direction cuDNN has a persistent kernel for float16
    *(Shape(16, 100, hidden, hidden, 1, 1) for hidden in (256, 512, 1024)),
    Shape(64, 100, 512, 512, 1, 1),
]
TINY = Shape(2, 4, 8, 16, 1)
IN_README = {SHAPES[0], SHAPES[1], SHAPES[2]}


@dataclass
class Row:
    """A row of the table, and of the JSON file."""

    name: str
    mode: str
    shape: Shape
    chosen: str = ""  # the algorithm that birnn_ext chooses by itself
    ms: dict[str, float] = field(default_factory=dict)  # per call, by contestant
    us_a_step: dict[str, list[float]] = field(default_factory=dict)  # by algorithm
    failures: dict[str, str] = field(default_factory=dict)  # by contestant, in a few words

    def cell(self, contestant: str) -> str:
        if contestant in self.failures:
            return self.failures[contestant]
        if contestant not in self.ms:
            return ""
        return f"**{self.ms[contestant]:.4g}**" if contestant == self.chosen else f"{self.ms[contestant]:.4g}"

    def ratio(self) -> str:
        """Returns nn.LSTM's time over ours."""
        ours, theirs = self.ms.get(self.chosen, 0), self.ms.get(CUDNN, 0)
        return f"{theirs / ours:.2f}" if ours > 0 and theirs > 0 else ""

    def step(self) -> str:
        return " + ".join(f"{us:.3g}" for us in self.us_a_step.get(self.chosen, []))

    def entry(self) -> dict[str, Any]:
        fields = {"pass": self.name, "dtype": self.mode, "shape": self.shape._asdict(), "chosen": self.chosen}
        return {**fields, "ms": self.ms, "us_a_step": self.us_a_step, "failures": self.failures}

    @classmethod
    def of(cls, entry: dict[str, Any]) -> Row:
        measured = (entry.get(name, {}) for name in ("ms", "us_a_step", "failures"))
        return cls(entry["pass"], entry["dtype"], Shape(**entry["shape"]), entry["chosen"], *measured)


@contextmanager
def precision(mode: str) -> Iterator[torch.dtype]:
    """Yields the dtype of a mode. The mode allows TF32 to all contestants, or to none."""
    allow = mode.endswith("TF32")
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow
    try:
        yield getattr(torch, mode.split(",")[0])
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextmanager
def algorithm(name: str | None) -> Iterator[None]:
    """Makes birnn_ext use the algorithm that is named, or the one that it chooses."""
    before = os.environ.pop(VARIABLE, None)
    try:
        if name:
            os.environ[VARIABLE] = name
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before


# --- contestants ------------------------------------------------------------------------------------------------------


def forward(run: Work, parameters: Sequence[Tensor], dy: Tensor) -> Tensor:
    with torch.no_grad():
        return run()


def forward_backward(run: Work, parameters: Sequence[Tensor], dy: Tensor) -> Tensor:
    for parameter in parameters:
        parameter.grad = None
    y = run()
    y.backward(dy)
    return y.detach()


def forced(name: str | None, work: Work) -> Tensor:
    with algorithm(name):
        return work()


def flashrnn_run(lstm: nn.LSTM, x: Tensor) -> tuple[Work, list[Tensor]]:
    """Returns the same layer in FlashRNN, whose gates are in nn.LSTM's order, with all units as one head."""
    from flashrnn import flashrnn

    batch, steps, _ = x.shape
    hidden = lstm.hidden_size
    w_ih = lstm.weight_ih_l0.detach().clone().requires_grad_()
    r = lstm.weight_hh_l0.detach().reshape(4, 1, hidden, hidden).clone().requires_grad_()
    b = (lstm.bias_ih_l0 + lstm.bias_hh_l0).detach().reshape(4, 1, hidden).clone().requires_grad_()

    def run() -> Tensor:
        gates_x = (x @ w_ih.T).view(batch, steps, 4, 1, hidden)
        states, _ = flashrnn(gates_x, r, b, function="lstm", backend="cuda_fused")
        return states[0].reshape(batch, steps, hidden)

    return run, [w_ih, r, b]


def facts_of_the_gpu() -> dict[str, int]:
    """Returns the properties that the choice needs, in the order of `_C.cuda_choice`."""
    gpu = torch.cuda.get_device_properties(0)
    return {
        "multiprocessors": gpu.multi_processor_count,
        "shared_memory": gpu.shared_memory_per_block_optin,
        "capability": gpu.major * 10 + gpu.minor,
    }


def choice(shape: Shape, mode: str, gpu: dict[str, int], name: str = "") -> str | None:
    """Returns the algorithm that runs a layer on that GPU; with a name, that one, or None if it can't."""
    found = _C.cuda_choice(mode.split(",")[0], shape.H, shape.B, shape.D, *gpu.values(), name)
    return found and found["algorithm"]


def contestants(shape: Shape, dtype: torch.dtype, mode: str, work: Callable[..., Tensor]) -> dict[str, Work]:
    options = {"device": "cuda", "dtype": dtype}
    both = twins(shape.I, shape.H, shape.layers, batch_first=True, bidirectional=shape.D == 2, **options)
    x = torch.randn(shape.B, shape.T, shape.I, **options)
    dy = torch.randn(shape.B, shape.T, shape.D * shape.H, **options)
    ours, theirs = (partial(work, lambda lstm=lstm: lstm(x)[0], [*lstm.parameters()], dy) for lstm in both)
    gpu = facts_of_the_gpu()
    chosen = choice(shape, mode, gpu)
    works = {CUDNN: theirs}
    for name in ALGORITHMS:
        if choice(shape, mode, gpu, name):
            works[name] = partial(forced, None if name == chosen else name, ours)
    if find_spec("flashrnn") and shape.D == shape.layers == 1 and dtype == torch.bfloat16:
        works[FLASH] = partial(work, *flashrnn_run(both[1], x), dy)
    return works


# --- the recurrence alone ---------------------------------------------------------------------------------------------


def replayed(work: Callable[[], object], seconds: float) -> float:
    """Returns the GPU's milliseconds, without the host's. Takes about so many seconds."""
    work()  # a capture must not contain the first call's planning and loading
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    once = milliseconds(graph.replay, 2)
    number = max(1, round(min(1000 * seconds, TURN) / once)) if once > 0 else 1
    return median(milliseconds(graph.replay, number) for _ in range(3))


def us_a_step(name: str, shape: Shape, dtype: torch.dtype, backward: bool, seconds: float) -> list[float]:
    """Returns microseconds: of forward; or of forward with results saved, and of backward."""
    forward_op, backward_op = torch.ops.birnn_ext.lstm_recurrence, torch.ops.birnn_ext.lstm_recurrence_backward
    gates_x, w_hh = (
        torch.randn(size, device="cuda").div(shape.H**0.5).to(dtype)
        for size in ((shape.T, shape.B, shape.D, 4 * shape.H), (shape.D, 4 * shape.H, shape.H))
    )
    with algorithm(name), torch.no_grad():
        run = partial(forward_op, gates_x, w_hh, None, None, None, "all" if backward else "none")
        works: list[Callable[[], object]] = [run]
        if backward:
            y, _, _, gates, cells = run()
            works.append(partial(backward_op, w_hh, None, None, gates, cells, y, None, None, False))
        return [1000 * replayed(work, seconds / 5 / len(works)) / shape.T for work in works]


# --- a row ------------------------------------------------------------------------------------------------------------


def algorithms_taken(work: Work) -> str:
    """Returns the names of the algorithms that ran, from the extension's counts."""
    before = op_calls()
    work()
    after = op_calls()
    return " + ".join(name for name in ALGORITHMS if after[f"cuda_{name}"] > before[f"cuda_{name}"])


def in_a_few_words(failure: Exception) -> str:
    first = (str(failure).strip().splitlines() or [type(failure).__name__])[0]
    return f"failed: {first[:60]}".replace("|", "/")


def check(works: dict[str, Work], mode: str, chosen: str) -> dict[str, str]:
    """Compares outputs with nn.LSTM's, and the algorithm that ran with `chosen`. Removes and returns failures."""
    failures = {}
    expected = works[CUDNN]()
    for name, work in list(works.items()):
        try:
            found, ran = error(work(), expected), algorithms_taken(work) if name in ALGORITHMS else name
            if not found <= TOLERANCE[mode]:
                failures[name] = f"WRONG: off by {found:.1e}"
            elif ran != name:
                failures[name] = f"WRONG: {ran} ran"
        except Exception as failure:
            failures[name] = in_a_few_words(failure)
        if name in failures:
            del works[name]
    return failures


def milliseconds(work: Work, number: int) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(number):
        work()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / number


def measure(works: dict[str, Work], seconds: float, failures: dict[str, str]) -> dict[str, float]:
    """Returns medians in milliseconds, after about so many seconds. Moves contestants that fail to `failures`."""
    end = time.monotonic() + seconds
    figures: dict[str, list[float]] = {name: [] for name in works}
    once: dict[str, float] = {}
    rounds, turn = 1, 0.0
    for k in range(ROUNDS + 1):
        if k > rounds:
            break
        for name, work in works.items():
            if name in failures:
                continue
            try:
                if k == 0:
                    milliseconds(work, WARM_UP)
                    once[name] = milliseconds(work, 1)
                else:
                    number = max(1, int(turn / once[name])) if once[name] > 0 else 1  # 0 on a device without a clock
                    milliseconds(work, 1)  # fills the caches with this contestant's data
                    figures[name].append(milliseconds(work, number))
            except Exception as failure:
                failures[name] = in_a_few_words(failure)
        if k == 0:  # a turn is the timed work and one call before it
            left, calls = max(0.0, 1000 * (end - time.monotonic())), 2 * sum(once.values())
            rounds = min(ROUNDS, max(3, int(left / calls))) if seconds and calls else 1
            turn = min(TURN, max(0.0, left / rounds - calls / 2) / max(1, len(once)))
    return {name: median(times) for name, times in figures.items() if name not in failures}


def timed_row(name: str, work: Callable[..., Tensor], mode: str, shape: Shape, seconds: float) -> Row:
    """Checks and times a row in about so many seconds, or as few as possible if that is 0."""
    torch.manual_seed(0)
    begin = time.monotonic()
    row = Row(name, mode, shape, choice(shape, mode, facts_of_the_gpu()) or "")
    with precision(mode) as dtype:
        works = contestants(shape, dtype, mode, work)
        row.failures = check(works, mode, row.chosen)
        left = max(0.0, seconds - (time.monotonic() - begin))
        row.ms = measure(works, (1 - FOR_STEPS) * left, row.failures)
        ours = [name for name in ALGORITHMS if name in row.ms]
        for name in ours:
            try:
                share = FOR_STEPS * left / len(ours)
                row.us_a_step[name] = us_a_step(name, shape, dtype, work is forward_backward, share)
            except Exception as failure:
                row.failures[f"{name}, alone"] = in_a_few_words(failure)
    return row


# --- the table --------------------------------------------------------------------------------------------------------


def heading(names: Sequence[str]) -> list[str]:
    return ["ms", "dtype", "B,T,I,H,layers,D", *names, f"{CUDNN} / birnn_ext", "us a step"]


def line(row: Row, names: Sequence[str]) -> list[str]:
    cells = [row.cell(name) for name in names]
    alone = [f"{name} {why}" for name, why in row.failures.items() if name not in names]
    return [row.name, row.mode, ",".join(map(str, row.shape)), *cells, row.ratio(), "; ".join([row.step(), *alone])]


def contestants_of(rows: Sequence[Row]) -> list[str]:
    seen = {name for row in rows for name in [*row.ms, *row.failures]}
    return [name for name in (CUDNN, *ALGORITHMS, FLASH) if name in seen]


def table(measured: dict[str, Any], shapes: set[Shape] | None = None) -> str:
    """Returns a JSON file of this script as Markdown, only with the given shapes if there are some."""
    rows = [row for row in map(Row.of, measured["rows"]) if shapes is None or row.shape in shapes]
    names = contestants_of(rows)
    head = f"{measured['card']}, {measured['date']}, {measured['commit']}; {measured['software']}"
    return f"{head}\n\n{markdown([heading(names), *(line(row, names) for row in rows)])}"


def facts() -> dict[str, Any]:
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    build = f"built for {birnn_ext.build_info()['cuda_architectures']}"
    gpu = {"card": torch.cuda.get_device_name(), "gpu": facts_of_the_gpu()}
    return {**gpu, "date": date.today().isoformat(), "commit": commit(), "software": f"{versions}; {build}"}


def write(path: Path, measured: dict[str, Any], rows: Sequence[Row]) -> None:
    """Writes one line for each row, so that diffs are readable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps(measured, indent=1)[:-2]
    path.write_text(f'{head},\n "rows": [\n  ' + ",\n  ".join(json.dumps(r.entry()) for r in rows) + "\n ]\n}\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4, help="for all rows together")
    parser.add_argument("--quick", action="store_true", help="one tiny shape, one round: whether it runs, not how fast")
    parser.add_argument("--only", default="", metavar="TEXT", help='only rows with it, such as "16,1024" or "bfloat16"')
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures to this file")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="print the table of such a file, and measure nothing"
    )
    args = parser.parse_args(arguments)
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return
    if not torch.cuda.is_available():
        sys.exit("cuda_speed: PyTorch finds no CUDA device here")
    wanted = [
        (name, work, mode, shape)
        for shape in ([TINY] if args.quick else SHAPES)
        for mode in TOLERANCE
        for name, work in (("forward", forward), ("forward + backward", forward_backward))
        if args.only in f"{name} {mode} {','.join(map(str, shape))}"
    ]
    measured, rows = facts(), []
    names = [CUDNN, *ALGORITHMS, *([FLASH] if find_spec("flashrnn") else [])]
    print(
        f"{measured['card']}; {measured['commit']}; {measured['software']}\n\n{markdown([heading(names)])}", flush=True
    )
    end = time.monotonic() + 60 * args.minutes
    for k, (name, work, mode, shape) in enumerate(wanted):
        seconds = 0.0 if args.quick else max(0.1, (end - time.monotonic()) / (len(wanted) - k))
        try:
            row = timed_row(name, work, mode, shape, seconds)
        except Exception as failure:  # such as too little memory, which later rows may not need
            row = Row(name, mode, shape, failures={CUDNN: in_a_few_words(failure)})
        rows.append(row)
        print(f"| {' | '.join(line(row, names))} |", flush=True)
        if args.json:
            write(args.json, measured, rows)
    if any(row.failures for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
