"""Several processes that train one model: torchrun with the command, DistributedDataParallel and FSDP with the modules."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import all_near

from birnn_ext.mnist.processes import Processes

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TRAIN = ["-m", "birnn_ext.mnist", "train", "--data-source", "sample", "--device", "cpu", "--hidden-size", "8"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_shares_make_up_the_batch():
    for size in (7, 2, 1, 0):
        shares = [Processes(rank, 3).share(torch.arange(size)) for rank in range(3)]
        assert torch.cat(shares).tolist() == list(range(size))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_two_processes_come_to_the_model_of_one(tmp_path):
    """Steps of 4,999 digits and of 1: shares of 2,500 and 2,499, then of 1 and none."""
    arguments = [*TRAIN, "--batch-size", "4999", "--num-epochs", "3", "--learning-rate", "0.01"]
    done = [
        subprocess.run(
            [sys.executable, *launcher, *arguments, "--out", tmp_path / name],
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
        )
        for name, launcher in (("one", []), ("two", TORCHRUN))
    ]
    for run in done:
        assert run.returncode == 0, run.stderr
    one, two = (re.sub(r"\d+\.\d{4}|one|two", "", run.stdout) for run in done)
    assert two == one  # the first process alone prints
    assert done[1].stderr.count("Epoch 1/3: 100%") == done[0].stderr.count("Epoch 1/3: 100%") == 1
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(p.name for p in (tmp_path / "one").iterdir())

    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert [m["processes"] for m in metrics] == [1, 2]
    assert len(metrics[0]["loss"]) == 6
    assert metrics[1]["loss"] == pytest.approx(metrics[0]["loss"], rel=1e-5)
    assert metrics[1]["accuracy"] == metrics[0]["accuracy"]
    models = [torch.load(tmp_path / name / "model.ckpt", weights_only=True) for name in ("one", "two")]
    assert list(models[0]) == list(models[1])
    all_near(models[1].values(), models[0].values())


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
    rest, _ = process.communicate(timeout=60)
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
