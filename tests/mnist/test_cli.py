"""The command birnn-mnist works on the embedded sample, mostly in its own process."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Event

import pytest
import torch
from helpers import TutorialBiRNN
from PIL import Image

import birnn_ext.mnist
from birnn_ext import BiRNN
from birnn_ext.mnist import cli, data, training
from birnn_ext.mnist import pictures as pictures_module
from birnn_ext.mnist.training import Hyperparameters, Training, load_state, save

COMMAND = [sys.executable, "-m", "birnn_ext.mnist"]
# One thread, as two that share a core with another program wait for each other far longer than they work.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SAMPLE = ["--data-source", "sample", "--device", "cpu"]
LEARNED = 0.6  # guessing gives 0.1; small trainings reach 0.70 .. 0.86, depending on rounding and seed, as with nn.LSTM
SMALL = [*SAMPLE, "--hidden-size", "24", "--batch-size", "50", "--learning-rate", "0.01"]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Returns the folder of a finished small training, and the process that ran it."""
    out = tmp_path_factory.mktemp("trained")
    return out, run("train", *SMALL, "--out", out, "--seed", 3)


def test_train_prints_what_the_tutorial_prints(trained):
    _, done = trained
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    steps = [line for line in lines if line.startswith("Epoch")]
    assert [line.rsplit(" ", 1)[0] for line in steps] == [
        f"Epoch [{epoch}/2], Step [100/100], Loss:" for epoch in (1, 2)
    ]
    assert all(re.fullmatch(r".*Loss: \d\.\d{4}", line) for line in steps)
    (accuracy,) = [line for line in lines if line.startswith("Test Accuracy")]
    assert re.fullmatch(r"Test Accuracy of the model on the 1000 test images: \d\d\.\d\d %", accuracy)
    assert float(accuracy.split()[-2]) > 100 * LEARNED
    assert any("accuracy is on the sample" in line for line in lines)
    assert "Epoch 2/2: 100%" in done.stderr  # the progress bar


def test_train_leaves_its_files(trained):
    out, _ = trained
    metrics = json.loads((out / "metrics.json").read_text())
    assert len(metrics["loss"]) == 200
    assert metrics["loss"][-1] < 0.5 * metrics["loss"][0]
    assert metrics["accuracy"] == metrics["epoch_accuracy"][-1] > LEARNED
    assert metrics["data"] == {"source": "sample", "train": 5000, "test": 1000}
    assert metrics["hyperparameters"]["hidden_size"] == 24
    assert metrics["device"] == "cpu"
    assert metrics["device_name"]
    assert metrics["versions"]["torch"] == torch.__version__
    assert metrics["train_seconds"] == pytest.approx(sum(metrics["epoch_seconds"]))
    # 3 calls per step: layer 1, layer 2 forwards, one step of layer 2 backwards; evaluations add more
    assert metrics["op_calls"]["cpu_backward"] == 3 * 200
    assert metrics["op_calls"]["cpu_forward"] > 3 * 200
    assert metrics["op_calls"]["reference_forward"] == 0
    assert metrics["build_info"]["cpu_isa"]
    for name in ("curves.png", "misclassified.png"):
        with Image.open(out / name) as picture:
            picture.load()
            assert picture.format == "PNG"
            assert picture.width > 400
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 20
    assert sorted(p.name for p in out.iterdir()) == [
        "curves.png", "metrics.json", "misclassified.png", "model.ckpt", "training_state.pt"
    ]  # fmt: skip


def test_tutorial_class_reaches_the_same_accuracy(trained):
    out, done = trained
    model = TutorialBiRNN(28, 24, 2, 10)
    model.load_state_dict(torch.load(out / "model.ckpt", weights_only=True))
    _, test = data.read_sample(out)
    with torch.no_grad():
        correct = (model(test.images.float() / 255).argmax(1) == test.labels).sum().item()
    assert f"test images: {correct / 10:.2f} %" in done.stdout


def test_evaluate(trained):
    out, done = trained
    evaluated = run("evaluate", out / "model.ckpt", *SAMPLE)
    assert evaluated.returncode == 0, evaluated.stderr
    expected = next(line for line in done.stdout.splitlines() if line.startswith("Test Accuracy"))
    assert expected in evaluated.stdout.splitlines()


def test_predict(trained, tmp_path):
    out, _ = trained
    _, test = data.read_sample(out)
    paths = []
    for k in range(20):
        image = Image.fromarray(255 - test.images[k].numpy())
        if k % 2:  # every other picture is large, in another mode
            image = image.resize((140, 140)).convert("RGBA" if k % 4 == 1 else "RGB")
        paths.append(tmp_path / f"{k}.{'jpg' if k % 4 == 3 else 'png'}")
        image.save(paths[-1])
    done = run("predict", out / "model.ckpt", "--device", "cpu", *paths)
    assert done.returncode == 0, done.stderr
    found = [
        re.fullmatch(r"(.*): (\d) \(probability [01]\.\d{3}(?:, not sure)?\)", line)
        for line in done.stdout.splitlines()
    ]
    assert [m.group(1) for m in found] == [str(p) for p in paths]
    model = TutorialBiRNN(28, 24, 2, 10)
    model.load_state_dict(torch.load(out / "model.ckpt", weights_only=True))
    with torch.no_grad():
        expected = model(test.images[:20].float() / 255).argmax(1).tolist()
    same = [int(m.group(2)) == digit for m, digit in zip(found, expected, strict=True)]
    assert all(same[::2])  # these are used unchanged
    assert sum(same[1::2]) >= 6  # of 10, as scaling changes them slightly


