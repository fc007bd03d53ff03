"""Batches: endless and resumable for training, once through for evaluation."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, get_worker_info

from vitdense.data.base import DataError, Dataset, Policy
from vitdense.data.collate import PackedBatch, collate
from vitdense.data.workers import CAUSES, WorkerError, Workers, count, heed_main_process, iterate
from vitdense.structures import Batch, Sample

log = logging.getLogger(__name__)

Faulty = Literal["stop", "skip"]
"""What becomes of an image that cannot be read: an error, or another one takes its place."""

ATTEMPTS = 100
"""Images that are tried in place of one; if none can be read, it is a fault of them all."""


class ImageError(DataError):
    """One image or its truth cannot be read; others may be."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """An image that was left out.

    Attributes:
        split: of the data set that it is in.
        name: its file.
        reason: what the data set says of it.
    """

    split: str
    name: str
    reason: str


Report = Callable[[Unreadable], None]
"""Is told of each image that is left out, in the main process, when its batch is due."""


def warn(image: Unreadable) -> None:
    """Say it in the log."""
    log.warning("%s is left out: %s", image.name, image.reason)


def training_loader(
    dataset: Dataset,
    policy: Policy,
    batch_size: int,
    divisor: int = 1,
    *,
    workers: Workers = "auto",
    faulty: Faulty = "stop",
    report: Report = warn,
    seed: int = 0,
    start_step: int = 0,
    closing: Callable[[int], bool] | None = None,
    repeats: NDArray[np.float64] | None = None,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Batches without end, from step `start_step` on.

    The images form one endless stream of shuffled passes, cut into batches: no image is dropped,
    a batch may span two passes, and a set smaller than a batch works. The order depends on (seed,
    pass), a sample's augmentation on (seed, pass, image), and what a batch shares on (seed, step),
    so any step is the same for any number of workers and after any interruption.

    Args:
        batch_size: images per step and process.
        divisor: canvas sizes are multiples of it.
        faulty: `skip` takes another image, drawn from the same random numbers, in place of one
            that cannot be read, so that batches stay full and the order stays exact.
        closing: whether a step is in the policy's last span; by default none is.
        repeats: [images], how often each image is seen in relation to the others; a pass still
            has as many images as the data set. By default all are seen once.
        pin_memory: batches lie in page-locked memory, for a GPU that copies them beside its work.

    Raises:
        DataError: a file is missing or wrong, from whatever process found it; with `skip`, so
            are the images that were tried in its place.
        WorkerError: a process that reads images died.
    """
    policy.check(dataset)
    order = partial(_order, len(dataset), repeats, seed)
    steps = _Steps(len(dataset), batch_size, order, start_step, closing, rank, world_size)
    read = _TrainingReader(dataset, policy, seed, divisor, faulty == "skip")
    join = partial(_join, divisor=divisor, canvas=None, training=True)
    return _batches(_loader(read, steps, join, count(workers), pin_memory), report)


