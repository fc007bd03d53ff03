"""What sums are divided by where a step learns from several batches: accumulated, or of processes.

The mean over the pixels or objects of each batch, averaged over batches, is not the mean over all
pixels or objects: one in an emptier batch weighs more. So a loss that is a mean divides its sum by
what the *mean* batch of the step holds; the mean of such losses is that of one large batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from vitdense.structures import Target

Count = Callable[[Target], float | Tensor]
"""What one image adds to a count; a scalar."""


@dataclass(slots=True)
class _Step:
    """The batches of a step, and what was counted in them, by what counts it."""

    batches: list[list[Target]]
    known: dict[Count, Tensor] = field(default_factory=dict)


_step: ContextVar[_Step | None] = ContextVar("step", default=None)
_alone: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def one_step(batches: list[list[Target]]) -> Iterator[None]:
    """Inside, the losses of these batches are computed one after the other, to be averaged.

    Args:
        batches: targets, best on the host, where counting waits for no device.
    """
    token = _step.set(_Step(batches) if len(batches) > 1 else None)
    try:
        yield
    finally:
        _step.reset(token)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, a process computes losses of its own, while others do not."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def divisor(here: float | Tensor, count: Count, like: Tensor) -> Tensor:
    """`mean_count`, and where no batch holds anything what it would be if there were one."""
    mean = mean_count(here, count, like)
    return mean.where(mean > 0, 1 / _batches())


def mean_count(here: float | Tensor, count: Count, like: Tensor) -> Tensor:
    """What the mean batch of the step holds, over all processes, which must call this in step.

    Args:
        here: what the batch at hand holds, the only one of this process unless in `one_step`.
        count: the same for one image. It is asked once in a step for what equals it, as bound
            methods of one object do.
        like: gives the device, and the type if that is float64.

    Returns:
        a scalar without a gradient.
    """
    step = _step.get()
    if step is None:
        return _over_processes([here], like)
    if count not in step.known:
        counts = [count(target) for batch in step.batches for target in batch]
        step.known[count] = _over_processes(counts, like)
    return step.known[count]


def _over_processes(counts: list[float | Tensor], like: Tensor) -> Tensor:
    dtype = torch.promote_types(like.dtype, torch.float32)
    numbers = sum(each for each in counts if not isinstance(each, Tensor))
    total = torch.full((), float(numbers), dtype=dtype, device=like.device)
    for each in counts:
        if isinstance(each, Tensor):
            total = total + each.detach().to(total, non_blocking=True)
    if _processes() > 1:
        dist.all_reduce(total)
    return total / _batches()


def _batches() -> int:
    """Of the step, in all processes."""
    step = _step.get()
    return _processes() * (1 if step is None else len(step.batches))


def _processes() -> int:
    ready = dist.is_available() and dist.is_initialized() and not _alone.get()
    return dist.get_world_size() if ready else 1


def objects(target: Target) -> int:
    """Labelled objects, or segments, of an image."""
    return 0 if target.labels is None else len(target.labels)
