"""The compiled module: what was built, which kernels were chosen, how often they ran (csrc/module.cpp)."""

from typing import Any

def build_info() -> dict[str, Any]:
    """See `birnn_ext.build_info`, which adds the version."""

def op_calls() -> dict[str, int]:
    """See `birnn_ext.op_calls`, which adds the calls of the reference."""

def cell_math(name: str, x: int, y: int, n: int) -> None:
    """exp, sigmoid or tanh of n float32 at address x, to address y, by the function that the CPU kernels use."""

def cuda_choice(
    dtype: str,
    H: int,
    B: int,
    D: int,
    multiprocessors: int,
    shared_memory: int,
    capability: int,
    algorithm: str,
) -> tuple[str, int, int, int, float] | None:
    """What would run a layer on a GPU.

    Returns:
        The algorithm, CTAs of a group, bytes of shared memory forward and backward, and the model's microseconds for a
        step forward and one back; of one algorithm if it is named. None if that can't run the layer.
    """
