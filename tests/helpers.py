"""Helpers that the tests share: tolerances, pairs of equal modules, the tutorial's own class."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from cells import LSTM_CELL, Cell
from torch import Tensor, nn

# The largest difference that two ways of computing in a dtype may have, forward or backward, relative to the largest
# expected value. The 16-bit figures serve comparisons among our own kernels: beside nn.LSTM, the tests compare 16-bit
# errors against float64 with nn.LSTM's own error (WORSE_THAN_TORCH).
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
WORSE_THAN_TORCH = 1.5


@contextmanager
def plain_torch() -> Iterator[None]:
    """Makes PyTorch the tests' oracle on a GPU, too: nn.LSTM runs without cuDNN, and float32 products in float32.

    cuDNN's nn.LSTM rounds float32 to TF32 by default, refuses a backward pass in eval mode and states that are not
    contiguous, and fails where its output is changed in place. PyTorch's own kernels do none of that. Products in TF32
    are off by default, but an environment variable or an earlier test may have allowed them.
    """
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    torch.set_float32_matmul_precision("highest")
    if hasattr(torch.backends, "fp32_precision"):  # "highest" sets it for products, which hides the setting for all
        torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


@contextmanager
def projected_by_pytorch() -> Iterator[None]:
    """Runs layers as on devices without lstm_layer: by the recurrence's operator, after a product of the input."""
    with mock.patch("birnn_ext.route._has_layer_operator", return_value=False):
        yield


def error(actual: Tensor, expected: Tensor) -> float:
    """Returns the largest difference, relative to the largest expected value; NaN if actual has one."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def as_double(args: Iterable[object]) -> list:
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def assert_near(actual: Tensor, expected: Tensor, what: str = "", dtype: torch.dtype | None = None) -> None:
    tolerance = TOLERANCE[dtype or expected.dtype]
    found = error(actual, expected)
    assert found <= tolerance, f"{what}: relative error {found:.2e}, tolerance {tolerance:.0e}"


def all_near(actual: Iterable[Tensor], expected: Iterable[Tensor], what: str = "") -> None:
    for k, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_near(a, e, f"{what}[{k}]")


def twins(*args, device: str = "cpu", cell: Cell = LSTM_CELL, **kwargs):
    """Returns our LSTM and nn.LSTM, or another cell's two modules, with the same arguments and weights."""
    theirs = cell.theirs(*args, device=device, **cell.options, **kwargs)
    ours = cell.module(*args, device=device, **cell.options, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def gradients(module: nn.Module, outputs: Iterable[Tensor], inputs: Iterable[Tensor]) -> list[Tensor]:
    """Returns gradients of a random but repeatable function of all outputs, for inputs and parameters."""
    outputs = list(outputs)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    return list(torch.autograd.grad(outputs, [*inputs, *module.parameters()], weights))


def random_state(
    layers_and_directions: int, batch: int, hidden: int, cell: Cell = LSTM_CELL, **kwargs
) -> tuple[Tensor, ...]:
    return tuple(torch.randn(layers_and_directions, batch, hidden, **kwargs) for _ in range(cell.states))


def leaves(result: object) -> list[Tensor]:
    """Returns the tensors of a module's result: y, the final states, and what else there is."""
    return [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]


def skip_without_triton_on_cuda() -> None:
    """Skips a test that uses torch.compile's default backend on CUDA, which an emulator can't run.

    An emulator has to turn PyTorch's caching allocator off in order to find accesses out of bounds.
    """
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):
        pytest.skip("torch.compile's graphs live in pools of PyTorch's caching allocator, which is off")


class TutorialBiRNN(nn.Module):
    """The tutorial's classifier, which reads nn.LSTM's output at the last step."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int, num_classes: int) -> None:
        super().__init__()
        self.hidden_size, self.num_layers = hidden_size, num_layers
        self.lstm = nn.LSTM(input_size, hidden_size, num_layers, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(hidden_size * 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        h0 = torch.zeros(self.num_layers * 2, x.size(0), self.hidden_size, dtype=x.dtype, device=x.device)
        out, _ = self.lstm(x, (h0, torch.zeros_like(h0)))
        return self.fc(out[:, -1, :])
