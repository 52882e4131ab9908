"""torch.compile makes one graph, once for all batches and lengths, with the numbers and gradients of eager mode."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from cells import GRU_CELL, LSTM_CELL, every_cell
from helpers import all_near, gradients, leaves, random_state
from torch import Tensor, nn
from torch._dynamo.exc import RecompileError, Unsupported
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from birnn_ext import GRU, LSTM, RNN, BiRNN, accelerate

# B, T. None is 1, which torch.compile treats specially, and the first call's sizes differ, as it identifies equal ones.
SIZES = [(3, 7), (5, 6), (9, 2), (6, 11)]


@pytest.fixture(autouse=True)
def compiled_once():
    """Fails a test if what it calls breaks the graph or is compiled a second time."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    assert counters["stats"]["unique_graphs"] <= 1
    assert not counters["graph_break"]


def check(module: nn.Module, arguments, device: str, backend: str = "aot_eager", train: bool = True) -> None:
    """Compares compiled and eager mode on all SIZES: results and, if train, gradients of everything."""
    module.train(train)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    with torch.set_grad_enabled(train):
        for size in SIZES:
            args, kwargs = arguments(*size)
            inputs = [t.requires_grad_(train) for t in leaves((args, kwargs)) if t.is_floating_point()]
            results = []
            for f in (compiled, module):
                outputs = leaves(f(*args, **kwargs))
                results.append([*outputs, *(gradients(module, outputs, inputs) if train else [])])
            all_near(*results, str(size))
    assert counters["stats"]["unique_graphs"] == 1


@every_cell
@pytest.mark.parametrize("train", [True, False], ids=["training", "inference"])
def test_the_classifier_compiles_into_one_graph_once_for_all_sizes(train, cell, device):
    model = BiRNN(28, 16, 2, 10, cell=cell.name).to(device)
    check(model, lambda batch, steps: ((torch.randn(batch, steps, 28, device=device),), {}), device, train=train)


CASES = [  # cell, output, with_state, lengths, recompute, dtype, train
    (LSTM_CELL, "all", True, True, False, torch.float32, True),
    (LSTM_CELL, "last", True, True, True, torch.float64, True),
    (LSTM_CELL, "last", False, True, False, torch.bfloat16, False),
    (GRU_CELL, "all", True, True, True, torch.float32, True),
    (GRU_CELL, "last", True, False, False, torch.float64, True),
]
MORE = [
    case
    for case in itertools.product(
        (LSTM_CELL, GRU_CELL),
        ("all", "last"),
        (True, False),
        (True, False),
        (True, False),
        (torch.float32, torch.bfloat16),
        (True, False),
    )
    if case not in CASES
][::8]  # an eighth, as each takes seconds


