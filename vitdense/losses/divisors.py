"""Divisors of losses where a step has several batches: accumulated ones, or those of processes.

A loss is a mean over pixels or objects. The average of such means over batches is not the mean over
all of their pixels: those in an emptier batch weigh more. So each batch's sum is divided by what
the *mean* batch of the step holds; then the average of the losses is the loss of one large batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from vitdense.ops.processes import world_size
from vitdense.structures import Target

Count = Callable[[Target], float | Tensor]
"""What one image adds to a count; a scalar."""


@dataclass(slots=True)
class _Step:
    """The targets of a step's batches, and the counts in them by the function that counted."""

    batches: list[list[Target]]
    known: dict[Count, Tensor] = field(default_factory=dict)


_step: ContextVar[_Step | None] = ContextVar("step", default=None)


@contextmanager
def one_step(batches: list[list[Target]]) -> Iterator[None]:
    """Within, the losses of these batches are computed one after the other, to be averaged.

    Args:
        batches: targets of this process, best on the host, where counting waits for no device.
    """
    token = _step.set(_Step(batches) if len(batches) > 1 else None)
    try:
        yield
    finally:
        _step.reset(token)


def divisor(here: float | Tensor, count: Count, like: Tensor) -> Tensor:
    """`mean_count`, but never 0: where no batch holds anything, as if one of them held 1."""
    mean = mean_count(here, count, like)
    return mean.where(mean > 0, 1 / _batches())


def mean_count(here: float | Tensor, count: Count, like: Tensor) -> Tensor:
    """What a batch of the step holds on average, over all processes.

    All processes must call this equally often and in the same order.

    Args:
        here: what the batch at hand holds; used unless `one_step` says that there are others.
        count: what one image holds. The result is kept for the step and found again by equality,
            which bound methods of one object have.
        like: gives the device; the result has its dtype, but float32 at least.

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
    if world_size() > 1:
        dist.all_reduce(total)
    return total / _batches()


def _batches() -> int:
    """Of the step, in all processes."""
    step = _step.get()
    return world_size() * (1 if step is None else len(step.batches))


def objects(target: Target) -> int:
    """Labelled objects, or segments, of an image."""
    return 0 if target.labels is None else len(target.labels)
