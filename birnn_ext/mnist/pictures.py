"""Draws the two pictures of a training run."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from birnn_ext.mnist.data import Digits, Mnist

LOSS, ACCURACY = "#0072B2", "#D55E00"  # Okabe and Ito's colours, which colour-blind readers can tell apart
SMOOTHED = 50  # steps over which the loss is averaged
FEW = 20  # steps; with fewer there is no mean
LABELLED = 6  # accuracies for which there is room
GRID = 6  # rows and columns of misclassified digits


def draw_curves(losses: Sequence[float], evaluations: Sequence[tuple[int, float]], mnist: Mnist) -> bytes:
    """Returns a PNG of the loss of every step and, below it, of accuracies on the test set.

    Args:
        losses: The loss of every step.
        evaluations: For each, the number of steps before it and the accuracy, 0 .. 1.
        mnist: The data of the training.
    """
    steps = len(losses)
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    digits = f"{len(mnist.train):,} digits of MNIST" + (", its embedded sample" if mnist.source == "sample" else "")
    figure.suptitle(f"Training of a BiRNN on {digits}")

    dotted = ".-" if steps < FEW else "-"
    above.plot(range(1, steps + 1), losses, dotted, color=LOSS, alpha=0.4, linewidth=0.8, label="each step")
    if steps >= FEW:
        over = min(SMOOTHED, steps // 4)
        means = np.convolve(losses, np.full(over, 1 / over), "valid")
        centres = np.arange(len(means)) + (over + 1) / 2
        above.plot(centres, means, color=LOSS, linewidth=2, label=f"mean of {over} steps")
    above.set_ylabel("training loss (cross-entropy)")
    if any(0 < loss < np.inf for loss in losses):  # true unless the training diverged at once
        above.set_yscale("log")
        above.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        above.yaxis.set_major_formatter("{x:g}")
        above.yaxis.set_minor_formatter(NullFormatter())
    above.legend(frameon=False)

    below.plot([step for step, _ in evaluations], [100 * accuracy for _, accuracy in evaluations], "o:", color=ACCURACY)
    for step, accuracy in evaluations if len(evaluations) <= LABELLED else evaluations[-1:]:
        text = f"{100 * accuracy:.2f} %"
        below.annotate(text, (step, 100 * accuracy), (0, 8), textcoords="offset points", ha="center")
    below.set(xlabel="training steps", ylabel=f"accuracy (%)\non {len(mnist.test):,} test digits")
    below.set_xlim(0, 1.05 * steps)
    below.margins(y=0.4)
    for axes in (above, below):
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    return _png(figure, 120)


def draw_misclassified(digits: Digits, predicted: Tensor) -> bytes:
    """Returns a PNG of the first misclassified digits, each with its label and the model's answer."""
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
