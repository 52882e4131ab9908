"""Traces, scripts and other exports before torch.export hold PyTorch's own operator, which runs anywhere."""

from __future__ import annotations

import copy
import io
import itertools
import subprocess
import sys
from collections import Counter

import pytest
import torch
from cells import GRU_CELL, LSTM_CELL, every_cell, every_cell_the_gru_slow
from helpers import all_near, leaves, random_state
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import birnn_ext
from birnn_ext import GRU, LSTM, BiRNN, accelerate, as_nn_gru, as_nn_lstm, restore

pytestmark = [
    # torch.jit and torch.ao are deprecated, and torch.onnx warns of batch sizes with any LSTM
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning", "ignore:.*deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Exporting a model to ONNX with a batch_size", "ignore:.*legacy TorchScript"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    # pytest's filters override PyTorch's and ours, which ignore warnings of their own modules
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

SIZES = [(1, 1), (7, 9), (2, 30)]  # B, T; none is the example's


class Scaled(nn.LSTM):
    """A subclass that scales its input."""

    def forward(self, input, hx=None):
        return super().forward(input * 2, hx)


class ScaledGRU(nn.GRU):
    """The same of a GRU."""

    def forward(self, input, hx=None):
        return super().forward(input * 2, hx)


class Initialised(nn.LSTM):
    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)


class Tagger(nn.Module):
    """A model with an LSTM or GRU (or one for each of several calls) and a linear layer."""

    def __init__(self, cls: type[nn.RNNBase] = LSTM, call=lambda lstm, x, lengths: lstm(x)[0], **options) -> None:
        super().__init__()
        self.rnn = cls(6, 8, 2, batch_first=True, bidirectional=True, **options)
        self.fc = nn.Linear(2 * (options.get("proj_size") or 8), 3)
        self.call = call
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        result = self.call(self.rnn, x, lengths)
        y, *states = leaves(result)
        return self.fc(y), *states


def packed(x: Tensor, lengths: Tensor):
    return pack_padded_sequence(x, lengths.clamp(min=1), batch_first=True, enforce_sorted=False)


def unpacked(result, x: Tensor):
    return pad_packed_sequence(result[0], batch_first=True, total_length=x.shape[1])[0], result[1]


def ones(module: nn.RNNBase, x: Tensor) -> tuple[Tensor, Tensor] | Tensor:
    h = x.new_ones(4, x.shape[0], 8)
    return (h, h.clone()) if isinstance(module, nn.LSTM) else h


CALLS = {
    "plain": (lambda lstm, x, lengths: lstm(x), {}),
    "state": (lambda lstm, x, lengths: lstm(x, ones(lstm, x)), {}),
    "unbatched": (lambda lstm, x, lengths: lstm(x[0]), {}),
    "packed": (lambda lstm, x, lengths: unpacked(lstm(packed(x, lengths)), x), {}),
    "packed, last": (lambda lstm, x, lengths: lstm(packed(x, lengths), output="last"), {}),
    "last": (lambda lstm, x, lengths: lstm(x, output="last"), {}),
    "lengths": (lambda lstm, x, lengths: lstm(x, lengths=lengths), {}),
    "lengths, state": (lambda lstm, x, lengths: lstm(x, ones(lstm, x), lengths=lengths), {}),
    "lengths, last": (lambda lstm, x, lengths: lstm(x, lengths=lengths, output="last"), {}),
    "learned state": (lambda lstm, x, lengths: lstm(x), {"learned_state": True}),
    "learned state, lengths": (lambda lstm, x, lengths: lstm(x, lengths=lengths), {"learned_state": True}),
    "projected, lengths": (lambda lstm, x, lengths: lstm(x, lengths=lengths), {"proj_size": 3}),
    "no bias, recompute": (lambda lstm, x, lengths: lstm(x), {"bias": False, "recompute": True}),
}


def arguments(batch: int, steps: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, steps, 6), torch.randint(0, steps + 1, (batch,))


