"""Helpers of the benchmark scripts: run work in its own process, read its peak memory, write Markdown."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("tests", "tests/fuzz"))
from cells import GRU_CELL, LSTM_CELL, Cell
from helpers import TutorialBiRNN, error, twins

__all__ = ["GRU_CELL", "LSTM_CELL", "Cell", "TutorialBiRNN", "alone", "commit", "error", "markdown", "memory", "twins"]

T = TypeVar("T")


def alone(work: Callable[..., T], *arguments: object) -> T:
    """Calls work in a new process, so that peak memory, warm caches and threads are its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def memory(field: str = "VmHWM") -> float:
    """Returns MiB of this process: VmHWM is its peak, VmRSS is now. (getrusage's ru_maxrss starts at the parent's.)"""
    return int(re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) / 1024


def commit() -> str:
    """Returns "commit" and that of these files, or the version of the package without a repository or without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    if shutil.which("git"):
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        if done.returncode == 0:
            return f"commit {done.stdout.strip()}"
    return f"birnn_ext {version('birnn_ext')}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Returns a table. The first row is its head, the first column has words, and the others have figures."""
    head, *body = rows
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