@pytest.mark.parametrize(
    ("cell", "output", "with_state", "lengths", "recompute", "dtype", "train"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
def test_a_module_compiles_into_one_graph_once_for_all_sizes(
    cell, output, with_state, lengths, recompute, dtype, train, device
):
    lstm = cell.module(10, 8, 2, batch_first=True, bidirectional=True, recompute=recompute, device=device, dtype=dtype)

    def arguments(batch: int, steps: int):
        x = torch.randn(batch, steps, 10, device=device).to(dtype)
        state = tuple(s.to(dtype) for s in random_state(4, batch, 8, cell, device=device)) if with_state else None
        n = torch.randint(0, steps + 1, (batch,), device=device) if lengths else None
        return (x, cell.hx(state)), {"lengths": n, "output": output}

    check(lstm, arguments, device, train=train)


@every_cell
def test_autocast_compiles_into_one_graph(cell, device):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = cell.module(10, 8, bidirectional=True, device=device)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast(device, torch.bfloat16):
                return self.rnn(x)[0]

    check(Model(), lambda batch, steps: ((torch.randn(steps, batch, 10, device=device),), {}), device, train=False)


def graphs(module: nn.Module, dynamic: bool | None, sizes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns the sizes at which torch.compile makes a new graph."""
    torch._dynamo.reset()
    made = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        made.append(size)
        return graph

    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for size in sizes:
            compiled(torch.randn(*size, 10))
    counters.clear()
    return made


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    "module",
    [LSTM(10, 8, batch_first=True), GRU(10, 8, batch_first=True), BiRNN(10, 8, 1, 2)],
    ids=lambda m: type(m).__name__,
)
def test_there_are_as_many_graphs_as_of_nn_linear(module, dynamic):
    """PyTorch has its own rules for sizes, for 1 too. We add no graphs to those that they make."""
    sizes = [(3, 7), (5, 6), (9, 2), (1, 4), (4, 1), (6, 11)]
    expected = graphs(nn.Sequential(nn.Linear(10, 8)), dynamic, sizes)
    assert graphs(module, dynamic, sizes) == expected
    if dynamic:
        assert expected == [(3, 7), (1, 4), (4, 1)]


@every_cell
def test_lists_of_lengths_compile(cell):
    """Their values are constants of the graph or become its variables, and the results equal a tensor's."""
    rnn = cell.module(10, 8, batch_first=True)
    compiled = torch.compile(rnn, fullgraph=True, backend="eager")
    x = torch.randn(3, 7, 10)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for lengths in ([3, 7, 1], [7, 2, 5], [4, 4, 0]):
            assert torch.equal(compiled(x, lengths=lengths)[0], rnn(x, lengths=torch.tensor(lengths))[0])
    counters.clear()


class Mine(LSTM):
    pass


def test_resets_of_a_gru_compile_into_one_graph_once_for_all_sizes(device):
    gru = GRU(10, 8, 2, batch_first=True, bidirectional=True, device=device)

    def arguments(batch: int, steps: int):
        reset = torch.rand(batch, steps, device=device) < 0.2
        return (torch.randn(batch, steps, 10, device=device),), {"reset": reset}

    check(gru, arguments, device)


def test_resets_of_a_plain_rnn_compile_into_one_graph_for_each_number_of_steps(device):
    rnn = RNN(5, 8, device=device)
    compiled = torch.compile(rnn, fullgraph=True, dynamic=True, backend="eager")

    def outputs(steps: int, batch: int):
        x, reset = torch.randn(steps, batch, 5, device=device), torch.rand(steps, batch, device=device) < 0.3
        return [[module(x, reset=reset)[0]] for module in (compiled, rnn)]

    for batch in (4, 6):
        all_near(*outputs(3, batch))
    with pytest.raises(RecompileError):
        outputs(5, 6)


@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["saved", "recompute"])
@pytest.mark.parametrize(
    "options",
    [
        {"proj_size": 3},
        pytest.param({"layer_norm": True}, marks=pytest.mark.slow),
        {"recurrent_dropout": 0.5, "zoneout": 0.5},
    ],
    ids=str,
)
def test_variants_compile_into_one_graph_once_for_all_sizes(options, recompute, device):
    lstm = LSTM(10, 8, 2, batch_first=True, bidirectional=True, recompute=recompute, device=device, **options)

    def arguments(batch: int, steps: int):
        x = torch.randn(batch, steps, 10, device=device)
        return (x,), {"reset": torch.rand(batch, steps, device=device) < 0.2}

    check(lstm, arguments, device, train="proj_size" in options or "layer_norm" in options)


@pytest.mark.parametrize(
    "make",
    [lambda: Mine(5, 8), lambda: nn.Sequential(nn.LSTM(5, 8)), lambda: nn.Sequential(nn.GRU(5, 8))],
    ids=["subclass", "accelerated", "accelerated GRU"],
)
def test_subclasses_and_accelerated_models_compile_into_one_graph(make):
    module = make()
    accelerate(module)
    x = torch.randn(4, 3, 5)
    all_near([torch.compile(module, fullgraph=True, backend="eager")(x)[0]], [module(x)[0]])


@every_cell
def test_torch_func_compiles_into_one_graph(cell, monkeypatch, reference_operators):
    """It takes the slow reference, and the warning that says so does not break the graph."""
    monkeypatch.setattr("birnn_ext.without_kernels._said", set())
    lstm, x = cell.module(3, 5), torch.randn(4, 2, 3)
    parameters = {name: p.detach() for name, p in lstm.named_parameters()}

    def loss(parameters):
        return (torch.func.functional_call(lstm, parameters, (x,))[0] ** 2).sum()

    with pytest.warns(
        UserWarning,
        match=rf"^birnn_ext::{cell.operators}_\w+ has no rule .* under torch\.compile\. Using .* is slow\.$",
    ):
        compiled = torch.compile(torch.func.grad(loss), backend="aot_eager", fullgraph=True)(parameters)
    all_near(compiled.values(), torch.func.grad(loss)(parameters).values())


def test_nn_lstm_is_treated_as_without_us():
    with pytest.raises(Unsupported, match="LSTM"):
        torch.compile(nn.LSTM(5, 8), fullgraph=True, backend="eager")(torch.randn(4, 3, 5))
    assert not torch._dynamo.config.allow_rnn
    counters.clear()  # this test breaks the graph on purpose


@pytest.mark.parametrize("first", ["birnn_ext", pytest.param("torch._dynamo", marks=pytest.mark.slow)])
def test_order_of_imports_does_not_matter(first):
    """This needs new processes, as both packages are imported here."""
    second = {"birnn_ext": "torch._dynamo", "torch._dynamo": "birnn_ext"}[first]
    code = f"""
import sys, torch
import {first}
assert ("torch._dynamo" in sys.modules) == ({first!r} == "torch._dynamo")  # birnn_ext leaves that import to its users
import {second}
lstm = birnn_ext.LSTM(5, 8)
x = torch.randn(4, 3, 5)
assert torch.equal(torch.compile(lstm, fullgraph=True, backend="eager")(x)[0], lstm(x)[0])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@every_cell
@pytest.mark.slow
def test_the_classifier_of_the_tutorial_compiles_within_30_seconds(cell):
    model = BiRNN(28, 128, 2, 10, cell=cell.name)
    torch.compile(lambda x: x + 1)(torch.ones(3))  # starts the compiler
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    x = torch.randn(100, 28, 28)
    with fresh_cache(), torch._inductor.config.patch(compile_threads=1):  # its processes would outlive the measurement
        start = sum(os.times()[:4])  # CPU time of all threads and children, which other programs don't change
        compiled(x).sum().backward()
        seconds = sum(os.times()[:4]) - start
    assert seconds < 30
    # a new input, as torch.compile(dynamic=True) identifies two dimensions of 28
    torch._dynamo.reset()
    counters.clear()
    check(model, lambda batch, steps: ((torch.randn(batch, steps, 28),), {}), "cpu", backend="inductor")
