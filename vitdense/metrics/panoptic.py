"""Panoptic quality with COCO's rules for crowds, void, things and stuff.

Kirillov et al., "Panoptic Segmentation", section 4; the rules for crowds are those of panopticapi.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vitdense.metrics.base import Metric
from vitdense.metrics.processes import sum_over_processes
from vitdense.registry import METRICS
from vitdense.structures import Batch, Prediction, Target


@METRICS.register("panoptic")
class PanopticQuality(Metric):
    """PQ, SQ and RQ over all classes, things (`PQth`) and stuff (`PQst`), and PQ of each class.

    A class that neither truth nor prediction has counts in no mean. Sums stay on the device of the
    predictions; an image that comes twice to a process counts once.
    """

    headline = "PQ"

    def __init__(
        self,
        classes: list[str],
        *,
        things: list[str] | None = None,  # classes whose objects are counted, the rest is stuff
    ) -> None:
        super().__init__(classes)
        unknown = sorted(set(things or []) - set(classes))
        if unknown:
            raise ValueError(f"things: there is no class {unknown[0]!r}")
        self.things = None if things is None else [name in things for name in classes]
        self.reset()

    def reset(self) -> None:
        """Forget all."""
        # Rows: matched segments, their IoU, wrongly predicted ones, missed ones.
        self.sums = torch.zeros(4, len(self.classes), dtype=torch.float64)
        self.image_ids: set[int | str] = set()

    def update(self, predictions: list[Prediction], batch: Batch) -> None:
        """Count one batch in; needs panoptic maps and labels, and masks and labels of the truth.

        Raises:
            ValueError: a prediction has another size than the truth, or segments without a class.
        """
        for prediction, target, image_id, path in zip(
            predictions, batch.targets, batch.image_ids, batch.paths, strict=True
        ):
            if image_id in self.image_ids:
                continue
            self.image_ids.add(image_id)
            answer, labels = prediction.panoptic, prediction.labels
            if answer is None or labels is None:
                raise ValueError(f"{path}: the panoptic metric needs a panoptic map and labels")
            truth, classes, crowd = _segments(target.to(answer.device), path)
            _check(answer, truth, labels, len(self.classes), path)
            self.count(answer, labels, truth, classes, crowd)

    def count(
        self, answer: Tensor, labels: Tensor, truth: Tensor, classes: Tensor, crowd: Tensor
    ) -> None:
        """Count one image in.

        Args:
            answer, truth: int64 [H, W], 0 = void, k = the k-th segment, from 1.
            labels, classes: int64 [P], [G], the class of each segment.
            crowd: bool [G], segments that are ignored.
        """
        sums = count_segments(answer, labels, truth, classes, crowd, len(self.classes))
        self.sums = self.sums.to(sums.device) + sums

    def compute(self) -> dict[str, float]:
        """The numbers over all images of all processes, in 0..1; zeros if nothing was counted."""
        right, overlap, wrong, missed = sum_over_processes(self.sums).cpu()
        weight = right + (wrong + missed) / 2
        quality = torch.stack([overlap / weight, overlap / right, right / weight])
        quality = torch.where(torch.stack([weight, right, weight]) > 0, quality, 0.0)
        present = weight > 0
        groups = {"": present}
        if self.things is not None:
            things = torch.tensor(self.things)
            groups |= {"th": present & things, "st": present & ~things}
        numbers = {
            f"{name}{suffix}": float(values[group].mean()) if group.any() else 0.0
            for suffix, group in groups.items()
            for name, values in zip(("PQ", "SQ", "RQ"), quality, strict=True)
        }
        for name, values in zip(("PQ", "SQ", "RQ"), quality.tolist(), strict=True):
            rows = zip(self.classes, values, present.tolist(), strict=True)
            numbers |= {f"{name}/{label}": value for label, value, there in rows if there}
        return numbers


def count_segments(
    answer: Tensor, labels: Tensor, truth: Tensor, classes: Tensor, crowd: Tensor, count: int
) -> Tensor:
    """What one image adds, by class; the arguments are those of `PanopticQuality.count`.

    Returns:
        float64 [4, count]: matched segments, the sum of their IoU, false and missed ones.
    """
    pixels = _common_pixels(truth, answer, len(classes), len(labels))
    void, common = pixels[0, 1:], pixels[1:, 1:]
    area = pixels[:, 1:].sum(0)
    # Where the truth is void, a prediction is neither right nor wrong.
    union = area + pixels[1:].sum(1)[:, None] - common - void
    iou = common.double() / union.clamp(min=1).double()
    hit = (iou > 0.5) & (classes[:, None] == labels) & ~crowd[:, None]

    # The last crowd segment of each class, as in panopticapi; 0 if it has none.
    number = torch.arange(1, len(classes) + 1, device=truth.device) * crowd
    last = torch.zeros(count, dtype=torch.int64, device=truth.device)
    last = last.scatter_reduce(0, classes, number, "amax")[labels]
    column = torch.arange(1, len(labels) + 1, device=truth.device)
    ignored = void + torch.where(last > 0, pixels[last, column], 0)
    ignored = ignored.double() / area.clamp(min=1).double() > 0.5
    false = ~hit.any(0) & ~ignored & (area > 0)
    missed = ~hit.any(1) & ~crowd
    sums = torch.zeros(4, count, dtype=torch.float64, device=truth.device)
    sums[0].index_add_(0, classes, hit.sum(1).double())
    sums[1].index_add_(0, classes, (iou * hit).sum(1))
    sums[2].index_add_(0, labels, false.double())
    sums[3].index_add_(0, classes, missed.double())
    return sums


def _common_pixels(truth: Tensor, answer: Tensor, rows: int, columns: int) -> Tensor:
    """int64 [rows + 1, columns + 1], pixels of each pair of segments; row and column 0 are void."""
    cells = (truth.long() * (columns + 1) + answer.long()).flatten()
    pixels = cells.new_zeros((rows + 1) * (columns + 1))
    # Not bincount, which waits for the device to learn its size.
    return pixels.scatter_add_(0, cells, torch.ones_like(cells)).view(rows + 1, columns + 1)


def _segments(target: Target, path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Map, classes and crowds of the truth."""
    if target.masks is None or target.labels is None:
        raise ValueError(f"{path}: the panoptic metric needs masks and labels of the truth")
    masks, labels = target.masks, target.labels.long()
    crowd = torch.zeros_like(labels, dtype=torch.bool)
    if target.crowd is not None:
        crowd = target.crowd
    if len(masks) == 0:
        return torch.zeros(masks.shape[1:], dtype=torch.int64, device=masks.device), labels, crowd
    first = masks.to(torch.uint8).argmax(0) + 1
    return torch.where(masks.any(0), first, 0), labels, crowd


def _check(answer: Tensor, truth: Tensor, labels: Tensor, classes: int, path: Path) -> None:
    if answer.shape != truth.shape:
        raise ValueError(
            f"{path}: the prediction is of size {list(answer.shape)}, the truth of "
            f"{list(truth.shape)}: both must be in pixels of the original image"
        )
    strange = ((answer < 0) | (answer > len(labels))).any()
    if bool(strange | ((labels < 0) | (labels >= classes)).any()):
        raise ValueError(
            f"{path}: the prediction has {len(labels)} segments of classes "
            f"{sorted(set(labels.tolist()))}, and its map the numbers {answer.unique().tolist()}: "
            f"those must be in 0..{len(labels)}, classes in 0..{classes - 1}"
        )