@pytest.fixture
def pictures(trained, tmp_path) -> list[Path]:
    """Returns paths of two digits, of a file between them that is no picture, and of noise."""
    _, test = data.read_sample(trained[0])
    noise = torch.randint(0, 256, (28, 28), dtype=torch.uint8)
    paths = [tmp_path / name for name in ("first.png", "bad.png", "second.png", "noise.png")]
    for path, image in zip(paths, (test.images[0], None, test.images[1], noise), strict=True):
        path.write_text("no picture") if image is None else Image.fromarray(image.numpy()).save(path)
    return paths


def test_predict_names_a_bad_picture_and_goes_on(trained, pictures, capsys):
    first, bad, second, _ = map(str, pictures)
    assert cli.main(["predict", str(trained[0] / "model.ckpt"), first, bad, second, first]) == 1
    printed = capsys.readouterr()
    assert re.findall(r"^(.*): \d \(probability [01]\.\d{3}[^)]*\)$", printed.out, re.MULTILINE) == [
        first,
        second,
        first,
    ]
    assert re.fullmatch(f"birnn-mnist: error: {re.escape(bad)} can't be read as a picture: .*\n", printed.err)
    assert cli.main(["predict", str(trained[0] / "model.ckpt"), bad, bad]) == 2  # nothing is left to predict
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("can't be read as a picture")) == ("", 2)


def test_predict_says_when_it_is_not_sure(tmp_path, pictures, capsys):
    """The model always gives 3 the probability p, and every other digit a ninth of the rest."""
    model = Hyperparameters(hidden_size=4).model()
    for p, expected in ((0.69, "3 (probability 0.690, not sure)"), (0.71, "3 (probability 0.710)")):
        with torch.no_grad():
            model.fc.weight.zero_()
            model.fc.bias.fill_((1 - p) / 9)[3] = p
            model.fc.bias.log_()
        torch.save(model.state_dict(), tmp_path / "model.ckpt")
        assert cli.main(["predict", str(tmp_path / "model.ckpt"), str(pictures[-1])]) == 0
        assert capsys.readouterr().out == f"{pictures[-1]}: {expected}\n"


def test_curves_are_smoothed_and_say_what_they_are(monkeypatch):
    monkeypatch.setattr(pictures_module, "_png", lambda figure, dpi: figure)
    digits = [data.Digits(torch.zeros(n, 28, 28), torch.zeros(n)) for n in (60000, 10000)]
    losses = [2.0, 0.0] * 600
    figure = pictures_module.draw_curves(losses, [(600, 0.9531), (1200, 0.9796)], data.Mnist(*digits, "npm"))
    above, below = figure.axes
    assert figure.get_suptitle() == "Training of a BiRNN on 60,000 digits of MNIST"
    raw, smooth = above.get_lines()
    assert list(raw.get_ydata()) == losses
    assert raw.get_alpha() < 1
    assert smooth.get_ydata() == pytest.approx([1.0] * 1151)  # 50 at a time
    assert [smooth.get_xdata()[k] for k in (0, -1)] == [25.5, 1175.5]  # the middle of each 50
    assert [text.get_text() for text in above.get_legend().get_texts()] == ["each step", "mean of 50 steps"]
    (points,) = below.get_lines()
    assert points.get_xydata().ravel().tolist() == pytest.approx([600, 95.31, 1200, 97.96])
    assert [text.get_text() for text in below.texts] == ["95.31 %", "97.96 %"]
    assert below.get_xlabel() == "training steps"
    assert "accuracy (%)" in below.get_ylabel()
    odd = [math.nan, 0.0, math.inf]
    assert pictures_module.draw_curves(odd, [], data.Mnist(*digits, "sample")).axes  # it draws such a training, too


