"""The CPU kernels' exp, sigmoid and tanh agree with float64, over all magnitudes."""

from __future__ import annotations

import pytest
import torch

from birnn_ext import _C

MAX_ULP = 4.0


def apply(name: str, x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    _C.cell_math(name, x.data_ptr(), y.data_ptr(), x.numel())
    return y


def ulp_error(y: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Returns |y - exact| in units in the last place of float32 (below the smallest normal number, in its units)."""
    _, exponent = torch.frexp(exact)
    ulp = torch.ldexp(torch.ones_like(exact), exponent.clamp(min=-125) - 24)
    return (y.double() - exact).abs() / ulp


def floats(step: int) -> torch.Tensor:
    """Returns every step-th finite float, of both signs."""
    positive = torch.arange(0, 0x7F800000, step, dtype=torch.int32).view(torch.float32)
    return torch.cat([positive, -positive])


def check(name: str, step: int) -> None:
    x = floats(step)
    exact = getattr(torch, name)(x.double())
    y = apply(name, x)
    finite = exact <= torch.finfo(torch.float32).max  # exp overflows
    assert (y[~finite] == float("inf")).all()
    errors = ulp_error(y, exact)[finite]
    x = x[finite]
    worst = errors.argmax()
    assert errors[worst] <= MAX_ULP, f"{name}({x[worst].item()!r}): {errors[worst].item():.2f} ulp"


@pytest.mark.parametrize("name", ["exp", "sigmoid", "tanh"])
def test_within_4_ulp(name):
    check(name, 997)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exp", "sigmoid", "tanh"])
def test_within_4_ulp_densely(name):
    check(name, 31)


@pytest.mark.parametrize("count", [1, 7, 16, 33])
def test_limits(count):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([inf, -inf, nan, 0.0, -0.0]).repeat(count)
    torch.testing.assert_close(
        apply("sigmoid", x), torch.tensor([1, 0, nan, 0.5, 0.5]).repeat(count), equal_nan=True, rtol=0, atol=0
    )
    torch.testing.assert_close(
        apply("exp", x), torch.tensor([inf, 0, nan, 1, 1]).repeat(count), equal_nan=True, rtol=0, atol=0
    )
    tanh = apply("tanh", x)
    torch.testing.assert_close(tanh, torch.tensor([1, -1, nan, 0, 0]).repeat(count), equal_nan=True, rtol=0, atol=0)
    assert torch.signbit(tanh[4])
