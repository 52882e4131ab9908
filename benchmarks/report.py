"""Measures again what the README claims; writes docs/report.md with its pictures, and the README's main table.

`make report` runs it. It measures errors against float64, training on MNIST from several seeds beside the tutorial's
code, pytest-benchmark's runs, and the comparison with other libraries. This takes half an hour or more, on a machine
that should be idle otherwise. The peak memory needs Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import correctness
import mnist_end_to_end
import peers
import torch
from measuring import commit, markdown

import birnn_ext
from birnn_ext.mnist.data import SOURCES
from birnn_ext.mnist.training import device_name

ROOT = Path(__file__).parents[1]
DOCS, README = ROOT / "docs", ROOT / "README.md"
BEGIN, END = "<!-- written by make report -->", "<!-- until here -->"


@contextmanager
def stage(title: str) -> Iterator[None]:
    begin = time.monotonic()
    print(f"== {title}", flush=True)
    yield
    print(f"== {title}: {time.monotonic() - begin:.0f} s", flush=True)


def machine() -> str:
    """Returns a description of the machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "CPU": f"{device_name(torch.device('cpu'))}, {os.cpu_count()} logical cores, {memory:.0f} GiB",
        "kernels in use": birnn_ext.build_info()["cpu_isa"],
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "torch": torch.__version__,
        "birnn_ext": f"{birnn_ext.__version__}, {commit()}",
    }
    return markdown([["", ""], *map(list, facts.items())])


def method(script: ModuleType) -> str:
    """Returns a script's account of how it measures: the second paragraph of its docstring."""
    return (script.__doc__ or "").split("\n\n")[1].strip()


def pytest_benchmarks(select: str) -> str:
    """Returns a table of what `make bench` measures: medians in milliseconds, and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, "-m", "pytest", "-q", "benchmarks", f"--benchmark-json={result}", "-k", select]
        subprocess.run(command, cwd=ROOT, check=True)
        found = json.loads(result.read_text())["benchmarks"]
    groups: dict[str, dict[str, float]] = {}
    for one in found:
        contestant = "birnn_ext" if "birnn_ext" in one["name"] else "nn.LSTM"
        groups.setdefault(one["group"], {})[contestant] = 1000 * one["stats"]["median"]
    rows = [["", "birnn_ext, ms", "nn.LSTM, ms", "nn.LSTM / birnn_ext"]]
    for name, of in groups.items():
        ours, theirs = of["birnn_ext"], of["nn.LSTM"]
        rows.append([name, f"{ours:.4g}", f"{theirs:.4g}", f"{theirs / ours:.2f}"])
    return markdown(rows)


def put_into_readme(text: str) -> None:
    before, rest = README.read_text().split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def redraw() -> None:
    """Draws the pictures again whose figures the last report saved. It does not save the thousands of errors."""
    comparison = peers.Comparison.load()
    peers.draw(comparison.rows, comparison.title, peers.CHART)
    trainings = peers.RESULTS.parent / "mnist.json"
    if trainings.exists():
        mnist_end_to_end.draw(json.loads(trainings.read_text()), DOCS / "report-mnist.png")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100, help="configurations of each type, for the errors")
    parser.add_argument("--seeds", type=int, default=5, help="trainings on MNIST of each contestant")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the comparison with other libraries")
    parser.add_argument("--steps", type=int, help="steps of a training (default: the tutorial's 2 epochs)")
    parser.add_argument("--select", default="float32 or mnist", help="pytest's -k, for the benchmarks")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of MNIST (default: data)")
    parser.add_argument("--data-source", choices=("auto", *SOURCES), default="auto", help="see birnn-mnist train")
    parser.add_argument("--redraw", action="store_true", help="only draw, from the figures in benchmarks/results")
    args = parser.parse_args(arguments)
    if args.redraw:
        redraw()
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    load = os.getloadavg()[0]
    description = machine()  # before the report changes files of the repository

    with stage("errors"):
        errors = correctness.measure(args.cases, device.type)
    with stage("MNIST"):
        trainings = mnist_end_to_end.race(args.seeds, args.data, args.data_source, device, args.steps)
    with stage("pytest-benchmark"):
        benchmarks = pytest_benchmarks(args.select)
    with stage("other libraries"):
        comparison = peers.compare(torch.get_num_threads(), args.rounds, load=load)

    correctness.draw(errors, DOCS / "report-errors.png")
    mnist_end_to_end.draw(mnist_end_to_end.curves(trainings), DOCS / "report-mnist.png")
    comparison.save()
    (peers.RESULTS.parent / "mnist.json").write_text(json.dumps(mnist_end_to_end.curves(trainings)) + "\n")
    (DOCS / "report.md").write_text(f"""# Report

`make report` writes this page, here from {args.seeds} seeds and {args.rounds} rounds. Other machines give other speeds
and, because they round differently, other accuracies.

{description}

## Errors against float64

The table shows errors of outputs, of final states, and of the gradients of inputs, states and weights, over
{args.cases} random configurations for each type, on {device.type}. {method(correctness)}

{correctness.table(errors)}

![Errors of each tensor](report-errors.png)

## Training on MNIST

{method(mnist_end_to_end)}

{mnist_end_to_end.report(trainings)}

![Accuracy over time](report-mnist.png)

## Beside nn.LSTM

These are medians of pytest-benchmark's runs (`make bench`).

{benchmarks}

## Beside other libraries

`make bench-peers` measures this table. Contestants take turns, and figures are medians: milliseconds or MiB, less is
better.

{comparison.text()}

![Speed relative to nn.LSTM](peers.png)
""")
    put_into_readme(f"{comparison.text()}\n\n![Speed relative to nn.LSTM](docs/peers.png)")
    print(f"Wrote {DOCS / 'report.md'}")


if __name__ == "__main__":
    main()