def evaluation_loader(
    dataset: Dataset,
    policy: Policy,
    batch_size: int,
    divisor: int = 1,
    *,
    workers: Workers = "auto",
    faulty: Faulty = "stop",
    report: Report = warn,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> EvaluationLoader:
    """Every image once, shared out among processes; can be iterated again and again.

    Only images of equal canvases share a batch, so that no answer depends on its neighbours: up
    to `batch_size` images, fewer where sizes differ and the policy has no fixed canvas.

    Args:
        faulty: `skip` leaves out images that cannot be read.
        pin_memory: as for training.

    Raises:
        DataError: a file is missing or wrong, from whatever process found it; with `skip`, all
            images are.
        WorkerError: a process that reads images died.
    """
    mine = list(range(rank, len(dataset), world_size))
    steps = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    read = _EvaluationReader(dataset, policy, faulty == "skip")
    join = partial(_join, divisor=divisor, canvas=policy.canvas, training=False)
    processes = min(count(workers), len(steps))
    loader = _loader(read, steps, join, processes, pin_memory, keep=True)
    return EvaluationLoader(loader, len(mine), report, shared=world_size > 1)


@dataclass
class EvaluationLoader:
    """Batches over a data set, or a process's share of it.

    Attributes:
        images: how many there are to read, those that cannot be read among them.
        shared: other processes read the rest of the data set.
    """

    loader: DataLoader
    images: int
    report: Report = warn
    shared: bool = False

    def __iter__(self) -> Iterator[Batch]:
        missing: list[Unreadable] = []

        def note(image: Unreadable) -> None:
            missing.append(image)
            self.report(image)

        yield from _batches(self.loader, note)
        # the few images of a small share may all be broken while others are not
        telling = not self.shared or self.images >= ATTEMPTS
        if missing and len(missing) == self.images and telling:
            raise DataError(f"{missing[0].reason}; none of the {self.images} images can be read")


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
    generator = np.random.default_rng((seed, epoch))
    if repeats is None:
        order = generator.permutation(images)
        return np.stack([order, np.zeros_like(order)], 1)
    # systematic sampling: no image is seen more than one time too often or too rarely
    ends = np.cumsum(repeats) * (images / repeats.sum())
    chosen = np.searchsorted(ends, np.arange(images) + generator.random(), side="right")
    chosen = chosen.clip(max=images - 1)
    again = np.arange(images) - np.searchsorted(chosen, chosen)
    return generator.permutation(np.stack([chosen, again], 1))


_Found = tuple[list[Sample], list[Unreadable]]
"""Samples, and what was left out on the way to them."""


@dataclass
class _Images:
    """The images of a data set; if `skip`, others where they cannot be read."""

    dataset: Dataset
    skip: bool
    unreadable: list[Unreadable] = field(default_factory=list)

    def read(self, index: int) -> Sample:
        for _ in range(ATTEMPTS):
            sample = self.try_to_read(index)
            if sample is not None:
                return sample
            index = int(torch.randint(len(self.dataset), ()))
        raise DataError(
            f"{self.unreadable[-1].reason}; {ATTEMPTS} images in a row could not be read, so the "
            "fault is not one of single files: look at data.root"
        )

    def try_to_read(self, index: int) -> Sample | None:
        """The sample; if `skip`, None where it cannot be read."""
        try:
            return self.dataset[index]
        except DataError as error:
            if not self.skip:
                raise ImageError(str(error)) from None
            self.unreadable.append(Unreadable(self.dataset.split, self._name(index), str(error)))
            return None

    def draw(self) -> Sample:
        return self.read(int(torch.randint(len(self.dataset), ())))

    def _name(self, index: int) -> str:
        try:
            return str(self.dataset.image_path(index))
        except DataError as error:  # a data set that has to read an image for it
            return str(error).partition(": ")[0]


@dataclass
class _TrainingReader:
    """Reads and prepares the samples of a step, each under its own random state."""

    dataset: Dataset
    policy: Policy
    seed: int
    divisor: int
    skip: bool

    def __getitems__(self, step: _Step) -> _Found | DataError:
        with _seeded(np.random.SeedSequence(self.seed, spawn_key=(step.number,))):
            policy = self.policy.for_batch(self.divisor, step.closing)
        images = _Images(self.dataset, self.skip)
        return _or_fault(images, lambda: [self._read(policy, images, *it) for it in step.images])

    def _read(self, policy: Policy, images: _Images, index: int, key: tuple[int, ...]) -> Sample:
        with _seeded(np.random.SeedSequence((self.seed, *key))):
            return policy.compose(images.read(index), images.draw)


@dataclass
class _EvaluationReader:
    """Reads and prepares the samples of a batch."""

    dataset: Dataset
    policy: Policy
    skip: bool

    def __getitems__(self, indices: list[int]) -> _Found | DataError:
        images = _Images(self.dataset, self.skip)
        return _or_fault(images, lambda: [it for i in indices for it in self._read(images, i)])

    def _read(self, images: _Images, index: int) -> list[Sample]:
        with _seeded(np.random.SeedSequence((0, index))):
            sample = images.try_to_read(index)
            return [] if sample is None else [self.policy.evaluate(sample)]


@contextmanager
def _seeded(sequence: np.random.SeedSequence) -> Iterator[None]:
    """Seed torch, Python and numpy inside; afterwards their states are as before.

    Only torch is used here; a user's own parts may draw from the others.
    """
    number = int(sequence.generate_state(1, np.uint64)[0])
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            # Only the CPU's generator: torch.manual_seed would reset the accelerator's too.
            torch.default_generator.manual_seed(number)
            random.seed(number)
            np.random.seed(number & 0xFFFFFFFF)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _or_fault(images: _Images, read: Callable[[], list[Sample]]) -> _Found | DataError:
    """Return a DataError as a value: raised in a worker, it would come with a traceback."""
    try:
        return read(), images.unreadable
    except DataError as error:
        return error


def _join(
    found: _Found | DataError, **options: Any
) -> tuple[list[Any], list[Unreadable]] | DataError:
    """Batches with what was left out, or the first fault."""
    if isinstance(found, DataError):
        return found
    samples, unreadable = found
    batches = collate(samples, **options) if samples else []
    if get_worker_info() is None:
        return batches, unreadable
    try:
        return [PackedBatch.pack(batch) for batch in batches], unreadable
    except (OSError, RuntimeError) as error:
        return WorkerError(f"a batch could not be handed over ({error}): {CAUSES['SIGBUS']}")


def _batches(loader: DataLoader, report: Report) -> Iterator[Batch]:
    for found in iterate(loader):
        if isinstance(found, DataError):
            raise found
        batches, unreadable = found
        for image in unreadable:
            report(image)
        for batch in batches:
            yield batch if isinstance(batch, Batch) else batch.unpack()


def _loader(
    read: Any, steps: Any, join: Any, workers: int, pin_memory: bool, keep: bool = False
) -> DataLoader:
    return DataLoader(
        read,
        batch_sampler=steps,
        collate_fn=join,
        num_workers=workers,
        worker_init_fn=heed_main_process,
        persistent_workers=keep and workers > 0,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else making an iterator draws from the global state
    )
