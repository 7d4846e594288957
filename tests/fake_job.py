"""One process of a job whose others do not exist: torch's fake process group, whose exchanges change nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch.distributed as dist


@contextlib.contextmanager
def fake_job(rank: int = 0, size: int = 2, local_rank: int = 0, local_size: int = 1, **environment) -> Iterator[None]:
    """Process `rank` of `size`, with what torchrun puts into the environment."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    words = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size, **environment}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in words.items():
            patch.setenv(name, str(value))
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        try:
            yield
        finally:
            dist.destroy_process_group()
