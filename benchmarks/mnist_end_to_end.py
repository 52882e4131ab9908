"""Trains MNIST with the tutorial's own code and with birnn_ext's trainer, from the same weights, on the same batches.

The tutorial reads its digits one by one as PIL images through a DataLoader, and runs nn.LSTM and the default Adam. The
trainer keeps them as one tensor on the device, and runs BiRNN and the fused Adam. Each trains in its own process. The
time leaves out reading files, starting Python, and the evaluation every 100 steps. The peak memory needs Linux.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from statistics import mean, median, stdev
from threading import Event

import torch
from measuring import TutorialBiRNN, alone, markdown, memory
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import ToTensor

from birnn_ext.mnist import data, training
from birnn_ext.mnist.cli import choose_device
from birnn_ext.mnist.data import Digits, Mnist, UserError
from birnn_ext.mnist.training import Hyperparameters, Training, device_name

Trained = tuple[float, list[float]]  # seconds, and the loss of every step
GOAL = 0.97  # the time to this accuracy is measured

# Losses of two correct trainings agree over so many steps. Then rounding grows: after 100 steps, nn.LSTM's losses with
# the plain and with the fused Adam differ by 0.1.
FOLLOWED = 20


@dataclass(frozen=True)
class Result:
    seconds: float
    losses: list[float]
    memory: float  # MiB, the process's peak
    gpu_memory: float  # MiB, the peak of tensors
    curve: list[tuple[float, float]]  # seconds of training, and the accuracy on the test set after them

    @property
    def seconds_to_goal(self) -> float:
        """Returns infinity if it is not reached."""
        return next((seconds for seconds, accuracy in self.curve if accuracy >= GOAL), math.inf)


@dataclass
class Watch:
    """Measures the accuracy on the test set during a training, and how much time that takes."""

    hp: Hyperparameters
    test: Digits
    curve: list[tuple[float, float]] = field(default_factory=list)
    seconds: float = 0.0  # spent here

    def __call__(self, model: nn.Module, seconds: float) -> None:
        """Takes the seconds since the training began, which include those spent here."""
        begin = time.perf_counter()
        found = training.accuracy(training.predictions(model, self.hp, self.test), self.test)
        self.curve.append((seconds - self.seconds, found))
        self.seconds += time.perf_counter() - begin


class Images(Dataset):
    """Does what torchvision.datasets.MNIST does, with files that are already read."""

    def __init__(self, digits: Digits) -> None:
        self.digits, self.transform = digits, ToTensor()

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.digits.images[index].numpy())
        return self.transform(image), int(self.digits.labels[index])


def train_tutorial(hp: Hyperparameters, mnist: Mnist, device: torch.device, max_steps: int, watch: Watch) -> Trained:
    """Runs the tutorial's code, with a watch."""
    torch.manual_seed(hp.seed)  # gives the same weights as BiRNN
    model = TutorialBiRNN(hp.input_size, hp.hidden_size, hp.num_layers, hp.num_classes).to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=hp.learning_rate)
    dataset = Images(mnist.train)
    generator = torch.Generator().manual_seed(hp.seed)  # the same order as Training.run
    losses: list[Tensor] = []
    begin = time.perf_counter()
    for epoch in range(hp.num_epochs):
        order = torch.randperm(len(dataset), generator=generator).tolist()
        loader = DataLoader(dataset, batch_size=hp.batch_size, sampler=order)
        for i, (images, labels) in enumerate(islice(loader, max_steps - len(losses))):
            images = images.reshape(-1, hp.sequence_length, hp.input_size).to(device)
            labels = labels.to(device)
            outputs = model(images)
            loss = criterion(outputs, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())  # read only at the end, as reading waits for the device
            if (i + 1) % 100 == 0:
                print(f"Epoch [{epoch + 1}/{hp.num_epochs}], Step [{i + 1}/{len(loader)}], Loss: {loss.item():.4f}")
                watch(model, time.perf_counter() - begin)
    values = torch.stack(losses).tolist()  # this waits for the device
    seconds = time.perf_counter() - begin - watch.seconds
    watch(model, seconds + watch.seconds)
    return seconds, values


def train_ours(hp: Hyperparameters, mnist: Mnist, device: torch.device, max_steps: int, watch: Watch) -> Trained:
    """Trains as birnn-mnist does."""
    run = Training(hp, mnist, device)

    def seconds() -> float:
        return sum(run.progress.epoch_seconds) + run.progress.seconds

    def log(line: str) -> None:
        print(line)
        if line.startswith("Epoch"):  # other lines come within a step
            watch(run.model, seconds())

    run.run(max_steps, Event(), log)
    taken = seconds() - watch.seconds
    watch(run.model, seconds())
    return taken, run.progress.losses


Results = dict[str, list[Result]]  # by contestant, a result for each seed
CONTESTANTS = {"tutorial": train_tutorial, "birnn_ext": train_ours}
LOOKS = {"tutorial": ("#D55E00", "s-"), "birnn_ext": ("#0072B2", "o-")}  # Okabe and Ito's colours, and other markers


