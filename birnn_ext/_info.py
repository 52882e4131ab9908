"""What was built, and what has run."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch  # the extension links against torch's libraries, which this import loads

try:
    from birnn_ext import _C
except ImportError as error:
    if "BIRNN_CPU_ISA" in str(error):
        raise ImportError(str(error)) from None
    raise ImportError(
        "birnn_ext's compiled extension can't be loaded: install the package with "
        "`pip install --no-build-isolation .` for the torch of this environment "
        f"({torch.__version__}). The loader said: {error}"
    ) from error

__version__ = version("birnn_ext")

# Counts of the calls that the reference served in place of kernels: without_kernels.py.
reference_calls = {"reference_forward": 0, "reference_backward": 0}


def build_info() -> dict[str, Any]:
    """Describes the compiled extension.

    Returns:
        A dict with ``version``; ``torch`` and ``cuda``, the versions it was built with (``cuda`` is None for a CPU-only
        build); ``cuda_architectures``, e.g. ``"8.0+PTX 9.0"``; ``cuda_missing``, why a build is CPU-only, else None;
        ``compiler``; ``cpu_isas``, the instruction sets that CPU kernels were compiled for, and ``cpu_isa``, the one in
        use (environment variable ``BIRNN_CPU_ISA``). ``python -m birnn_ext`` prints it.
    """
    return {"version": __version__, **_C.build_info()}


def describe() -> str:
    """Returns `build_info` as lines for people to read."""
    info = build_info()
    cuda = f"CUDA {info['cuda']}, for {info['cuda_architectures']}" if info["cuda"] else f"none: {info['cuda_missing']}"
    return "\n".join(
        [
            f"birnn_ext {info['version']}",
            f"torch: {torch.__version__} (built with {info['torch']})",
            f"CPU kernels: {info['cpu_isa']}, of {', '.join(info['cpu_isas'])}",
            f"CUDA kernels: {cuda}",
            f"compiler: {info['compiler']}",
        ]
    )


def op_calls() -> dict[str, int]:
    """Counts the calls of each implementation of the operators in this process.

    Returns:
        The counts of ``"cpu_forward"``, ``"cpu_backward"``, ``"cuda_forward"`` and ``"cuda_backward"``; of
        ``"cuda_stepwise"``, ``"cuda_persistent-cta"``, ``"cuda_persistent-grid"`` and ``"cuda_persistent-cluster"``,
        the algorithms that ran the CUDA calls, forward and backward; and of ``"reference_forward"`` and
        ``"reference_backward"``, calls that no compiled kernel could serve.
    """
    return {**_C.op_calls(), **reference_calls}