EVERY_CALL = [(LSTM_CELL, name) for name in CALLS] + [
    (GRU_CELL, name) for name in CALLS if name != "projected, lengths"
]


def operators(graph: torch._C.Graph) -> Counter:
    return Counter(node.kind() for node in graph.nodes())


# --- torch.jit.trace --------------------------------------------------------------------------------------------------


TRACED_BY_DEFAULT = ("plain", "packed", "lengths, last", "learned state, lengths")


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        pytest.param(cell, name, marks=[] if name in TRACED_BY_DEFAULT else pytest.mark.slow, id=f"{cell.name}: {name}")
        for cell, name in EVERY_CALL
    ],
)
def test_a_traced_model_is_right_at_other_sizes(cell, name):
    call, options = CALLS[name]
    model = Tagger(cell.module, call, **options).eval()
    traced = torch.jit.trace(model, arguments(4, 5))
    found = operators(traced.inlined_graph)
    assert found[f"aten::{cell.operators}"] and not any(kind.startswith("birnn_ext") for kind in found)
    for size in SIZES:
        args = arguments(*size)
        all_near(traced(*args), model(*args), f"{name} {size}")


@every_cell
def test_tracing_a_plain_call_records_what_pytorchs_module_does(cell):
    theirs = Tagger(cell.theirs)
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    graphs = [operators(torch.jit.trace(m.eval(), arguments(4, 5)).inlined_graph) for m in (ours, theirs)]
    assert graphs[0] == graphs[1]


@every_cell_the_gru_slow
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_traced_model_can_be_trained(trainable, training, cell):
    model = Tagger(cell.module).requires_grad_(trainable).train(training)
    args = arguments(4, 5)
    traced = torch.jit.trace(model, args)
    x, lengths = arguments(7, 9)
    x.requires_grad_()
    gradients = []
    for one in (traced, model):
        loss = one(x, lengths)[0].square().sum()
        gradients.append(torch.autograd.grad(loss, [x, *one.parameters()] if trainable else [x]))
    all_near(*gradients)


@every_cell
def test_a_trace_keeps_parametrizations(cell):
    rnn = nn.utils.parametrizations.weight_norm(cell.module(6, 8), "weight_hh_l0")
    traced = torch.jit.trace(rnn, torch.randn(5, 4, 6))
    x = torch.randn(9, 7, 6)
    with torch.no_grad():
        rnn.parametrizations.weight_hh_l0.original1.mul_(2)
    all_near([traced(x)[0]], [rnn(x)[0]])


@pytest.mark.parametrize("cls", [Scaled, Initialised, ScaledGRU])
def test_an_accelerated_subclass_is_recorded_with_its_own_code(cls):
    model = Plain(cls)
    accelerate(model)
    traced = torch.jit.trace(model, torch.randn(4, 5, 6))
    assert operators(traced.inlined_graph)[f"aten::{'gru' if issubclass(cls, nn.GRU) else 'lstm'}"] == 1
    x = torch.randn(7, 9, 6)
    ours, calls = model(x), birnn_ext.op_calls()
    with as_nn_lstm():
        all_near([traced(x), model(x)], [ours, ours])
    assert birnn_ext.op_calls() == calls


def run_without_birnn_ext(files: list, cases: list, tmp_path) -> None:
    """Loads and runs TorchScript files in a process without birnn_ext."""
    torch.save(cases, tmp_path / "cases.pt")
    code = """
import sys, torch
sys.modules["birnn_ext"] = None  # importing it is an error
for file in sys.argv[2:]:
    model = torch.jit.load(file)
    for args, expected in torch.load(sys.argv[1]):
        torch.testing.assert_close(model(*args)[0], expected, rtol=1e-5, atol=1e-6)
"""
    command = [sys.executable, "-W", "ignore", "-c", code, tmp_path / "cases.pt", *files]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@every_cell
