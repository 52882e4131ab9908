"""torch.export and AOTInductor keep batch and time dynamic, and a loaded program computes what the module does."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch
from cells import GRU_CELL, LSTM_CELL, every_cell, every_cell_fast
from helpers import all_near, leaves, random_state
from torch import nn
from torch.export import Dim

from birnn_ext import BiRNN

SIZES = [(1, 1), (4, 9), (2, 30)]  # B, T; none is the example's


def reloaded(program: torch.export.ExportedProgram) -> nn.Module:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@every_cell_fast
@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_export_of_the_classifier_freezes_neither_batch_nor_time(strict, cell):
    model = BiRNN(28, 16, 2, 10, cell=cell.name)
    shapes = {"x": {0: Dim("batch", min=1), 1: Dim("time", min=1)}}
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(3, 7, 28),), dynamic_shapes=shapes, strict=strict)
        loaded = reloaded(program)
        for batch, steps in SIZES:
            x = torch.randn(batch, steps, 28)
            all_near([loaded(x)], [model(x)])
    assert [node.target for node in program.graph.nodes].count(cell.operator()) == 1
    decomposed = program.run_decompositions().graph.nodes
    layers = [node for node in decomposed if node.target is cell.operator("_layer")]
    assert [node.args[-1] for node in layers] == ["none"] * 3  # no_grad saves nothing for a backward pass


@pytest.mark.parametrize(
    ("cell", "output", "recompute", "dtype"),
    [
        (LSTM_CELL, "all", True, torch.float32),
        (LSTM_CELL, "last", False, torch.bfloat16),
        (GRU_CELL, "all", False, torch.float32),
        pytest.param(GRU_CELL, "all", False, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(LSTM_CELL, "last", True, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_export_with_states_and_lengths_freezes_neither_batch_nor_time(cell, output, recompute, dtype, device):
    lstm = cell.module(5, 8, 2, batch_first=True, bidirectional=True, recompute=recompute, device=device, dtype=dtype)

    def arguments(batch: int, steps: int):
        x = torch.randn(batch, steps, 5, device=device).to(dtype)
        state = tuple(s.to(dtype) for s in random_state(4, batch, 8, cell, device=device))
        return (x, cell.hx(state)), {"lengths": torch.randint(0, steps + 1, (batch,), device=device), "output": output}

    batch, time = Dim("batch", min=1), Dim("time", min=1)
    shapes = {"input": {0: batch, 1: time}, "hx": cell.hx(({1: batch},) * 2), "lengths": {0: batch}, "output": None}
    args, kwargs = arguments(3, 7)
    with torch.no_grad():
        loaded = reloaded(torch.export.export(lstm, args, kwargs, dynamic_shapes=shapes))
        for size in SIZES:
            args, kwargs = arguments(*size)
            all_near(leaves(loaded(*args, **kwargs)), leaves(lstm(*args, **kwargs)))


@every_cell
def test_exported_program_can_be_trained(cell):
    lstm = cell.module(5, 8, 2, bidirectional=True)
    x = torch.randn(7, 3, 5)
    program = torch.export.export(lstm, (x,), dynamic_shapes={"input": {0: Dim("time"), 1: Dim("batch")}})
    exported = program.module()
    x = torch.randn(4, 6, 5)
    exported(x)[0].square().sum().backward()
    lstm(x)[0].square().sum().backward()
    ours = dict(lstm.named_parameters())
    for name, parameter in exported.named_parameters():
        all_near([parameter.grad], [ours[name].grad], name)


@every_cell
@pytest.mark.slow
def test_aotinductor_package_freezes_neither_batch_nor_time(tmp_path, cell):
    """The model is compiled ahead of time, and a process runs it that has only the package and the extension."""
    model = BiRNN(28, 16, 2, 10, cell=cell.name)
    shapes = {"x": {0: Dim("batch", min=1), 1: Dim("time", min=1)}}
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(3, 7, 28),), dynamic_shapes=shapes)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "birnn.pt2"))
        cases = [(x, model(x)) for x in (torch.randn(batch, steps, 28) for batch, steps in SIZES)]
    torch.save(cases, tmp_path / "cases.pt")
    code = """
import sys, torch, birnn_ext
run = torch._inductor.aoti_load_package(sys.argv[1])
for x, expected in torch.load(sys.argv[2]):
    torch.testing.assert_close(run(x), expected, rtol=1e-5, atol=1e-5)
print("ran", birnn_ext.op_calls()["cpu_forward"])
"""
    command = [sys.executable, "-c", code, package, str(tmp_path / "cases.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "ran 9"  # three operators for each case
