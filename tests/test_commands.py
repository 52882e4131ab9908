"""`make train` and `make test` announce long steps, show their progress, and report failures last."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# This program stands for the Python that makes the virtual environment, and for the one within it.
PYTHON = """#!/bin/sh
echo "$@" >> "$PYTHON_CALLS"
case "$*" in
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
*" -e "*)
    echo '  Running command Building editable for birnn_ext (pyproject.toml)'
    echo '  Downloading numpy-2.0.0.whl (16.2 MB)'
    echo '  birnn_ext: building for the CPU only: BIRNN_CUDA=0'
    for file in cpu/isa.cpp cuda/cell_kernels.cu; do
        echo "  ${NINJA_STATUS}g++ -MMD -DX='1 -c 2' -c -c /a folder/csrc/$file -o /tmp/x.o -O3" \\
            | sed 's/%f/1/; s/%t/2/; s/%e/12.345/'
    done
    echo '  csrc/cpu/isa.cpp:1:1: fatal error: no such thing' >&2
    seq 100
    exit $STATUS ;;
esac
"""


def make(folder: Path, status: int) -> subprocess.CompletedProcess:
    """Runs `make install` with a pip that exits with status."""
    python = folder / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return subprocess.run(
        ["make", "--no-print-directory", "install", f"PYTHON={python}", f"VENV={folder}/venv"],
        cwd=ROOT,
        env={**os.environ, "STATUS": str(status), "PYTHON_CALLS": str(folder / "calls"), "MAKEFLAGS": ""},
        capture_output=True,
        text=True,
    )


needs_make = pytest.mark.skipif(
    not (shutil.which("make") and (ROOT / "Makefile").exists()), reason="needs make and the repository's files"
)


@needs_make
def test_each_step_is_announced_and_shows_progress(tmp_path):
    done = make(tmp_path, status=0)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("== Step 1 of 2: ") and " GB to download" in lines[0]
    assert lines[1].startswith("== Step 2 of 2: ") and "minutes on two cores" in lines[1]
    assert lines[2:] == [
        "  Downloading numpy-2.0.0.whl (16.2 MB)",
        "  birnn_ext: building for the CPU only: BIRNN_CUDA=0",
        "  [1 of 2, 12.345 s] isa.cpp",
        "  [1 of 2, 12.345 s] cell_kernels.cu",
    ]
    # pip itself shows the progress of the large download
    (download,) = [call for call in (tmp_path / "calls").read_text().splitlines() if "torch==" in call]
    assert "--quiet" not in download
    again = make(tmp_path, status=0)
    assert again.returncode == 0 and "==" not in again.stdout


@needs_make
def test_a_build_that_fails_is_shown_in_full(tmp_path):
    done = make(tmp_path, status=1)
    assert done.returncode != 0
    assert "csrc/cpu/isa.cpp:1:1: fatal error: no such thing" in done.stdout
    assert "Running command Building editable" in done.stdout
    assert not (tmp_path / "venv" / "installed").exists()


TESTS = """
import pytest

@pytest.mark.cuda
@pytest.mark.parametrize("k", range(3))
def test_on_a_gpu(k):
    pass

def test_skipped():
    pytest.skip("a reason\\nin two lines")

def test_fails():
    assert 1 == 2

@pytest.fixture
def broken():
    raise ValueError

def test_error(broken):
    pass
"""


def test_failures_come_last_and_skips_are_counted_by_reason(tmp_path):
    """A process runs with stubs for torch and birnn_ext, which would take seconds to load."""
    (tmp_path / "torch.py").write_text("manual_seed = print\nclass cuda:\n    is_available = bool\n")
    (tmp_path / "birnn_ext.py").write_text("build_info = op_calls = dict\n")
    (tmp_path / "helpers.py").write_text("from contextlib import nullcontext as plain_torch\n")
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_some.py").write_text(TESTS)
    options = ["-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, "-p", "no:cacheprovider", tmp_path]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "PYTEST_ADDOPTS": "",
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    (at,) = [k for k, line in enumerate(lines) if line.strip("= ") == "4 skipped"]
    assert lines[at + 1 : at + 3] == [
        "   3 torch.cuda is not available: no GPU and no emulator",
        "   1 a reason in two lines",
    ]
    assert [line.split(" - ")[0] for line in lines[at + 3 : -1]] == [
        "=========================== short test summary info ============================",
        "ERROR test_some.py::test_error",
        "FAILED test_some.py::test_fails",
    ]
