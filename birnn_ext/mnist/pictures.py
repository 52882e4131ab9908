"""The two pictures of a training run."""

from __future__ import annotations

import io

from matplotlib.figure import Figure
from torch import Tensor

from birnn_ext.mnist.data import Digits
from birnn_ext.mnist.training import Progress

GRID = 6  # rows and columns of misclassified digits


def draw_curves(progress: Progress, steps_per_epoch: int) -> bytes:
    """A PNG: loss of every step, and test accuracy after every epoch."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    left = figure.subplots()
    left.plot(range(1, len(progress.losses) + 1), progress.losses, color="tab:blue", linewidth=0.8)
    left.set(xlabel="step", ylabel="training loss (cross-entropy)", ylim=(0, None))
    right = left.twinx()
    epochs = range(1, len(progress.accuracies) + 1)
    right.plot([e * steps_per_epoch for e in epochs], [100 * a for a in progress.accuracies], "o-", color="tab:orange")
    right.set(ylabel="test accuracy (%)")
    for axis, colour in ((left, "tab:blue"), (right, "tab:orange")):
        axis.yaxis.label.set_color(colour)
    return _png(figure, 120)


def draw_misclassified(digits: Digits, predicted: Tensor) -> bytes:
    """A PNG: the first misclassified digits, each with its label and what the model took it for."""
    wrong = (predicted != digits.labels).nonzero().flatten().cpu()
    images, labels, guesses = (t.cpu() for t in (digits.images, digits.labels, predicted))
    figure = Figure(figsize=(8, 9), layout="constrained")
    figure.suptitle(f"{len(wrong)} of {len(digits)} test digits misclassified: label, prediction")
    for axis in figure.subplots(GRID, GRID).flat:
        axis.set_axis_off()
    for axis, index in zip(figure.axes, wrong.tolist(), strict=False):
        axis.imshow(images[index], cmap="gray_r", vmin=0, vmax=255)
        axis.set_title(f"{labels[index]}, {guesses[index]}", fontsize=10)
    return _png(figure, 100)


def _png(figure: Figure, dpi: int) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    return content.getvalue()
