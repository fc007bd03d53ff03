"""VOC's average precision equals the development kit's, written as its description loops."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from vitdense.metrics.voc import VocMetric
from vitdense.structures import Batch, Frame, Prediction, Target

CLASSES = ["a", "b", "c", "absent"]
Truth = list[tuple[np.ndarray, np.ndarray, np.ndarray]]
"""Boxes, labels and difficult flags of each image."""
Found = list[tuple[np.ndarray, np.ndarray, np.ndarray]]
"""Boxes, labels and scores of each image."""


def overlap(box: np.ndarray, other: np.ndarray, more: int) -> float:
    width = min(box[2], other[2]) - max(box[0], other[0]) + more
    height = min(box[3], other[3]) - max(box[1], other[1]) + more
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(b[2] - b[0] + more) * (b[3] - b[1] + more) for b in (box, other)]
    return width * height / (sum(areas) - width * height)


def kit(truth: Truth, found: Found, label: int, iou: float, points: object, more: int) -> float:
    """AP of a class; NaN if it has no object that counts."""
    positives = sum(int((labels[~hard] == label).sum()) for _, labels, hard in truth)
    entries = [
        (score, image, box)
        for image, (boxes, labels, scores) in enumerate(found)
        for box, score, its in zip(boxes, scores, labels, strict=True)
        if its == label
    ]
    entries = sorted(entries, key=lambda entry: -entry[0])  # sorts stably
    taken: set[tuple[int, int]] = set()
    right, wrong = np.zeros(len(entries)), np.zeros(len(entries))
    for place, (_, image, box) in enumerate(entries):
        best, which = -math.inf, -1
        for number, (other, its) in enumerate(zip(*truth[image][:2], strict=True)):
            value = overlap(box, other, more)
            if its == label and value > best:
                best, which = value, number
        if best < iou:
            wrong[place] = 1
        elif not truth[image][2][which]:
            (wrong if (image, which) in taken else right)[place] = 1
            taken.add((image, which))
    if positives == 0:
        return math.nan
    right, wrong = right.cumsum(), wrong.cumsum()
    with np.errstate(invalid="ignore"):
        recall, precision = right / positives, np.nan_to_num(right / (right + wrong))
    return average(recall, precision, points)


def average(recall: np.ndarray, precision: np.ndarray, points: object) -> float:
    if points == 11:
        total = 0.0
        for level in [*(0.1 * np.arange(6)), *(1 - 0.1 * np.arange(4, -1, -1))]:
            above = precision[recall >= level]
            total += above.max() / 11 if len(above) else 0.0
        return total
    recall, precision = np.array([0, *recall, 1]), np.array([0, *precision, 0])
    for i in range(len(precision) - 2, -1, -1):
        precision[i] = max(precision[i], precision[i + 1])
    steps = np.flatnonzero(recall[1:] != recall[:-1]) + 1
    return float(((recall[steps] - recall[steps - 1]) * precision[steps]).sum())


def draw(seed: int) -> tuple[Truth, Found]:
    """Boxes on a coarse grid, so that overlaps tie and meet the threshold; many equal scores."""
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for _ in range(rng.integers(1, 6)):
        count = int(rng.integers(0, 7))
        corner = rng.integers(0, 5, (count, 2)) * 2.0
        boxes = np.concatenate([corner, corner + rng.integers(1, 5, (count, 2)) * 2], 1)
        labels, hard = rng.integers(0, 3, count), rng.random(count) < 0.2
        truth.append((boxes, labels, hard))
        again = rng.integers(0, count, int(rng.integers(0, 12)) if count else 0)
        moved = boxes[again] + rng.integers(-1, 2, (len(again), 4)) * rng.choice([0.0, 0.5])
        other = rng.integers(0, 3, len(again))
        its = np.where(rng.random(len(again)) < 0.8, labels[again], other)
        scores = rng.integers(1, rng.choice([4, 1000]), len(again)) / 1024
        order = np.argsort(-scores, kind="stable")
        found.append((moved[order], its[order], scores[order]))
    return truth, found


def update(metric: VocMetric, truth: Truth, found: Found, images: list[int]) -> VocMetric:
    frame = Frame((16, 16), (16, 16), (16, 16))
    for image in images:
        boxes, labels, hard = map(torch.from_numpy, truth[image])
        target = Target(labels=labels, boxes=boxes.float(), crowd=hard)
        boxes, labels, scores = map(torch.from_numpy, found[image])
        prediction = Prediction(scores.float(), labels, boxes.float())
        batch = Batch(torch.zeros(1, 3, 1, 1), [target], [frame], [image], [Path("image.jpg")])
        metric.update([prediction], batch)
    return metric


@pytest.mark.parametrize("points", [11, "all"])
@pytest.mark.parametrize("inclusive", [False, True])
def test_random_sets_equal_the_kit(points, inclusive) -> None:
    seen = set()
    for seed in range(60):
        truth, found = draw(seed)
        iou = (0.5, 0.3, 0.75)[seed % 3]
        metric = VocMetric(CLASSES, iou=iou, points=points, inclusive=inclusive)
        numbers = update(metric, truth, found, list(range(len(truth)))[::-1]).compute()
        values = {f"AP/{name}": kit(truth, found, label, iou, points, int(inclusive))
                  for label, name in enumerate(CLASSES)}  # fmt: skip
        values = {name: value for name, value in values.items() if not math.isnan(value)}
        values["mAP"] = float(np.mean(list(values.values()))) if values else math.nan
        assert numbers == pytest.approx(values, abs=1e-9, rel=0, nan_ok=True), seed
        seen.add(round(numbers["mAP"], 6))
    assert len(seen) > 30


def one_image(boxes: list, hard: list, found: list, scores: list, **options) -> float:
    truth = (np.array(boxes, float), np.zeros(len(boxes), int), np.array(hard, bool))
    answer = (np.array(found, float), np.zeros(len(found), int), np.array(scores))
    return update(VocMetric(["a"], **options), [truth], [answer], [0]).compute()["mAP"]


def test_the_best_overlap_decides_even_if_it_is_taken() -> None:
    """The second detection overlaps the free truth enough, too, where COCO would take it."""
    truth = [[0, 0, 10, 10], [2, 0, 12, 10]]
    assert one_image(truth, [0, 0], [[0, 0, 10, 10], [0.5, 0, 10.5, 10]], [0.9, 0.8]) == 0.5


def test_difficult_objects_are_neither_hit_nor_missed() -> None:
    truth = [[0, 0, 10, 10], [20, 0, 30, 10]]
    found = [[20, 0, 30, 10], [20, 0, 30, 10], [0, 0, 10, 10]]
    assert one_image(truth, [0, 1], found, [0.9, 0.8, 0.7]) == 1.0
    assert math.isnan(one_image(truth, [1, 1], found, [0.9, 0.8, 0.7]))


def test_pixels_that_belong_to_boxes() -> None:
    """Half is overlapped from edge to edge, and less with the last pixels counted."""
    boxes, found = [[0, 0, 10, 10]], [[0, 0, 5, 10]]
    assert one_image(boxes, [0], found, [0.9]) == 1.0
    assert one_image(boxes, [0], found, [0.9], inclusive=True) == 1.0
    assert one_image([[0, 0, 9, 9]], [0], [[0, 0, 4, 9]], [0.9]) == 0.0
    assert one_image([[0, 0, 9, 9]], [0], [[0, 0, 4, 9]], [0.9], inclusive=True) == 1.0


def test_memory_is_bounded_and_images_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, found = draw(3)
    images = list(range(len(truth)))
    whole = update(VocMetric(CLASSES), truth, found, images).compute()
    monkeypatch.setattr("vitdense.metrics.voc.MOST_PAIRS", 1)
    again = update(VocMetric(CLASSES), truth, found, images + images[:2]).compute()
    assert again == pytest.approx(whole, nan_ok=True)


def test_an_overlap_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="^iou: must be above 0"):
        VocMetric(["a"], iou=0.0)
