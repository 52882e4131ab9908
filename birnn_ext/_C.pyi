"""The compiled module: what was built, which kernels were chosen, how often they ran (csrc/module.cpp)."""

from typing import Any

def build_info() -> dict[str, Any]:
    """See `birnn_ext.build_info`, which adds the version."""

def op_calls() -> dict[str, int]:
    """See `birnn_ext.op_calls`, which adds the calls of the reference."""

def cell_math(name: str, dtype: str, x: int, y: int, n: int) -> None:
    """Computes sigmoid or tanh of n values at address x, to address y, by the CPU kernels' function for this dtype."""

def cuda_choice(
    dtype: str,
    H: int,
    B: int,
    D: int,
    multiprocessors: int,
    shared_memory: int,
    capability: int,
    algorithm: str = "",
    largest_cluster: int = 16,
    cell: str = "lstm",
) -> dict[str, Any] | None:
    """Says what would run a layer on a GPU.

    Args:
        dtype: "float64", "float32", "float16" or "bfloat16".
        H: hidden units.
        B: sequences.
        D: directions, 1 or 2.
        multiprocessors: of the GPU.
        shared_memory: bytes that a block may have.
        capability: 80 for 8.0.
        algorithm: the only one that may; "" for any.
        largest_cluster: blocks of a cluster that the device grants.
        cell: "lstm", "gru", or "rnn_tanh" or "rnn_relu", which stepwise alone runs.

    Returns:
        ``algorithm``; ``us``, the model's microseconds for a step forward and one back; of a persistent one ``forward``
        and ``backward``, each with ``row`` (of its table), ``ctas`` and ``sequences`` of a group, ``warps``, ``bytes``
        of shared memory, and the model's clock ``ticks`` of a step. None if nothing that may can run the layer.
    """
