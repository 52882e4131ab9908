"""Several processes train one model: with torchrun and the command, or with DistributedDataParallel and FSDP."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from threading import Event

import pytest
import torch
from cells import every_cell, every_cell_the_gru_slow
from helpers import all_near, twins
from torch import nn
from torch.distributed.fsdp import fully_shard

from birnn_ext import accelerate, op_calls, restore
from birnn_ext.mnist.data import load_mnist
from birnn_ext.mnist.processes import Processes
from birnn_ext.mnist.training import Hyperparameters, Training

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TRAIN = ["-m", "birnn_ext.mnist", "train", "--data-source", "sample", "--device", "cpu", "--hidden-size", "8"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_shares_make_up_the_batch():
    for size in (7, 2, 1, 0):
        shares = [Processes(rank, 3).share(torch.arange(size)) for rank in range(3)]
        assert torch.cat(shares).tolist() == list(range(size))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@every_cell_the_gru_slow
def test_two_processes_reach_the_model_of_one(tmp_path, cell):
    """Steps have 4,999 digits and 1 digit, so shares are 2,500 and 2,499, then 1 and none."""
    hp = Hyperparameters(hidden_size=8, batch_size=4999, num_epochs=2, learning_rate=0.01, cell=cell.name)
    arguments = ["--batch-size", "4999", "--num-epochs", "2", "--learning-rate", "0.01", "--cell", cell.name]
    run = subprocess.run(
        [sys.executable, *TORCHRUN, *TRAIN, *arguments, "--out", tmp_path],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert run.returncode == 0, run.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["processes"] == 2

    lines: list[str] = []
    one = Training(hp, load_mnist(tmp_path, "sample", lines.append), torch.device("cpu"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one.run(None, Event(), lines.append)
    torch.set_num_threads(threads)
    assert len(one.progress.losses) == 4
    assert metrics["loss"] == pytest.approx(one.progress.losses, rel=1e-5)
    assert metrics["epoch_accuracy"] == one.progress.accuracies
    model = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert list(model) == list(one.model.state_dict())
    for trained, expected in zip(model.values(), one.model.state_dict().values(), strict=True):
        # Adam divides by a gradient's size, which magnifies the rounding of those near 0. A step is up to 1e-2.
        torch.testing.assert_close(trained, expected, rtol=0, atol=1e-4)

    # only the first process prints, and prints what a single process would
    printed = [line for line in run.stdout.splitlines() if not line.startswith("[Gloo]")]  # as torch 2.10 does
    assert printed[: len(lines)] == lines
    assert run.stdout.count("Test Accuracy") == run.stdout.count("Saved model.ckpt") == 1
    assert run.stderr.count("Epoch 1/2:   0%") == 1


# Runs the command in two processes, many times. It forks, as importing takes far longer than these trainings.
FORKED = """
import os, socket, sys
from matplotlib.backends import backend_agg
from birnn_ext.mnist import main

runs, *arguments = sys.argv[1:]
for _ in range(int(runs)):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    children = []
    for rank in "01":
        children.append(os.fork())
        if children[-1] == 0:
            os.environ.update(TORCHELASTIC_RUN_ID="a", RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            sys.argv[1:] = arguments
            status = main()
            names = [open(f"/proc/self/task/{thread}/comm").read().strip() for thread in os.listdir("/proc/self/task")]
            with open(f"{arguments[-1]}/threads", "a") as log:  # as lines of a pipe that both write to may mix
                log.write(" ".join(names) + "\\n")
            sys.exit(status)
    print("statuses:", *(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are listed in Linux's /proc")
@pytest.mark.parametrize("runs", [1, pytest.param(30, marks=pytest.mark.slow)])
def test_no_thread_of_the_group_is_left_when_python_ends(tmp_path, runs):
    """A thread that drops a tensor while Python ends aborts the process, about once in twenty runs."""
    arguments = [*TRAIN[2:], "--batch-size", "2500", "--max-steps", "1", "--out", tmp_path]
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(runs), *arguments], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("statuses: 0 0\n") == runs, done.stdout + done.stderr
    threads = (tmp_path / "threads").read_text().splitlines()
    assert len(threads) == 2 * runs
    assert not any("gloo" in names for names in threads), threads


@pytest.fixture
def one_process(tmp_path):
    """Makes a process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@every_cell
@pytest.mark.parametrize("wrap", [nn.parallel.DistributedDataParallel, fully_shard])
def test_wrappers_that_replace_parameters(wrap, cell, one_process):
    """Nothing is flattened, so wrappers may shard or replace the weights."""
    ours, theirs = twins(3, 8, 2, batch_first=True, bidirectional=True, cell=cell)
    x = torch.randn(4, 5, 3)
    model = wrap(ours)
    y, _ = model(x)
    expected, _ = theirs(x)
    all_near([y], [expected])
    y.square().sum().backward()
    expected.square().sum().backward()
    grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
    all_near(grads, [p.grad for p in theirs.parameters()])


@every_cell
@pytest.mark.parametrize("first", ["accelerated", "sharded"])
def test_fully_shard_and_accelerate_in_any_order(first, cell, one_process):
    theirs = nn.Sequential(cell.theirs(3, 8, 2, batch_first=True, bidirectional=True))
    model = copy.deepcopy(theirs)
    steps = [accelerate, lambda model: fully_shard(model[0]) and fully_shard(model)]
    for step in steps if first == "accelerated" else reversed(steps):
        step(model)
    assert type(model[0]).__name__ == f"FSDP{cell.theirs.__name__}"
    x = torch.randn(4, 5, 3)

    def results(model: nn.Module) -> list[torch.Tensor]:
        y, _ = model(x)
        model.zero_grad()
        y.square().sum().backward()
        grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
        return [y, *grads]

    expected = results(theirs)
    calls = op_calls()["cpu_backward"]
    all_near(results(model), expected)
    assert op_calls()["cpu_backward"] > calls

    assert restore(model) == ["0"]
    calls = op_calls()["cpu_backward"]
    all_near(results(model), expected)
    assert op_calls()["cpu_backward"] == calls


@pytest.mark.slow
def test_interrupted_together_and_resumed_alone(tmp_path):
    arguments = [*TRAIN, "--batch-size", "50", "--out", tmp_path]
    process = subprocess.Popen(
        [sys.executable, *TORCHRUN, *arguments, "--num-epochs", "1000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    while not (line := process.stdout.readline()).startswith("Epoch"):
        assert line or process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=300)
    (steps,) = re.findall(
        r"Interrupted after (\d+) steps. To go on: torchrun --nproc-per-node 2 -m birnn_ext.mnist ", rest
    )
    again = subprocess.run(
        [sys.executable, *arguments, "--resume", "--max-steps", str(int(steps) + 3)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert again.returncode == 0, again.stderr
    assert len(json.loads((tmp_path / "metrics.json").read_text())["loss"]) == int(steps) + 3


@pytest.mark.slow
def test_a_user_error_is_said_once(tmp_path):
    (tmp_path / "training_state.pt").write_text("no state")
    arguments = [*TRAIN, "--resume", tmp_path, "--out", tmp_path]
    run = subprocess.run([sys.executable, *TORCHRUN, *arguments], capture_output=True, text=True, env=ENVIRONMENT)
    assert run.returncode != 0
    assert run.stderr.count("birnn-mnist: error: ") == 1
    assert "is not a checkpoint" in run.stderr