@pytest.mark.slow  # it starts another process with PyTorch
def test_files_run_in_a_process_without_birnn_ext(tmp_path, cell):
    model = Tagger(cell.theirs).eval()
    accelerate(model)
    torch.jit.trace(model, arguments(4, 5)).save(tmp_path / "traced.pt")
    with torch.no_grad():
        cases = [(args, model(*args)[0]) for args in itertools.starmap(arguments, SIZES)]
    run_without_birnn_ext([tmp_path / "traced.pt"], cases, tmp_path)
    scripted = BiRNN(6, 8, 2, 3, cell=cell.name)
    with torch.no_grad():
        cases = [((x,), scripted(x)[0]) for x, _ in itertools.starmap(arguments, SIZES)]
    torch.jit.script(scripted).save(tmp_path / "scripted.pt")
    run_without_birnn_ext([tmp_path / "scripted.pt"], cases, tmp_path)


@pytest.mark.parametrize("name", ["a trace", "as_nn_gru"])
def test_a_gru_cannot_record_resets(name):
    gru, reset = GRU(6, 8), torch.zeros(5, 4, dtype=torch.bool)
    message = "GRU: reset can't be recorded: .* and as_nn_gru record nn.GRU's own operator"
    with pytest.raises(NotImplementedError, match=message):
        if name == "a trace":
            torch.jit.trace(lambda x: gru(x, reset=reset)[0], torch.randn(5, 4, 6))
        else:
            with as_nn_gru():
                gru(torch.randn(5, 4, 6), reset=reset)


