"""How well whole images are labelled, counted beside what is said about their pixels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vitdense.metrics.base import Metric
from vitdense.metrics.processes import gather, share
from vitdense.structures import Batch, Prediction


class Several(Metric):
    """Metrics as one; the first says which model is the best."""

    def __init__(self, metrics: list[Metric]) -> None:
        super().__init__(metrics[0].classes)
        self.metrics = metrics
        self.headline = metrics[0].headline  # type: ignore[misc]
        self.lower = tuple(name for metric in metrics for name in metric.lower)
        self.confidence = any(metric.confidence for metric in metrics)

    def __str__(self) -> str:
        return " and ".join(map(str, self.metrics))

    def update(self, predictions: list[Prediction], batch: Batch) -> None:
        for metric in self.metrics:
            metric.update(predictions, batch)

    def compute(self) -> dict[str, float]:
        return {name: it for metric in self.metrics for name, it in metric.compute().items()}

    def reset(self) -> None:
        for metric in self.metrics:
            metric.reset()


class ImageLabels(Metric):
    """image_acc, image_mAP and each label's `image_AP/<label>`, in 0..1.

    image_acc is the part of the images whose highest score is that of one of their labels; images
    without any are left out of it. The average precision of a label is scikit-learn's: the sum over
    thresholds of precision times the step in recall, not interpolated; image_mAP is the mean over
    the labels that some image has. All are 0 if nothing was counted.

    Args:
        classes: names of the labels of whole images.
    """

    headline = "image_mAP"

    def __init__(self, classes: list[str]) -> None:
        super().__init__(classes)
        self.reset()

    def reset(self) -> None:
        """Forget all."""
        self.scores: dict[int | str, Tensor] = {}
        self.truths: dict[int | str, Tensor] = {}

    def update(self, predictions: list[Prediction], batch: Batch) -> None:
        """Count one batch in; an image that comes again is not counted again.

        Raises:
            ValueError: a prediction or a truth has no image labels.
        """
        for prediction, target, image_id, path in zip(
            predictions, batch.targets, batch.image_ids, batch.paths, strict=True
        ):
            if prediction.image_scores is None or target.image_labels is None:
                raise ValueError(f"{path}: has no image labels, in the prediction or in the truth")
            self.scores.setdefault(image_id, prediction.image_scores)
            self.truths.setdefault(image_id, target.image_labels)

    def compute(self) -> dict[str, float]:
        """The numbers over all images of all processes."""
        ids = list(self.scores)
        mine = [key for key, place in zip(ids, share(ids), strict=True) if place >= 0]
        shares = gather((self._table(self.scores, mine), self._table(self.truths, mine)))
        scores = torch.cat([part for part, _ in shares])
        truth = torch.cat([part for _, part in shares]) > 0
        columns = zip(self.classes, scores.T, truth.T, strict=True)
        each = {label: average_precision(*column) for label, *column in columns}
        each = {label: value for label, value in each.items() if not math.isnan(value)}
        return {
            "image_acc": accuracy(scores, truth),
            "image_mAP": sum(each.values()) / max(len(each), 1),
            **{f"image_AP/{label}": value for label, value in each.items()},
        }

    def _table(self, rows: dict[int | str, Tensor], ids: list[int | str]) -> Tensor:
        """float64 [N, K] on the CPU."""
        if not ids:
            return torch.zeros(0, len(self.classes), dtype=torch.float64)
        return torch.stack([rows[key] for key in ids]).double().cpu()


def accuracy(scores: Tensor, truth: Tensor) -> float:
    """Part of the images with labels whose highest score is that of one of them; 0 of none.

    Args:
        scores: float [N, K].
        truth: bool [N, K].
    """
    labelled = truth.any(1)
    if not labelled.any():
        return 0.0
    best = scores[labelled].max(1, keepdim=True).indices
    return truth[labelled].gather(1, best).double().mean().item()


def average_precision(scores: Tensor, truth: Tensor) -> float:
    """Area under precision over recall, as a sum of steps; NaN without a positive.

    Equal scores are one threshold, so that the order of images does not matter.

    Args:
        scores: float [N].
        truth: bool [N].
    """
    positives = int(truth.sum())
    if not positives:
        return math.nan
    values, order = scores.sort(descending=True)
    hits = truth[order].double().cumsum(0)
    ends = torch.cat([values[1:] != values[:-1], torch.ones(1, dtype=torch.bool)])
    found = torch.arange(1, len(values) + 1)[ends]
    hits = hits[ends]
    steps = hits.diff(prepend=hits.new_zeros(1)) / positives
    return (steps * hits / found).sum().item()
