"""On CUDA a training step is one CUDA graph, with the numbers of the same steps without it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import torch
from torch import Tensor

from birnn_ext import op_calls
from birnn_ext.mnist import cli, data
from birnn_ext.mnist.processes import Processes
from birnn_ext.mnist.training import Hyperparameters, Training, load_state, save

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = Hyperparameters(hidden_size=8, batch_size=8, num_epochs=3)  # of 30 digits: 4 steps per epoch, the last one of 6
CAPTURED, REFUSED = "From here on, a training step is one CUDA graph", "A training step can't be captured"


class Alone(Processes):
    """Processes whose others contribute nothing."""

    def sum(self, value: Tensor) -> Tensor:
        return value


def train(
    folder: Path,
    device: torch.device = CUDA,
    hp: Hyperparameters = SMALL,
    max_steps: int | None = None,
    log: list[str] | None = None,
    kind: type[Training] = Training,
    **options,
) -> Training:
    digits = (data.Digits(part.images[:30], part.labels[:30]).to(device) for part in data.read_sample(folder))
    run = kind(hp, data.Mnist(*digits, "sample"), device, **options)
    assert run.run(max_steps, Event(), (log if log is not None else []).append)
    return run


def assert_equal(found: Training, expected: Training) -> None:
    assert found.progress.losses == expected.progress.losses
    assert found.progress.accuracies == expected.progress.accuracies
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], tensor), name
    moments = (run.optimizer.state_dict()["state"] for run in (found, expected))
    for one, other in zip(*(state.values() for state in moments), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("hp", "max_steps", "launched"),
    [
        # 3 steps before the capture, the capture itself, and each smaller batch
        pytest.param(SMALL, None, 3 + 1 + 3, id="three_epochs"),
        pytest.param(Hyperparameters(batch_size=7), 5, 3 + 1 + 1, id="the_tutorials_model"),
        pytest.param(Hyperparameters(hidden_size=8, num_epochs=5), None, 3 + 1, id="one_batch_an_epoch"),
        pytest.param(replace(SMALL, cell="gru"), None, 3 + 1 + 3, id="a_gru"),
    ],
)
def test_losses_and_weights_are_those_without_a_graph(tmp_path, hp, max_steps, launched):
    log: list[str] = []
    expected = train(tmp_path, hp=hp, max_steps=max_steps, graph=False, log=log)
    assert not any("graph" in line for line in log)
    before = op_calls()["cuda_backward"]
    found = train(tmp_path, hp=hp, max_steps=max_steps, log=log)
    assert_equal(found, expected)
    assert op_calls()["cuda_backward"] - before == 3 * launched  # a replay calls no operator; see test_cli.py on the 3
    assert sum(line.startswith(CAPTURED) for line in log) == 1


@pytest.mark.cuda
@pytest.mark.parametrize("steps", [2, 3, 6], ids="cut_after_{}".format)  # in the warm-up, before a smaller batch, later
def test_resume_with_and_without_a_graph(tmp_path, steps):
    expected = train(tmp_path, graph=False)
    for before in (True, False):
        save(train(tmp_path, max_steps=steps, graph=before), tmp_path)
        for after in (True, False):
            log: list[str] = []
            found = train(tmp_path, state=load_state(tmp_path), graph=after, log=log)
            assert_equal(found, expected)
            assert any(line.startswith(CAPTURED) for line in log) == after


@pytest.mark.cuda
def test_resume_on_another_device(tmp_path):
    """A state of the CPU goes on as a graph, and one of a graph goes on on the CPU."""
    whole = train(tmp_path, CPU)
    for first, then in ((CPU, CUDA), (CUDA, CPU)):
        save(train(tmp_path, first, max_steps=6), tmp_path)
        found = train(tmp_path, then, state=load_state(tmp_path))
        assert found.progress.losses == pytest.approx(whole.progress.losses, rel=1e-4)
        assert {group["capturable"] for group in found.optimizer.param_groups} == {then == CUDA}
        if then == CUDA:
            assert_equal(found, train(tmp_path, state=load_state(tmp_path), graph=False))


class Waits(Training):
    """Its step reads the loss, for which it has to wait for the GPU. A capture can't do that."""

    def _step(self, batch: Tensor) -> Tensor:
        loss = super()._step(batch)
        assert loss.item() > 0
        return loss


class Fails(Training):
    """Its step fails within a capture, before the backward pass."""

    def _step(self, batch: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            self.model(torch.zeros(8, 28, 28, device="cuda"))
            raise RuntimeError("no capture today\nand a stack of lines")
        return super()._step(batch)


@pytest.mark.cuda
@pytest.mark.parametrize(("kind", "why"), [(Waits, ""), (Fails, "no capture today")])
def test_a_step_that_can_not_be_captured_runs_without_a_graph(tmp_path, kind, why):
    log: list[str] = []
    found = train(tmp_path, kind=kind, log=log)
    (line,) = [line for line in log if "graph" in line]
    assert line.startswith(REFUSED)
    assert line.endswith(why)
    assert "\n" not in line
    assert_equal(found, train(tmp_path, graph=False))
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


@pytest.mark.cuda
def test_several_processes_say_that_they_train_without_a_graph(tmp_path):
    log: list[str] = []
    run = train(tmp_path, max_steps=5, processes=Alone(count=2), log=log)
    assert len(run.progress.losses) == 5
    assert [line for line in log if "graph" in line] == [
        "Several processes train without a CUDA graph, as they exchange gradients within each step"
    ]


@pytest.mark.cuda
def test_the_command_on_cuda(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "draw_curves", lambda *_: b"")
    monkeypatch.setattr(cli, "draw_misclassified", lambda *_: b"")
    options = ["--data-source", "sample", "--device", "cuda", "--hidden-size", "8", "--batch-size", "4"]
    losses = []
    for name, options_of_graph in (("graph", []), ("eager", ["--no-graph"])):
        out = tmp_path / name
        assert cli.main(["train", *options, *options_of_graph, "--max-steps", "5", "--out", str(out)]) == 0
        assert (CAPTURED in capsys.readouterr().out) == (name == "graph")
        losses.append(json.loads((out / "metrics.json").read_text())["loss"])
    assert losses[0] == losses[1]


def test_the_cpu_has_no_graph(tmp_path):
    """It has none, asked for or not."""
    log: list[str] = []
    runs = [train(tmp_path, CPU, max_steps=5, graph=graph, log=log) for graph in (True, False)]
    assert_equal(*runs)
    assert not any("graph" in line for line in log)
    assert not runs[0].optimizer.param_groups[0]["capturable"]


def test_the_command_to_resume_keeps_the_choice():
    for option in ([], ["--no-graph"]):
        assert ("--no-graph" in cli.resume_command(cli.parse(["train", "--out", "runs/a", *option]))) == bool(option)
