"""tools/gpu_check.sh and tools/cuda_counts.py need a GPU or an emulator. These tests check what needs neither."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).parents[1] / "tools"
pytestmark = pytest.mark.skipif(not TOOLS.exists(), reason="tools/ is in the repository only")


def gpu_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run([TOOLS / "gpu_check.sh", *arguments], capture_output=True, text=True, env=environment)


def test_gpu_check_lists_its_parts():
    parts = gpu_check("--list").stdout.split()
    assert {"build", "tests", "sanitizer", "speed", "mnist"} < set(parts)
    text = (TOOLS / "gpu_check.sh").read_text()
    assert all(f"part_{part}()" in text or part.startswith("tests-") for part in parts)


@pytest.mark.parametrize("arguments", [["--part"], ["--part", "nothing"], ["--part", "tests sanitizer"], ["--no"]])
def test_gpu_check_refuses_unknown_arguments(arguments):
    done = gpu_check(*arguments)
    assert done.returncode == 2
    assert re.match(r"usage: .* parts are build tests ", done.stderr)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_says_that_there_is_no_gpu():
    done = gpu_check("--part", "speed")
    assert done.returncode == 1
    assert "there is no GPU here" in done.stderr


@pytest.fixture(scope="module")
def counts():
    spec = importlib.util.spec_from_file_location("cuda_counts", TOOLS / "cuda_counts.py")
    module = sys.modules["cuda_counts"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launch(steps: int) -> dict:
    """Returns the counts of a launch of 4 blocks of 2 warps, with a beginning and with steps."""
    kinds = {"mma": 5 + 16 * steps, "ld.shared": 9 + 8 * steps, "st.shared": 4 * steps, "st.other": 2 * steps}
    return {
        "kernel": "a kernel",
        "grid": [2, 2, 1],
        "block": [32, 2, 1],
        "cluster": [2, 1, 1],
        "warp_instructions": 1000 + 800 * steps,
        "global_load_bytes": 70 + 64 * steps,
        "global_store_bytes": 32 * steps,
        "shared_bank_conflicts": 3 * steps,
        "by_class": kinds,
    }


def test_counts_of_a_step(counts):
    found = counts.Count.of_a_step([launch(4)], [launch(8)])
    assert found == counts.Count(8, 800, 100, 16, 8, 4, 3, 2, 96)
    study = counts.Count(16, 400, 50, 16, 16, 4, 0, 1, 96)
    assert counts.cells(found, study) == [
        "8 (0.50)", "800 (2.00)", "100 (2.00)", "16 (1.00)", "8 (0.50) / 4 (1.00)", "3", "2 (2.00)", "96 (1.00)"
    ]  # fmt: skip
    assert len(counts.HEAD) == 2 + len(counts.cells(found))
    assert counts.name_of("persistent-cluster", [launch(4)]) == "persistent-cluster, 4 blocks in clusters of 2"


def test_launches_are_those_of_the_named_kernels(counts, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    stats = tmp_path / "counts.jsonl"
    stats.write_text('{"kernel": "birnn::before"}\n')

    def run() -> None:
        with stats.open("a") as file:
            file.write('{"kernel": "birnn::forward"}\n{"kernel": "at::fill"}\n')

    assert counts.counted(stats, "birnn", run) == [{"kernel": "birnn::forward"}]
    with pytest.raises(SystemExit, match="no kernel's name matches 'gru': at::fill, birnn::forward"):
        counts.counted(stats, "gru", run)
    with pytest.raises(SystemExit, match="the device has counted nothing"):
        counts.counted(stats, "birnn", lambda: None)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("CUDA_EMULATOR"), reason="CUDA_EMULATOR names no emulator")
def test_counts_of_this_build(tmp_path):
    stats = tmp_path / "counts.jsonl"
    command = [os.environ["CUDA_EMULATOR"], "--cc", "90", "--stats", stats, "--", sys.executable]
    done = subprocess.run(
        [*command, TOOLS / "cuda_counts.py", stats, "--only", "bfloat16 256"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 + 2 * 2  # forward and backward, each with its study
    for line in lines[3::2]:
        assert line.startswith("|  | persistent-cluster, ")
        assert float(re.search(r"\| 4096 \((.*?)\) \|", line)[1]) == 1  # mma, as many as the products need
