"""Panoptic quality with COCO's rules for crowds, void, things and stuff.

Kirillov et al., "Panoptic Segmentation", section 4; the rules for crowds are those of panopticapi.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vitdense.metrics.base import Metric
from vitdense.metrics.processes import ImageSums, share
from vitdense.ops.histogram import joint_histogram
from vitdense.registry import METRICS
from vitdense.structures import Batch, Prediction, Target

PENDING = 64
"""Images whose segments are matched together: one by one costs more than counting their pixels."""


@METRICS.register("panoptic")
class PanopticQuality(Metric):
    """PQ, SQ and RQ over all classes, things (`PQth`) and stuff (`PQst`), and PQ of each class.

    A class that neither truth nor prediction has counts in no mean. Sums stay on the device of the
    predictions; an image that comes twice, as padded distributed samplers send it, counts once.
    """

    tasks = ("panoptic",)
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
        self.sums = ImageSums(4, len(self.classes), dtype=torch.float64)
        self.image_ids: dict[int | str, None] = {}
        self._pending: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

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
            answer, labels = prediction.panoptic, prediction.labels
            if answer is None or labels is None:
                raise ValueError(f"{path}: the panoptic metric needs a panoptic map and labels")
            truth, classes, crowd = _segments(target.to(answer.device), path)
            _check(answer, truth, labels, len(self.classes), path)
            pixels = common_pixels(truth, answer, len(classes), len(labels))
            self.image_ids[image_id] = None
            self.count(pixels, labels, classes, crowd)

    def count(self, pixels: Tensor, labels: Tensor, classes: Tensor, crowd: Tensor) -> None:
        """Count one image in, with others that wait.

        Args:
            pixels: int64 [G + 1, P + 1], what each true segment has in common with each predicted
                one; row and column 0 are void.
            labels, classes: int64 [P], [G], the class of each segment.
            crowd: bool [G], segments that are ignored.
        """
        self._pending.append((pixels, labels, classes, crowd))
        if len(self._pending) == PENDING:
            self._count_pending()

    def _count_pending(self) -> None:
        if not self._pending:
            return
        tables, *columns = zip(*self._pending, strict=True)
        count = len(self.classes)
        labels, classes, crowd = (
            pad_sequence(list(column), batch_first=True, padding_value=value)
            for column, value in zip(columns, (count, count, 1), strict=True)
        )
        shape = len(tables), classes.shape[1] + 1, labels.shape[1] + 1
        pixels = torch.zeros(shape, dtype=torch.int64, device=labels.device)
        for one, table in zip(pixels, tables, strict=True):
            one[: table.shape[0], : table.shape[1]] = table
        self.sums.add(count_segments(pixels, labels, classes, crowd, count))
        self._pending = []

    def compute(self) -> dict[str, float]:
        """The numbers over all images of all processes, in 0..1; zeros if nothing was counted."""
        self._count_pending()
        right, overlap, wrong, missed = self.sums.of_all(share(list(self.image_ids))).cpu()
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
    pixels: Tensor, labels: Tensor, classes: Tensor, crowd: Tensor, count: int
) -> Tensor:
    """What each of some images adds, by class.

    Args:
        pixels: int64 [B, G + 1, P + 1], what each true segment has in common with each predicted
            one; row and column 0 are void.
        labels, classes: int64 [B, P], [B, G], the class of each segment, `count` where is none.
        crowd: bool [B, G], segments that are ignored.

    Returns:
        float64 [B, 4, count]: matched segments, the sum of their IoU, false and missed ones.
    """
    void, common = pixels[:, 0, 1:], pixels[:, 1:, 1:]
    area = pixels[:, :, 1:].sum(1)
    # Where the truth is void, a prediction is neither right nor wrong.
    union = (area - void)[:, None] + pixels[:, 1:].sum(2, keepdim=True) - common
    iou = common.double() / union.clamp(min=1).double()
    hit = (iou > 0.5) & (classes[:, :, None] == labels[:, None]) & ~crowd[:, :, None]

    # The last crowd segment of each class, as in panopticapi; 0 if it has none.
    number = torch.arange(1, classes.shape[1] + 1, device=pixels.device) * crowd
    last = torch.zeros(len(pixels), count + 1, dtype=torch.int64, device=pixels.device)
    last = last.scatter_reduce(1, classes, number, "amax").gather(1, labels)
    in_crowd = pixels[:, :, 1:].gather(1, last[:, None])[:, 0].where(last > 0, 0)
    ignored = (void + in_crowd).double() / area.clamp(min=1).double() > 0.5
    false = ~hit.any(1) & ~ignored & (area > 0)
    missed = ~hit.any(2) & ~crowd
    sums = torch.zeros(len(pixels), 4, count + 1, dtype=torch.float64, device=pixels.device)
    kinds = classes, classes, labels, classes
    rows = hit.sum(2), (iou * hit).sum(2), false, missed
    for row, kind, values in zip(sums.unbind(1), kinds, rows, strict=True):
        row.scatter_add_(1, kind, values.double())
    return sums[..., :count]


def common_pixels(truth: Tensor, answer: Tensor, rows: int, columns: int) -> Tensor:
    """int64 [rows + 1, columns + 1], pixels of each pair of segments; row and column 0 are void.

    Args:
        truth, answer: whole numbers [H, W] in 0..rows and in 0..columns.
    """
    return joint_histogram(truth, answer, (rows + 1, columns + 1))


def _segments(target: Target, path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Map, classes and crowds of the truth."""
    if target.masks is None or target.labels is None:
        raise ValueError(f"{path}: the panoptic metric needs masks and labels of the truth")
    masks, labels = target.masks, target.labels.long()
    crowd = torch.zeros_like(labels, dtype=torch.bool)
    if target.crowd is not None:
        crowd = target.crowd
    if len(masks) == 0:
        return torch.zeros(masks.shape[1:], dtype=torch.uint8, device=masks.device), labels, crowd
    # On a CPU a product of bytes is a hundred times as fast as argmax.
    kind = torch.uint8 if len(masks) < 256 else torch.int32
    numbers = torch.arange(1, len(masks) + 1, dtype=kind, device=masks.device)
    return (masks * numbers[:, None, None]).amax(0), labels, crowd


def _check(answer: Tensor, truth: Tensor, labels: Tensor, classes: int, path: Path) -> None:
    if answer.shape != truth.shape:
        raise ValueError(
            f"{path}: the prediction is of size {list(answer.shape)}, the truth of "
            f"{list(truth.shape)}: both must be in pixels of the original image"
        )
    low, high = answer.aminmax() if answer.numel() else (answer.new_zeros(()),) * 2
    strange = (low < 0) | (high > len(labels))
    if bool(strange | ((labels < 0) | (labels >= classes)).any()):
        raise ValueError(
            f"{path}: the prediction has {len(labels)} segments of classes "
            f"{sorted(set(labels.tolist()))}, and its map the numbers {answer.unique().tolist()}: "
            f"those must be in 0..{len(labels)}, classes in 0..{classes - 1}"
        )
