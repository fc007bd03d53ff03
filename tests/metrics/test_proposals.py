"""Recall of proposals, all objects one class, at 1, 10, 100 and 1000 equals pycocotools'."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.metrics.test_coco_exactness import reference
from vitdense.metrics.coco import CocoMetric
from vitdense.metrics.matching import Rules
from vitdense.structures import Batch, Frame, Prediction, Target

pytest.importorskip("pycocotools")
SIDE, CLASSES = 200, ["a", "b", "c"]


def draw(image: int, proposals: int, rng: np.random.Generator) -> tuple[Batch, Prediction]:
    """30 objects, and proposals near them with equal scores, on a grid that float32 holds."""
    corner = rng.integers(0, 500, (30, 2)) / 4
    boxes = np.concatenate([corner, corner + rng.integers(20, 250, (30, 2)) / 4], 1)
    target = Target(
        labels=torch.from_numpy(rng.integers(0, 3, 30)),
        boxes=torch.from_numpy(boxes).float(),
        crowd=torch.from_numpy(rng.random(30) < 0.1),
    )
    near = boxes[rng.integers(0, 30, proposals)] + rng.integers(-40, 41, (proposals, 4)) / 4
    near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
    scores = np.sort(rng.integers(1, 300, proposals))[::-1] / 512
    prediction = Prediction(
        scores=torch.from_numpy(scores.copy()).float(),
        labels=torch.from_numpy(rng.integers(0, 3, proposals)),
        boxes=torch.from_numpy(near).float(),
    )
    frame = Frame((SIDE, SIDE), (SIDE, SIDE), (SIDE, SIDE))
    path = Path(f"{image}.jpg")
    return Batch(torch.zeros(1, 3, 1, 1), [target], [frame], [image], [path]), prediction


def entries_of(image: int, record: Target | Prediction, start: int) -> list[dict]:
    assert record.boxes is not None and record.labels is not None
    entries = []
    for place, ((x1, y1, x2, y2), label) in enumerate(
        zip(record.boxes.tolist(), record.labels.tolist(), strict=True)
    ):
        entry = {"id": start + place, "image_id": image, "category_id": label, "iscrowd": 0,
                 "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}  # fmt: skip
        if isinstance(record, Target):
            entry["iscrowd"] = int(record.crowd[place])
        else:
            entry["score"] = float(record.scores[place])
        entries.append(entry)
    return entries


def test_recall_of_proposals_equals_pycocotools() -> None:
    rng = np.random.default_rng(0)
    metric = CocoMetric(CLASSES, class_agnostic=True, max_detections=1000)
    truth = {
        "images": [{"id": image, "height": SIDE, "width": SIDE} for image in range(2)],
        "categories": [{"id": label, "name": name} for label, name in enumerate(CLASSES)],
        "annotations": [],
    }
    results: list[dict] = []
    for image, proposals in enumerate((1050, 40)):
        batch, prediction = draw(image, proposals, rng)
        metric.update([prediction], batch)
        truth["annotations"] += entries_of(
            image, batch.targets[0], len(truth["annotations"]) + 1
        )  # fmt: skip
        results += entries_of(image, prediction, len(results) + 1)
    rules = Rules(limits=(1, 10, 100, 1000), class_agnostic=True)
    theirs = reference(truth, results, "bbox", rules)
    numbers = metric.compute()
    recalls = [theirs.eval["recall"][:, 0, 0, place].mean() for place in range(4)]
    assert recalls == sorted(set(recalls)), "each limit must matter"
    for limit, recall in zip(rules.limits, recalls, strict=True):
        assert numbers[f"AR{limit}"] == pytest.approx(recall, abs=1e-9, rel=0)
    precision = theirs.eval["precision"][:, :, 0, 0, -1]
    assert numbers["AP"] == pytest.approx(precision.mean(), abs=1e-9, rel=0)


def test_the_limits_that_are_told() -> None:
    assert CocoMetric(CLASSES, max_detections=50).rules.limits == (1, 10, 50)
    assert CocoMetric(CLASSES).rules.limits == (1, 10, 100)
    assert CocoMetric(CLASSES, max_detections=300).rules.limits == (1, 10, 100, 300)
