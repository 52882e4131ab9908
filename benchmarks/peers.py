"""Times birnn_ext beside its peers on the CPU (nn.LSTM, ONNX Runtime, OpenVINO, JAX), all in one run.

`make bench-peers` runs it. Every contestant's results are compared with nn.LSTM's before a row is timed. Then the
contestants take turns, round by round, so that a drift of the machine affects all alike. A figure is the median of the
rounds. Peers that are not installed leave their columns empty. The peak memory needs Linux.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import platform
import sys
import time
import timeit
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measuring import GRU_CELL, LSTM_CELL, Cell, TutorialBiRNN, alone, commit, error, markdown, memory, twins
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import birnn_ext
from birnn_ext import LSTM, BiRNN, restore
from birnn_ext.mnist.training import device_name

Shape = tuple[int, int, int, int, int]  # B, T, I, H, layers; all are bidirectional
Work = Callable[[], list[Any]]  # it returns its results, for the comparison
Works = dict[str, Work]  # by contestant

ROOT = Path(__file__).parents[1]
RESULTS, CHART = ROOT / "benchmarks" / "results" / "peers.json", ROOT / "docs" / "peers.png"
OURS, TORCH = "birnn_ext", "nn.LSTM"
PEERS = {"ONNX Runtime": ("onnxruntime", "onnx"), "OpenVINO": ("openvino", "onnx"), "JAX": ("jax",)}  # and packages
# These are Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = {OURS: "#0072B2", "ONNX Runtime": "#E69F00", "OpenVINO": "#009E73", "JAX": "#999999"}
# Results may differ by this much, relative to the largest value. It only shows that nothing is wrong.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
MNIST: Shape = (100, 28, 28, 128, 2)
BATCH: Shape = (32, 100, 128, 256, 2)
SINGLE: Shape = (1, 28, 28, 128, 2)
WIDE: Shape = (64, 200, 256, 512, 1)
RAGGED: Shape = (32, 400, 64, 128, 1)
TURN = 0.1  # seconds, for which short work is repeated
PATIENCE = 60  # seconds, after which three rounds are enough, as products of 16 bits may be a hundred times slower
BUSY = 0.5  # load from which on figures are too large, which the table then says
REST = 0.05  # seconds, after which threads that spin for more work, such as ONNX Runtime's, sleep


class NotHereError(Exception):
    """A row can't be measured here, for a reason that the table shows."""


@dataclass
class Row:
    """A row of the table: every round's figure, by contestant. Less is better."""

    name: str
    shape: Shape
    unit: str = "ms"
    figures: dict[str, list[float]] = field(default_factory=dict)
    note: str = ""

    @property
    def sizes(self) -> str:
        return ",".join(map(str, self.shape))

    def median(self, contestant: str) -> float:
        return median(self.figures[contestant])

    def advantage(self, *others: str) -> float | None:
        """Returns the best of the others' figures over birnn_ext's."""
        found = [self.median(name) for name in others if name in self.figures]
        return min(found) / self.median(OURS) if found and OURS in self.figures else None


def in_words(shape: Shape) -> str:
    batch, steps, features, hidden, layers = shape
    return f"batch {batch}, {steps} steps, {features} features, {hidden} units, {layers} layer{'s' * (layers > 1)}"


def installed() -> list[str]:
    return [peer for peer, needs in PEERS.items() if all(importlib.util.find_spec(module) for module in needs)]


# --- peers ------------------------------------------------------------------------------------------------------------


