"""A training step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from birnn_ext.mnist.data import reason

WARM_UP_STEPS = 3  # as many as in PyTorch's notes on CUDA graphs


class GraphedStep:
    """Runs a training step as a CUDA graph: one launch in place of one for each kernel. The numbers stay the same.

    The first steps run without a graph, on a stream of their own, as PyTorch asks for. They do what a capture must not
    do, such as to allocate the optimizer's state, and are steps like all others. The next step is captured, which runs
    nothing, and then replayed. Batches of another size, such as an epoch's last one, always run without a graph.

    Args:
        step: Trains on the digits with these numbers, an int64 tensor on the GPU, and returns a tensor. All else that
            it reads and writes must stay where it is in memory, and it must not wait for the GPU.
        size: The number of digits of the steps to capture.
        device: The GPU.
        log: Gets a line when the step has been captured, or could not be; then all later steps run without a graph.
    """

    def __init__(
        self, step: Callable[[Tensor], Tensor], size: int, device: torch.device, log: Callable[[str], None]
    ) -> None:
        self.step, self.size, self.device, self.log = step, size, device, log
        self.stream = torch.cuda.Stream(device)
        self.steps_before = WARM_UP_STEPS
        self.graph: torch.cuda.CUDAGraph | None = None
        self.refused = False

    def __call__(self, batch: Tensor) -> Tensor:
        if len(batch) != self.size or self.refused:
            return self.step(batch)
        if self.steps_before:
            self.steps_before -= 1
            current = torch.cuda.current_stream(self.device)
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                result = self.step(batch)
            current.wait_stream(self.stream)
            return result
        if self.graph is None:
            self._capture(batch)
            if self.graph is None:
                return self.step(batch)
        self.batch.copy_(batch)
        self.graph.replay()
        return self.result.clone()  # the next replay overwrites it

    def _capture(self, batch: Tensor) -> None:
        graph = torch.cuda.CUDAGraph()
        self.batch = batch.clone()
        try:
            # torch.cuda.graph does not leave its stream if it fails, so the outer context does
            with torch.cuda.stream(self.stream), torch.cuda.graph(graph, stream=self.stream):
                self.result = self.step(self.batch)
        except RuntimeError as error:  # if the step ended the capture, a second error tells only that it has ended
            self.refused = True
            why = reason(error.__context__ or error)
            self.log(f"A training step can't be captured as a CUDA graph, so it runs without one: {why}")
        else:
            self.graph = graph
            self.log("From here on, a training step is one CUDA graph (--no-graph launches each kernel by itself)")
