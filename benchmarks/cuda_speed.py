"""birnn_ext beside cuDNN on a GPU: forward, and forward + backward, for each algorithm and for the one that is chosen.

    python benchmarks/cuda_speed.py

Before a row is timed, every contestant's output is compared with nn.LSTM's. Then the contestants take turns, round by
round, so that a drift of clocks and temperature hits all alike; a figure is the median of the rounds, in milliseconds
of a call by CUDA events, with all that a user pays for: Python, launches, allocation. FlashRNN takes part where it is
installed, in one direction and bfloat16, together with the projection that it leaves to PyTorch. An empty cell: this
contestant can't run the layer here. Rows are printed as they come; what fails says so in its cell, and the exit status
is 1.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import NamedTuple

import torch
from measuring import error, markdown, twins
from torch import Tensor, nn

import birnn_ext
from birnn_ext import op_calls

ALGORITHMS = ["stepwise", "persistent-cta", "persistent-grid", "persistent-cluster"]
OURS, CUDNN, FLASH = "birnn_ext", "nn.LSTM", "FlashRNN"
VARIABLE = "BIRNN_CUDA_ALGO"  # names the algorithm to take
WARM_UP = 3  # calls: libraries set themselves up, clocks rise
TURN = 50.0  # ms: short work is repeated for so long
# how far outputs may be from nn.LSTM's, relative to the largest: nothing is wrong, no more
TOLERANCE = {"float32": 1e-4, "float32, TF32": 1e-2, "float16": 2e-2, "bfloat16": 1e-1}

Work = Callable[[], Tensor]  # returns its output, for the comparison


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
]
TINY = Shape(2, 4, 8, 16, 1)


@dataclass
class Row:
    """A row of the table: by contestant, milliseconds of a call in every round."""

    name: str
    mode: str
    shape: Shape
    figures: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)  # by contestant, in a few words
    chosen: str = ""  # the algorithm that birnn_ext took by itself

    def cell(self, contestant: str) -> str:
        if contestant in self.failures:
            return self.failures[contestant]
        return f"{median(self.figures[contestant]):.4g}" if contestant in self.figures else ""

    def ratio(self) -> str:
        """nn.LSTM's time over ours."""
        ours, theirs = (median(self.figures.get(name, [0.0])) for name in (OURS, CUDNN))
        return f"{theirs / ours:.2f}" if ours > 0 and theirs > 0 else ""


@contextmanager
def precision(mode: str) -> Iterator[torch.dtype]:
    """The dtype of a mode; TF32 is allowed to all, or to nobody."""
    allow = mode.endswith("TF32")
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow
    try:
        yield getattr(torch, mode.split(",")[0])
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextmanager
def algorithm(name: str | None) -> Iterator[None]:
    """What birnn_ext takes: the one named, or the one that it chooses."""
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
    """The same layer by FlashRNN: its gates are in nn.LSTM's order, all units are one head."""
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


def contestants(shape: Shape, dtype: torch.dtype, work: Callable[..., Tensor]) -> dict[str, Work]:
    options = {"device": "cuda", "dtype": dtype}
    both = twins(shape.I, shape.H, shape.layers, batch_first=True, bidirectional=shape.D == 2, **options)
    x = torch.randn(shape.B, shape.T, shape.I, **options)
    dy = torch.randn(shape.B, shape.T, shape.D * shape.H, **options)
    ours, theirs = (partial(work, lambda lstm=lstm: lstm(x)[0], [*lstm.parameters()], dy) for lstm in both)
    works = {CUDNN: theirs, OURS: partial(forced, None, ours)}
    for name in ALGORITHMS:
        works[name] = partial(forced, name, ours)
    if find_spec("flashrnn") and shape.D == shape.layers == 1 and dtype == torch.bfloat16:
        works[FLASH] = partial(work, *flashrnn_run(both[1], x), dy)
    return works


# --- a row ------------------------------------------------------------------------------------------------------------


def algorithms_taken(work: Work) -> str:
    """The names of the algorithms that ran, as the extension counted them."""
    before = op_calls()
    work()
    after = op_calls()
    return " + ".join(name for name in ALGORITHMS if after[f"cuda_{name}"] > before[f"cuda_{name}"])


