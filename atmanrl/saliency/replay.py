"""A step of fixed shapes, captured once in a CUDA graph and replayed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Eager calls before the capture: libraries choose their algorithms, lazily made buffers (AdamW's) come to exist.
WARM_UP = 3


class Replayed:
    """``step`` with the launches of all but its first calls replayed from a CUDA graph.

    The first calls run eagerly and count as calls. Every call returns the same tensor, overwritten by the next.

    Args:
        step: works in place on tensors that live as long as this object, without synchronising with the host.
    """

    def __init__(self, step: Callable[[], Tensor]) -> None:
        self._step = step
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: Tensor | None = None
        # Capture forbids the default stream, and what is captured must not depend on work there.
        self._stream = torch.cuda.Stream()

    def __call__(self) -> Tensor:
        self._calls += 1
        if self._calls <= WARM_UP:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                output = self._step()
            torch.cuda.current_stream().wait_stream(self._stream)
            return output
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._stream):
                self._output = self._step()
        self._graph.replay()
        assert self._output is not None
        return self._output
