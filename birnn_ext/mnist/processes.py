"""The processes of one training. torchrun starts them, and each does its share of every batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from birnn_ext.mnist.data import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """A process among those that train together. Without torchrun, it is the only one.

    All processes must make the same calls in the same order, as they wait for each other in each call.
    """

    rank: int = 0
    count: int = 1

    def share(self, whole: Tensor) -> Tensor:
        """Returns this process's part of a batch, which may be empty. The sizes of parts differ by 1 at most."""
        return whole.tensor_split(self.count)[self.rank]

    def sum(self, value: Tensor) -> Tensor:
        """Returns the sum over all processes, in each of them."""
        if self.count > 1:
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Returns whether any process has it set. This runs on the CPU, so that no process waits for a GPU."""
        return bool(self.sum(torch.tensor(int(flag))).item())

    def same(self, make: Callable[[], T]) -> T:
        """Calls make in the first process only. Each process returns its result, or raises its UserError."""
        if self.count == 1:
            return make()
        made: list[Any] = [None]
        if self.rank == 0:
            try:
                made = [make()]
            except (UserError, OSError) as error:
                made = [error]
        dist.broadcast_object_list(made)
        if isinstance(made[0], Exception):
            raise made[0]
        value: T = made[0]
        return value

    def sum_gradients(self, model: nn.Module) -> None:
        """Sums gradients over all processes, in one message.

        DistributedDataParallel would send them during the backward pass, but it keeps the group alive: see `joined`.
        """
        if self.count > 1:
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            whole = self.sum(torch.cat([gradient.flatten() for gradient in gradients]))
            for gradient, part in zip(gradients, whole.split([one.numel() for one in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))


def launched() -> bool:
    """Returns whether torchrun has started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def local_rank() -> int:
    """Returns this process's number among those on its machine."""
    return int(os.environ["LOCAL_RANK"]) if launched() else 0


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """Joins the processes that torchrun has started, through gloo, and through nccl for CUDA tensors.

    The group's threads end with it, once nothing keeps it alive. A thread that is left may drop a tensor while Python
    ends, which aborts the process.
    """
    if not launched():
        yield Processes()
        return
    # This module's functions take the group as a default argument if there is one when they are defined. An optimizer's
    # first step would import the module after the group exists, and so keep the group alive for ever.
    import_module("torch.distributed.nn.functional")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