def in_a_few_words(failure: Exception) -> str:
    first = (str(failure).strip().splitlines() or [type(failure).__name__])[0]
    return f"failed: {first[:60]}".replace("|", "/")


def check(works: dict[str, Work], mode: str) -> dict[str, str]:
    """Compares outputs with nn.LSTM's. Takes out those who can't take part; returns the failures among them."""
    failures = {}
    expected = works[CUDNN]()
    for name, work in list(works.items()):
        try:
            found = error(work(), expected)
            if not found <= TOLERANCE[mode]:
                failures[name] = f"WRONG: off by {found:.1e}"
        except Exception as failure:
            if name not in ALGORITHMS or "can't run this layer" not in str(failure):
                failures[name] = in_a_few_words(failure)
            del works[name]
            continue
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


def measure(works: dict[str, Work], rounds: int, failures: dict[str, str]) -> dict[str, list[float]]:
    """Milliseconds of each round. Who fails takes no further part, and is added to `failures`."""
    figures: dict[str, list[float]] = {name: [] for name in works}
    numbers: dict[str, int] = {}
    for turn in range(rounds + 1):
        for name, work in works.items():
            if name in failures:
                continue
            try:
                if turn == 0:
                    milliseconds(work, WARM_UP)
                    once = milliseconds(work, 1)
                    numbers[name] = max(1, round(TURN / once)) if once > 0 else 1  # a device without a clock says 0
                else:
                    milliseconds(work, 1)  # the caches are this contestant's
                    figures[name].append(milliseconds(work, numbers[name]))
            except Exception as failure:
                failures[name] = in_a_few_words(failure)
    return {name: times for name, times in figures.items() if name not in failures}


def timed_row(name: str, work: Callable[..., Tensor], mode: str, shape: Shape, rounds: int) -> Row:
    torch.manual_seed(0)
    row = Row(name, mode, shape)
    with precision(mode) as dtype:
        works = contestants(shape, dtype, work)
        row.failures = check(works, mode)
        if OURS in works:
            row.chosen = algorithms_taken(works[OURS])
        row.figures = measure(works, rounds, row.failures)
    return row


def contestants_here() -> list[str]:
    return [CUDNN, OURS, *ALGORITHMS, *([FLASH] if find_spec("flashrnn") else [])]


def heading() -> list[str]:
    return ["ms", "dtype", "B,T,I,H,layers,D", *contestants_here(), "chosen", f"{CUDNN} / {OURS}"]


def line(row: Row) -> list[str]:
    cells = [row.cell(name) for name in contestants_here()]
    return [row.name, row.mode, ",".join(map(str, row.shape)), *cells, row.chosen, row.ratio()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="one tiny shape, one round: whether it runs, not how fast")
    parser.add_argument("--only", default="", metavar="TEXT", help='only rows with it, such as "16,1024" or "bfloat16"')
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("cuda_speed: PyTorch finds no CUDA device here")
    rounds = 1 if args.quick else args.rounds
    cudnn = torch.backends.cudnn.version()
    info = birnn_ext.build_info()
    print(
        f"{torch.cuda.get_device_name()}; torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {cudnn}, "
        f"birnn_ext {birnn_ext.__version__} for {info['cuda_architectures']}; medians of {rounds} rounds\n\n"
        f"{markdown([heading()])}",
        flush=True,
    )
    failed = False
    for shape in [TINY] if args.quick else SHAPES:
        for mode in TOLERANCE:
            for name, work in ("forward", forward), ("forward + backward", forward_backward):
                if args.only not in f"{name} {mode} {','.join(map(str, shape))}":
                    continue
                try:
                    row = timed_row(name, work, mode, shape, rounds)
                except Exception as failure:  # such as too little memory: the rows after it may do
                    row = Row(name, mode, shape, failures=dict.fromkeys([CUDNN], in_a_few_words(failure)))
                failed = failed or bool(row.failures)
                print(f"| {' | '.join(line(row))} |", flush=True)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
