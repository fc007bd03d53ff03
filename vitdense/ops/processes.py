"""How many processes compute together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch.distributed as dist

_alone: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Within, this process computes by itself what the others may not: it waits for nobody."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def world_size() -> int:
    """Processes that compute together here; 1 without torch.distributed, and within `alone`."""
    ready = dist.is_available() and dist.is_initialized() and not _alone.get()
    return dist.get_world_size() if ready else 1
