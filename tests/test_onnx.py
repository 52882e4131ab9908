"""birnn_ext.onnx.export writes ONNX's operators with dynamic batch and time, and ONNX Runtime agrees with PyTorch."""

from __future__ import annotations

import importlib.util
import itertools
from collections import Counter

import pytest
import torch
from cells import GRU_CELL, LSTM_CELL, RNN_CELL, Cell, every_cell, every_cell_fast, every_cell_the_gru_slow
from helpers import assert_near, leaves, random_state
from torch import nn

import birnn_ext
import birnn_ext.onnx
from birnn_ext import GRU, LSTM, RNN, BiRNN

pytest.importorskip("onnxscript", reason="exporting to ONNX needs onnxscript: pip install 'birnn_ext[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="running ONNX files needs onnxruntime")

# torch.onnx and onnxscript warn of changes of their own
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

SIZES = [(1, 1), (4, 9), (2, 30)]  # B, T; none is the example's


def run(path, *tensors: torch.Tensor) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(path)
    inputs = session.get_inputs()
    arrays = {i.name: t.numpy() for i, t in zip(inputs, tensors, strict=True)}
    return [torch.from_numpy(array) for array in session.run(None, arrays)]


def operators(program) -> Counter:
    return Counter(node.op_type for node in program.model.graph)


@every_cell_fast
def test_export_of_the_classifier_freezes_neither_batch_nor_time(cell, tmp_path):
    model = BiRNN(28, 16, 2, 10, cell=cell.name)
    program = birnn_ext.onnx.export(model, tmp_path / "birnn.onnx")
    count = operators(program)
    assert count[cell.name.upper()] == 3  # the last layer has two, as one step of its reverse direction is enough
    assert not count["Loop"] and not count["Scan"]
    assert [type(size) is int for size in program.model.graph.inputs[0].shape] == [False, False, True]
    for batch, steps in SIZES:
        x = torch.randn(batch, steps, 28)
        (y,) = run(tmp_path / "birnn.onnx", x)
        assert_near(y, model(x))


CASES = [  # bidirectional, batch_first, bias, output, with_state, lengths
    (True, True, True, "all", True, True),
    (True, False, False, "last", False, True),
    (False, False, True, "all", False, False),
]
MORE = [
    case
    for case in itertools.product((True, False), (True, False), (True,), ("all", "last"), (True, False), (True, False))
    if case not in CASES
][::4]  # a quarter, as each takes seconds


@every_cell
@pytest.mark.parametrize(
    ("bidirectional", "batch_first", "bias", "output", "with_state", "lengths"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
def test_export_of_a_module_freezes_neither_batch_nor_time(
    bidirectional, batch_first, bias, output, with_state, lengths, cell, tmp_path
):
    layers, directions = 2, 1 + bidirectional
    module = cell.module(5, 8, layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional)

    def arguments(batch: int, steps: int):
        x = torch.randn((batch, steps, 5) if batch_first else (steps, batch, 5))
        state = random_state(layers * directions, batch, 8, cell) if with_state else None
        # the first sequence is empty
        n = torch.arange(batch) * steps // max(batch - 1, 1) if lengths else None
        return x, state, n

    x, state, n = arguments(3, 7)
    path = tmp_path / "lstm.onnx"
    program = birnn_ext.onnx.export(module, path, (x, cell.hx(state)), {"lengths": n, "output": output})
    assert operators(program)[cell.name.upper()] == layers + (bidirectional and output == "last")
    for batch, steps in SIZES:
        x, state, n = arguments(batch, steps)
        results = run(path, *(t for t in (x, *(state or ()), n) if t is not None))
        expected = leaves(module(x, cell.hx(state), lengths=n, output=output))
        for actual, e in zip(results, expected, strict=True):
            assert_near(actual, e)


class Tagger(nn.Module):
    """A model as users write it, with PyTorch's module of a cell between other layers."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.rnn = cell.theirs(6, 8, 2, batch_first=True, bidirectional=True, dropout=0.5)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(self.embedding(tokens))[0]).log_softmax(-1)


@every_cell_the_gru_slow
def test_export_of_somebody_elses_model_once_accelerated(cell, tmp_path):
    model = Tagger(cell)
    birnn_ext.accelerate(model)
    program = birnn_ext.onnx.export(model, tmp_path / "tagger.onnx", (torch.zeros(2, 3, dtype=torch.int64),))
    assert operators(program)[cell.name.upper()] == 2
    assert all(module.training for module in model.modules())  # export uses evaluation mode, then restores the mode
    model.eval()
    for batch, steps in SIZES:
        tokens = torch.randint(0, 20, (batch, steps))
        (y,) = run(tmp_path / "tagger.onnx", tokens)
        assert_near(y, model(tokens))


@every_cell
def test_plain_torch_onnx_export_finds_the_operator_too(cell, tmp_path):
    rnn = cell.module(5, 8, bidirectional=True).eval()
    program = torch.onnx.export(rnn, (torch.randn(7, 3, 5),), tmp_path / "m.onnx", dynamo=True, verbose=False)
    assert operators(program)[cell.name.upper()] == 1


@pytest.mark.parametrize("bidirectional", [True, False], ids=["bi", "uni"])
def test_relu(bidirectional, tmp_path):
    """ONNX's operator has tanh if it is not told of another function, for each direction."""
    module = RNN(5, 8, nonlinearity="relu", bidirectional=bidirectional)
    birnn_ext.onnx.export(module, tmp_path / "rnn.onnx", (torch.randn(4, 3, 5),))
    x = torch.randn(7, 2, 5)
    for actual, expected in zip(run(tmp_path / "rnn.onnx", x), leaves(module(x)), strict=True):
        assert_near(actual, expected)


@every_cell
def test_float16(cell, tmp_path):
    module = cell.module(5, 8, 2, bidirectional=True, dtype=torch.float16)
    birnn_ext.onnx.export(module, tmp_path / "m.onnx")
    x = torch.randn(9, 4, 5).half()
    for actual, expected in zip(run(tmp_path / "m.onnx", x), leaves(module(x)), strict=True):
        assert actual.dtype == torch.float16
        assert_near(actual, expected)


@every_cell
def test_bfloat16_computes_in_float32(cell, tmp_path):
    class InFloat32(nn.Module):  # the tensors travel as numpy arrays, which have no bfloat16
        def __init__(self) -> None:
            super().__init__()
            self.rnn = cell.module(5, 8, 2, bidirectional=True, dtype=torch.bfloat16)

        def forward(self, x):
            return self.rnn(x.bfloat16())[0].float()

    model = InFloat32()
    birnn_ext.onnx.export(model, tmp_path / "lstm.onnx", (torch.randn(3, 2, 5),))
    x = torch.randn(9, 4, 5)
    (y,) = run(tmp_path / "lstm.onnx", x)
    assert_near(y, model(x), dtype=torch.bfloat16)


# --- errors -----------------------------------------------------------------------------------------------------------


@every_cell_fast
def test_float64_is_refused(cell, tmp_path):
    with pytest.raises(TypeError, match=rf"no {cell.name.upper()} in float64; export model\.float"):
        birnn_ext.onnx.export(cell.module(3, 5, dtype=torch.float64), tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("options", "kwargs", "name"),
    [
        ({"proj_size": 3}, {}, "proj_size"),
        ({"layer_norm": True}, {}, "layer_norm"),
        ({"zoneout": 0.3}, {}, "zoneout"),
        ({}, {"reset": torch.zeros(7, 3, dtype=torch.bool)}, "reset"),
        ({}, {"return_cell_states": True}, "return_cell_states"),
    ],
)
def test_variants_are_refused(tmp_path, options, kwargs, name):
    with pytest.raises(NotImplementedError, match=f"ONNX's LSTM operator has no {name}"):
        birnn_ext.onnx.export(LSTM(5, 8, **options), tmp_path / "m.onnx", (torch.randn(7, 3, 5),), kwargs)


@pytest.mark.parametrize("cls", [GRU, RNN])
def test_resets_without_c_are_refused(cls, tmp_path):
    reset = torch.zeros(7, 3, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match=f"ONNX's {cls.__name__} operator has no reset"):
        birnn_ext.onnx.export(cls(5, 8), tmp_path / "m.onnx", (torch.randn(7, 3, 5),), {"reset": reset})


@pytest.mark.parametrize(
    ("cell", "name", "values"),
    [
        (LSTM_CELL, "reset", lambda x: x[..., 0] > 0),
        (LSTM_CELL, "return_cell_states", lambda x: True),
        (GRU_CELL, "reset", lambda x: x[..., 0] > 0),
        (RNN_CELL, "reset", lambda x: x[..., 0] > 0),
    ],
    ids=["lstm: reset", "lstm: cells", "gru: reset", "rnn: reset"],
)
def test_what_a_model_asks_of_a_module_in_it_is_refused(tmp_path, cell, name, values):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = cell.module(5, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rnn(x, **{name: values(x)})[0]

    model = Model()
    with pytest.raises(NotImplementedError, match=f"ONNX's {cell.name.upper()} operator has no {name}$"):
        birnn_ext.onnx.export(model, tmp_path / "m.onnx", (torch.randn(7, 3, 5),))
    assert model.training  # as before


def test_other_modules_need_example_arguments(tmp_path):
    with pytest.raises(TypeError, match="args must be example arguments of Tagger, got None"):
        birnn_ext.onnx.export(Tagger(LSTM_CELL), tmp_path / "tagger.onnx")


def test_missing_packages_are_named(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else real(name))
    with pytest.raises(ImportError, match=r"needs onnxscript: pip install 'birnn_ext\[onnx\]'"):
        birnn_ext.onnx.export(LSTM(3, 5), tmp_path / "lstm.onnx")


def test_an_example_that_would_freeze_the_batch_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match=r"input has a dimension of size 1 in the example, \(3, 1, 5\)"):
        birnn_ext.onnx.export(LSTM(5, 8), tmp_path / "lstm.onnx", (torch.randn(3, 1, 5),))
