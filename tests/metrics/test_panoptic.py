"""Panoptic quality equals a plain loop over segments, as panopticapi defines it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vitdense.metrics.panoptic import PanopticQuality
from vitdense.structures import Batch, Frame, Prediction, Target

CLASSES = ["person", "car", "sky", "road", "absent"]
THINGS = ["person", "car", "absent"]
VOID = 0

Image = tuple[np.ndarray, list[int], list[bool], np.ndarray, list[int]]
"""Truth map, its classes and crowds; answer map and its classes."""


def reference(images: list[Image]) -> dict[str, float]:
    """The published algorithm, segment by segment, in plain Python."""
    tp, fp, fn, iou_sum = (dict.fromkeys(CLASSES, 0.0) for _ in range(4))
    for truth, classes, crowds, answer, labels in images:
        there = {k + 1: (CLASSES[c], crowd) for k, (c, crowd) in enumerate(zip(classes, crowds))}  # noqa: B905
        found = {k + 1: CLASSES[c] for k, c in enumerate(labels)}
        matched_truth, matched_answer = set(), set()
        for g, (name, crowd) in there.items():
            for p, label in found.items():
                common = ((truth == g) & (answer == p)).sum()
                if crowd or name != label or common == 0:
                    continue
                in_void = ((truth == VOID) & (answer == p)).sum()
                union = (truth == g).sum() + (answer == p).sum() - common - in_void
                if common / union > 0.5:
                    tp[name] += 1
                    iou_sum[name] += common / union
                    matched_truth.add(g)
                    matched_answer.add(p)
        crowd_of = {name: g for g, (name, crowd) in there.items() if crowd}
        for g, (name, crowd) in there.items():
            fn[name] += g not in matched_truth and not crowd
        for p, label in found.items():
            area = (answer == p).sum()
            if p in matched_answer or area == 0:
                continue
            ignored = ((truth == VOID) & (answer == p)).sum()
            if label in crowd_of:
                ignored += ((truth == crowd_of[label]) & (answer == p)).sum()
            fp[label] += ignored / area <= 0.5
    numbers: dict[str, float] = {}
    groups = {"": CLASSES, "th": THINGS, "st": [c for c in CLASSES if c not in THINGS]}
    for suffix, names in groups.items():
        rows = []
        for name in names:
            weight = tp[name] + fp[name] / 2 + fn[name] / 2
            if weight:
                sq = iou_sum[name] / tp[name] if tp[name] else 0.0
                rows.append((iou_sum[name] / weight, sq, tp[name] / weight))
                if suffix == "":
                    row = zip(("PQ", "SQ", "RQ"), rows[-1], strict=True)
                    numbers |= {f"{kind}/{name}": value for kind, value in row}
        for kind, column in zip(("PQ", "SQ", "RQ"), zip(*rows, strict=True), strict=False):
            numbers[kind + suffix] = float(np.mean(column))
    return numbers


def random_image(rng: np.random.Generator, size: int = 24) -> Image:
    """Rectangles over each other on void; the answer is the truth, moved and partly renamed."""
    truth = np.zeros((size, size), np.int64)
    classes, crowds = [], []
    for k in range(rng.integers(0, 8)):
        y, x, h, w = rng.integers(0, size - 4, 2).tolist() + rng.integers(3, size // 2, 2).tolist()
        truth[y : y + h, x : x + w] = k + 1
        classes.append(int(rng.integers(4)))
        crowds.append(bool(classes[-1] < 2 and rng.random() < 0.3))
    shift = tuple(rng.integers(-2, 3, 2))
    answer = np.roll(truth, shift, (0, 1))
    labels = [c if rng.random() < 0.8 else int(rng.integers(4)) for c in classes]
    if rng.random() < 0.8:
        answer[answer == 0] = len(labels) + 1
        labels.append(int(rng.integers(4)))
    return truth, classes, crowds, answer, labels


def count(metric: PanopticQuality, image_id: int, image: Image) -> None:
    truth, classes, crowds, answer, labels = image
    masks = torch.stack([torch.zeros(truth.shape).bool(), *(
        torch.tensor(truth == k + 1) for k in range(len(classes)))])[1:]  # fmt: skip
    target = Target(labels=whole(classes), masks=masks, crowd=torch.tensor(crowds).bool())
    prediction = Prediction(labels=whole(labels), panoptic=torch.tensor(answer))
    frame = Frame(truth.shape, truth.shape, truth.shape)
    batch = Batch(torch.zeros(1, 3, 1, 1), [target], [frame], [image_id], [Path("some.jpg")])
    metric.update([prediction], batch)


def whole(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_plain_algorithm(seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = [random_image(rng) for _ in range(6)]
    metric = PanopticQuality(CLASSES, things=THINGS)
    for image_id, image in enumerate(images):
        count(metric, image_id, image)
        count(metric, image_id, image)  # twice is once
    numbers = metric.compute()
    assert numbers == pytest.approx(reference(images), abs=1e-12)
    assert 0 < numbers["PQ"] < 1 and "PQ/absent" not in numbers


def test_images_are_matched_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    images = [random_image(rng) for _ in range(7)]
    monkeypatch.setattr("vitdense.metrics.panoptic.PENDING", 3)
    metric = PanopticQuality(CLASSES, things=THINGS)
    for image_id, image in enumerate(images):
        count(metric, image_id, image)
    assert metric.compute() == pytest.approx(reference(images), abs=1e-12)
    assert metric.compute() == pytest.approx(reference(images), abs=1e-12)  # nothing counts twice


def test_void_and_crowd_by_hand() -> None:
    """A segment mostly on void is not wrong, one mostly on a crowd of its class neither."""
    truth = np.array([[0, 0, 1, 1, 2, 2]])
    image = truth, [0, 1], [True, False], np.array([[1, 1, 2, 2, 3, 0]]), [1, 0, 1]
    metric = PanopticQuality(CLASSES)
    count(metric, 1, image)  # the third covers half of its car: not more than half
    numbers = metric.compute()
    assert set(numbers) == {"PQ", "SQ", "RQ", "PQ/car", "SQ/car", "RQ/car"}
    assert metric.sums.total.T[:2].tolist() == [[0, 0, 0, 0], [0, 0, 1, 1]]
    count(metric, 2, (truth, [0, 1], [False, False], np.array([[0, 0, 1, 1, 2, 2]]), [1, 1]))
    metric.compute()
    assert metric.sums.total.T[:2].tolist() == [[0, 0, 0, 1], [1, 1, 2, 1]]


def test_nothing_and_reset() -> None:
    metric = PanopticQuality(CLASSES, things=THINGS)
    empty = np.zeros((3, 4), np.int64)
    count(metric, 1, (empty, [], [], empty, []))
    assert set(metric.compute().values()) == {0.0}
    count(metric, 2, (empty + 1, [0], [False], empty + 1, [0]))
    assert metric.compute()["PQth"] == 1.0
    metric.reset()
    assert metric.compute()["PQ"] == 0.0


def test_faults_are_named() -> None:
    metric = PanopticQuality(CLASSES)
    one = np.ones((3, 4), np.int64)
    with pytest.raises(ValueError, match=r"some.jpg: .* of size \[3, 4\], the truth of \[2, 4\]"):
        count(metric, 1, (one[:2], [0], [False], one, [0]))
    with pytest.raises(ValueError, match=r"some.jpg: .* the numbers \[2\]: those must be in 0..1"):
        count(metric, 2, (one, [0], [False], one + 1, [0]))
    with pytest.raises(ValueError, match=r"classes \[5\]"):
        count(metric, 3, (one, [0], [False], one, [5]))
    with pytest.raises(ValueError, match="^things: there is no class 'cat'"):
        PanopticQuality(CLASSES, things=["cat"])
