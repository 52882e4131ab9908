"""The tutorial's training of MNIST as it is written, beside birnn_ext's trainer: the same weights, the same batches.

The tutorial reads its digits one by one as PIL images through a DataLoader and runs nn.LSTM and the default Adam. The
trainer keeps them as one tensor on the device and runs BiRNN and the fused Adam. Both train in a process of their own;
reading the files, starting Python and evaluation do not count. Linux only, for the peak memory.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
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

# Steps over which the losses of two correct trainings agree. Later rounding has grown: after 100 steps those of nn.LSTM
# with the plain and with the fused Adam are 0.1 apart.
FOLLOWED = 20


@dataclass(frozen=True)
class Result:
    seconds: float
    losses: list[float]
    memory: float  # MiB, the process's peak
    gpu_memory: float  # MiB, the peak of tensors


class Images(Dataset):
    """torchvision.datasets.MNIST, but for where its files come from."""

    def __init__(self, digits: Digits) -> None:
        self.digits, self.transform = digits, ToTensor()

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.digits.images[index].numpy())
        return self.transform(image), int(self.digits.labels[index])


def train_tutorial(hp: Hyperparameters, mnist: Mnist, device: torch.device, max_steps: int) -> Trained:
    """The tutorial's code."""
    torch.manual_seed(hp.seed)  # the weights of BiRNN
    model = TutorialBiRNN(hp.input_size, hp.hidden_size, hp.num_layers, hp.num_classes).to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=hp.learning_rate)
    dataset = Images(mnist.train)
    generator = torch.Generator().manual_seed(hp.seed)  # the order of Training.run
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
            losses.append(loss.detach())  # for the comparison, not read before the end
            if (i + 1) % 100 == 0:
                print(f"Epoch [{epoch + 1}/{hp.num_epochs}], Step [{i + 1}/{len(loader)}], Loss: {loss.item():.4f}")
    values = torch.stack(losses).tolist()  # waits for the device
    return time.perf_counter() - begin, values


def train_ours(hp: Hyperparameters, mnist: Mnist, device: torch.device, max_steps: int) -> Trained:
    """What birnn-mnist does."""
    training.EVALUATION_BATCH = hp.batch_size  # the evaluation after an epoch shall not set the peak of memory
    run = Training(hp, Mnist(mnist.train.to(device), mnist.test.to(device), mnist.source), device)
    run.run(max_steps, Event(), print)
    return sum(run.progress.epoch_seconds) + run.progress.seconds, run.progress.losses


CONTESTANTS = {"tutorial": train_tutorial, "birnn_ext": train_ours}


def compete(name: str, hp: Hyperparameters, folder: Path, source: str, device: torch.device, max_steps: int) -> Result:
    mnist = data.load_mnist(folder, source, log=lambda line: None)
    seconds, losses = CONTESTANTS[name](hp, mnist, device, max_steps)
    gpu_memory = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0
    return Result(seconds, losses, memory(), gpu_memory)


def report(results: dict[str, list[Result]]) -> str:
    """The table, from the results of all rounds, and how far the losses are apart."""
    rows = [["", *results, "tutorial / birnn_ext"]]

    def add(title: str, values: list[float], digits: int) -> None:
        rows.append([title, *(f"{value:.{digits}f}" for value in values), f"{values[0] / values[1]:.2f}"])

    losses = [torch.tensor([result.losses for result in of]) for of in results.values()]  # (rounds, steps)
    steps = losses[0].shape[1]
    seconds = [median(result.seconds for result in of) for of in results.values()]
    add("training, s", seconds, 2)
    add("a step, ms", [1000 * value / steps for value in seconds], 2)
    add("peak memory, MiB", [median(result.memory for result in of) for of in results.values()], 0)
    if any(result.gpu_memory for of in results.values() for result in of):
        add("peak GPU memory, MiB", [median(result.gpu_memory for result in of) for of in results.values()], 1)
    difference = (losses[0] - losses[1]).abs()
    first = min(FOLLOWED, steps)
    return (
        f"{markdown(rows)}\n\nLargest difference of losses: {difference[:, :first].max():.1e} over the first {first} "
        f"steps, {difference.max():.1e} over all {steps}.\n"
        f"Mean loss of the last {first} steps: " + ", ".join(f"{of[:, -first:].mean():.4f}" for of in losses) + "."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="training steps (default: the tutorial's 2 epochs)")
    parser.add_argument("--rounds", type=int, default=1, help="trainings of each contestant, in turn; medians count")
    parser.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of MNIST (default: data)")
    parser.add_argument("--data-source", choices=("auto", *data.SOURCES), default="auto", help="see birnn-mnist train")
    args = parser.parse_args(arguments)
    hp = Hyperparameters()
    try:
        device = choose_device(args.device)
        mnist = data.load_mnist(args.data, args.data_source)
    except UserError as error:
        parser.error(str(error))
    source = "sample" if mnist.source == "sample" else "files"  # a download has left its files in the folder
    max_steps = min(args.steps or 2**31, hp.num_epochs * -(-len(mnist.train) // hp.batch_size))

    results: dict[str, list[Result]] = {name: [] for name in CONTESTANTS}
    for _ in range(args.rounds):
        for name, of in results.items():
            of.append(alone(compete, name, hp, args.data, source, device, max_steps))
    print(f"\n{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}, {max_steps} steps\n")
    print(report(results))


if __name__ == "__main__":
    main()
