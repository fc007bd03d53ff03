"""Batches: endless and resumable for training, once through for evaluation."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, get_worker_info

from vitdense.data.base import DataError, Dataset, Policy
from vitdense.data.collate import PackedBatch, collate
from vitdense.structures import Batch, Sample

Workers = int | Literal["auto"]


def training_loader(
    dataset: Dataset,
    policy: Policy,
    batch_size: int,
    divisor: int = 1,
    *,
    workers: Workers = "auto",
    seed: int = 0,
    start_step: int = 0,
    closing: Callable[[int], bool] | None = None,
    repeats: NDArray[np.float64] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Batches without end, from step `start_step` on.

    The images form one endless stream of shuffled passes, cut into batches: no image is dropped,
    a batch may span two passes, and a set smaller than a batch works. The order depends on (seed,
    pass), a sample's augmentation on (seed, pass, image), and what a batch shares on (seed, step),
    so any step is the same for any number of workers and after any interruption.

    Args:
        batch_size: images per step and process.
        divisor: canvas sizes are multiples of it.
        closing: whether a step is in the policy's last span; by default none is.
        repeats: [images], how often each image is seen in relation to the others; a pass still
            has as many images as the data set. By default all are seen once.

    Raises:
        DataError: a file is missing or wrong, from whatever process found it.
    """
    policy.check(dataset)
    order = partial(_order, len(dataset), repeats, seed)
    steps = _Steps(len(dataset), batch_size, order, start_step, closing, rank, world_size)
    read = _TrainingReader(dataset, policy, seed, divisor)
    join = partial(_join, divisor=divisor, canvas=None, training=True)
    return _batches(_loader(read, steps, join, _count(workers)))


def evaluation_loader(
    dataset: Dataset,
    policy: Policy,
    batch_size: int,
    divisor: int = 1,
    *,
    workers: Workers = "auto",
    rank: int = 0,
    world_size: int = 1,
) -> EvaluationLoader:
    """Every image once, shared out among processes; can be iterated again and again.

    Only images of equal canvases share a batch, so that no answer depends on its neighbours: up
    to `batch_size` images, fewer where sizes differ and the policy has no fixed canvas.

    Raises:
        DataError: a file is missing or wrong, from whatever process found it.
    """
    mine = list(range(rank, len(dataset), world_size))
    steps = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    read = _EvaluationReader(dataset, policy)
    join = partial(_join, divisor=divisor, canvas=policy.canvas, training=False)
    count = min(_count(workers), len(steps))
    return EvaluationLoader(_loader(read, steps, join, count, keep=True), len(mine))


@dataclass
class EvaluationLoader:
    """Batches over a data set, or a process's share of it.

    Attributes:
        images: how many there are in all batches together.
    """

    loader: DataLoader
    images: int

    def __iter__(self) -> Iterator[Batch]:
        return _batches(self.loader)


@dataclass(frozen=True, slots=True)
class _Step:
    """What the worker that makes a batch must know: its number, and its images.

    An image is its index and what its random numbers are drawn from: the pass, the index, and
    which time it is seen in that pass, if not the first.
    """

    number: int
    closing: bool
    images: list[tuple[int, tuple[int, ...]]]


class _Steps:
    """The steps of this process, without end."""

    def __init__(
        self,
        images: int,
        batch_size: int,
        order: Callable[[int], NDArray[np.int64]],
        start: int,
        closing: Callable[[int], bool] | None,
        rank: int,
        world_size: int,
    ) -> None:
        self.images, self.batch_size, self.order = images, batch_size, order
        self.start, self.rank, self.world_size = start, rank, world_size
        self.closing = closing

    def __iter__(self) -> Iterator[_Step]:
        epoch, order = -1, np.empty((0, 2), dtype=np.int64)
        step = self.start
        while True:
            first = (step * self.world_size + self.rank) * self.batch_size
            places = [divmod(place, self.images) for place in range(first, first + self.batch_size)]
            images: list[tuple[int, tuple[int, ...]]] = []
            for wanted, place in places:
                if wanted != epoch:
                    epoch, order = wanted, self.order(wanted)
                index, again = order[place].tolist()
                key = (epoch, index, again) if again else (epoch, index)
                images.append((index, key))
            yield _Step(step, self.closing is not None and self.closing(step), images)
            step += 1


