"""Mean intersection over union, from one confusion matrix over the whole data set."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vitdense.data.base import DataError
from vitdense.metrics.base import Metric
from vitdense.metrics.boundaries import band_width, boundary_band
from vitdense.metrics.processes import ImageSums, share
from vitdense.ops.histogram import joint_histogram
from vitdense.registry import METRICS, Fraction
from vitdense.structures import IGNORE, Batch, Prediction

BINS = 15
"""Of confidence, for the calibration error."""

PENDING = 64
"""Images whose labels are checked together: each check waits for the device."""


@METRICS.register("miou")
class MeanIoU(Metric):
    """aAcc, mIoU, mAcc, fwIoU, mDice and each class's IoU, Acc and Dice, in 0..1.

    Names are mmsegmentation's; fwIoU is the IoU of classes weighted by their share of the truth.
    Counts are int64 and stay on the device of the predictions. A class is absent if neither truth
    nor prediction has a pixel of it (IoU, Dice), or the truth has none (Acc): `skip` leaves it out
    of means and results, as mmsegmentation does; `zero` counts it as 0, as ADE20K's own code does.
    With `boundary` also mBIoU and BIoU of each class: the same over the pixels of each that are
    near its outline (Cheng et al., arXiv 2103.16562, over the whole set as mIoU is). With
    `calibration` also ECE: how far confidence is from accuracy, over 15 equal bins of confidence
    (Guo et al., arXiv 1706.04599, section 2). An image that comes twice, as padded distributed
    samplers send it, counts once.
    """

    tasks = ("semantic",)
    headline = "mIoU"
    lower = ("ECE",)

    def __init__(
        self,
        classes: list[str],
        *,
        absent: Literal["skip", "zero"] = "skip",  # classes without pixels
        boundary: Fraction | None = None,  # part of the diagonal for boundary IoU; published: 0.02
        calibration: bool = False,  # also the expected calibration error
    ) -> None:
        super().__init__(classes)
        self.confidence = calibration
        self.absent = absent
        self.boundary = boundary
        self.reset()

    def reset(self) -> None:
        """Forget all."""
        # Row: truth, column: prediction. The last of each takes what must not count.
        side = len(self.classes) + 1
        self.matrix = ImageSums(side, side)
        # Rows: near the outline of both, of the answer, of the truth; by class.
        self.bands = ImageSums(3, side)
        # Rows: pixels, those that are right, their confidence; by bin of confidence.
        self.bins = ImageSums(3, BINS + 1, dtype=torch.float64)
        self.image_ids: dict[int | str, None] = {}
        self._faults: list[Tensor] = []
        self._paths: list[Path] = []

    def update(self, predictions: list[Prediction], batch: Batch) -> None:
        """Count one batch in.

        Raises:
            ValueError: a prediction has another size than the truth, or no such class.
            DataError: a label is neither a class nor IGNORE; at most 64 images later, or by
                `compute`, so that no image waits for the device.
        """
        for prediction, target, image_id, path in zip(
            predictions, batch.targets, batch.image_ids, batch.paths, strict=True
        ):
            if image_id in self.image_ids:
                continue
            if prediction.semantic is None or target.semantic is None:
                raise ValueError(f"{path}: the miou metric needs a semantic prediction and truth")
            _check_size(prediction.semantic, target.semantic, path)
            if target.semantic.numel():
                self._count(prediction.semantic, target.semantic, path)
                if self.confidence:
                    self._count_bins(prediction, target.semantic, path)
                self.image_ids[image_id] = None
        if len(self._faults) >= PENDING:
            self._check()

    def _count(self, answer: Tensor, truth: Tensor, path: Path) -> None:
        truth, classes = truth.to(answer.device), len(self.classes)
        self._faults.append(torch.stack([_wrong_label(truth, classes), _wrong(answer, classes)]))
        self._paths.append(path)
        # The last row and column take what is ignored, and what is wrong and will be raised.
        if classes > IGNORE:
            answer, truth = answer.int(), truth.int().where(truth != IGNORE, classes)
        else:
            answer, truth = answer.to(torch.uint8), truth.to(torch.uint8)
        answer, truth = answer.clamp(0, classes), truth.clamp(0, classes)
        self.matrix.add(joint_histogram(truth, answer, (classes + 1, classes + 1))[None])
        if self.boundary is not None:
            self._count_bands(answer.long(), truth.long())

    def _count_bands(self, answer: Tensor, truth: Tensor) -> None:
        width = band_width((truth.shape[0], truth.shape[1]), self.boundary or 0.0)
        near_answer, near_truth = boundary_band(answer, width), boundary_band(truth, width)
        counted = truth < len(self.classes)
        bands = truth.new_zeros(3, len(self.classes) + 1)
        for row, where, labels in (
            (0, near_answer & near_truth & (answer == truth), truth),
            (1, near_answer, answer),
            (2, near_truth, truth),
        ):
            cells = labels.where(where & counted, len(self.classes)).flatten()
            bands[row].scatter_add_(0, cells, torch.ones_like(cells))
        self.bands.add(bands[None])

    def _count_bins(self, prediction: Prediction, truth: Tensor, path: Path) -> None:
        if prediction.confidence is None or prediction.semantic is None:
            raise ValueError(f"{path}: calibration needs the confidence of the prediction")
        sure, answer = prediction.confidence.double(), prediction.semantic
        truth = truth.to(answer.device)
        # a bin holds its upper edge
        places = (sure * BINS).ceil().long().clamp(1, BINS) - 1
        places = places.where(truth != IGNORE, BINS).flatten()
        right = (answer == truth).double()
        bins = right.new_zeros(3, BINS + 1)
        for row, values in zip(bins, (torch.ones_like(sure), right, sure), strict=True):
            row.scatter_add_(0, places, values.flatten())
        self.bins.add(bins[None])

    def _check(self) -> None:
        faults = torch.stack(self._faults).tolist() if self._faults else []
        highest = len(self.classes) - 1
        for (label, answer), path in zip(faults, self._paths, strict=True):
            if label != _NONE:
                raise DataError(
                    f"{path}: its annotation has label {label}, classes are 0..{highest} and "
                    f"{IGNORE} is ignored: correct the file or the list of classes"
                )
            if answer != _NONE:
                raise ValueError(f"{path}: class {answer} was predicted, classes are 0..{highest}")
        self._faults, self._paths = [], []

    def compute(self) -> dict[str, float]:
        """aAcc, mIoU, mAcc, fwIoU, mDice, and IoU, Acc and Dice of each class as `IoU/<class>`.

        Zeros if no pixel was counted.

        Adds up the counts of all processes; raises as `update` does.
        """
        self._check()
        shared = share(list(self.image_ids))
        counts = self.matrix.of_all(shared).cpu()[:-1, :-1].double()
        hits, truth, answers = counts.diag(), counts.sum(dim=1), counts.sum(dim=0)
        either, pixels = truth + answers - hits, truth.sum().clamp(min=1)
        mean_iou, iou = self._ratios("IoU", hits, either)
        mean_acc, acc = self._ratios("Acc", hits, truth)
        mean_dice, dice = self._ratios("Dice", 2 * hits, truth + answers)
        more: dict[str, float] = {}
        if self.boundary is not None:
            both, *each = self.bands.of_all(shared).cpu()[:, :-1].double()
            outline, outlines = self._ratios("BIoU", both, sum(each) - both)
            more = {"mBIoU": outline, **outlines}
        if self.confidence:
            pixels_in, right, sure = self.bins.of_all(shared).cpu()[:, :-1]
            error = (right - sure).abs().sum() / pixels_in.sum().clamp(min=1)
            more["ECE"] = error.item()
        return {
            "aAcc": (hits.sum() / pixels).item(),
            "mIoU": mean_iou,
            "mAcc": mean_acc,
            "fwIoU": (truth / pixels * hits / either.clamp(min=1)).sum().item(),
            "mDice": mean_dice,
            **iou,
            **acc,
            **dice,
            **more,
        }

    def _ratios(self, name: str, parts: Tensor, wholes: Tensor) -> tuple[float, dict[str, float]]:
        """Of each class that counts, and their mean; of classes of one name the last is listed."""
        ratios = (parts / wholes.clamp(min=1)).tolist()
        rows = zip(self.classes, ratios, wholes.tolist(), strict=True)
        known = [(label, it) for label, it, whole in rows if whole > 0 or self.absent == "zero"]
        mean = sum(ratio for _, ratio in known) / max(len(known), 1)
        return mean, {f"{name}/{label}": ratio for label, ratio in known}


def _check_size(answer: Tensor, truth: Tensor, path: Path) -> None:
    if answer.shape != truth.shape:
        raise ValueError(
            f"{path}: the prediction is of size {list(answer.shape)}, the truth of "
            f"{list(truth.shape)}: both must be in pixels of the original image"
        )


_NONE = torch.iinfo(torch.int64).min


def _wrong_label(truth: Tensor, classes: int) -> Tensor:
    """The same of labels, of which IGNORE is not wrong."""
    if truth.dtype == torch.uint8:  # where 255 + 1 is 0
        highest = (truth + 1).max().long() - 1
        return highest.where(highest >= classes, _NONE)
    return _wrong(truth.where(truth != IGNORE, 0), classes)


def _wrong(values: Tensor, classes: int) -> Tensor:
    """The highest value if it is no class, else the lowest if that is none, else _NONE."""
    low, high = (value.long() for value in values.aminmax())
    return high.where(high >= classes, low.where(low < 0, _NONE))
