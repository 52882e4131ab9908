"""Times gradients of the tutorial's BiRNN for each digit of a batch, as differential privacy needs them.

    python benchmarks/per_sample_gradients.py

vmap(grad(loss)) on the kernels runs beside a loop over the samples, the same vmap on the reference in plain PyTorch,
and, as a lower bound, the gradient of the whole batch at once. Their results are compared first. The contestants take
turns, and a figure is the median of the rounds, in milliseconds.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence
from statistics import median
from unittest import mock

import torch
from measuring import error, markdown
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from birnn_ext import BiRNN, route


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = BiRNN(28, 128, 2, 10)
    parameters = dict(model.named_parameters())
    images, labels = torch.randn(arguments.batch, 28, 28), torch.randint(10, (arguments.batch,))

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, parameters, (image[None],)), label[None])

    def kernels() -> list[Tensor]:
        detached = {name: p.detach() for name, p in parameters.items()}
        return list(vmap(grad(loss), in_dims=(None, 0, 0))(detached, images, labels).values())

    def loop() -> list[Tensor]:
        each = [
            torch.autograd.grad(loss(parameters, image, label), list(parameters.values()))
            for image, label in zip(images, labels, strict=True)
        ]
        return [torch.stack(grads) for grads in zip(*each, strict=True)]

    def reference() -> list[Tensor]:
        with mock.patch.object(route, "only_plain_pytorch", lambda *asked: "is to be compared"):
            return kernels()

    def whole_batch() -> list[Tensor]:
        mean = cross_entropy(model(images), labels, reduction="sum")
        return list(torch.autograd.grad(mean, list(parameters.values())))

    warnings.simplefilter("ignore")  # the reference warns that it is slow
    contestants = {"kernels": kernels, "loop": loop, "reference": reference, "whole batch, summed": whole_batch}
    expected = whole_batch()
    for name, work in contestants.items():
        found = work() if work is whole_batch else [g.sum(0) for g in work()]
        worst = max(error(f, e) for f, e in zip(found, expected, strict=True))
        if worst > 1e-4:
            raise SystemExit(f"{name}: gradients are off by {worst:.1e} of the largest")
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(arguments.rounds):
        for name, work in contestants.items():
            start = time.perf_counter()
            work()
            times[name].append((time.perf_counter() - start) * 1e3)
    medians = {name: median(t) for name, t in times.items()}
    print(f"B={arguments.batch}, T=28, I=28, H=128, 2 layers, float32, {arguments.threads} threads")
    rows = [[name, f"{t:.4g}", f"{t / medians['kernels']:.2f}"] for name, t in medians.items()]
    print(markdown([["per-sample gradients", "ms", "in terms of the kernels"], *rows]))


if __name__ == "__main__":
    main()
