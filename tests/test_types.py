"""A type checker sees the package's types in a user's program, and help() has a text for all that is public."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from importlib import resources
from pathlib import Path

import pytest

import birnn_ext
from birnn_ext import onnx, ops, variants

# mypy follows only those imports of torch that these types need, so a first run takes a quarter of the time.
CONFIGURATION = """
[mypy]
strict = true
follow_imports = silent
[mypy-torch.*,numpy.*]
follow_imports = skip
[mypy-torch,torch._C.*,torch._tensor,torch.nn.*]
follow_imports = silent
"""


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config):
    """Returns a function that checks a program with mypy and returns the lines of its report."""
    api = pytest.importorskip("mypy.api", reason="mypy is not installed")
    where = Path(birnn_ext.__file__).parent.parent
    if where.name != "site-packages":  # mypy knows that folder, and refuses it here
        monkeypatch.setenv("MYPYPATH", str(where))
    (tmp_path / "mypy.ini").write_text(CONFIGURATION)

    def check(program: str) -> list[str]:
        file = tmp_path / "program.py"
        file.write_text(textwrap.dedent(program))
        options = ["--config-file", str(tmp_path / "mypy.ini"), "--cache-dir", str(pytestconfig.cache.mkdir("mypy"))]
        report, trouble, _ = api.run([*options, "--hide-error-codes", "--no-error-summary", str(file)])
        assert trouble == ""
        return [line.split("program.py:", 1)[1] for line in report.splitlines()]

    return check


def test_types_in_a_users_program(check):
    program = """
        import torch
        from torch import Tensor
        from torch.nn.utils.rnn import PackedSequence, pack_sequence
        from typing_extensions import assert_type
        from birnn_ext import GRU, LSTM, RNN, Acceleration, BiRNN, accelerate, build_info, op_calls, restore

        State = tuple[Tensor, Tensor]
        lstm, x = LSTM(28, 128, bidirectional=True), torch.zeros(3, 2, 28)
        assert_type(lstm(x), tuple[Tensor, State])
        assert_type(lstm(pack_sequence([x[:, 0]])), tuple[PackedSequence, State])
        assert_type(lstm(x, lengths=torch.tensor([3, 1]), output="last"), tuple[Tensor, State | None])
        gru = GRU(28, 128, bidirectional=True)
        assert_type(gru(x), tuple[Tensor, Tensor])
        assert_type(gru(pack_sequence([x[:, 0]])), tuple[PackedSequence, Tensor])
        assert_type(gru(x, lengths=[3, 1], output="last"), tuple[Tensor, Tensor | None])
        assert_type(BiRNN(28, 128, 2, 10)(x), Tensor)
        assert_type(BiRNN(28, 128, 2, 10, cell="gru")(x), Tensor)
        assert_type(RNN(28, 128, nonlinearity="relu")(x), tuple[Tensor, Tensor])
        assert_type(BiRNN(28, 128, 2, 10, cell="rnn")(x), Tensor)
        gru(x, (x, x))  # wrong
        gru(x, return_cell_states=True)  # wrong
        GRU(28, 128, proj_size=3)  # wrong
        BiRNN(28, 128, 2, 10, cell="RNN")  # wrong
        RNN(28, 128, nonlinearity="sine")  # wrong
        assert_type(accelerate(lstm), Acceleration)
        assert_type(accelerate(lstm).left, dict[str, str])
        assert_type(restore(lstm), list[str])
        assert_type(op_calls(), dict[str, int])
        lstm(x, output="first")  # wrong
        lstm(x, size=3)  # wrong
        LSTM("28", 128)  # wrong
        build_info().version  # wrong
        restore(lstm).left  # wrong
    """
    report = check(program)
    errors = {int(line.split(":")[0]) for line in report if ": error:" in line}
    wrong = {number for number, line in enumerate(program.splitlines(), 1) if line.endswith("# wrong")}
    assert errors == wrong, "\n".join(report)


def test_the_package_says_that_it_has_types():
    assert resources.files("birnn_ext").joinpath("py.typed").is_file()


def signature(function: ast.FunctionDef) -> list[tuple[str, str, object]]:
    """Names, types and defaults of the arguments; and what is returned. pybind11's versions differ in how they write int."""
    of_end = [*[None] * (len(function.args.args) - len(function.args.defaults)), *function.args.defaults]
    arguments = [
        (arg.arg, "int" if "SupportsInt" in ast.unparse(arg.annotation) else ast.unparse(arg.annotation), default)
        for arg, default in zip(function.args.args, of_end, strict=True)
    ]
    defaults = [(name, kind, default and ast.literal_eval(default)) for name, kind, default in arguments]
    return [*defaults, ("return", ast.unparse(function.returns).split("[")[0], None)]


def test_the_stub_agrees_with_the_compiled_module():
    stub = ast.parse(resources.files("birnn_ext").joinpath("_C.pyi").read_text())
    stubs = {one.name: signature(one) for one in stub.body if isinstance(one, ast.FunctionDef)}
    assert stubs.keys() == {name for name in dir(birnn_ext._C) if not name.startswith("_")}
    for name, ours in stubs.items():
        first = getattr(birnn_ext._C, name).__doc__.splitlines()[0]  # pybind11 writes the signature there
        (compiled,) = ast.parse(f"def {first}: ...").body
        theirs = signature(compiled)
        if theirs[-1][1] == "object":  # says nothing
            theirs[-1] = ours[-1]
        assert ours == theirs, name


def public() -> dict[str, object]:
    """Returns every public class, its own public methods, and every public function."""
    found = {name: getattr(birnn_ext, name) for name in birnn_ext.__all__ if name != "__version__"}
    found |= {
        f"ops.{name}": getattr(ops, name)
        for name in ("lstm_recurrence", "lstm_layer", "gru_recurrence", "gru_layer", "rnn_recurrence", "rnn_layer")
    }
    found |= {"onnx.export": onnx.export}
    found |= {f"variants.{name}": getattr(variants, name) for name in ("lstm_variant", "lstm_variant_layer")}
    for name, one in list(found.items()):
        if inspect.isclass(one):
            found |= {f"{name}.{key}": f for key, f in vars(one).items() if inspect.isfunction(f) and key[0] != "_"}
    return found


@pytest.mark.parametrize("name", public())
def test_what_is_public_has_a_docstring_that_names_every_argument(name):
    one = public()[name]
    text = vars(one).get("__doc__") if inspect.isclass(one) else one.__doc__  # a base's text does not count
    assert text
    unnamed = [name for name in inspect.signature(one).parameters if not re.search(rf"\b{name}\b", text)]
    assert unnamed in ([], ["self"])
