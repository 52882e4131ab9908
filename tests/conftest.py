from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from helpers import plain_torch

import birnn_ext

CUDA_MISSING = (
    None
    if torch.cuda.is_available() and birnn_ext.build_info()["cuda"]
    else "birnn_ext is built without CUDA"
    if torch.cuda.is_available()
    else "torch.cuda is not available: no GPU and no emulator"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if CUDA_MISSING:
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason=CUDA_MISSING))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    calls = {name: n for name, n in birnn_ext.op_calls().items() if name.startswith("cuda_") and n}
    if calls:
        terminalreporter.write_line(", ".join(f"{name}: {n} calls" for name, n in calls.items()))
    reasons = Counter(
        " ".join(report.longrepr[2].removeprefix("Skipped: ").split())
        for report in terminalreporter.getreports("skipped")
    )
    if reasons:  # -rs prints a line for each place, which would bury failures
        terminalreporter.section(f"{reasons.total()} skipped")
        for reason, count in reasons.most_common():
            terminalreporter.write_line(f"{count:4} {reason}")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Every test that takes this fixture runs on the CPU and on CUDA."""
    return request.param


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def oracle() -> Iterator[None]:
    """Tests compare results with PyTorch's own kernels, not with cuDNN's."""
    with plain_torch():
        yield


@pytest.fixture(autouse=True)
def compiled_kernels_only(request: pytest.FixtureRequest):
    """Fails a test whose operators fell back to the reference, unless it takes `reference_operators`."""
    before = birnn_ext.op_calls()
    yield
    after = birnn_ext.op_calls()
    if "reference_operators" not in request.fixturenames:
        assert all(after[name] == before[name] for name in after if name.startswith("reference"))


@pytest.fixture
def reference_operators() -> None:
    """Tests take this fixture if their operators fall back to the reference on purpose."""