def compete(name: str, hp: Hyperparameters, folder: Path, source: str, device: torch.device, max_steps: int) -> Result:
    training.EVALUATION_BATCH = hp.batch_size  # evaluation must not determine the peak memory
    mnist = data.load_mnist(folder, source, log=lambda line: None)
    train = mnist.train.to(device) if name == "birnn_ext" else mnist.train  # the tutorial moves batch by batch
    mnist = Mnist(train, mnist.test.to(device), mnist.source)
    watch = Watch(hp, mnist.test)
    seconds, losses = CONTESTANTS[name](hp, mnist, device, max_steps, watch)
    gpu_memory = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0
    return Result(seconds, losses, memory(), gpu_memory, watch.curve)


def race(seeds: int, folder: Path, source: str, device: torch.device, steps: int | None = None) -> Results:
    """Trains both contestants from the seeds 0, 1, ..., in turn, for the tutorial's two epochs or fewer steps."""
    hp = Hyperparameters()
    mnist = data.load_mnist(folder, source)
    source = "sample" if mnist.source == "sample" else "files"  # a download has left its files in the folder
    max_steps = min(steps or 2**31, hp.num_epochs * -(-len(mnist.train) // hp.batch_size))
    results: Results = {name: [] for name in CONTESTANTS}
    for seed in range(seeds):
        for name, of in results.items():
            print(f"{name}, seed {seed}", flush=True)
            of.append(alone(compete, name, replace(hp, seed=seed), folder, source, device, max_steps))
    return results


def report(results: Results) -> str:
    """Returns the table of the results of all seeds, and the difference of the losses."""
    rows = [["", *results, "tutorial / birnn_ext"]]

    def add(title: str, values: list[float], digits: int) -> None:
        rows.append([title, *(f"{value:.{digits}f}" for value in values), f"{values[0] / values[1]:.2f}"])

    sides = list(results.values())
    losses = [torch.tensor([result.losses for result in of]) for of in sides]  # (seeds, steps)
    seeds, steps = losses[0].shape
    seconds = [median(result.seconds for result in of) for of in sides]
    add("training, s", seconds, 2)
    add("a step, ms", [1000 * value / steps for value in seconds], 2)
    accuracies = [[100 * result.curve[-1][1] for result in of] for of in sides]
    rows.append(["accuracy, %: mean", *(f"{mean(of):.2f}" for of in accuracies), ""])
    if seeds > 1:
        rows.append(["its standard deviation", *(f"{stdev(of):.2f}" for of in accuracies), ""])
        rows.append(["its range", *(f"{min(of):.2f} to {max(of):.2f}" for of in accuracies), ""])
    to_goal = [[result.seconds_to_goal for result in of] for of in sides]
    reached = [sum(seconds < math.inf for seconds in of) for of in to_goal]
    rows.append([f"seeds that come to {100 * GOAL:.0f} %", *(f"{count} of {seeds}" for count in reached), ""])
    if all(median(of) < math.inf for of in to_goal):
        add(f"time to {100 * GOAL:.0f} %, s", [median(of) for of in to_goal], 1)
    add("peak memory, MiB", [median(result.memory for result in of) for of in sides], 0)
    if any(result.gpu_memory for of in sides for result in of):
        add("peak GPU memory, MiB", [median(result.gpu_memory for result in of) for of in sides], 1)
    difference = (losses[0] - losses[1]).abs()
    first = min(FOLLOWED, steps)
    return (
        f"{markdown(rows)}\n\nMedians over seeds, if nothing else is said. Largest difference of losses: "
        f"{difference[:, :first].max():.1e} over the first {first} steps, {difference.max():.1e} over all {steps}.\n"
        f"Mean loss of the last {first} steps: " + ", ".join(f"{of[:, -first:].mean():.4f}" for of in losses) + "."
    )


Curves = dict[str, list[list[tuple[float, float]]]]  # by contestant, for each seed: seconds and accuracies


def curves(results: Results) -> Curves:
    return {name: [result.curve for result in of] for name, of in results.items()}


def draw(found: Curves, path: Path) -> None:
    """Draws accuracy over time, with a line for each training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for name, (colour, marker) in LOOKS.items():
        for k, curve in enumerate(found[name]):
            seconds, accuracies = zip(*curve, strict=True)
            percent = [100 * accuracy for accuracy in accuracies]
            label = name if k == 0 else None
            axes.plot(seconds, percent, marker, color=colour, alpha=0.7, markersize=4, linewidth=1.2, label=label)
    axes.axhline(100 * GOAL, color="black", linewidth=0.8, linestyle="--")
    axes.annotate(
        f"{100 * GOAL:.0f} %", (1, 100 * GOAL), (4, 0), ("axes fraction", "data"), "offset points", va="center"
    )
    seeds = len(next(iter(found.values())))
    axes.set_title(f"Training on MNIST: accuracy every 100 steps, {seeds} seed{'s' * (seeds > 1)} of each")
    axes.set(xlabel="time of training (s)", ylabel="accuracy on the test set (%)", ylim=(80, 100))
    axes.set_xlim(0)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="training steps (default: the tutorial's 2 epochs)")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each contestant, in turn")
    parser.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of MNIST (default: data)")
    parser.add_argument("--data-source", choices=("auto", *data.SOURCES), default="auto", help="see birnn-mnist train")
    args = parser.parse_args(arguments)
    try:
        device = choose_device(args.device)
        results = race(args.seeds, args.data, args.data_source, device, args.steps)
    except UserError as error:
        parser.error(str(error))
    print(f"\n{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}\n\n{report(results)}")


if __name__ == "__main__":
    main()
