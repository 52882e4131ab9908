"""The CPU kernels' sigmoid and tanh agree with float64, over all magnitudes."""

from __future__ import annotations

import pytest
import torch

from birnn_ext import _C

MAX_ULP = 4.0
MAX_ULP_16_BITS = 0.51  # rounding alone is within 0.5

FUNCTIONS = ["sigmoid", "tanh"]


def apply(name: str, x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    _C.cell_math(name, str(x.dtype).removeprefix("torch."), x.data_ptr(), y.data_ptr(), x.numel())
    return y


def test_other_names_raise():
    with pytest.raises(ValueError, match="name must be sigmoid or tanh, got exp"):
        apply("exp", torch.zeros(1))
    with pytest.raises(ValueError, match="dtype must be float64, float32, float16 or bfloat16, got int32"):
        apply("tanh", torch.zeros(1, dtype=torch.int32))


def ulp_error(y: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Returns |y - exact| in units in the last place of y's type (below its smallest normal number, in its units)."""
    info = torch.finfo(y.dtype)
    _, exponent = torch.frexp(exact.abs().clamp(min=info.tiny))
    ulp = torch.ldexp(torch.full_like(exact, info.eps / 2), exponent)
    return (y.double() - exact).abs() / ulp


def floats(step: int) -> torch.Tensor:
    """Returns every step-th finite float, of both signs."""
    positive = torch.arange(0, 0x7F800000, step, dtype=torch.int32).view(torch.float32)
    return torch.cat([positive, -positive])


def check(name: str, x: torch.Tensor, most: float) -> None:
    exact = getattr(torch, name)(x.double())
    errors = ulp_error(apply(name, x), exact)
    worst = errors.argmax()
    assert errors[worst] <= most, f"{name}({x[worst].item()!r}): {errors[worst].item():.3f} ulp"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_within_4_ulp(name):
    check(name, floats(997), MAX_ULP)


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_within_4_ulp_densely(name):
    check(name, floats(31), MAX_ULP)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_values_of_16_bits(name, dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    x = x[x.isfinite()]
    if name == "sigmoid":  # bfloat16's subnormal results may be 0, as the kernels flush them everywhere
        subnormal = torch.sigmoid(x.double()) < torch.finfo(torch.float32).tiny
        assert (apply(name, x[subnormal]) <= torch.finfo(torch.float32).tiny).all()
        x = x[~subnormal]
    check(name, x, MAX_ULP_16_BITS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 7, 16, 33])
def test_limits(count, dtype):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([inf, -inf, nan, 0.0, -0.0], dtype=dtype).repeat(count)

    def check(name, expected):
        expected = torch.tensor(expected, dtype=dtype).repeat(count)
        torch.testing.assert_close(apply(name, x), expected, equal_nan=True, rtol=0, atol=0)

    check("sigmoid", [1, 0, nan, 0.5, 0.5])
    check("tanh", [1, -1, nan, 0, 0])
    assert torch.signbit(apply("tanh", x)[4])
