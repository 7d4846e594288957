"""The decode step of a model and its cache as CUDA graphs: one launch instead of a few hundred kernels'."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from model import GPT, KVCache

GRAPH_CONTEXT = 256  # a new graph is captured for each multiple of this context, so that a short one stays cheap


class CapturedDecode:
    """Callable in the place of `GPT.decode_at`, whose kernels it captures at the first call for a context."""

    def __init__(self, model: GPT, cache: KVCache):
        self.model, self.cache = model, cache
        device = model.wte.weight.device
        self.ids = torch.zeros(len(cache.tokens), device=device, dtype=torch.long)
        self.positions = torch.zeros_like(self.ids)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, ids: Tensor, lengths: list[int]) -> Tensor:
        """Logits (B, n_vocab) after ids (B,) at positions `lengths`; the next call overwrites them."""
        end = min(-(-(max(lengths) + 1) // GRAPH_CONTEXT) * GRAPH_CONTEXT, self.model.config.block_size)
        self.ids.copy_(ids)
        self.positions.copy_(torch.tensor(lengths))
        if end not in self.graphs:
            self.graphs[end] = self._capture(end)
        graph, logits = self.graphs[end]
        graph.replay()
        return logits

    def _capture(self, end: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        with torch.cuda.device(self.ids.device):  # whose streams are meant
            side_stream = torch.cuda.Stream()
            side_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side_stream):  # libraries make their workspaces at the first calls, not in the graph
                for _ in range(2):
                    self.model.decode_at(self.ids, self.positions, end, self.cache)
            torch.cuda.current_stream().wait_stream(side_stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self.model.decode_at(self.ids, self.positions, end, self.cache)
        return graph, logits