def onnx_model(rnn: nn.RNNBase) -> bytes:
    """Returns a bidirectional, batch-first nn.LSTM or nn.GRU as an ONNX graph: x (B, T, I) -> y (B, T, 2H)."""
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants = [], []
    # torch's i, f, g, o becomes i, o, f, g, and its r, z, n becomes z, r, n
    order = [0, 3, 1, 2] if isinstance(rnn, nn.LSTM) else [1, 0, 2]
    attributes = {"hidden_size": rnn.hidden_size, "direction": "bidirectional"}
    if isinstance(rnn, nn.GRU):
        attributes["linear_before_reset"] = 1

    def constant(name: str, value: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(value, name))
        return name

    def stacked(name: str, layer: int) -> np.ndarray:
        """Returns (2, gates * H, ...): both directions, with gates in ONNX's order."""
        both = [getattr(rnn, f"{name}_l{layer}{suffix}").detach() for suffix in ("", "_reverse")]
        return torch.stack(both).unflatten(1, (len(order), -1))[:, order].flatten(1, 2).numpy()

    def node(operator: str, inputs: list[str], output: str, **attributes: object) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    x = node("Transpose", ["x"], "x_time_major", perm=[1, 0, 2])
    merged = constant("merged", np.array([0, 0, -1]))  # (T, B, 2, H) -> (T, B, 2H)
    for k in range(rnn.num_layers):
        biases = np.concatenate([stacked("bias_ih", k), stacked("bias_hh", k)], axis=1)
        weights = [constant(f"W{k}", stacked("weight_ih", k)), constant(f"R{k}", stacked("weight_hh", k))]
        inputs = [x, *weights, constant(f"B{k}", biases)]
        y = node(rnn.mode, inputs, f"rnn{k}", **attributes)  # (T, 2, B, H)
        x = node("Reshape", [node("Transpose", [y], f"swapped{k}", perm=[0, 2, 1, 3]), merged], f"y{k}")
    node("Transpose", [x], "y", perm=[1, 0, 2])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None, None]) for name in "xy")
    graph = helper.make_graph(nodes, "rnn", [x], [y], constants)
    opset = helper.make_opsetid("", 17)
    return helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString()


def onnxruntime_inference(rnn: nn.RNNBase, x: Tensor) -> Work:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(onnx_model(rnn), options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return lambda: session.run(None, feed)


def openvino_inference(rnn: nn.RNNBase, x: Tensor, precision: str = "f32") -> Work:
    sys.modules["openvino_telemetry"] = None  # otherwise importing openvino forks, and sends telemetry
    import openvino

    core = openvino.Core()
    model = core.read_model(onnx_model(rnn))
    model.reshape(list(x.shape))
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,  # by default it may choose bfloat16, but not on every CPU
    }
    request = core.compile_model(model, "CPU", config).create_infer_request()
    values = x.numpy()
    return lambda: list(request.infer({0: values}, share_inputs=True, share_outputs=True).values())


def jax_lstm(lstm: nn.LSTM, unroll: int) -> tuple[dict[str, Any], Callable]:
    """Returns a bidirectional, batch-first nn.LSTM's parameters, and a function of them and x that runs its scans."""
    os.environ["NPROC"] = str(torch.get_num_threads())  # XLA reads its number of threads here at its first use
    import jax.numpy as jnp
    from jax import lax, nn

    def direction(parameters: dict[str, Any], x: Any, suffix: str) -> Any:  # x (T, B, .) -> (T, B, H)
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        w_ih, w_hh, b_ih, b_hh = (parameters[name + suffix] for name in names)

        def step(state, gates_x):
            h, c = state
            i, f, g, o = jnp.split(gates_x + h @ w_hh.T, 4, axis=-1)
            c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
            h = nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zeros = jnp.zeros((x.shape[1], w_hh.shape[1]))
        reverse = suffix.endswith("_reverse")
        return lax.scan(step, (zeros, zeros), x @ w_ih.T + (b_ih + b_hh), reverse=reverse, unroll=unroll)[1]

    def forward(parameters: dict[str, Any], x: Any) -> Any:
        x = x.swapaxes(0, 1)
        for k in range(lstm.num_layers):
            x = jnp.concatenate([direction(parameters, x, f"_l{k}{suffix}") for suffix in ("", "_reverse")], -1)
        return x.swapaxes(0, 1)

    return {name: jnp.asarray(value.detach().numpy()) for name, value in lstm.named_parameters()}, forward


def jax_inference(lstm: nn.LSTM, x: Tensor) -> Work:
    import jax

    parameters, forward = jax_lstm(lstm, unroll=4)  # unroll=1 was slower here, but faster with gradients
    compiled, values = jax.jit(forward), jax.numpy.asarray(x.numpy())
    return lambda: [compiled(parameters, values).block_until_ready()]


