"""The decode step and the draw of the next id as CUDA graphs: one launch each instead of a few hundred.

Replaces: generation.decoding.decode_step and generation.sampling.draw on CUDA. The random numbers are drawn before the
replay, so a seed gives the ids that plain drawing gives.
Gains: not measured yet (no GPU was available); the launches of GPT-2 124M take several times as long as its kernels.
Skipped: with --plain and on other devices; the draw also with top_p alone, which reads a number from the device.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from generation.decoding import decode_at
from generation.sampling import Sampling, draw
from model import GPT, KVCache

GRAPH_CONTEXT = 256  # a graph is captured for each multiple of this context, so that short contexts stay cheap
MAX_DRAWS = 8  # graphs of draws that are kept, one for each setting and number of rows


class Graph(Protocol):
    """Captured kernels that can be launched again."""

    def replay(self) -> None: ...


# (step, device) -> (the kernels of `step`, the tensor in which each replay leaves its result)
Capture = Callable[[Callable[[], Tensor], torch.device], tuple[Graph, Tensor]]


def capture_graph(step: Callable[[], Tensor], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Capture what `step` launches on a CUDA device."""
    with torch.cuda.device(device):  # the device whose streams are meant
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):  # libraries allocate workspaces in the first calls, not in the graph
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = step()
    return graph, result


class CapturedDecode:
    """A `DecodeStep` that captures its kernels at the first call for a cache and a context, and replays them later.

    A context is rounded up to a multiple of `context_step`. Tests without a CUDA device replace `capture`.
    """

    def __init__(self, context_step: int = GRAPH_CONTEXT, capture: Capture = capture_graph) -> None:
        self.context_step, self.capture = context_step, capture
        self._graphs: weakref.WeakKeyDictionary[KVCache, _CacheGraphs] = weakref.WeakKeyDictionary()
        self._draws: dict[tuple, _DrawGraph] = {}

    def __call__(self, model: GPT, ids: Tensor, lengths: list[int], cache: KVCache) -> Tensor:
        """Logits (B, n_vocab) of what follows ids (B,) at positions `lengths`; the next call overwrites them."""
        if cache not in self._graphs:
            self._graphs[cache] = _CacheGraphs(ids, self.context_step, self.capture)
        return self._graphs[cache].replay(model, ids, lengths, cache)

    def draw(self, logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
        """The ids (B,) that `generation.sampling.draw` chooses; the next call overwrites them."""
        if sampling.reads_device:
            return draw(logits, sampling, uniform)
        key = (sampling, logits.shape, logits.device)
        if key not in self._draws:
            if len(self._draws) == MAX_DRAWS:
                self._draws.clear()
            self._draws[key] = _DrawGraph(logits, sampling, uniform, self.capture)
        return self._draws[key].replay(logits, uniform)


class _DrawGraph:
    """The graph of `draw` for one setting and one shape of logits, with the tensors that its kernels read."""

    def __init__(self, logits: Tensor, sampling: Sampling, uniform: Tensor, capture: Capture):
        self.logits, self.uniform = logits.clone(), uniform.clone()
        self.graph, self.ids = capture(functools.partial(draw, self.logits, sampling, self.uniform), logits.device)

    def replay(self, logits: Tensor, uniform: Tensor) -> Tensor:
        self.logits.copy_(logits)
        self.uniform.copy_(uniform)
        self.graph.replay()
        return self.ids


class _CacheGraphs:
    """The graphs of one cache, whose memory their kernels read and write."""

    def __init__(self, ids: Tensor, context_step: int, capture: Capture):
        self.context_step, self.capture = context_step, capture
        self.ids = torch.zeros_like(ids)
        self.positions = torch.zeros_like(ids)
        self.lengths: list[int] = []  # what `positions` holds
        self.graphs: dict[int, tuple[Graph, Tensor]] = {}

    def replay(self, model: GPT, ids: Tensor, lengths: list[int], cache: KVCache) -> Tensor:
        end = min(-(-(max(lengths) + 1) // self.context_step) * self.context_step, model.config.block_size)
        self.ids.copy_(ids)
        if lengths == [length + 1 for length in self.lengths]:
            self.positions.add_(1)  # on the device; a copy from the CPU would make the program wait
        else:
            self.positions.copy_(torch.tensor(lengths))
        self.lengths = list(lengths)
        if end not in self.graphs:
            step = functools.partial(decode_at, model, self.ids, self.positions, end, cache)
            self.graphs[end] = self.capture(step, self.ids.device)
        graph, logits = self.graphs[end]
        graph.replay()
        return logits
