"""Trains and evaluates the tutorial's classifier, and writes the files of a run."""

from __future__ import annotations

import io
import json
import platform
import signal
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from threading import Event
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from birnn_ext import BiRNN, __version__, build_info, op_calls
from birnn_ext.mnist.data import SOURCES, Digits, Mnist, UserError, reason, write_together
from birnn_ext.mnist.graph import GraphedStep
from birnn_ext.mnist.processes import Processes

REPORT_STEPS = 100  # the tutorial prints the loss this often
EVALUATION_BATCH = 1000


def _value(default: float | str, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Hyperparameters:
    """The tutorial's hyperparameters, with its values as defaults."""

    sequence_length: int = _value(28, "steps of a digit")
    input_size: int = _value(28, "pixels of a step")
    hidden_size: int = _value(128, "units per direction")
    num_layers: int = _value(2, "recurrent layers")
    num_classes: int = _value(10, "outputs")
    batch_size: int = _value(100, "digits of a training step")
    num_epochs: int = _value(2, "passes through the training set")
    learning_rate: float = _value(0.003, "Adam's")
    seed: int = _value(3, "of weights and shuffling")
    cell: Literal["lstm", "gru", "rnn"] = _value("lstm", "cell of the recurrent layers", choices=("lstm", "gru", "rnn"))

    def check(self) -> None:
        """Raises UserError for values that make no model of MNIST."""
        for one in fields(self):
            value, choices = getattr(self, one.name), one.metadata["choices"]
            if choices:
                if value not in choices:
                    raise UserError(f"{one.name} must be one of {', '.join(choices)}, got {value}")
            elif one.name != "seed":
                if not value > 0:
                    raise UserError(f"{one.name} must be positive, got {value}")
                if value >= 2**31:
                    raise UserError(f"{one.name} is too large: {value}")
        if self.sequence_length * self.input_size != 784:
            raise UserError(
                "sequence_length * input_size must be the 784 pixels of a digit, "
                f"got {self.sequence_length} * {self.input_size} = {self.sequence_length * self.input_size}"
            )
        if self.num_classes < 10:
            raise UserError(f"num_classes must be at least 10, for 10 digits, got {self.num_classes}")
        if not -(2**63) <= self.seed < 2**63:
            raise UserError(f"seed must fit 64 bits, got {self.seed}")

    def model(self) -> BiRNN:
        return BiRNN(self.input_size, self.hidden_size, self.num_layers, self.num_classes, self.cell)

    def optimizer(self, model: BiRNN, capturable: bool = False) -> torch.optim.Adam:
        return torch.optim.Adam(model.parameters(), lr=self.learning_rate, fused=True, capturable=capturable)

    def sequences(self, images: Tensor) -> Tensor:
        """Converts uint8 (N, 28, 28) to float32 (N, sequence_length, input_size) in 0 .. 1."""
        return images.view(-1, self.sequence_length, self.input_size).float() / 255


@dataclass
class Progress:
    """The position of a training. With model and optimizer it is enough to go on as if it had never stopped."""

    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the current epoch
    losses: list[float] = field(default_factory=list)  # one per step
    accuracies: list[float] = field(default_factory=list)  # on the test set, after each epoch, 0 .. 1
    epoch_seconds: list[float] = field(default_factory=list)  # without evaluation
    seconds: float = 0.0  # in the current epoch

    def check(self) -> None:
        """Raises ValueError for values that no training reaches."""
        counts, series = (self.epoch, self.step), (self.losses, self.accuracies, self.epoch_seconds)
        if not all(type(value) is int and value >= 0 for value in counts):
            raise ValueError("counts")
        if not all(type(values) is list and all(type(value) is float for value in values) for values in series):
            raise ValueError("series")
        if not (type(self.seconds) is float and self.seconds >= 0):
            raise ValueError("seconds")
        if not len(self.accuracies) == len(self.epoch_seconds) == self.epoch:
            raise ValueError("one value per epoch")
        # There is one loss per step. Each finished epoch has the same number of steps (which depends on the data), and
        # more than `step`.
        before = len(self.losses) - self.step
        if not (before % self.epoch == 0 and before // self.epoch > self.step if self.epoch else before == 0):
            raise ValueError("one loss per step")


class Training:
    """A model in training.

    Args:
        hyperparameters: Those of the model and its training.
        mnist: The data, on the device to train on.
        device: The device to train on.
        state: The `state` of an earlier training, to go on from there.
        processes: The processes that train together, each with a share of every batch. All have the same seed, data and
            state, and reach the same model as a single process.
        graph: Whether a training step on CUDA is a CUDA graph. Several processes always train without one, as they
            exchange gradients within the step.

    Raises:
        UserError: The state belongs to a training on another number of digits.
    """

    def __init__(
        self,
        hyperparameters: Hyperparameters,
        mnist: Mnist,
        device: torch.device,
        state: dict[str, Any] | None = None,
        processes: Processes | None = None,
        graph: bool = True,
    ) -> None:
        self.hyperparameters, self.mnist, self.device = hyperparameters, mnist, device
        self.processes = processes or Processes()
        self.graph = graph and device.type == "cuda"
        torch.manual_seed(hyperparameters.seed)
        self.model = hyperparameters.model().to(device)
        self.optimizer = hyperparameters.optimizer(self.model, capturable=self.graph)
        self.progress = Progress()
        self.accuracy: float | None = None  # of the finished model
        if state is not None:
            self.model.load_state_dict(state["model"])
            # other groups than this optimizer's may belong to another device, or to a training without a graph
            moments = state["optimizer"]["state"]
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
            progress = self.progress = Progress(**state["progress"])
            steps = self.steps_per_epoch
            if progress.step >= steps or len(progress.losses) != progress.epoch * steps + progress.step:
                raise UserError(f"the training to resume did not have {steps} steps per epoch, as this one has")

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.mnist.train) // self.hyperparameters.batch_size)

    @property
    def evaluations(self) -> list[tuple[int, float]]:
        """Returns the steps done and the accuracy on the test set, after each epoch and at the end."""
        progress = self.progress
        found = [((epoch + 1) * self.steps_per_epoch, one) for epoch, one in enumerate(progress.accuracies)]
        if progress.step and self.accuracy is not None:  # the training ended within an epoch
            found.append((len(progress.losses), self.accuracy))
        return found

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
            "hyperparameters": asdict(self.hyperparameters),
            "source": self.mnist.source,
        }

    def run(
        self,
        max_steps: int | None,
        stop: Event,
        log: Callable[[str], None],
        after_epoch: Callable[[], None] = lambda: None,
    ) -> bool:
        """Trains to the last epoch's end, for max_steps in all, or until stop is set; then it returns False."""
        hp, progress = self.hyperparameters, self.progress
        step: Callable[[Tensor], Tensor] = self._step
        if self.graph and self.processes.count > 1:
            log("Several processes train without a CUDA graph, as they exchange gradients within each step")
        elif self.graph:
            step = GraphedStep(step, min(hp.batch_size, len(self.mnist.train)), self.device, log)
        generator = torch.Generator().manual_seed(hp.seed)
        for epoch in range(hp.num_epochs):
            order = torch.randperm(len(self.mnist.train), generator=generator)
            if epoch < progress.epoch:
                continue  # finished before the resume; its order is drawn only to get to the next one
            if self._epoch(step, order.to(self.device), max_steps, stop, log):
                return not self.processes.any(stop.is_set())
            progress.accuracies.append(self._test_accuracy())
            progress.epoch_seconds.append(progress.seconds)
            progress.epoch, progress.step, progress.seconds = progress.epoch + 1, 0, 0.0
            after_epoch()
        return True

    def _test_accuracy(self) -> float:
        test, share = self.mnist.test, self.processes.share
        mine = Digits(share(test.images), share(test.labels))
        correct = (predictions(self.model, self.hyperparameters, mine) == mine.labels).sum()
        return self.processes.sum(correct).item() / len(test)

    def _step(self, batch: Tensor) -> Tensor:
        """Trains on the digits with these numbers. Returns this process's part of their mean loss."""
        hp, train, processes = self.hyperparameters, self.mnist.train, self.processes
        mine = processes.share(batch)
        scores = self.model(hp.sequences(train.images[mine]))
        # this process's part of the whole batch's mean, as shares may differ in size
        loss = F.cross_entropy(scores, train.labels[mine], reduction="sum") / len(batch)
        self.optimizer.zero_grad()
        loss.backward()
        processes.sum_gradients(self.model)
        self.optimizer.step()
        return loss.detach()

    def _epoch(
        self,
        step: Callable[[Tensor], Tensor],
        order: Tensor,
        max_steps: int | None,
        stop: Event,
        log: Callable[[str], None],
    ) -> bool:
        """Goes on with the current epoch; returns True if max_steps or stop ended it early."""
        hp, progress, processes = self.hyperparameters, self.progress, self.processes
        batches = order.split(hp.batch_size)
        pending: list[Tensor] = []  # losses stay on the device, as reading each would wait for it
        begin = time.perf_counter()

        def settle() -> None:
            nonlocal begin
            progress.losses += processes.sum(torch.stack(pending)).tolist() if pending else []
            pending.clear()
            now = time.perf_counter()
            progress.seconds, begin = progress.seconds + now - begin, now

        self.model.train()
        title = f"Epoch {progress.epoch + 1}/{hp.num_epochs}"
        with tqdm(batches, title, initial=progress.step, unit="step", disable=processes.rank > 0) as bar:
            for batch in batches[progress.step :]:
                enough = max_steps is not None and len(progress.losses) + len(pending) >= max_steps
                if processes.any(stop.is_set()) or enough:
                    settle()
                    return True
                pending.append(step(batch))
                progress.step += 1
                bar.update()
                if progress.step % REPORT_STEPS == 0 or progress.step == len(batches):
                    settle()
                    bar.set_postfix(loss=f"{progress.losses[-1]:.4f}", refresh=False)
                    log(
                        f"Epoch [{progress.epoch + 1}/{hp.num_epochs}], Step [{progress.step}/{len(batches)}], "
                        f"Loss: {progress.losses[-1]:.4f}"
                    )
            settle()
        return False

    def metrics(self) -> dict[str, Any]:
        """Returns the contents of metrics.json."""
        progress = self.progress
        return {
            "loss": progress.losses,
            "epoch_accuracy": progress.accuracies,
            "accuracy": self.accuracy,
            "epoch_seconds": progress.epoch_seconds,
            "train_seconds": sum(progress.epoch_seconds) + progress.seconds,
            "epochs_finished": progress.epoch,
            "hyperparameters": asdict(self.hyperparameters),
            "data": {"source": self.mnist.source, "train": len(self.mnist.train), "test": len(self.mnist.test)},
            "device": str(self.device),
            "device_name": device_name(self.device),
            "processes": self.processes.count,
            "threads": torch.get_num_threads(),
            "versions": {"birnn_ext": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "build_info": build_info(),
            "op_calls": op_calls(),
        }


@torch.no_grad()
def predictions(model: nn.Module, hyperparameters: Hyperparameters, digits: Digits) -> Tensor:
    """Returns the class with the highest score for each digit, (N,) int64."""
    was_training = model.training
    model.eval()
    found = [model(hyperparameters.sequences(images)).argmax(1) for images in digits.images.split(EVALUATION_BATCH)]
    model.train(was_training)
    return torch.cat(found)


def accuracy(predicted: Tensor, digits: Digits) -> float:
    return (predicted == digits.labels).double().mean().item()


def accuracy_line(value: float, digits: Digits) -> str:
    return f"Test Accuracy of the model on the {len(digits)} test images: {100 * value:.2f} %"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


# --- files ------------------------------------------------------------------------------------------------------------


def _packed(value: Any) -> bytes:
    content = io.BytesIO()  # with a file, torch.save would raise C++'s RuntimeError for a full disk
    torch.save(value, content)
    return content.getvalue()


def save(training: Training, out: Path) -> None:
    """Writes out/model.ckpt (a plain state_dict), out/training_state.pt (for --resume) and out/metrics.json."""
    state = training.state()
    contents = {
        "model.ckpt": _packed(state["model"]),
        "training_state.pt": _packed(state),
        "metrics.json": json.dumps(training.metrics(), indent=1).encode() + b"\n",
    }
    write_together({out / name: content for name, content in contents.items()})


def check_replaces(training: Training, max_steps: int | None, out: Path, log: Callable[[str], None]) -> None:
    """Reads the training in the folder that this one will write to. Tells log if it has the same steps.

    Raises:
        UserError: That training is another one, or longer, and would be lost.
    """
    try:
        metrics = json.loads((out / "metrics.json").read_text())
        # before there was a choice, the cell was an LSTM
        before = {"cell": "lstm", **metrics["hyperparameters"]}
        steps, source = len(metrics["loss"]), metrics["data"]["source"]
        different = [
            f"{name} {before.get(name)}, not {value}"
            for name, value in asdict(training.hyperparameters).items()
            if name != "num_epochs" and before.get(name) != value  # more epochs continue the same training
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # the folder holds no training
    if source != training.mnist.source and "sample" in (source, training.mnist.source):  # all others have the same data
        different.append(f"data from {source}, not {training.mnist.source}")
    planned = training.hyperparameters.num_epochs * training.steps_per_epoch
    planned = planned if max_steps is None else min(max_steps, planned)
    if not different and steps > planned:
        different.append(f"{steps} steps, not {planned}")
    if different:
        raise UserError(
            f"{out} holds another training ({'; '.join(different)}): choose another folder with --out, "
            "or replace that training with --overwrite"
        )
    log(f"{out} holds this training's first {steps} steps, which are done again (--resume would go on from there)")


def _load(path: Path) -> dict[Any, Any]:
    """Returns the dict in a checkpoint, or an empty one if the file holds something else."""
    try:
        file = io.BytesIO(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from None
    try:
        if zipfile.is_zipfile(file) and zipfile.ZipFile(file).testzip():
            raise ValueError("a wrong checksum, at which torch.load does not look")
        file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd files; an error, if there is one, is enough
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # there are many kinds, and their texts advise to load without weights_only
        why = "it is damaged, or holds something else than tensors and plain values"
        raise UserError(f"{path} is not a checkpoint: {why}") from None
    return found if isinstance(found, dict) else {}


def _check_tensors(found: dict[str, Tensor], hyperparameters: Hyperparameters) -> None:
    """Raises ValueError, with the first reason, if found is not the state_dict of such a model.

    load_state_dict would list all reasons, and would cast integers and complex numbers.
    """
    if hyperparameters.num_layers > len(found):  # a wrong number of layers could be huge
        raise ValueError(f"it has less than {hyperparameters.num_layers} layers")
    with torch.device("meta"):  # sizes could be huge, too
        expected = hyperparameters.model().state_dict()
    for name in expected:
        if name not in found:
            raise ValueError(f"it has no {name!r}")
    for name, tensor in found.items():
        if name not in expected:
            raise ValueError(f"a BiRNN has no {name!r}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is of {tensor.dtype}")
        if tensor.is_meta or tensor.layout != torch.strided:
            raise ValueError(f"{name} is {'empty' if tensor.is_meta else 'sparse'}")
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{name} is of shape {tuple(tensor.shape)}, not {tuple(expected[name].shape)}")


def _check_moments(found: dict[int, dict[str, Tensor]], parameters: list[nn.Parameter]) -> None:
    """Raises ValueError if found is not Adam's state of parameters, as its kernels would read beyond small tensors."""

    def kind(tensor: Tensor) -> tuple[Any, ...]:
        return tensor.dtype, tensor.device, tensor.shape, tensor.is_contiguous()

    step = torch.tensor(0.0)
    expected = [{"step": step, "exp_avg": one, "exp_avg_sq": one} for one in parameters]
    for k in found.keys() | range(len(expected)):
        if {name: kind(one) for name, one in found[k].items()} != {
            name: kind(one) for name, one in expected[k].items()
        }:
            raise ValueError(f"the moments of parameter {k}")


def state_file(path: Path) -> Path:
    """Returns the file of a training's state: path, or the file in that folder."""
    return path / "training_state.pt" if path.is_dir() else path


def load_state(path: Path) -> dict[str, Any]:
    """Loads the training state from a file, or from the folder of a run.

    Raises:
        UserError: There is none.
    """
    path = state_file(path)
    state = _load(path)
    try:
        hp = Hyperparameters(**state["hyperparameters"])
        if any(type(getattr(hp, one.name)) is not type(one.default) for one in fields(hp)):
            raise TypeError
        hp.check()
        Progress(**state["progress"]).check()
        if state["source"] not in SOURCES:
            raise ValueError
        _check_tensors(state["model"], hp)
        model = hp.model()
        model.load_state_dict(state["model"])
        moments = state["optimizer"]["state"]
        _check_moments(moments, list(model.parameters()) if state["progress"]["losses"] else [])
        state["optimizer"] = {"state": moments}  # the rest is in hp
        state["hyperparameters"] = asdict(hp)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError, UserError):
        raise UserError(f"{path} is not a training_state.pt") from None
    return state


def load_model(path: Path, device: torch.device) -> tuple[BiRNN, Hyperparameters]:
    """Loads a model from its model.ckpt alone, with the cell and sizes that the tensors in it tell.

    Raises:
        UserError: There is no such file, or it holds something else.
    """
    state = _load(path)
    try:
        classes, features = state["fc.weight"].shape
        cell: Literal["lstm", "gru", "rnn"] = "lstm"
        if "gru.weight_ih_l0" in state or "rnn.weight_ih_l0" in state:
            cell = "gru" if "gru.weight_ih_l0" in state else "rnn"
        input_size, first = state[f"{cell}.weight_ih_l0"].shape[1], f"{cell}.weight_ih_l"
        layers = sum(str(name).startswith(first) and not str(name).endswith("_reverse") for name in state)
        hp = Hyperparameters(784 // max(input_size, 1), input_size, features // 2, layers, classes, cell=cell)
        hp.check()
        _check_tensors(state, hp)
        model = hp.model()
        model.load_state_dict(state)
    except KeyError as error:
        raise UserError(f"{path} is not a BiRNN's model.ckpt: it has no {error}") from None
    except (TypeError, AttributeError, ValueError, IndexError, RuntimeError, UserError) as error:
        raise UserError(f"{path} is not a BiRNN's model.ckpt: {reason(error)}") from None
    return model.to(device), hp


@contextmanager
def interruptible() -> Iterator[Event]:
    """Yields an event that Ctrl-C and SIGTERM set, so that they do not stop in the middle of a step or of a file."""
    stop = Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