def test_every_evaluation_is_in_the_curves(undrawn, tmp_path, monkeypatch):
    """An epoch has 2 steps, and the training ends within the second epoch."""
    found = []
    monkeypatch.setattr(cli, "draw_curves", lambda *arguments: found.append(arguments) or b"")
    assert cli.main(["train", *TINY, "--max-steps", "3", "--out", str(tmp_path)]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    ((losses, evaluations, _),) = found
    assert losses == metrics["loss"]
    assert evaluations == [(2, metrics["epoch_accuracy"][0]), (3, metrics["accuracy"])]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_is_as_if_never_interrupted(trained, tmp_path, number):
    whole, _ = trained
    with subprocess.Popen(
        [*COMMAND, "train", *SMALL, "--out", str(tmp_path), "--seed", "3"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    ) as child:
        said = ""
        while not re.search(r"\| [1-9]\d*/100 ", said):  # until the bar shows a step
            got = child.stderr.read(1)
            assert got, said
            said += got
        child.send_signal(number)
        time.sleep(0.01)
        child.send_signal(number)  # a second signal, as an impatient user sends it, must do no harm
        stdout, _ = child.communicate(timeout=300)
    assert child.returncode == 130
    (hint,) = re.findall(r"Interrupted after \d+ steps. To go on: birnn-mnist (train .*)", stdout)
    assert shlex.split(hint) == ["train", "--out", str(tmp_path), "--data", "data", *SAMPLE, "--resume"]
    cut = json.loads((tmp_path / "metrics.json").read_text())
    assert 1 <= len(cut["loss"]) < 200
    TutorialBiRNN(28, 24, 2, 10).load_state_dict(torch.load(tmp_path / "model.ckpt", weights_only=True))

    wrong = run("train", *SAMPLE, "--out", tmp_path, "--resume", "--hidden-size", 32)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "hidden_size of the training to resume is 24, not 32" in wrong.stderr

    done = run(*shlex.split(hint))
    assert done.returncode == 0, done.stderr
    expected, found = (json.loads((folder / "metrics.json").read_text()) for folder in (whole, tmp_path))
    assert found["loss"] == expected["loss"]
    assert found["epoch_accuracy"] == expected["epoch_accuracy"]
    a, b = (torch.load(folder / "model.ckpt", weights_only=True) for folder in (whole, tmp_path))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "bars", [pytest.param(True, marks=pytest.mark.slow), False], ids=["with_stderr", "stdout_only"]
)
def test_reader_of_stdout_goes_away(tmp_path, bars):
    """`birnn-mnist train 2>&1 | head -1` also breaks the progress bar, and `birnn-mnist train | head -1` does not."""
    arguments = [*map(str, COMMAND), "train", *SMALL, "--batch-size", "500", "--out", str(tmp_path)]
    with (
        open(tmp_path / "stderr", "w+") as stderr,
        subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT if bars else stderr, env=ENVIRONMENT
        ) as child,
    ):
        assert child.stdout.readline()
        child.stdout.close()
        assert child.wait(timeout=300) == 0
        stderr.seek(0)
        said = stderr.read()
    assert "Error" not in said
    assert bars or "Epoch 2/2: 100%" in said
    assert load_state(tmp_path)["progress"]["epoch"] == 2
    assert json.loads((tmp_path / "metrics.json").read_text())["accuracy"] > 0
    assert (tmp_path / "misclassified.png").exists()