REFUSED = {
    "zoneout": ({"zoneout": 0.1}, {}),
    "layer_norm": ({"layer_norm": True}, {}),
    "recurrent_dropout": ({"recurrent_dropout": 0.1}, {}),
    "reset": ({}, {"reset": torch.zeros(5, 4, dtype=torch.bool)}),
    "return_cell_states": ({}, {"return_cell_states": True}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_recorded_is_named(name):
    options, keywords = REFUSED[name]
    lstm, x = LSTM(6, 8, **options), torch.randn(5, 4, 6)

    class Calls(nn.Module):
        def forward(self, x):
            return lstm(x, **keywords)[0]

    with pytest.raises(NotImplementedError, match=rf"LSTM: {name} can't be recorded: torch.jit.trace"):
        torch.jit.trace(Calls(), x)
    with as_nn_lstm(), pytest.raises(NotImplementedError, match=rf"LSTM: {name} can't be recorded"):
        lstm(x, **keywords)
    lstm(x, **keywords)  # eager calls still work


def test_recurrent_dropout_does_nothing_in_evaluation_and_can_be_recorded():
    lstm = LSTM(6, 8, recurrent_dropout=0.5).eval()
    x = torch.randn(5, 4, 6)
    all_near([torch.jit.trace(lstm, x)(x)[0]], [lstm(x)[0]])


@every_cell
@pytest.mark.slow  # it starts another process with PyTorch
def test_our_own_checks_of_sizes_do_not_warn_in_a_trace(cell):
    code = f"""
import torch, birnn_ext
rnn = birnn_ext.{cell.module.__name__}(6, 8).requires_grad_(False)
torch.jit.trace(lambda x, lengths: rnn(x, lengths=lengths)[0], (torch.randn(5, 4, 6), torch.full((4,), 5)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "TracerWarning" not in done.stderr, done.stderr


# --- torch.onnx.export(dynamo=False) ----------------------------------------------------------------------------------


@every_cell
@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "lengths, last",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("state", "packed", "last", "lengths", "learned state")),
    ],
)
def test_the_older_onnx_exporter_writes_the_standard_operator(name, cell):
    onnx = pytest.importorskip("onnx", reason="writing ONNX files needs onnx")
    onnxruntime = pytest.importorskip("onnxruntime", reason="running ONNX files needs onnxruntime")
    call, options = CALLS[name]
    model, file = Tagger(cell.module, call, **options).eval(), io.BytesIO()
    names = ["x", "lengths"]
    axes = {"x": {0: "batch", 1: "time"}, "lengths": {0: "batch"}}
    torch.onnx.export(model, arguments(4, 5), file, dynamo=False, input_names=names, dynamic_axes=axes)
    nodes = onnx.load_from_string(file.getvalue()).graph.node
    assert {node.domain for node in nodes} == {""} and cell.name.upper() in {node.op_type for node in nodes}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # the exporter records wrong sizes of results, for nn.LSTM too
    session = onnxruntime.InferenceSession(file.getvalue(), options)
    asked = {given.name for given in session.get_inputs()}
    for size in SIZES:
        args = arguments(*size)
        given = {name: arg.numpy() for name, arg in zip(names, args, strict=True) if name in asked}
        all_near(map(torch.from_numpy, session.run(None, given)), model(*args), f"{size}")


@every_cell
@pytest.mark.parametrize("ragged", [False, True], ids=["plain", "lengths"])
def test_the_older_onnx_exporter_takes_our_module_itself(ragged, cell):
    """It gives the model all arguments by position, and with them the defaults of those that are keywords only."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="running ONNX files needs onnxruntime")
    pytest.importorskip("onnx", reason="writing ONNX files needs onnx")
    module, file = cell.module(6, 8, batch_first=True, bidirectional=True).eval(), io.BytesIO()
    x, lengths = arguments(4, 5)
    keywords = {"lengths": lengths} if ragged else {}
    names = ["x", "lengths"][: 1 + ragged]
    axes = {name: {0: "batch", 1: "time"} if name == "x" else {0: "batch"} for name in names}
    torch.onnx.export(
        module, (x,), file, kwargs=keywords, dynamo=False, input_names=names, dynamic_axes=axes, verbose=False
    )
    session = onnxruntime.InferenceSession(file.getvalue())
    for size in SIZES:
        args = arguments(*size)[: 1 + ragged]
        expected = leaves(module(args[0], **dict(zip(["lengths"], args[1:], strict=False))))
        given = {name: arg.numpy() for name, arg in zip(names, args, strict=True)}
        all_near(map(torch.from_numpy, session.run(None, given)), expected, f"{size}")


# --- torch.fx ---------------------------------------------------------------------------------------------------------


@every_cell
@pytest.mark.parametrize("name", ["plain", "state", "lengths", "lengths, last"])
def test_torch_fx_sees_a_leaf(name, cell):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = cell.module(6, 8, 2, batch_first=True, bidirectional=True)

        def forward(self, x, lengths):
            return CALLS[name][0](self.rnn, x, lengths)

    model = Reads()
    graph = torch.fx.symbolic_trace(model)
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    assert [node.target for node in calls] == ["rnn"]
    given = {"lengths": {"lengths"}, "lengths, last": {"lengths", "output"}}
    assert set(calls[0].kwargs) == given.get(name, set())
    args = arguments(7, 9)
    expected = torch.utils._pytree.tree_leaves(model(*args))
    for run in (graph, torch.fx.Interpreter(graph).run):
        result = torch.utils._pytree.tree_leaves(run(*args))
        all_near(*([t for t in tensors if t is not None] for tensors in (result, expected)))


@every_cell
def test_torch_fx_sees_a_leaf_where_only_the_state_is_symbolic(cell):
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = cell.module(6, 8)
            self.register_buffer("start", torch.zeros(1, 4, 6))

        def forward(self, h, c=None):
            return self.rnn(self.start, cell.hx((h, c)))[0]

    model, state = Decoder(), random_state(1, 4, 8, cell)
    all_near([torch.fx.symbolic_trace(model)(*state)], [model(*state)])


def test_torch_fx_says_that_it_cannot_trace_into_one():
    with pytest.raises(NotImplementedError, match="can't trace into an LSTM, only a module that contains it"):
        torch.fx.symbolic_trace(LSTM(6, 8))
    with pytest.raises(NotImplementedError, match=r"GRU: torch.fx can't trace into a GRU, only .* as nn.GRU is"):
        torch.fx.symbolic_trace(GRU(6, 8))


def test_torch_fx_sees_a_leaf_in_an_accelerated_subclass_but_for_a_forward_of_its_own():
    """A leaf would repeat what such a forward has already done to the input."""
    model = Plain(Initialised)
    accelerate(model)
    x = torch.randn(7, 9, 6)
    all_near([torch.fx.symbolic_trace(model)(x)], [model(x)])
    model = Plain(Scaled)
    accelerate(model)
    with pytest.raises(
        NotImplementedError, match=r"torch\.fx can't trace through the forward of Scaled; name it a leaf"
    ):
        torch.fx.symbolic_trace(model)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, LSTM) or super().is_leaf_module(module, name)

    all_near([torch.fx.GraphModule(model, Tracer().trace(model))(x)], [model(x)])


# --- torch.jit.script -------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self, cls: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = cls(6, 8, 2, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0])


@pytest.mark.parametrize("cls", [nn.LSTM, LSTM, Initialised, nn.GRU, GRU])
def test_script(cls):
    model = Plain(cls)
    accelerate(model)
    x = torch.randn(7, 9, 6)
    expected, parameters = model(x), dict(model.named_parameters())
    with pytest.warns(UserWarning, match=r"in place of a birnn_ext.(LSTM|GRU), .*accelerate\(model\) brings ours back"):
        scripted = torch.jit.script(model)
    all_near([scripted(x)], [expected])
    assert all(p.data_ptr() == parameters[name].data_ptr() for name, p in scripted.named_parameters())
    all_near([model(x)], [expected])
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert accelerate(model).replaced == ["rnn"]  # the warning says that this helps
    all_near([model(x)], [expected])


@every_cell
def test_script_of_the_classifier_leaves_the_classifier_as_it_is(cell):
    model, x = BiRNN(6, 8, 2, 3, cell=cell.name), torch.randn(7, 9, 6)
    scripted = torch.jit.script(model)
    assert type(getattr(model, cell.name)) is cell.module
    all_near([scripted(x)], [model(x)])
    scripted(x).square().sum().backward()
    assert model.fc.weight.grad is not None  # the script shares the parameters


@pytest.mark.filterwarnings("ignore:torch.jit.script compiles an nn.LSTM")
def test_script_says_what_it_cannot_compile():
    with pytest.raises(NotImplementedError, match=r"compiles an nn\.LSTM, which has no zoneout, learned_state"):
        torch.jit.script(LSTM(6, 8, zoneout=0.1, learned_state=True))
    lstm = nn.utils.parametrizations.weight_norm(LSTM(6, 8), "weight_hh_l0")
    model = Plain(Scaled)
    accelerate(model)
    with pytest.raises(NotImplementedError, match="would leave out the forward of Scaled; trace it instead"):
        torch.jit.script(model)
    with pytest.raises(NotImplementedError, match="remove_parametrizations first, or trace it"):
        torch.jit.script(lstm)


# --- torch.export without operators of ours ---------------------------------------------------------------------------


@every_cell
@pytest.mark.slow  # test_docs.py runs the page's code by default
@pytest.mark.parametrize("name", ["plain", "lengths, last"])
@pytest.mark.parametrize("strict", [False, True])
def test_a_program_exported_as_nn_lstm_ends_in_aten_operators_alone(name, strict, cell):
    model = Tagger(cell.module, call=CALLS[name][0]).eval()
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad(), as_nn_lstm():
        program = torch.export.export(model, arguments(4, 3), dynamic_shapes=({0: batch}, {0: batch}), strict=strict)
    assert getattr(torch.ops.aten, cell.operators).input in {node.target for node in program.graph.nodes}
    program = program.run_decompositions()
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert {target.namespace for target in targets if isinstance(target, torch._ops.OpOverload)} == {"aten"}
    args = arguments(7, 3)
    all_near(program.module()(*args), model(*args))


@pytest.mark.parametrize(("cell", "name"), [pytest.param(c, n, id=f"{c.name}: {n}") for c, n in EVERY_CALL])
def test_as_nn_lstm_computes_the_same(cell, name):
    call, options = CALLS[name]
    model = Tagger(cell.module, call, **options)
    x, lengths = arguments(7, 9)
    x.requires_grad_()
    results = []
    calls = birnn_ext.op_calls()
    for _ in range(2):
        if not results:
            with as_nn_lstm():
                outputs = model(x, lengths)
            assert birnn_ext.op_calls() == calls
        else:
            outputs = model(x, lengths)
            assert birnn_ext.op_calls() != calls
        loss = sum((y * y.detach().cos()).sum() for y in outputs)
        gradients = torch.autograd.grad(loss, [x, *model.parameters()], materialize_grads=True)
        results.append([*outputs, *gradients])
    all_near(*results)


# --- restore, and what looks at types ---------------------------------------------------------------------------------


def test_restore_turns_models_written_with_ours_where_they_use_nothing_beyond_nn_lstm():
    model = nn.ModuleDict({"plain": LSTM(6, 8, recompute=True), "own": LSTM(6, 8, layer_norm=True), "gru": GRU(6, 8)})
    x = torch.randn(5, 4, 6)
    expected, parameters = model["plain"](x)[0], list(model["plain"].parameters())
    with pytest.warns(UserWarning, match="restore: own is left, as nn.LSTM has no layer_norm"):
        assert restore(model) == ["plain", "gru"]
    assert type(model["gru"]) is nn.GRU
    assert type(model["plain"]) is nn.LSTM and type(model["own"]) is LSTM
    assert all(p is q for p, q in zip(model["plain"].parameters(), parameters, strict=True))
    all_near([model["plain"](x)[0]], [expected])
    assert accelerate(model).replaced == ["plain", "gru"]
    assert model["plain"].recompute
    model = GRU(6, 8, learned_state=True)
    with pytest.warns(UserWarning, match="restore: the model itself is left, as nn.GRU has no learned_state"):
        assert restore(model) == []


@every_cell
def test_restore_keeps_parametrizations_of_models_written_with_ours(cell):
    rnn, x = nn.utils.parametrizations.weight_norm(cell.module(6, 8), "weight_hh_l0"), torch.randn(5, 4, 6)
    expected = rnn(x)[0]
    assert restore(rnn) == [""]
    assert not isinstance(rnn, cell.module)
    all_near([rnn(x)[0]], [expected])
    nn.utils.parametrize.remove_parametrizations(rnn, "weight_hh_l0")
    assert type(rnn) is cell.theirs and accelerate(rnn).left == {}


@every_cell
def test_restore_leaves_a_class_derived_from_ours(cell):
    rnn = type("Derived", (cell.module,), {})(6, 8)
    with pytest.warns(UserWarning, match="restore: the model itself is left, as its class Derived is not one that acc"):
        assert restore(rnn) == []


@every_cell
def test_the_classifier_still_runs_restored(cell):
    model = BiRNN(6, 8, 2, 3, cell=cell.name)
    x = torch.randn(7, 9, 6)
    expected = model(x)
    assert restore(model) == [cell.name]
    all_near([model(x)], [expected])


@pytest.mark.parametrize("made", ["accelerated", "ours"])
def test_static_quantization_names_restore_and_works_after_it(made):
    class Quantized(nn.Module):
        def __init__(self, cls: type[nn.LSTM]):
            super().__init__()
            self.quantize = torch.ao.quantization.QuantStub()
            self.rnn = cls(6, 8, batch_first=True, bidirectional=True)
            self.dequantize = torch.ao.quantization.DeQuantStub()

        def forward(self, x):
            return self.dequantize(self.rnn(self.quantize(x))[0])

    def quantized(model: nn.Module) -> nn.Module:
        model = copy.deepcopy(model).eval()
        model.qconfig = torch.ao.quantization.get_default_qconfig(torch.backends.quantized.engine)
        torch.ao.quantization.prepare(model, inplace=True)
        model(x)
        return torch.ao.quantization.convert(model)

    x = torch.randn(4, 5, 6)
    theirs = Quantized(nn.LSTM)
    model = Quantized(nn.LSTM if made == "accelerated" else LSTM)
    model.load_state_dict(theirs.state_dict())
    accelerate(model)
    with pytest.raises(TypeError, match=r"must not be quantized, got torch.quint8; .* birnn_ext.restore\(model\)"):
        quantized(model)(x)
    restore(model)
    assert torch.equal(quantized(model)(x), quantized(theirs)(x))


def test_a_gru_refuses_what_is_quantized():
    """PyTorch has no static quantization of a GRU, so that one gets such an input by mistake."""
    x = torch.quantize_per_tensor(torch.randn(5, 4, 6), 0.1, 0, torch.quint8)
    with pytest.raises(
        TypeError, match=r"GRU: input must not be quantized, got torch.quint8; .* an nn.GRU by .*restore"
    ):
        GRU(6, 8)(x)


# --- birnn_ext.onnx ---------------------------------------------------------------------------------------------------


def test_birnn_ext_onnx_is_loaded_when_it_is_asked_for():
    code = """
import sys, birnn_ext
assert "birnn_ext.onnx" not in sys.modules and "onnx" in dir(birnn_ext) and "LSTM" in dir(birnn_ext)
assert birnn_ext.onnx.export.__module__ == "birnn_ext.onnx"
try:
    birnn_ext.onxx
except AttributeError as error:
    assert str(error) == "module 'birnn_ext' has no attribute 'onxx'"
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- tools of others --------------------------------------------------------------------------------------------------


@every_cell
@pytest.mark.slow
@pytest.mark.parametrize("way", ["trace", "export"])
def test_openvino(way, cell):
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    model = Plain(cell.theirs).eval()
    accelerate(model)
    example = torch.randn(4, 5, 6)
    if way == "trace":
        converted, sizes = openvino.convert_model(model, example_input=example), SIZES
    else:
        with as_nn_lstm():
            converted, sizes = openvino.convert_model(torch.export.export(model, (example,))), [(4, 5)]
    run = openvino.compile_model(converted, "CPU")
    for batch, steps in sizes:
        x = torch.randn(batch, steps, 6)
        all_near([torch.from_numpy(run(x.numpy())[0])], [model(x).detach()])


@every_cell
@pytest.mark.slow
def test_executorch(cell):
    exir = pytest.importorskip("executorch.exir", reason="executorch is not installed")
    runtime = pytest.importorskip("executorch.runtime", reason="executorch is not installed")
    model, x = BiRNN(6, 8, 1, 3, cell=cell.name).eval(), torch.randn(4, 3, 6)
    with torch.no_grad(), as_nn_lstm():
        program = torch.export.export(model, (x,))
    written = exir.to_edge_transform_and_lower(program).to_executorch()
    method = runtime.Runtime.get().load_program(written.buffer).load_method("forward")
    all_near(method.execute((x,)), [model(x).detach()])


@every_cell
@pytest.mark.slow
@pytest.mark.parametrize("name", ["last", "lengths, last"])
def test_core_ml_converts(name, cell):
    """It becomes Core ML's LSTM operator, or the loop that coremltools makes of nn.GRU.

    Core ML runs on macOS only, so the test stops at the conversion.
    """
    coremltools = pytest.importorskip("coremltools", reason="coremltools is not installed")
    model = Tagger(cell.module, call=lambda *args: CALLS[name][0](*args)[0]).eval()
    traced = torch.jit.trace(model, arguments(4, 5))
    shape = coremltools.Shape((4, coremltools.RangeDim(1, 64), 6))
    inputs = [coremltools.TensorType(shape=shape), coremltools.TensorType(shape=(4,), dtype=int)]
    used = len(list(traced.graph.inputs())[1:])
    converted = coremltools.convert(traced, inputs=inputs[:used], convert_to="mlprogram")
    made = "lstm" if cell is LSTM_CELL else "while_loop"
    assert made in {op.op_type for op in converted._mil_program.functions["main"].operations}
