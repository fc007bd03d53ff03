"""Images that cannot be read, and processes that die while they read."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vitdense.data import workers
from vitdense.data.base import DataError, Dataset, Policy
from vitdense.data.collate import PackedBatch
from vitdense.data.loader import (
    ATTEMPTS,
    ImageError,
    Unreadable,
    evaluation_loader,
    training_loader,
)
from vitdense.data.workers import WorkerError
from vitdense.structures import Batch, Sample, Target


class Holes(Dataset):
    """Small images, some of which cannot be read."""

    classes, category_ids = ["a"], [1]

    def __init__(self, count: int, holes: set[int]) -> None:
        super().__init__(Path("set"), "train")
        self.count, self.holes, self.read = count, holes, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        self.read += 1
        if index in self.holes:
            raise DataError(f"{self.image_path(index)}: cannot be decoded; replace the file")
        image = torch.full((3, 8, 8), index + 1, dtype=torch.uint8)
        return Sample(image, Target(), index, (8, 8), self.image_path(index))

    def image_path(self, index: int) -> Path:
        return self.root / f"{index}.jpg"


class Pairs(Policy):
    """Training mixes a second image in; both depend on random numbers."""

    def compose(self, sample: Sample, draw) -> Sample:
        other = draw()
        sample.image = sample.image + 10 * other.image + torch.randint(2, (1,), dtype=torch.uint8)
        return sample

    def evaluate(self, sample: Sample) -> Sample:
        return sample


class Lethal(Holes):
    """Reading one image ends the process."""

    def __getitem__(self, index: int) -> Sample:
        if index in self.holes:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def load(
    holes: set[int], workers: int = 0, start: int = 0, **options: int
) -> tuple[list[Batch], list[Unreadable]]:
    """Steps up to 8 of a set of 6 images, and what was left out."""
    found: list[Unreadable] = []
    loader = training_loader(
        Holes(6, holes),
        Pairs(),
        3,
        workers=workers,
        faulty="skip",
        report=found.append,
        start_step=start,
        **options,
    )
    return list(itertools.islice(loader, 8 - start)), found


def images(batches: list[Batch]) -> list[list[int]]:
    return [batch.images[:, 0, 0, 0].tolist() for batch in batches]


def test_another_image_takes_the_place_whatever_the_workers_and_the_start() -> None:
    batches, found = load({1, 4})
    assert {image.name for image in found} == {"set/1.jpg", "set/4.jpg"}
    assert found[0].split == "train" and "cannot be decoded" in found[0].reason
    assert all(len(batch.images) == 3 for batch in batches)
    assert not {1, 4} & {key for batch in batches for key in batch.image_ids}
    in_workers, found_there = load({1, 4}, workers=2)
    assert images(in_workers) == images(batches)
    assert found_there == found
    assert images(load({1, 4}, start=5)[0]) == images(batches)[5:]
    ranks = [load({1, 4}, rank=rank, world_size=2)[0] for rank in (0, 1)]
    assert images(ranks[0])[:2] + images(ranks[1])[:2] == [
        images(batches)[step] for step in (0, 2, 1, 3)
    ]


def test_the_other_images_stay_as_they_were() -> None:
    whole, _ = load(set())
    holed, _ = load({2})
    pairs = zip(whole, holed, strict=True)
    kept = [
        (a.images[place], b.images[place], a.image_ids[place])
        for a, b in pairs
        for place in range(3)
        if a.image_ids[place] == b.image_ids[place]
    ]
    assert {key for *_, key in kept} == {0, 1, 3, 4, 5}
    assert sum(torch.equal(a, b) for a, b, _ in kept) > len(kept) / 2  # others were mixed with 2


@pytest.mark.parametrize("count", [0, 2])
def test_a_set_that_cannot_be_read_at_all_is_an_error(count: int) -> None:
    dataset = Holes(6, set(range(6)))
    loader = training_loader(dataset, Pairs(), 3, workers=count, faulty="skip", report=print)
    with pytest.raises(
        DataError, match=rf"{ATTEMPTS} images in a row could not be read.*data.root"
    ):
        next(loader)
    assert dataset.read == (0 if count else ATTEMPTS)


def test_stopping_is_the_default_and_faults_of_the_policy_are_never_skipped() -> None:
    with pytest.raises(ImageError, match=r"^set/\d\.jpg: cannot be decoded; replace the file$"):
        next(training_loader(Holes(6, set(range(6))), Pairs(), 3, workers=0))

    class Refuses(Pairs):
        def compose(self, sample: Sample, draw) -> Sample:
            raise DataError("has no masks")

    with pytest.raises(DataError, match="has no masks") as caught:
        next(training_loader(Holes(6, set()), Refuses(), 3, workers=0, faulty="skip"))
    assert not isinstance(caught.value, ImageError)


@pytest.mark.parametrize("count", [0, 2])
def test_evaluation_leaves_out_and_tells(count: int) -> None:
    found: list[Unreadable] = []
    loader = evaluation_loader(
        Holes(6, {0, 1, 4}), Pairs(), 2, workers=count, faulty="skip", report=found.append
    )
    for _ in range(2):
        assert [batch.image_ids for batch in loader] == [[2, 3], [5]]
    assert [image.name for image in found] == ["set/0.jpg", "set/1.jpg", "set/4.jpg"] * 2
    none = evaluation_loader(
        Holes(3, {0, 1, 2}), Pairs(), 2, workers=count, faulty="skip", report=found.append
    )
    with pytest.raises(DataError, match="none of the 3 images can be read"):
        list(none)
    with pytest.raises(ImageError, match=r"set/1\.jpg"):
        list(evaluation_loader(Holes(3, {1}), Pairs(), 2, workers=count))
    share = evaluation_loader(
        Holes(3, {1}), Pairs(), 2, workers=count, faulty="skip", report=print, rank=1, world_size=2
    )
    assert list(share) == []  # other processes have readable ones


def test_without_a_listener_it_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    list(evaluation_loader(Holes(3, {1}), Pairs(), 2, workers=0, faulty="skip"))
    assert "set/1.jpg is left out: set/1.jpg: cannot be decoded" in caplog.text


@pytest.mark.parametrize("training", [True, False])
def test_a_killed_worker_is_one_message(training: bool) -> None:
    dataset = Lethal(8, {7})
    make = training_loader if training else evaluation_loader
    with pytest.raises(WorkerError) as caught:
        list(itertools.islice(make(dataset, Pairs(), 2, workers=2), 9))
    text = str(caught.value)
    assert "was killed by SIGKILL" in text and "data.workers" in text and "\n" not in text


def test_a_death_is_noticed_only_when_a_batch_is_asked_for() -> None:
    before = signal.getsignal(signal.SIGCHLD)
    loader = training_loader(Holes(6, set()), Pairs(), 2, workers=1)
    next(loader)
    assert signal.getsignal(signal.SIGCHLD) == before


def test_a_batch_that_finds_no_shared_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(batch: Batch) -> PackedBatch:
        raise RuntimeError("unable to resize file </torch_1>")

    monkeypatch.setattr(PackedBatch, "pack", full)
    loader = training_loader(Holes(6, set()), Pairs(), 2, workers=1)
    with pytest.raises(WorkerError, match=r"unable to resize.*shared memory.*--shm-size"):
        next(loader)


def test_packed_batches_lie_in_shared_memory() -> None:
    (batch,) = itertools.islice(training_loader(Holes(6, set()), Pairs(), 2, workers=0), 1)
    assert PackedBatch.pack(batch).data.is_shared()


def test_errors_of_the_loader_itself_are_not_taken_for_a_death() -> None:
    class Broken(Holes):
        def __getitem__(self, index: int) -> Sample:
            raise KeyError("a fault of the user's code")

    with pytest.raises(KeyError, match="a fault of the user's code"):
        next(training_loader(Broken(6, set()), Pairs(), 2, workers=1))


class _Ended:
    pid = 12

    def __init__(self, code: int) -> None:
        self.exitcode = code


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-signal.SIGBUS, "killed by SIGBUS: no shared memory"),
        (-signal.SIGSEGV, "killed by SIGSEGV: a library crashed"),
        (3, "ended by itself with the code 3: data.workers=0"),
        (-signal.SIGTERM, "killed by SIGTERM: data.workers=0"),
    ],
)
def test_what_is_said_of_an_end(code: int, words: str) -> None:
    assert words in workers.describe(_Ended(code))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _one_core() -> Iterator[None]:
    """Torch warns of more workers than cores, which is no concern here."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
