"""Batches: the same for any number of workers, from any step on, with readable faults."""

from __future__ import annotations

import itertools
import multiprocessing
import random
import signal
import subprocess
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vitdense.data import workers
from vitdense.data.base import DataError, Dataset, Policy
from vitdense.data.coco import CocoDataset
from vitdense.data.collate import PackedBatch, collate
from vitdense.data.frequency import images_with_class, repeat_factors
from vitdense.data.loader import evaluation_loader, training_loader
from vitdense.data.shapes import ShapesDataset
from vitdense.data.transforms import DetectionPolicy, NoPolicy, SegmentationPolicy
from vitdense.data.workers import count
from vitdense.structures import IGNORE, Batch, Sample, Target


class Numbers(Dataset):
    """Images of given sizes, filled with their index."""

    classes = ["a"]
    category_ids = [1]

    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        super().__init__(Path("."), "train")
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Sample:
        size = self.sizes[index]
        image = torch.full((3, *size), index + 1, dtype=torch.uint8)
        target = Target(
            labels=torch.zeros(1, dtype=torch.long),
            boxes=torch.tensor([[0.0, 0, size[1], size[0]]]),
            masks=torch.ones(1, *size, dtype=torch.bool),
            semantic=torch.zeros(size, dtype=torch.uint8),
        )
        return Sample(image, target, index, size, Path(f"{index}.png"))


class Draws(Policy):
    """Adds a random number, to see whose random state it comes from."""

    def train(self, sample: Sample) -> Sample:
        sample.target.area = torch.rand(1)
        return sample

    evaluate = train


def take(loader, count: int) -> list[Batch]:
    return list(itertools.islice(loader, count))


def equal(a: Batch, b: Batch) -> bool:
    def flat(batch: Batch) -> list[Tensor]:
        found: list[Tensor] = []
        batch._map(found.append)
        return found

    rest = [f.name for f in fields(Batch) if f.name not in ("images", "targets")]
    return all(getattr(a, name) == getattr(b, name) for name in rest) and all(
        torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(flat(a), flat(b), strict=True)
    )


class DrawsElsewhere(Policy):
    """Adds numbers of the generators that parts of a user's own may use."""

    def train(self, sample: Sample) -> Sample:
        sample.target.area = torch.tensor([random.random(), np.random.random()])
        return sample

    evaluate = train


def test_every_generator_is_seeded_and_left_as_it_was() -> None:
    dataset = Numbers([(8, 8)] * 6)
    before = random.getstate(), np.random.get_state()[1].tolist()
    whole = take(training_loader(dataset, DrawsElsewhere(), 2, workers=0), 4)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    resumed = take(training_loader(dataset, DrawsElsewhere(), 2, workers=1, start_step=2), 2)
    assert all(map(equal, whole[2:], resumed))
    drawn = torch.cat([target.area for batch in whole for target in batch.targets])
    assert len(drawn.unique()) == 16


@pytest.mark.parametrize("task", ["instance", "semantic"])
def test_workers_and_resuming_change_nothing(shapes_root, task):
    dataset = ShapesDataset(shapes_root, "train", task=task, images=24, size=96)
    policy = (
        SegmentationPolicy(size=64, crop=64) if task == "semantic" else DetectionPolicy(size=64)
    )
    whole = take(training_loader(dataset, policy, 5, 32, workers=0, seed=3), 8)
    parallel = take(training_loader(dataset, policy, 5, 32, workers=2, seed=3), 8)
    resumed = take(training_loader(dataset, policy, 5, 32, workers=1, seed=3, start_step=5), 3)
    assert all(map(equal, whole, parallel))
    assert all(map(equal, whole[5:], resumed))
    other = take(training_loader(dataset, policy, 5, 32, workers=0, seed=4), 1)
    assert not equal(whole[0], other[0])


RECIPE = {
    "mosaic": 0.5,
    "mixup": 0.5,
    "copy_paste": 0.5,
    "multi_scale": (0.5, 1.5),
    "jitter": (0.5, 1.5),
    "close": 0.3,
}


def test_a_whole_recipe_is_the_same_for_any_workers_and_after_any_stop(shapes_root):
    dataset = ShapesDataset(shapes_root, "train", task="instance", images=24, size=96)
    policy = DetectionPolicy(size=64, **RECIPE)

    def load(workers: int, start: int = 0, count: int = 8) -> list[Batch]:
        loader = training_loader(
            dataset, policy, 5, 16, workers=workers, seed=3, start_step=start, closing=ends
        )
        return take(loader, count)

    def ends(step: int) -> bool:
        return step >= 6

    whole = load(0)
    assert all(map(equal, whole, load(2)))
    assert all(map(equal, whole[3:], load(1, start=3, count=5)))  # within a pass of 24 images
    sides = [batch.images.shape[-1] for batch in whole]
    assert len(set(sides[:6])) > 2 and all(side % 16 == 0 for side in sides)
    assert sides[6:] == [64, 64]
    for batch in whole[6:]:
        for image, index in zip(batch.images, batch.image_ids, strict=True):
            same = policy.evaluate(next(s for s in dataset if s.image_id == index)).image
            assert torch.equal(image, same) or torch.equal(image, same.flip(2))


