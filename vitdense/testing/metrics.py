"""The check of metrics."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vitdense.metrics.base import Metric
from vitdense.structures import IGNORE, Batch, Frame, Prediction, Target
from vitdense.testing import probes
from vitdense.testing.probes import require

CLASSES = ["circle", "square", "ring"]
SIZE = (64, 96)


def check_metric(cls: Callable[..., Metric], **options: Any) -> None:
    """Assert what every metric must keep.

    Right answers score higher than wrong ones; numbers by name, `headline` among them; the order
    and the size of batches do not matter; `reset` forgets; images without objects work.

    Args:
        cls: the class, or a function that builds the part.
        options: what a config would set.

    Raises:
        AssertionError: says what is broken and how to mend it.
    """
    name = getattr(cls, "__name__", type(cls).__name__)
    with probes.seeded():
        metric = cls(list(CLASSES), **options)
        probes.check_contract("metric", metric)
        targets = [probes.make_target(SIZE, len(CLASSES), count) for count in (3, 2, 0, 3)]
    right = [_answer(target) for target in targets]
    wrong = [_answer(_renamed(target)) for target in targets]
    images = range(len(targets))

    best = _score(metric, targets, right, [[*images]])
    _check_numbers(name, metric, best)
    worse = _score(metric, targets, wrong, [[*images]])
    require(
        worse[metric.headline] < best[metric.headline],
        f"{name}: '{metric.headline}' does not fall when answers are wrong: the best model is "
        "chosen by it, so higher must be better. Or reset() does not forget",
    )
    for order, what in (([[i] for i in images], "one image per batch"),
                        ([[3, 1], [0, 2]], "another order of images")):  # fmt: skip
        require(
            _same(_score(metric, targets, right, order), best),
            f"{name}: {what} gives other numbers. Count in update(), divide in compute(); "
            "reset() must forget all",
        )


def _answer(target: Target) -> Prediction:
    """The truth, given as a prediction."""
    assert target.labels is not None and target.masks is not None and target.semantic is not None
    panoptic = torch.zeros(SIZE, dtype=torch.int64)
    for index, mask in enumerate(target.masks):
        panoptic[mask] = index + 1
    return Prediction(
        scores=torch.linspace(0.9, 0.8, len(target.labels)),
        labels=target.labels,
        boxes=target.boxes,
        masks=target.masks,
        semantic=target.semantic.long() % len(CLASSES),  # ignored pixels: any class
        panoptic=panoptic,
    )


def _renamed(target: Target) -> Target:
    """The truth with each class taken for the next: all is found, and named wrongly."""
    assert target.labels is not None and target.semantic is not None
    count = len(CLASSES)
    semantic = torch.where(target.semantic == IGNORE, IGNORE, (target.semantic + 1) % count)
    return Target((target.labels + 1) % count, target.boxes, target.masks, semantic)


def _score(
    metric: Metric, targets: list[Target], answers: list[Prediction], batches: list[list[int]]
) -> dict[str, float]:
    """The numbers over images in these batches, by their indices."""
    metric.reset()
    for indices in batches:
        batch = Batch(
            images=torch.zeros(len(indices), 3, *SIZE, dtype=torch.uint8),
            targets=[targets[index] for index in indices],
            frames=[Frame(SIZE, SIZE, SIZE)] * len(indices),
            image_ids=list(indices),
            paths=[Path(f"{index}.jpg") for index in indices],
        )
        metric.update([answers[index] for index in indices], batch)
    return metric.compute()


def _check_numbers(name: str, metric: Metric, numbers: dict[str, float]) -> None:
    require(
        isinstance(numbers, dict) and all(isinstance(v, (int, float)) for v in numbers.values()),
        f"{name}.compute must return plain numbers by name; it returned {numbers!r:.120}",
    )
    headline = getattr(metric, "headline", "")
    require(
        not math.isnan(numbers.get(headline, math.nan)),
        f"{name}.headline is {headline!r}; it must name a number of compute() that is never nan: "
        f"{sorted(numbers)}",
    )


def _same(first: dict[str, float], second: dict[str, float]) -> bool:
    return first.keys() == second.keys() and all(
        math.isclose(value, second[key], abs_tol=1e-9) or math.isnan(value + second[key])
        for key, value in first.items()
    )
