"""The benchmark scripts run, compare the results that they time, and report a mismatch."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import correctness
import cuda_speed
import measuring
import mnist_end_to_end
import peers
import pytest
import report
import torch
from cells import GRU_CELL, LSTM_CELL
from matplotlib.figure import Figure
from matplotlib.text import Text

import birnn_ext
from birnn_ext import _C

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "benchmarks"
TINY = (3, 5, 4, 6, 2)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Times one call a round, on one thread: two would wait for each other when another program takes a core."""
    monkeypatch.setattr(peers, "TURN", 0)
    monkeypatch.setattr(peers, "REST", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
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
        (peers.inference, {"dtype": torch.bfloat16}),
        (peers.inference, {"dtype": torch.float16}),
        (peers.forward_backward, {}),
        (peers.forward_backward, {"last": True}),
        (peers.ragged, {}),
        (peers.training_step, {}),
        (peers.training_step, {"dtype": torch.bfloat16}),
        (peers.inference, {"cell": GRU_CELL}),
        (peers.forward_backward, {"cell": GRU_CELL}),
        (peers.training_step, {"cell": GRU_CELL}),
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
    for cell in (LSTM_CELL, GRU_CELL):
        peers.check(peers.inference(TINY, [peer], cell=cell), torch.float32)
    peers.check(peers.inference(TINY, [peer], dtype=torch.bfloat16), torch.bfloat16)
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


def test_a_comparison_says_where_it_comes_from(monkeypatch):
    machine = {
        "cpu": "a CPU",
        "threads": 2,
        "date": "2026-01-02",
        "commit": "commit abc",
        "versions": {"torch": "2.14"},
    }
    quiet, busy = (peers.Comparison({**machine, "load": load}, [], 1, 2).text() for load in (0.2, 2.01))
    assert quiet.startswith("a CPU, 2 threads, 2026-01-02, commit abc; torch 2.14; ")
    assert busy.startswith("a CPU, 2 threads, 2026-01-02, commit abc, busy before the run (load 2.0); torch 2.14; ")
    assert re.fullmatch(r"(commit|birnn_ext) \S+", measuring.commit())
    monkeypatch.setenv("PATH", "")
    assert measuring.commit() == f"birnn_ext {birnn_ext.__version__}"


def test_errors_of_both(tmp_path):
    found = correctness.measure(2, "cpu")
    assert all(len(found[dtype, "outputs"]) == 2 for dtype in correctness.DTYPES)
    assert all(len(found[dtype, "gradients"]) > 9 for dtype in correctness.DTYPES)  # a pair for each tensor
    largest = {dtype: max(max(pair) for pair in found[dtype, "outputs"]) for dtype in correctness.DTYPES}
    assert largest["float64"] < 1e-12 < largest["float32"] < 1e-5 < largest["float16"] < largest["bfloat16"]
    assert re.search(r"^\| float64, outputs \| \d\.\de-1\d \|  \|", correctness.table(found), re.MULTILINE)
    correctness.draw(found, tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")


def test_mnist_from_several_seeds(tmp_path):
    result = mnist_end_to_end.Result(2.0, [0.5, 0.4], 100.0, 0.0, [(1.0, 0.96), (2.0, 0.975)])
    slower = replace(result, seconds=4.0, curve=[(2.0, 0.9), (4.0, 0.96)])
    results = {"tutorial": [slower, result], "birnn_ext": [result, result]}
    lines = mnist_end_to_end.report(results).splitlines()
    assert "| accuracy, %: mean | 96.75 | 97.50 |  |" in lines
    assert "| its standard deviation | 1.06 | 0.00 |  |" in lines
    assert "| its range | 96.00 to 97.50 | 97.50 to 97.50 |  |" in lines
    assert "| seeds that come to 97 % | 1 of 2 | 2 of 2 |  |" in lines
    # the tutorial's median seed does not reach 97 %
    assert not any(line.startswith("| time to 97 %") for line in lines)
    results["tutorial"] = [slower, result, result]
    lines = mnist_end_to_end.report({name: [*of, result][:3] for name, of in results.items()}).splitlines()
    assert "| time to 97 %, s | 2.0 | 2.0 | 1.00 |" in lines
    mnist_end_to_end.draw(mnist_end_to_end.curves(results), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """Collects the figures that would be written to files."""
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    return drawn


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]


def test_the_chart_of_the_report_explains_itself(figures):
    """It shows the figures that stand in the documents' tables."""
    comparison = peers.Comparison.load()
    assert all(comparison.text() in (ROOT / path).read_text() for path in ("README.md", "docs/report.md"))
    report.redraw()
    found = texts(figures[0])
    assert "training step\nbatch 100, 28 steps, 28 features, 128 units, 2 layers" in found
    assert "forward + backward, ragged\nbatch 32, 400 steps, 64 features, 128 units, 1 layer" in found
    assert f"Speed relative to nn.LSTM (GRU: nn.GRU), bidirectional, on {comparison.title}" in found
    for row in comparison.rows:
        if row.unit == "ms" and row.figures:
            assert f"{row.advantage(peers.TORCH):.2f}" in found
    assert len(set(peers.COLOURS.values())) == len(peers.COLOURS) == 1 + len(peers.PEERS)


def test_pictures_of_the_report_explain_themselves(figures, tmp_path):
    curve = [(10.0, 0.9), (20.0, 0.972)]
    mnist_end_to_end.draw({"tutorial": [curve, curve], "birnn_ext": [curve, curve]}, tmp_path / "mnist.png")
    expected = {"97 %", "Training on MNIST: accuracy every 100 steps, 2 seeds of each", "time of training (s)"}
    assert expected <= set(texts(figures[0]))
    pairs = [(1e-7, 2e-7)] * 3 + [(2e-7, 1e-7), (0.0, 1e-7)]
    correctness.draw({(dtype, kind): pairs for dtype in correctness.DTYPES for kind in correctness.KINDS}, tmp_path)
    panels = figures[1].axes
    assert len(panels) == 9  # one for each type and kind, so that none hides another
    assert all("4 tensors,\n75 % below" in texts(panel) for panel in panels)


@pytest.mark.slow
def test_the_report(tmp_path, monkeypatch):
    """Every part runs with as little work as possible."""
    monkeypatch.setattr(report, "DOCS", tmp_path)
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    monkeypatch.setattr(peers, "RESULTS", tmp_path / "peers.json")
    monkeypatch.setattr(peers, "CHART", tmp_path / "peers.png")
    monkeypatch.setattr(peers, "ROWS", [("inference", peers.inference, TINY, {})])
    monkeypatch.setattr(peers, "WIDE", TINY)
    monkeypatch.setattr(peers, "installed", list)
    report.README.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    few = ["--cases", "1", "--seeds", "1", "--rounds", "1", "--steps", "2", "--data-source", "sample", "--select"]
    report.main([*few, "test_mnist_step"])
    written = (tmp_path / "report.md").read_text()
    for beginning in (
        "| float32, gradients |",
        "| accuracy, %: mean |",
        "| MNIST training step with Adam, ",
        "| inference, ms |",
    ):
        assert f"\n{beginning}" in written
    pictures = re.findall(r"!\[.*\]\((.*)\)", written)
    assert sorted(pictures) == ["peers.png", "report-errors.png", "report-mnist.png"]
    assert all((tmp_path / picture).exists() for picture in pictures)
    (tmp_path / "report-mnist.png").unlink()
    (tmp_path / "peers.png").unlink()
    report.main(["--redraw"])
    assert all((tmp_path / picture).exists() for picture in pictures)
    readme = report.README.read_text()
    assert readme.startswith(f"before\n{report.BEGIN}\n\n")
    assert readme.endswith(f"![Speed relative to nn.LSTM](docs/peers.png)\n\n{report.END}\nafter\n")
    assert "old" not in readme
    assert "| inference, ms | 3,5,4,6,2 |" in readme


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("document", "shapes"), [("README.md", cuda_speed.IN_README), ("docs/cuda.md", None)])
def test_documents_show_what_was_measured(document, shapes):
    measured = json.loads((SCRIPTS / "results/cuda_h100.json").read_text())
    text = cuda_speed.table(measured, shapes)
    shown = re.search(
        r"<!-- benchmarks/results/cuda_h100.json -->\n\n(.*?)\n\n<!--", (ROOT / document).read_text(), re.S
    )
    assert shown[1] == text
    assert measured["card"] in text and measured["date"] in text and measured["commit"] in text


def test_a_row_keeps_to_its_time(monkeypatch):
    """The clock counts the work alone: 3 s for three contestants, one of which takes 74 ms a call."""
    now = 0.0

    def milliseconds(work, number):
        nonlocal now
        now += work * number / 1000
        return float(work)

    monkeypatch.setattr(cuda_speed.time, "monotonic", lambda: now)
    monkeypatch.setattr(cuda_speed, "milliseconds", milliseconds)
    for ms, seconds in itertools.product([(74, 24, 25), (0.5, 0.6, 0.7), (74, 0.5, 300)], [3.0, 1.0]):
        begin = now
        figures = cuda_speed.measure(dict(zip("abc", ms, strict=True)), seconds, {})
        assert figures == dict(zip("abc", ms, strict=True))
        least = (4 + 3 * 2) * sum(ms) / 1000  # warm-up, and three timed rounds
        assert now - begin <= 1.1 * max(seconds, least)
        assert now - begin >= min(seconds / 2, 9 * 3 * cuda_speed.TURN / 1000)


@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["float32", "bfloat16"])
def test_cuda_speed(mode, tmp_path, capsys):
    """Every algorithm that can run the layer takes part, and the file gives the same table again."""
    path = tmp_path / "speed.json"
    cuda_speed.main(["--quick", "--only", f"{mode} 2,4", "--json", str(path)])
    said = capsys.readouterr().out.strip()
    measured = json.loads(path.read_text())
    assert [row["pass"] for row in measured["rows"]] == ["forward", "forward + backward"]
    gpu = measured["gpu"].values()
    able = [name for name in cuda_speed.ALGORITHMS if _C.cuda_choice(mode, 16, 2, 2, *gpu, name)]
    for row in measured["rows"]:
        assert [*row["ms"]] == ["nn.LSTM", *able]
        assert [*row["us_a_step"]] == able
        assert all(len(us) == 1 + (row["pass"] != "forward") for us in row["us_a_step"].values())
        assert row["chosen"] in able and not row["failures"]
    again = cuda_speed.table(measured)
    assert all(
        line.split("|")[1:4] in [other.split("|")[1:4] for other in said.splitlines()]
        for line in again.splitlines()[2:]
    )
    assert measured["card"] in again


@pytest.mark.cuda
def test_cuda_speed_tells_of_a_mismatch(monkeypatch):
    monkeypatch.setitem(cuda_speed.TOLERANCE, "float32", -1.0)
    row = cuda_speed.timed_row("forward", cuda_speed.forward, "float32", cuda_speed.TINY, 0)
    assert re.match(r"WRONG: off by \d", row.failures[row.chosen])
    assert row.ms.keys() == set()
