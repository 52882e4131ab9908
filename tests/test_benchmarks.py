"""The benchmark scripts run, compare what they time, and tell of a mismatch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import peers
import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "benchmarks"
TINY = (3, 5, 4, 6, 2)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One call a round, on one thread: two that share a core with another program wait for each other."""
    monkeypatch.setattr(peers, "TURN", 0)
    monkeypatch.setattr(peers, "REST", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_mnist_end_to_end():
    command = [sys.executable, SCRIPTS / "mnist_end_to_end.py", "--steps", "2", "--data-source", "sample"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\|  \| tutorial \| birnn_ext \|", done.stdout, re.MULTILINE)
    assert re.search(r"^\| peak memory, MiB \| \d+ \| \d+ \|", done.stdout, re.MULTILINE)
    assert float(re.search(r"difference of losses: (\S+) over the first 2 steps", done.stdout)[1]) < 1e-4


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (peers.inference, {}),
        (peers.forward_backward, {}),
        (peers.forward_backward, {"last": True}),
        (peers.ragged, {}),
        (peers.training_step, {}),
        (peers.training_step, {"dtype": torch.bfloat16}),
    ],
)
def test_row_without_peers(make, options):
    row = peers.timed_row("tiny", make, TINY, options, [], 1)
    assert row.figures.keys() == {"birnn_ext", "nn.LSTM"}
    assert f"| tiny, ms | 3,5,4,6,2 | {row.median('birnn_ext'):.4g} |" in peers.table([row])


@pytest.mark.parametrize("peer", peers.PEERS)
def test_peer_computes_what_torch_does(peer):
    if peer not in peers.installed():
        pytest.skip(f"{peer} is not installed")
    peers.check(peers.inference(TINY, [peer]), torch.float32)
    peers.check(peers.forward_backward(TINY, [peer], last=True), torch.float32)


def test_a_mismatch_is_an_error():
    works = {peers.TORCH: lambda: [torch.ones(2)], peers.OURS: lambda: [torch.tensor([1.0, 1.01])]}
    with pytest.raises(AssertionError, match=r"birnn_ext: result 0 is off by 1\.0e-02"):
        peers.check(works, torch.float32)


def test_chart_and_notes(tmp_path):
    row = peers.Row("inference", TINY, figures={"birnn_ext": [1.0], "nn.LSTM": [2.0], "JAX": [3.0]})
    peers.draw([row], "a machine", tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    noted = peers.Row("high", TINY, note="no AMX here")
    assert "no AMX here" in peers.table([row, noted])
    assert row.advantage(peers.TORCH) == 2
    assert noted.advantage(peers.TORCH) is None