def _order(
    images: int, repeats: NDArray[np.float64] | None, seed: int, epoch: int
) -> NDArray[np.int64]:
    """The images of a pass in their order: all of them, or each as often as is its share.

    Returns:
        [images, 2]: the index, and how often it has come before in this pass.
    """
    random = np.random.default_rng((seed, epoch))
    if repeats is None:
        order = random.permutation(images)
        return np.stack([order, np.zeros_like(order)], 1)
    # systematic sampling: no image is seen more than one time too often or too rarely
    ends = np.cumsum(repeats) * (images / repeats.sum())
    chosen = np.searchsorted(ends, np.arange(images) + random.random(), side="right")
    chosen = chosen.clip(max=images - 1)
    again = np.arange(images) - np.searchsorted(chosen, chosen)
    return random.permutation(np.stack([chosen, again], 1))


@dataclass
class _TrainingReader:
    """Reads and prepares the samples of a step, each under its own random state."""

    dataset: Dataset
    policy: Policy
    seed: int
    divisor: int

    def __getitems__(self, step: _Step) -> list[Sample | DataError]:
        with _seeded(np.random.SeedSequence(self.seed, spawn_key=(step.number,))):
            policy = self.policy.for_batch(self.divisor, step.closing)
        return [self._read(policy, index, key) for index, key in step.images]

    def _read(self, policy: Policy, index: int, key: tuple[int, ...]) -> Sample | DataError:
        with _seeded(np.random.SeedSequence((self.seed, *key))):
            return _or_fault(lambda: policy.compose(self.dataset[index], self._draw))

    def _draw(self) -> Sample:
        return self.dataset[int(torch.randint(len(self.dataset), ()))]


@dataclass
class _EvaluationReader:
    """Reads and prepares the samples of a batch."""

    dataset: Dataset
    policy: Policy

    def __getitems__(self, indices: list[int]) -> list[Sample | DataError]:
        return [self._read(index) for index in indices]

    def _read(self, index: int) -> Sample | DataError:
        with _seeded(np.random.SeedSequence((0, index))):
            return _or_fault(lambda: self.policy.evaluate(self.dataset[index]))


@contextmanager
def _seeded(sequence: np.random.SeedSequence) -> Iterator[None]:
    """Random numbers from here, and afterwards as if there had been none."""
    with torch.random.fork_rng(devices=[]):
        # Only the CPU's generator: torch.manual_seed would reset the accelerator's too.
        torch.default_generator.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
        yield


def _or_fault(read: Callable[[], Sample]) -> Sample | DataError:
    """Faults as values: an exception raised in a worker would come with its trace."""
    try:
        return read()
    except DataError as error:
        return error


def _join(samples: list[Sample | DataError], **options: Any) -> list[Any] | DataError:
    """Batches, or the first fault."""
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
    batches = collate(samples, **options)  # type: ignore[arg-type]
    return batches if get_worker_info() is None else [PackedBatch.pack(it) for it in batches]


def _batches(loader: DataLoader) -> Iterator[Batch]:
    for batches in loader:
        if isinstance(batches, DataError):
            raise batches
        for batch in batches:
            yield batch if isinstance(batch, Batch) else batch.unpack()


def _loader(read: Any, steps: Any, join: Any, workers: int, keep: bool = False) -> DataLoader:
    return DataLoader(
        read,
        batch_sampler=steps,
        collate_fn=join,
        num_workers=workers,
        worker_init_fn=_ignore_interrupts,
        persistent_workers=keep and workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else making an iterator draws from the global state
    )


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process; the main one still wants batches to finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _count(workers: Workers) -> int:
    """Worker processes: with a GPU its share of the cores up to 8, else fewer than the model."""
    if workers != "auto":
        return workers
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        cores = len(os.sched_getaffinity(0))
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(8, share) if torch.cuda.is_available() else min(2, share // 2)