def test_processes_share_the_canvas():
    dataset, policy = Numbers([(8, 8)] * 9), DetectionPolicy(size=64, multi_scale=(0.5, 1.5))
    ranks = [
        take(training_loader(dataset, policy, 2, 8, workers=0, rank=r, world_size=2), 6)
        for r in (0, 1)
    ]
    shapes = [[batch.images.shape for batch in batches] for batches in ranks]
    assert shapes[0] == shapes[1] and len(set(shapes[0])) > 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_in_an_image_that_is_mixed_in_names_it(coco, workers):
    root = coco.write()
    (root / "images/train/b.png").write_bytes(b"no image")
    policy = DetectionPolicy(size=32, mosaic=1.0)
    with pytest.raises(DataError, match=r"b\.png: not an image"):
        take(training_loader(CocoDataset(root, "train"), policy, 1, workers=workers), 4)


def test_the_global_random_state_is_not_touched():
    dataset = Numbers([(8, 8)] * 3)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    loader = training_loader(dataset, Draws(), 2, workers=0)
    first, batch = torch.rand(1), next(loader)
    assert torch.equal(torch.cat([first, torch.rand(2)]), expected)
    again = next(training_loader(dataset, Draws(), 2, workers=0))
    assert equal(batch, again)


def test_augmentation_differs_between_passes_and_images():
    batches = take(training_loader(Numbers([(8, 8)] * 4), Draws(), 4, workers=0), 3)
    draws = [target.area.item() for batch in batches for target in batch.targets]
    assert len(set(draws)) == 12


@pytest.mark.parametrize(("images", "batch"), [(10, 3), (4, 4), (2, 8), (1, 3)])
def test_every_image_comes_once_in_each_pass(images, batch):
    loader = training_loader(Numbers([(8, 8)] * images), NoPolicy(), batch, workers=0)
    batches = take(loader, 12)
    assert all(len(it.image_ids) == batch for it in batches)
    stream = [key for it in batches for key in it.image_ids]
    passes = [stream[start : start + images] for start in range(0, len(stream), images)]
    for order in passes[:-1]:
        assert sorted(order) == list(range(images))
    if images > 4:
        assert passes[0] != passes[1]


def test_processes_share_the_stream():
    dataset = Numbers([(8, 8)] * 12)
    single = take(training_loader(dataset, Draws(), 6, workers=0), 4)
    ranks = [
        take(training_loader(dataset, Draws(), 3, workers=0, rank=r, world_size=2), 4)
        for r in (0, 1)
    ]
    for together, first, second in zip(single, *ranks, strict=True):
        assert together.image_ids == first.image_ids + second.image_ids


def test_training_pads_images_and_truth_to_a_multiple():
    (batch,) = take(training_loader(Numbers([(20, 33), (40, 10)]), NoPolicy(), 2, 16, workers=0), 1)
    assert batch.images.shape == (2, 3, 48, 48)
    for image, target, frame in zip(batch.images, batch.targets, batch.frames, strict=True):
        height, width = frame.content
        assert frame.canvas == (48, 48) and frame.original == frame.content
        assert image[:, :height, :width].all() and image.sum() == image[:, :height, :width].sum()
        assert target.masks.shape == (1, 48, 48) and target.masks.sum() == height * width
        assert target.semantic.shape == (48, 48)
        assert (target.semantic != IGNORE).sum() == height * width


def test_evaluation_batches_only_equal_canvases_and_leaves_the_truth():
    sizes = [(30, 20), (20, 30), (31, 17), (20, 30), (30, 20)]
    loader = evaluation_loader(Numbers(sizes), NoPolicy(), 4, 8, workers=0)
    for _ in range(2):
        batches = list(loader)
        keys = [batch.image_ids for batch in batches]
        assert keys == [[0, 2], [1, 3], [4]]
    assert loader.images == 5
    assert batches[0].images.shape == (2, 3, 32, 24)
    assert batches[0].targets[1].masks.shape == (1, 31, 17)
    assert batches[0].frames[1].original == (31, 17)


def test_a_fixed_canvas_gives_full_batches():
    policy = DetectionPolicy(size=(40, 40), resize="keep_ratio")
    loader = evaluation_loader(Numbers([(30, 20), (20, 30), (9, 9)]), policy, 2, 16, workers=0)
    batches = list(loader)
    assert [batch.image_ids for batch in batches] == [[0, 1], [2]]
    assert all(batch.images.shape[2:] == (48, 48) for batch in batches)
    assert [batch.frames[0].content for batch in batches] == [(40, 27), (40, 40)]