def jax_forward_backward(lstm: nn.LSTM, x: Tensor, dy: Tensor, last: bool) -> Work:
    import jax

    parameters, forward = jax_lstm(lstm, unroll=1)
    values, cotangent = jax.numpy.asarray(x.numpy()), jax.numpy.asarray(dy.numpy())

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradients(parameters, x, dy):
        y = forward(parameters, x)
        y = y[:, -1] if last else y
        return (y * dy).sum(), y

    def work() -> list[Any]:
        grads, y = jax.block_until_ready(gradients(parameters, values, cotangent))
        return [y, *(grads[name] for name in parameters)]

    return work


# --- rows: what is timed ----------------------------------------------------------------------------------------------


def modules(shape: Shape, cell: Cell = LSTM_CELL) -> tuple[nn.RNNBase, nn.RNNBase]:
    _, _, features, hidden, layers = shape
    return twins(features, hidden, layers, cell=cell, batch_first=True, bidirectional=True)


def inference(shape: Shape, peers: Sequence[str], dtype: torch.dtype = torch.float32, cell: Cell = LSTM_CELL) -> Works:
    ours, theirs = (rnn.eval().to(dtype) for rnn in modules(shape, cell))
    x = torch.randn(shape[:3]).to(dtype)
    makers: dict[str, Callable[..., Work]] = {}
    if dtype == torch.float32:
        makers = {"ONNX Runtime": onnxruntime_inference, "OpenVINO": openvino_inference, "JAX": jax_inference}
    elif dtype == torch.bfloat16:
        makers = {"OpenVINO": partial(openvino_inference, precision="bf16")}
    works: Works = {
        OURS: torch.inference_mode()(lambda: [ours(x)[0]]),
        TORCH: torch.inference_mode()(lambda: [theirs(x)[0]]),
    }
    if cell is not LSTM_CELL:
        makers.pop("JAX", None)  # its scan is written for the LSTM
    rounded = copy.deepcopy(theirs).float()  # NumPy and the ONNX file have no bfloat16
    return works | {peer: makers[peer](rounded, x.float()) for peer in peers if peer in makers}


def backward_of(rnn: nn.RNNBase, run: Callable[[], Tensor], dy: Tensor) -> Work:
    def work() -> list[Tensor]:
        rnn.zero_grad()
        y = run()
        y.backward(dy)
        return [y, *(parameter.grad for parameter in rnn.parameters())]

    return work


def forward_backward(shape: Shape, peers: Sequence[str], last: bool = False, cell: Cell = LSTM_CELL) -> Works:
    """Runs forward + backward of all outputs or, many-to-one, of the last one."""
    ours, theirs = modules(shape, cell)
    batch, steps, features, hidden, _ = shape
    x = torch.randn(batch, steps, features)
    dy = torch.randn((batch, 2 * hidden) if last else (batch, steps, 2 * hidden))
    works: Works = {
        OURS: backward_of(ours, lambda: ours(x, output="last" if last else "all")[0], dy),
        TORCH: backward_of(theirs, lambda: theirs(x)[0][:, -1] if last else theirs(x)[0], dy),
    }
    if "JAX" in peers and cell is LSTM_CELL:
        works["JAX"] = jax_forward_backward(theirs, x, dy, last)
    return works