def test_checkpoint_after_every_epoch(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(training, "save", lambda run, out: (save(run, out), saved.append(load_state(out)["progress"])))
    assert cli.main(["train", *SMALL, "--batch-size", "1000", "--num-epochs", "3", "--out", str(tmp_path)]) == 0
    assert [one["epoch"] for one in saved] == [1, 2, 3, 3]
    assert [len(one["losses"]) for one in saved] == [5, 10, 15, 15]


def test_full_disk_is_an_error_and_keeps_the_old_checkpoint(tmp_path):
    (tmp_path / "model.ckpt").write_text("old")
    arguments = [*COMMAND, "train", *SMALL, "--max-steps", "1", "--out", str(tmp_path)]
    done = subprocess.run(  # ulimit makes writing fail in the middle of the file, as a full disk does
        ["bash", "-c", f"ulimit -f 20; {shlex.join(arguments)}"], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if "rror" in line]
    assert errors == [f"birnn-mnist: error: {tmp_path / 'model.ckpt'} can't be written: File too large"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.ckpt"]
    assert (tmp_path / "model.ckpt").read_text() == "old"


@pytest.fixture
def disk(tmp_path):
    """Mounts a file system of 1 MiB; yields its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small file system is not permitted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


ONE_STEP = ["train", *SMALL, "--max-steps", "1"]


@pytest.fixture(scope="module")
def sizes(tmp_path_factory) -> dict[str, int]:
    """Returns the blocks of the files that ONE_STEP writes, in the order of writing."""
    out = tmp_path_factory.mktemp("sizes")
    assert cli.main([*ONE_STEP, "--out", str(out)]) == 0
    return {name: -(-(out / name).stat().st_size // os.sysconf("SC_PAGE_SIZE")) for name in cli.RESULTS}


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is Linux's")
@pytest.mark.parametrize("name", cli.RESULTS)
def test_full_disk_leaves_files_of_one_training(disk, sizes, capsys, name):
    for one in cli.RESULTS:
        (disk / one).write_text("old")
    # checkpoint, state and metrics are replaced together, then the pictures
    position = cli.RESULTS.index(name)
    new = cli.RESULTS[: 3 * (position // 3)]
    free = sum(sizes[one] for one in cli.RESULTS[: position + 1]) - len(new) - 1
    status = os.statvfs(disk)
    (disk / "pad").write_bytes(bytes((status.f_bavail - free) * status.f_frsize))
    assert cli.main([*ONE_STEP, "--out", str(disk)]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "rror" in line]
    assert said == [f"birnn-mnist: error: {disk / name} can't be written: No space left on device"]
    assert sorted(path.name for path in disk.iterdir()) == sorted([*cli.RESULTS, "pad"])
    assert [one for one in cli.RESULTS if (disk / one).read_bytes() != b"old"] == list(new)
    if new:
        assert json.loads((disk / "metrics.json").read_text())["loss"] == load_state(disk)["progress"]["losses"]


def test_read_only_disk_is_an_error(disk, capsys):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert cli.main([*ONE_STEP, "--out", str(disk)]) == 2
    why = f"can't write to the folder for results {disk}: Read-only file system"
    assert capsys.readouterr().err == f"birnn-mnist: error: {why}\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("command", ["--help", "train", "evaluate", "predict"])
def test_full_disk_of_stdout_is_an_error(tmp_path, monkeypatch, capsys, command):
    torch.save(Hyperparameters(hidden_size=4).model().state_dict(), tmp_path / "model.ckpt")
    drawing = Image.new("L", (28, 28))
    drawing.putpixel((14, 14), 255)
    drawing.save(tmp_path / "digit.png")
    arguments = {
        "--help": [],
        "train": [*SMALL, "--out", tmp_path / "out"],
        "evaluate": [tmp_path / "model.ckpt", *SAMPLE],
        "predict": [tmp_path / "model.ckpt", tmp_path / "digit.png"],
    }
    with open("/dev/full", "w") as full:  # closing it raises an error if something is left to write, as at exit
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main([command, *map(str, arguments[command])]) == 2
    why = "standard output can't be written: No space left on device"
    assert capsys.readouterr().err == f"birnn-mnist: error: {why}\n"


def test_closed_stdout_and_names_that_are_no_text(tmp_path, monkeypatch, capsys):
    torch.save(Hyperparameters(hidden_size=4).model().state_dict(), tmp_path / "model.ckpt")
    drawing = Image.new("L", (28, 28))
    drawing.putpixel((14, 14), 255)
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")
    drawing.save(path)
    predict = ["predict", str(tmp_path / "model.ckpt"), path]
    assert cli.main(predict) == 0
    assert "\\udcff.png: " in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(predict) == 0


def test_sigterm_outside_the_training_is_ctrl_c(monkeypatch, capsys):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(cli, "run_evaluate", lambda args: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(60)))
    monkeypatch.setattr(sys, "argv", ["birnn-mnist", "evaluate", "x.ckpt"])
    try:
        assert birnn_ext.mnist.main() == 130
        assert all(signal.getsignal(number) is signal.SIG_IGN for number in before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert capsys.readouterr().err == "birnn-mnist: interrupted\n"


@pytest.mark.parametrize("part", ["model", "optimizer", "progress", "hyperparameters", "source"])
def test_training_state_with_a_wrong_part_is_an_error(trained, tmp_path, capsys, part):
    state = torch.load(trained[0] / "training_state.pt", weights_only=True)
    torch.save({**state, part: {"other": 1}}, tmp_path / "state.pt")
    assert cli.main(["train", *SAMPLE, "--out", str(tmp_path), "--resume", str(tmp_path / "state.pt")]) == 2
    printed = capsys.readouterr()
    assert printed.err == f"birnn-mnist: error: {tmp_path / 'state.pt'} is not a training_state.pt\n"


MOMENTS = {
    k: {"step": torch.tensor(200.0), "exp_avg": torch.zeros(one.shape), "exp_avg_sq": torch.zeros(one.shape)}
    for k, one in enumerate(Hyperparameters(hidden_size=24).model().parameters())
}
ODD_VALUES = [  # of a training of 2 epochs, each of 100 steps
    ("progress", {"epoch": "x"}),
    ("progress", {"epoch": 3}),
    ("progress", {"epoch": -1}),
    ("progress", {"epoch": True}),
    ("progress", {"step": -3}),
    ("progress", {"step": 99999}),
    ("progress", {"step": 1.0}),
    ("progress", {"step": 100, "epoch": 1, "accuracies": [0.5], "epoch_seconds": [1.0]}),
    ("progress", {"losses": 5}),
    ("progress", {"losses": []}),
    ("progress", {"losses": ["x"] * 200}),
    ("progress", {"accuracies": None}),
    ("progress", {"accuracies": [0.5]}),
    ("progress", {"epoch_seconds": [1.0, "x"]}),
    ("progress", {"seconds": None}),
    ("progress", {"seconds": -1.0}),
    ("hyperparameters", {"batch_size": "many"}),
    ("hyperparameters", {"batch_size": 0}),
    ("hyperparameters", {"batch_size": 50.0}),
    ("hyperparameters", {"learning_rate": "fast"}),
    ("hyperparameters", {"seed": None}),
    ("hyperparameters", {"num_epochs": True}),
    ("hyperparameters", {"hidden_size": 2**31 - 1}),
    ("hyperparameters", {"num_layers": 2**31 - 1}),
    ("hyperparameters", {"cell": "rnn"}),
    ("hyperparameters", {"cell": "gru"}),  # the model is an LSTM's
    ("hyperparameters", {"cell": None}),
    ("model", {"fc.bias": torch.zeros(10, dtype=torch.complex64)}),
    ("model", {"fc.bias": torch.zeros(10, dtype=torch.int64)}),
    ("optimizer", {"state": {}}),
    ("optimizer", {"state": {0: MOMENTS[0]}}),
    ("optimizer", {"state": {**MOMENTS, 18: MOMENTS[0]}}),
    *(
        ("optimizer", {"state": {**MOMENTS, 0: {**MOMENTS[0], **wrong}}})
        for wrong in (
            {"exp_avg": torch.zeros(3)},  # Adam's kernel would read beyond its end
            {"exp_avg": torch.zeros(1).expand(96, 28)},
            {"exp_avg": torch.zeros(96, 28, dtype=torch.float64)},
            {"exp_avg_sq": "x"},
            {"step": torch.zeros(2)},
            {"other": torch.zeros(1)},
        )
    ),
]


@pytest.mark.parametrize(
    ("part", "values"),
    ODD_VALUES,
    ids=[f"{k}-{part}-{'-'.join(values)}" for k, (part, values) in enumerate(ODD_VALUES)],
)
def test_training_state_with_odd_values_is_an_error(trained, tmp_path, part, values):
    state = torch.load(trained[0] / "training_state.pt", weights_only=True)
    torch.save({**state, part: {**state[part], **values}}, tmp_path / "state.pt")
    with pytest.raises(data.UserError, match=r"state\.pt is not a training_state\.pt$"):
        load_state(tmp_path / "state.pt")


@pytest.mark.parametrize("cell", ["gru", "rnn"])
def test_another_cell_is_trained_resumed_and_evaluated(undrawn, tmp_path, capsys, cell):
    """The files tell the cell, so that only the training's first command has to."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli.main(["train", *TINY, "--cell", cell, "--max-steps", "3", "--out", str(whole)]) == 0
    assert cli.main(["train", *TINY, "--cell", cell, "--max-steps", "1", "--out", str(parts)]) == 0
    assert cli.main(["train", *SAMPLE, "--max-steps", "3", "--resume", str(parts)]) == 0
    models = [torch.load(folder / "model.ckpt", weights_only=True) for folder in (whole, parts)]
    assert list(models[0]) == list(BiRNN(28, 4, 2, 10, cell=cell).state_dict()) == list(models[1])
    assert all(map(torch.equal, models[0].values(), models[1].values()))
    metrics = json.loads((parts / "metrics.json").read_text())
    assert metrics["hyperparameters"]["cell"] == cell

    digit = data.read_sample(tmp_path)[1].images[0]
    Image.fromarray(digit.numpy()).save(tmp_path / "digit.png")
    capsys.readouterr()
    assert cli.main(["evaluate", str(parts / "model.ckpt"), *SAMPLE]) == 0
    assert f"test images: {100 * metrics['accuracy']:.2f} %" in capsys.readouterr().out
    assert cli.main(["predict", str(parts / "model.ckpt"), str(tmp_path / "digit.png")]) == 0

    assert cli.main(["train", *SAMPLE, "--resume", str(parts), "--cell", "lstm"]) == 2
    assert f"cell of the training to resume is {cell}, not lstm\n" in capsys.readouterr().err
    assert cli.main(["train", *TINY, "--max-steps", "3", "--out", str(parts)]) == 2
    assert f"{parts} holds another training (cell {cell}, not lstm): " in capsys.readouterr().err


def test_files_from_before_there_was_a_choice_of_the_cell_are_an_lstms(undrawn, tmp_path, capsys):
    command = ["train", *TINY, "--max-steps", "1", "--out", str(tmp_path)]
    assert cli.main(command) == 0
    state = torch.load(tmp_path / "training_state.pt", weights_only=True)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert state["hyperparameters"].pop("cell") == metrics["hyperparameters"].pop("cell") == "lstm"
    torch.save(state, tmp_path / "training_state.pt")
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    assert cli.main([*command, "--resume", "--cell", "gru"]) == 2
    assert "cell of the training to resume is lstm, not gru\n" in capsys.readouterr().err
    assert cli.main(command) == 0
    assert f"{tmp_path} holds this training's first 1 steps" in capsys.readouterr().out
    torch.save(state, tmp_path / "training_state.pt")
    assert cli.main(["train", *SAMPLE, "--max-steps", "2", "--out", str(tmp_path), "--resume"]) == 0
    assert steps_in(tmp_path) == 2


def test_training_state_of_other_data_is_an_error(trained, tmp_path):
    state = load_state(trained[0])
    train, test = data.read_sample(tmp_path)
    fewer = data.Mnist(data.Digits(train.images[:200], train.labels[:200]), test, "sample")
    with pytest.raises(data.UserError, match="the training to resume did not have 4 steps per epoch"):
        Training(Hyperparameters(**state["hyperparameters"]), fewer, torch.device("cpu"), state)


@pytest.mark.slow
def test_max_steps_and_more_epochs(tmp_path):
    common = ["train", *SMALL, "--batch-size", 1000, "--out", tmp_path]
    assert run(*common, "--max-steps", 2, "--num-epochs", 1).returncode == 0
    assert len(json.loads((tmp_path / "metrics.json").read_text())["loss"]) == 2
    done = run(*common, "--resume", tmp_path, "--num-epochs", 2)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert len(metrics["loss"]) == 10
    assert len(metrics["epoch_accuracy"]) == 2


TINY = [*SAMPLE, "--hidden-size", "4", "--batch-size", "2500"]  # 2 steps an epoch


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Skips drawing, which takes longer than these trainings."""
    monkeypatch.setattr(cli, "draw_curves", lambda *_: b"")
    monkeypatch.setattr(cli, "draw_misclassified", lambda *_: b"")


def steps_in(folder: Path) -> int:
    return len(json.loads((folder / "metrics.json").read_text())["loss"])


def test_resume_goes_on_in_the_folder_that_it_resumes(undrawn, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *TINY, "--epochs", "1"]) == 0
    finished = Path("runs/mnist/model.ckpt").read_bytes()
    for k, given in enumerate(("runs/a", "runs/b/training_state.pt")):
        folder = Path("runs", "ab"[k])
        assert cli.main(["train", *TINY, "--max-steps", "1", "--out", str(folder)]) == 0
        assert cli.main(["train", *SAMPLE, "--max-steps", "3", "--resume", given]) == 0
        assert f"in {folder}\n" in capsys.readouterr().out
        assert steps_in(folder) == 3
    assert cli.main(["train", *SAMPLE, "--max-steps", "4", "--resume", "runs/a", "--out", "runs/c"]) == 0
    assert (steps_in(Path("runs/a")), steps_in(Path("runs/c"))) == (3, 4)
    assert Path("runs/mnist/model.ckpt").read_bytes() == finished
    assert cli.main(["train", *SAMPLE, "--epochs", "2", "--resume"]) == 0  # the default folder
    assert steps_in(Path("runs/mnist")) == 4


@pytest.mark.parametrize("steps", [2, 3], ids="cut_after_{}".format)
def test_resume_does_not_call_its_results_those_of_fewer_epochs(undrawn, tmp_path, capsys, steps):
    resume = ["train", *SAMPLE, "--out", str(tmp_path), "--resume", "--epochs"]
    assert cli.main(["train", *TINY, "--out", str(tmp_path), "--epochs", "3", "--max-steps", str(steps)]) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    begun = -(-steps // 2)
    if begun > 1:
        assert cli.main([*resume, str(begun - 1)]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said == (
            f"birnn-mnist: error: num_epochs must be at least {begun}, which the training to resume began, "
            f"got {begun - 1}"
        )
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert cli.main([*resume, str(begun)]) == 0
    assert steps_in(tmp_path) == 2 * begun


def test_another_training_is_not_overwritten_unasked(undrawn, tmp_path, capsys):
    train = ["train", *TINY, "--out", str(tmp_path)]
    assert cli.main([*train, "--max-steps", "2"]) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    for arguments, why in (
        (["--seed", "4", "--lr", "0.1"], "learning_rate 0.003, not 0.1; seed 3, not 4"),
        (["--max-steps", "1"], "2 steps, not 1"),
    ):
        assert cli.main([*train, *arguments]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said == (
            f"birnn-mnist: error: {tmp_path} holds another training ({why}): choose another folder with --out, or "
            "replace that training with --overwrite"
        )
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert cli.main([*train, "--max-steps", "1", "--overwrite"]) == 0
    assert steps_in(tmp_path) == 1


def test_the_same_training_may_be_done_again(undrawn, tmp_path, capsys):
    """Running `make train` twice leaves the same files."""
    train = ["train", *TINY, "--out", str(tmp_path)]
    assert cli.main([*train, "--max-steps", "1"]) == 0
    assert "holds" not in capsys.readouterr().out
    assert cli.main([*train, "--max-steps", "2"]) == 0
    assert f"{tmp_path} holds this training's first 1 steps, which are done again" in capsys.readouterr().out
    assert steps_in(tmp_path) == 2


@pytest.mark.parametrize("steps", [1, 3, 4, 6, 9], ids="cut_after_{}".format)
def test_resume_in_every_epoch_is_bitwise(tmp_path, steps):
    train, test = (data.Digits(part.images[:200], part.labels[:200]) for part in data.read_sample(tmp_path))
    mnist = data.Mnist(train, test, "sample")
    hp = Hyperparameters(hidden_size=8, batch_size=60, num_epochs=3)  # 4 steps per epoch

    def run(max_steps: int | None, state: dict | None = None) -> Training:
        one = Training(hp, mnist, torch.device("cpu"), state)
        assert one.run(max_steps, Event(), str)
        return one

    whole = run(None)
    save(run(steps), tmp_path)
    state = load_state(tmp_path)
    assert len(state["progress"]["losses"]) == steps
    resumed = run(None, state)
    assert resumed.progress.losses == whole.progress.losses
    assert len(whole.progress.losses) == 12
    assert resumed.progress.accuracies == whole.progress.accuracies
    for name, expected in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], expected), name


# --- in this process --------------------------------------------------------------------------------------------------

CUTS = (1, 4, 100, 4000, -100, -1)  # the end of a truncated checkpoint, in bytes


class Code:
    """Unpickling this would create a file."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("it_ran"),)


ERRORS = [
    ([], "the following arguments are required: command"),
    (["fly"], "invalid choice: 'fly'"),
    (
        ["train", "--epoochs", "3"],
        "there is no option --epoochs; did you mean --epochs? (see birnn-mnist train --help)\n",
    ),
    (
        ["train", "--hidden_size=3"],
        "there is no option --hidden_size; did you mean --hidden-size? (see birnn-mnist train ",
    ),
    (["evaluate", "x", "--foo"], "there is no option --foo (see birnn-mnist evaluate --help)\n"),
    (["evaluate", "x", "y"], "there is one argument too many: 'y' (see birnn-mnist evaluate --help)\n"),
    (["--foo", "train"], "there is no option --foo (see birnn-mnist train --help)\n"),
    (["train", "--batch-size", "many"], "argument --batch-size: invalid int value: 'many'"),
    (["train", "--batch-size", "0"], "batch_size must be positive, got 0"),
    (["train", "--batch-size", "1" + "0" * 30], "batch_size is too large"),
    (["train", "--learning-rate", "nan"], "learning_rate must be positive, got nan"),
    (["train", "--max-steps", "0"], "max_steps must be positive, got 0"),
    (["train", "--input-size", "30"], "must be the 784 pixels of a digit, got 28 * 30 = 840"),
    (["train", "--num-classes", "9"], "num_classes must be at least 10"),
    (["train", "--seed", str(2**63)], "seed must fit 64 bits"),
    (["train", "--cell", "mlp"], "argument --cell: invalid choice: 'mlp'"),
    (["train", "--device", "toaster"], "device 'toaster' can't be used"),
    (["train", "--device", "privateuseone"], "device 'privateuseone' can't be used"),
    (["train", "--device", "xla"], "device 'xla' can't be used: Could not run 'aten::empty.memory_format'"),
    (["train", "--device", "meta"], "device 'meta' can't be used"),
    (["train", "--data-source", "moon"], "invalid choice: 'moon'"),
    (["train", "--data-source", "files", "--data", "nowhere"], "no MNIST data from files"),
    (["train", "--resume", ""], "--resume: FROM is empty"),
    (["train", "--device", ""], "device '' can't be used"),
    (["evaluate", "number.ckpt"], "number.ckpt is not a BiRNN's model.ckpt: a BiRNN has no 3"),
    (["train", "--resume", "nowhere"], "there is no file nowhere"),
    (["evaluate", "absent.ckpt"], "there is no file absent.ckpt"),
    (["evaluate", "text.ckpt"], "text.ckpt is not a checkpoint"),
    (["train", "--resume", "list.ckpt"], "list.ckpt is not a training_state.pt"),
    (["train", "--resume", "model.ckpt"], "model.ckpt is not a training_state.pt"),
    (["train", *SAMPLE, "--hidden-size", "100000000"], "not enough memory for a model or a batch of this size"),
    (["evaluate", "other.ckpt"], "other.ckpt is not a BiRNN's model.ckpt: it has no 'fc.weight'"),
    (["evaluate", "list.ckpt"], "list.ckpt is not a BiRNN's model.ckpt"),
    (["evaluate", "empty.ckpt"], "empty.ckpt is not a checkpoint: "),
    (["evaluate", "complex.ckpt"], "complex.ckpt is not a BiRNN's model.ckpt: fc.bias is of torch.complex64\n"),
    (["evaluate", "integer.ckpt"], "integer.ckpt is not a BiRNN's model.ckpt: fc.bias is of torch.int64\n"),
    (["evaluate", "one_way.ckpt"], "one_way.ckpt is not a BiRNN's model.ckpt: it has no 'lstm.weight_ih_l0_reverse'\n"),
    (["evaluate", "longer.ckpt"], "longer.ckpt is not a BiRNN's model.ckpt: a BiRNN has no 'other'\n"),
    (["evaluate", "shape.ckpt"], "shape.ckpt is not a BiRNN's model.ckpt: fc.bias is of shape (9,), not (10,)\n"),
    (["predict", "model.ckpt", "empty.ckpt"], "empty.ckpt can't be read as a picture"),
    (
        ["train", "--data", "text.ckpt", "--data-source", "npm"],
        "can't write to the data folder text.ckpt: Not a directory\n",
    ),
    (["predict", "model.ckpt", "text.ckpt"], "text.ckpt can't be read as a picture"),
    (["predict", "model.ckpt", "none.png"], "none.png can't be read as a picture: No such file or directory\n"),
    (["predict", "model.ckpt"], "the following arguments are required: IMAGE"),
    ([*ONE_STEP, "--out", "text.ckpt"], "can't write to the folder for results text.ckpt: File exists\n"),
    ([*ONE_STEP, "--out", "text.ckpt/out"], "can't write to the folder for results text.ckpt/out: Not a directory\n"),
    ([*ONE_STEP, "--out", "x" * 300], f"can't write to the folder for results {'x' * 300}: File name too long\n"),
    *(
        ([*ONE_STEP, "--out", f"with_{name}"], f"with_{name}/{name} can't be written: Is a directory\n")
        for name in cli.RESULTS
    ),
    (["evaluate", "with_model.ckpt"], "with_model.ckpt can't be read: Is a directory\n"),
    (["evaluate", "text.ckpt/x"], "text.ckpt/x can't be read: Not a directory\n"),
    (["predict", "with_model.ckpt", "x.png"], "with_model.ckpt can't be read: Is a directory\n"),
    (["train", "--resume", "with_model.ckpt"], "there is no file with_model.ckpt/training_state.pt\n"),
    (["train", "--resume", "with_training_state.pt"], "training_state.pt can't be read: Is a directory\n"),
    (["evaluate", "tensor.ckpt"], "tensor.ckpt is not a BiRNN's model.ckpt: it has no 'fc.weight'\n"),
    (["evaluate", "sparse.ckpt"], "sparse.ckpt is not a BiRNN's model.ckpt: fc.weight is sparse\n"),
    (["evaluate", "meta.ckpt"], "meta.ckpt is not a BiRNN's model.ckpt: fc.bias is empty\n"),
    *(
        ([*command, f"{name}.ckpt"], f"{name}.ckpt is not a checkpoint: it is damaged, or holds something else than ")
        for command in (["evaluate"], ["train", "--resume"])
        for name in (*(f"cut_{size}" for size in CUTS), "flipped", "zeros", "code", "old_code", "pickle")
    ),
]


@pytest.mark.parametrize(
    ("arguments", "message"), ERRORS, ids=[f"{k}-{message[:60]}" for k, (_, message) in enumerate(ERRORS)]
)
def test_errors_are_one_line(arguments, message, tmp_path, monkeypatch, capsys, recwarn):
    monkeypatch.chdir(tmp_path)
    Path("text.ckpt").write_text("no checkpoint")
    torch.save(torch.nn.Linear(2, 3).state_dict(), "other.ckpt")
    torch.save([1, 2], "list.ckpt")
    model = Hyperparameters(hidden_size=4).model().state_dict()
    torch.save(model, "model.ckpt")
    Path("empty.ckpt").touch()
    torch.save({**model, "fc.bias": model["fc.bias"].to(torch.complex64)}, "complex.ckpt")
    torch.save({**model, "fc.bias": model["fc.bias"].to(torch.int64)}, "integer.ckpt")
    torch.save({**model, "fc.bias": torch.zeros(9)}, "shape.ckpt")
    torch.save({**model, "other": torch.zeros(1)}, "longer.ckpt")
    torch.save({**model, 3: torch.zeros(1)}, "number.ckpt")
    one_way = {f"lstm.{name}": one for name, one in torch.nn.LSTM(28, 8, 2).state_dict().items()}
    torch.save(
        {**one_way, **{f"fc.{name}": one for name, one in torch.nn.Linear(8, 10).state_dict().items()}}, "one_way.ckpt"
    )
    for name in cli.RESULTS:
        Path(f"with_{name}", name).mkdir(parents=True)
    torch.save(torch.zeros(2), "tensor.ckpt")
    torch.save({**model, "fc.weight": model["fc.weight"].to_sparse()}, "sparse.ckpt")
    torch.save({**model, "fc.bias": torch.empty(10, device="meta")}, "meta.ckpt")
    whole = Path("model.ckpt").read_bytes()
    for size in CUTS:
        Path(f"cut_{size}.ckpt").write_bytes(whole[:size])
    weights = model["fc.weight"].numpy().tobytes()
    Path("flipped.ckpt").write_bytes(whole.replace(weights, bytes([weights[0] ^ 1]) + weights[1:]))
    Path("zeros.ckpt").write_bytes(bytes(2000))
    torch.save({"fc.weight": Code()}, "code.ckpt")
    torch.save({"fc.weight": Code()}, "old_code.ckpt", _use_new_zipfile_serialization=False)
    Path("pickle.ckpt").write_bytes(pickle.dumps(Code()))
    recwarn.clear()
    assert cli.main(arguments) == 2
    assert not recwarn.list  # each would print a line
    printed = capsys.readouterr()
    assert not Path("it_ran").exists()
    assert message in printed.err
    assert printed.err.startswith("birnn-mnist: error: ")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("command", [[], ["train"], ["evaluate"], ["predict"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command, "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    expected = {
        (): ["train", "evaluate", "predict"],
        ("train",): [
            "--hidden-size",
            "(default: 128)",
            "--cell {lstm,gru,rnn}",
            "--seed",
            "--device",
            "--out",
            "--overwrite",
            "--resume",
        ],
        ("evaluate",): ["CKPT", "--data", "--device"],
        ("predict",): ["CKPT", "IMAGE"],
    }
    assert all(word in said for word in expected[tuple(command)])


def test_version_tells_what_was_built(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    said, info = capsys.readouterr().out, birnn_ext.build_info()
    assert said.startswith(f"birnn_ext {birnn_ext.__version__}\n")
    assert all(part in said for part in (info["torch"], info["cpu_isa"], info["cuda"] or "CUDA kernels: none"))
    assert said.count("\n") >= 4  # a line for each


@pytest.mark.parametrize(
    "arguments", [["--num-epochs", "5", "--learning-rate", "0.5"], ["--epochs", "5", "--lr", "0.5"]]
)
def test_options_have_the_names_that_people_try(arguments):
    args = cli.parse(["train", *arguments])
    assert (args.num_epochs, args.learning_rate) == (5, 0.5)


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.delattr(birnn_ext.mnist, "cli", raising=False)
    monkeypatch.delitem(sys.modules, "birnn_ext.mnist.cli")
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert birnn_ext.mnist.main() == 2
    assert "install birnn_ext[mnist]" in capsys.readouterr().err


def test_defaults_are_the_tutorials():
    hp = Hyperparameters()
    assert (hp.sequence_length, hp.input_size, hp.hidden_size, hp.num_layers, hp.num_classes) == (28, 28, 128, 2, 10)
    assert (hp.batch_size, hp.num_epochs, hp.learning_rate) == (100, 2, 0.003)


@pytest.mark.cuda
def test_train_on_cuda(tmp_path):
    options = ["--data-source", "sample", "--device", "cuda", "--hidden-size", "8", "--max-steps", "2"]
    done = run("train", *options, "--batch-size", "4", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["device"] == "cuda"
    assert metrics["op_calls"]["cuda_backward"] == 6
    evaluated = run("evaluate", tmp_path / "model.ckpt", *SAMPLE)  # on the CPU
    assert f"Test Accuracy of the model on the 1000 test images: {100 * metrics['accuracy']:.2f}" in evaluated.stdout