def test_evaluation_is_shared_out_without_repeats():
    dataset = Numbers([(8, 8)] * 7)
    parts = [
        [key for batch in evaluation_loader(dataset, NoPolicy(), 2, workers=0, rank=r, world_size=3)
         for key in batch.image_ids]
        for r in range(3)
    ]  # fmt: skip
    assert sorted(sum(parts, [])) == list(range(7))


def test_evaluation_with_workers_is_the_same_each_time(shapes_root):
    dataset = ShapesDataset(shapes_root, "val", task="instance", images=24, size=96)
    policy = DetectionPolicy(size=64)
    alone = list(evaluation_loader(dataset, policy, 2, 32, workers=0))
    loader = evaluation_loader(dataset, policy, 2, 32, workers=2)
    for _ in range(2):
        assert all(equal(a, b) for a, b in zip(alone, loader, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("training", [True, False])
def test_faults_reach_the_user_as_one_line(coco, workers, training):
    root = coco.write()
    (root / "images/train/b.png").write_bytes(b"no image")
    dataset = CocoDataset(root, "train")
    make = training_loader if training else evaluation_loader
    with pytest.raises(DataError) as caught:
        take(make(dataset, DetectionPolicy(size=32), 2, workers=workers), 2)
    path = root / "images/train/b.png"
    assert str(caught.value) == f"{path}: not an image that Pillow can read; replace it"


def test_packing_keeps_types_shapes_and_values():
    samples = [Numbers([(5, 7), (6, 3)])[index] for index in range(2)]
    samples[1].target = Target(
        labels=torch.zeros(0, dtype=torch.long), boxes=torch.zeros(0, 4), crowd=torch.ones(3).bool()
    )
    (batch,) = collate(samples, divisor=4, training=True)
    packed = PackedBatch.pack(batch)
    assert equal(packed.unpack(), batch)
    assert packed.data.dtype == torch.uint8 and packed.data.ndim == 1


def test_rare_images_are_seen_as_often_as_their_share_and_changed_each_time():
    dataset, repeats = Numbers([(8, 8)] * 8), np.array([4.0, 1, 1, 1, 1, 1, 1, 2])

    def load(start: int = 0, count: int = 12) -> list[Batch]:
        loader = training_loader(
            dataset, Draws(), 4, workers=0, seed=3, repeats=repeats, start_step=start
        )
        return take(loader, count)

    batches = load()
    seen = Counter(index for batch in batches for index in batch.image_ids)
    assert sum(seen.values()) == 48
    for index, share in enumerate(repeats / repeats.sum()):
        assert abs(seen[index] - 48 * share) <= 6  # once in each of six passes
    pairs = [
        (index, target.area.item())
        for batch in batches
        for index, target in zip(batch.image_ids, batch.targets, strict=True)
    ]
    assert len(set(pairs)) == len(pairs)
    assert all(map(equal, batches[5:], load(start=5, count=7)))


def test_repeat_factors_by_hand():
    shown = [[0, 1], [0], [0], [0], [0, 2], [0], [0], [], [0], [0]]

    class Shown(Numbers):
        classes = ["a", "b", "c"]

        def target(self, index: int) -> Target:
            return Target(labels=torch.tensor(shown[index], dtype=torch.int64))

    expected = [2.0, 1, 1, 1, 2.0, 1, 1, 1, 1, 1]  # sqrt(0.4 / 0.1)
    found = images_with_class(Shown([(8, 8)] * 10))
    assert repeat_factors(found, 0.4).tolist() == pytest.approx(expected)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="not on this system")
def test_a_worker_ends_by_no_signal_but_the_main_process_s() -> None:
    """A launcher tells all processes to stop; those that read images still have a step to serve."""
    before = set(multiprocessing.active_children())
    loader = training_loader(Numbers([(8, 8)] * 6), Draws(), 2, workers=2)
    whole = take(training_loader(Numbers([(8, 8)] * 6), Draws(), 2, workers=0), 12)
    found = take(loader, 1)
    readers = sorted(set(multiprocessing.active_children()) - before, key=lambda it: it.pid or 0)
    for worker in readers:
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    found += take(loader, 11)
    assert all(map(equal, found, whole)) and [it.is_alive() for it in readers] == [True, True]
    readers[0].terminate()
    readers[0].join(20)
    assert readers[0].exitcode == 0


def test_workers_share_what_cores_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert count(3) == count(3, cores=1) == 3
    for cuda, expected in ((True, [1, 4, 8]), (False, [0, 2, 2])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        assert [count("auto", cores) for cores in (1, 4, 64)] == expected
        assert [count("auto", cores, gpu=False) for cores in (1, 4, 64)] == [0, 2, 2]
    monkeypatch.setattr(workers, "own_cores", lambda: {3, 5})
    assert count("auto") == 1