def ragged(shape: Shape, peers: Sequence[str]) -> Works:
    ours, theirs = modules(shape)
    batch, steps, features, hidden, _ = shape
    x, dy = torch.randn(batch, steps, features), torch.randn(batch, steps, 2 * hidden)
    lengths = torch.randint(steps // 2, steps + 1, (batch,))

    def packed() -> Tensor:
        y, _ = theirs(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
        return pad_packed_sequence(y, batch_first=True, total_length=steps)[0]

    return {
        OURS: backward_of(ours, lambda: ours(x, lengths=lengths)[0], dy),
        TORCH: backward_of(theirs, packed, dy),
    }


def training_step(
    shape: Shape,
    peers: Sequence[str],
    dtype: torch.dtype = torch.float32,
    precision: str = "highest",
    cell: Cell = LSTM_CELL,
) -> Works:
    """Trains the tutorial's many-to-one classifier with cross entropy and fused Adam. precision is for ours only."""
    if precision != "highest" and "amx_tile" not in Path("/proc/cpuinfo").read_text():
        raise NotHereError("no AMX here")
    batch, steps, features, hidden, layers = shape
    ours = BiRNN(features, hidden, layers, 10, cell=cell.name).to(dtype)
    theirs: nn.Module = TutorialBiRNN(features, hidden, layers, 10).to(dtype)
    if cell is LSTM_CELL:
        theirs.load_state_dict(ours.state_dict())
    else:  # the same with an nn.GRU
        theirs = copy.deepcopy(ours)
        restore(theirs)
    images, labels = torch.rand(batch, steps, features, dtype=dtype), torch.arange(batch) % 10

    def step_of(model: nn.Module, precision: str) -> Work:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.003, fused=True)

        def step() -> list[Tensor]:
            torch.set_float32_matmul_precision(precision)
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            torch.set_float32_matmul_precision("highest")
            return [loss]

        return step

    return {OURS: step_of(ours, precision), TORCH: step_of(theirs, "highest")}


ROWS: list[tuple[str, Callable[..., Works], Shape, dict[str, Any]]] = [
    ("training step", training_step, MNIST, {}),
    ("training step, bfloat16", training_step, MNIST, {"dtype": torch.bfloat16}),
    ('training step, matmul precision "high"', training_step, MNIST, {"precision": "high"}),
    ("forward + backward", forward_backward, MNIST, {}),
    ("inference", inference, MNIST, {}),
    ("inference", inference, BATCH, {}),
    ("inference", inference, SINGLE, {}),
    *(
        (f"inference, {str(dtype).removeprefix('torch.')}", inference, shape, {"dtype": dtype})
        for dtype in (torch.bfloat16, torch.float16)
        for shape in (MNIST, BATCH, SINGLE, WIDE, RAGGED)
    ),
    ("training step", training_step, SINGLE, {}),
    ("forward + backward, many-to-one", forward_backward, WIDE, {"last": True}),
    ("forward + backward, ragged", ragged, RAGGED, {}),
    ("forward + backward, the same padded", forward_backward, RAGGED, {}),
    # beside nn.GRU, in the column of nn.LSTM
    ("GRU, training step", training_step, MNIST, {"cell": GRU_CELL}),
    ("GRU, forward + backward", forward_backward, MNIST, {"cell": GRU_CELL}),
    ("GRU, inference", inference, MNIST, {"cell": GRU_CELL}),
    ("GRU, inference", inference, BATCH, {"cell": GRU_CELL}),
    ("GRU, inference", inference, SINGLE, {"cell": GRU_CELL}),
    ("GRU, training step", training_step, SINGLE, {"cell": GRU_CELL}),
]


def check(works: Works, dtype: torch.dtype) -> None:
    """Compares all results with nn.LSTM's, three times, as each training step starts from the one before."""
    for _ in range(3):
        expected = works[TORCH]()
        for name, work in works.items():
            if name == TORCH:
                continue
            for k, (actual, truth) in enumerate(zip(work(), expected, strict=True)):
                found = error(actual if isinstance(actual, Tensor) else torch.from_numpy(np.array(actual)), truth)
                if not found <= TOLERANCE[dtype]:
                    raise AssertionError(f"{name}: result {k} is off by {found:.1e}")


def measure(works: Works, rounds: int) -> dict[str, list[float]]:
    """Returns milliseconds per call, by contestant, for each round. Slow work is timed by a round's first call."""
    figures: dict[str, list[float]] = {name: [] for name in works}
    begin = time.monotonic()
    for k in range(rounds):
        if k >= 3 and time.monotonic() - begin > PATIENCE:
            break
        for name, work in works.items():
            time.sleep(REST)
            once = timeit.timeit(work, number=1)  # this fills the caches, and tells how often to repeat
            number = max(1, round(TURN / once))
            seconds = timeit.timeit(work, number=number) / number if once < PATIENCE / 20 else once
            figures[name].append(1000 * seconds)
    return figures


def timed_row(
    name: str, make: Callable[..., Works], shape: Shape, options: dict[str, Any], peers: Sequence[str], rounds: int
) -> Row:
    row = Row(name, shape)
    torch.manual_seed(0)
    try:
        works = make(shape, peers, **options)
    except NotHereError as reason:
        row.note = str(reason)
        return row
    check(works, torch.bfloat16 if options.get("precision") == "high" else options.get("dtype", torch.float32))
    row.figures = measure(works, rounds)
    return row


# --- memory and rates -------------------------------------------------------------------------------------------------


def training_memory(cls: type[nn.LSTM], shape: Shape, threads: int, options: dict[str, Any]) -> float:
    """Returns the MiB that forward and backward of all outputs add to the process at their peak."""
    torch.set_num_threads(threads)
    batch, steps, features, hidden, layers = shape
    lstm = cls(features, hidden, layers, batch_first=True, bidirectional=True, **options)
    x, dy = torch.randn(batch, steps, features), torch.randn(batch, steps, 2 * hidden)
    lstm(x[:1, :2])[0].sum().backward()  # libraries set themselves up
    before = memory("VmRSS")
    lstm(x)[0].backward(dy)
    return memory() - before


def memory_row(name: str, shape: Shape, options: dict[str, Any], rounds: int) -> Row:
    row = Row(name, shape, "MiB")
    threads = torch.get_num_threads()
    for _ in range(rounds):
        row.figures.setdefault(OURS, []).append(alone(training_memory, LSTM, shape, threads, options))
        row.figures.setdefault(TORCH, []).append(alone(training_memory, nn.LSTM, shape, threads, {}))
    return row


def recurrence_rate(shape: Shape, rounds: int) -> tuple[float, float]:
    """GFLOP/s of the recurrence's products alone over all of its time, and of torch's 1024 x 1024 x 1024 product."""
    batch, steps, _, hidden, _ = shape
    gates_x, w_hh = torch.randn(steps, batch, 2, 4 * hidden), torch.randn(2, 4 * hidden, hidden) / hidden**0.5
    a, b = torch.randn(2, 1024, 1024)
    works: Works = {
        OURS: lambda: [torch.ops.birnn_ext.lstm_recurrence(gates_x, w_hh, None, None, None, "none")],
        "sgemm": lambda: [a @ b],
    }
    figures = measure(works, rounds)
    flops = 2 * gates_x.numel() * hidden, 2 * 1024**3
    return tuple(n / median(of) / 1e6 for n, of in zip(flops, figures.values(), strict=True))


# --- the report -------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    contestants = [OURS, TORCH, *PEERS]
    lines = [["", "B,T,I,H,layers", *contestants, f"{TORCH} / {OURS}", f"best peer / {OURS}"]]
    for row in rows:
        cells = [f"{row.median(name):.4g}" if name in row.figures else "" for name in contestants]
        cells[0] = row.note or cells[0]
        ratios = ["" if of is None else f"{of:.2f}" for of in (row.advantage(TORCH), row.advantage(*PEERS))]
        lines.append([f"{row.name}, {row.unit}", row.sizes, *cells, *ratios])
    return markdown(lines)


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Speed relative to nn.LSTM, a group of bars for each timed row."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.unit == "ms" and row.figures]
    names = [name for name in [OURS, *PEERS] if any(name in row.figures for row in rows)]
    bars = sum(len(row.figures) - 1 for row in rows)
    figure = Figure(figsize=(10, 1.6 + 0.22 * bars + 0.2 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places: dict[str, list[float]] = {name: [] for name in names}
    speeds: dict[str, list[float]] = {name: [] for name in names}
    ticks, place = [], 0.0
    for row in rows:
        here = [name for name in names if name in row.figures]
        ticks.append(place + (len(here) - 1) / 2)
        for name in here:
            places[name].append(place)
            speeds[name].append(row.median(TORCH) / row.median(name))
            place += 1
        place += 0.7  # between groups
    for name in names:
        # from the line at 1, on a logarithmic scale: twice and half as fast are bars of the same length
        lengths = [speed - 1 for speed in speeds[name]]
        drawn = axes.barh(places[name], lengths, height=0.9, left=1, label=name, color=COLOURS[name])
        axes.bar_label(drawn, [f"{speed:.2f}" for speed in speeds[name]], padding=3, fontsize=8)
    axes.axvline(1, color="black", linewidth=1, label=TORCH)
    axes.set_yticks(ticks, [f"{row.name}\n{in_words(row.shape)}" for row in rows], fontsize=8)
    axes.tick_params("y", length=0)
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.01)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.set_xlabel(f"time of {TORCH} / time (logarithmic); right of the line is faster")
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(
        loc="outside upper center",
        ncols=len(names) + 1,
        frameon=False,
        title=f"Speed relative to {TORCH} (GRU: nn.GRU), bidirectional, on {title}",
        title_fontsize="large",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


@dataclass
class Comparison:
    """All rows, and what they were measured on and with."""

    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    recurrence_gflops: float = 0.0
    sgemm_gflops: float = 0.0

    @property
    def title(self) -> str:
        return f"{self.machine['cpu']}, {self.machine['threads']} threads"

    def text(self) -> str:
        versions = ", ".join(f"{name} {number}" for name, number in self.machine["versions"].items())
        load = self.machine["load"]
        busy = f", busy before the run (load {load:.1f})" if load > BUSY else ""
        return (
            f"{self.title}, {self.machine['date']}, {self.machine['commit']}{busy}; {versions}; float32 if nothing "
            f"else is said, bidirectional; rows of the GRU have nn.GRU in nn.LSTM's place\n\n{table(self.rows)}\n\n"
            f"Recurrence, forward, {','.join(map(str, MNIST))}, one layer: {self.recurrence_gflops:.0f} GFLOP/s of "
            f"products, {100 * self.recurrence_gflops / self.sgemm_gflops:.0f} % of torch's 1024 x 1024 x 1024 product "
            f"({self.sgemm_gflops:.0f} GFLOP/s)."
        )

    @classmethod
    def load(cls) -> Comparison:
        """Returns the comparison that save() wrote."""
        saved = json.loads(RESULTS.read_text())
        rows = [Row(**{**row, "shape": tuple(row["shape"])}) for row in saved.pop("rows")]
        rates = {name: saved.pop(name) for name in ("recurrence_gflops", "sgemm_gflops")}
        return cls(saved, rows, **rates)

    def save(self) -> None:
        """The figures of all rounds, and the chart."""
        RESULTS.parent.mkdir(exist_ok=True)
        figures = {**self.machine, **{k: v for k, v in asdict(self).items() if k != "machine"}}
        RESULTS.write_text(json.dumps(figures, indent=1) + "\n")
        draw(self.rows, self.title, CHART)


def compare(threads: int, rounds: int, only: str = "", load: float | None = None) -> Comparison:
    """Measures the rows whose name contains `only`. load: the machine's, if what ran before is this program's own."""
    torch.set_num_threads(threads)
    load = os.getloadavg()[0] if load is None else load
    if load > BUSY:
        print(
            f"The machine is busy (load {load:.1f}): figures will be too large, some more than others", file=sys.stderr
        )
    peers = installed()
    for peer in PEERS:
        if peer not in peers:
            print(f"{peer} is not installed, its column stays empty: pip install 'birnn_ext[peers]'", file=sys.stderr)
    packages = ["torch", "birnn_ext", *dict.fromkeys(module for peer in peers for module in PEERS[peer])]
    found = Comparison(
        {
            "date": date.today().isoformat(),
            "commit": commit(),
            "cpu": device_name(torch.device("cpu")),
            "cpu_isa": birnn_ext.build_info()["cpu_isa"],
            "threads": threads,
            "rounds": rounds,
            "load": load,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        }
    )

    def add(name: str, make: Callable[..., Row], *arguments: object) -> None:
        if only in name:
            row = make(name, *arguments)
            found.rows.append(row)
            said = ", ".join(f"{who} {row.median(who):.4g} {row.unit}" for who in row.figures)
            print(f"{row.name} {row.sizes}: {row.note or said}", file=sys.stderr, flush=True)

    for name, make, shape, options in ROWS:
        add(name, timed_row, make, shape, options, peers, rounds)
    for name, options in ("training memory", {}), ("training memory, recompute=True", {"recompute": True}):
        add(name, memory_row, WIDE, options, -(-rounds // 3))
    found.recurrence_gflops, found.sgemm_gflops = recurrence_rate(MNIST, rounds)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every contestant")
    parser.add_argument("--rounds", type=int, default=9, help="of the timing; memory: a third of them")
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows whose name contains it; saves nothing")
    args = parser.parse_args(arguments)
    found = compare(args.threads, args.rounds, args.only)
    print(found.text())
    if not args.only:
        found.save()


if __name__ == "__main__":
    main()
