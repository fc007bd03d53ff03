"""What metrics of objects share: they hold truth and detections until all images are seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from vitdense.metrics.base import Metric
from vitdense.metrics.boundaries import encode_bands
from vitdense.metrics.objects import Objects, join
from vitdense.metrics.processes import share
from vitdense.ops.run_length import RunLengths, encode
from vitdense.ops.run_length import join as join_runs
from vitdense.structures import Batch, Prediction, Target

IouType = Literal["bbox", "segm", "boundary"]


class ObjectMetric(Metric):
    """Holds the objects of each image once, on the device of its predictions.

    Attributes:
        iou_type: what is compared: boxes, masks, or masks and the bands inside their outlines.
        image_ids: the place of each image that was seen.
        truth, detections: one per batch.
    """

    def __init__(self, classes: list[str], iou_type: IouType = "bbox") -> None:
        super().__init__(classes)
        self.iou_type = iou_type
        self.tasks = ("detection", "instance") if iou_type == "bbox" else ("instance",)
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self.image_ids: dict[int | str, int] = {}
        self.truth: list[Objects] = []
        self.detections: list[Objects] = []

    def update(self, predictions: list[Prediction], batch: Batch) -> None:
        """Count one batch in; needs labels and boxes, and masks unless `bbox` is compared."""
        first = len(self.image_ids)
        answers, targets = [], []
        for prediction, target, image_id in zip(
            predictions, batch.targets, batch.image_ids, strict=True
        ):
            if image_id not in self.image_ids:
                self.image_ids[image_id] = len(self.image_ids)
                answers.append(prediction)
                targets.append(target)
        if answers:
            self.detections.append(self.found(first, answers, targets))
            self.truth.append(self.there(first, targets, self.detections[-1].scores.device))

    def found(self, first: int, answers: list[Prediction], targets: list[Target]) -> Objects:
        """The detections of some images, numbered from `first`; of masks the area is theirs."""
        scores = torch.cat([self._present(answer, "scores")[0] for answer in answers])
        return replace(self._pack(first, answers, scores.device), scores=scores.double())

    def there(self, first: int, targets: list[Target], device: torch.device) -> Objects:
        """The truth of the same images; where no area is given, it is the mask's or the box's."""
        objects = self._pack(first, targets, device)
        sizes = [len(target.boxes) for target in targets if target.boxes is not None]
        areas, crowds = objects.areas.split(sizes), objects.crowd.split(sizes)
        pairs = list(zip(targets, areas, crowds, strict=True))
        return replace(
            objects,
            areas=torch.cat([a if it.area is None else it.area.to(a) for it, a, _ in pairs]),
            crowd=torch.cat([c if it.crowd is None else it.crowd.to(c) for it, _, c in pairs]),
        )

    def held(self) -> tuple[Objects, Objects]:
        """Truth and detections of this process, with the images' places among those of all.

        Raises:
            ValueError: one has a class that there is not; names its image.
        """
        truth, detections = join(self.truth), join(self.detections)
        self._check_labels(truth, "truth")
        self._check_labels(detections, "prediction")
        places = torch.tensor(share(list(self.image_ids)), dtype=torch.int64)
        return _placed(truth, places), _placed(detections, places)

    def _check_labels(self, objects: Objects, holder: str) -> None:
        """A label beyond the classes would be taken for a class of the next image."""
        labels, classes = objects.labels, len(self.classes)
        wrong = ((labels < 0) | (labels >= classes)).nonzero()[:1, 0].tolist()
        for place in wrong:
            image = list(self.image_ids)[int(objects.images[place])]
            raise ValueError(
                f"{self}: the {holder} of image {image!r} has an object of class "
                f"{int(labels[place])}, classes are 0..{classes - 1}"
            )

    def _pack(
        self, first: int, holders: Sequence[Prediction | Target], device: torch.device
    ) -> Objects:
        """Objects of images in one go, as an operation for each would cost more than all else."""
        labels, boxes = (
            torch.cat([self._present(holder, name)[0] for holder in holders]).to(device)
            for name in ("labels", "boxes")
        )
        sizes = torch.tensor([len(self._present(holder, "labels")[0]) for holder in holders])
        images = torch.arange(first, first + len(sizes)).repeat_interleave(sizes)
        boxes = boxes.double()
        sides = boxes[:, 2:] - boxes[:, :2]
        runs, bands = self._encoded(holders, device)
        areas = sides.prod(1) if runs is None else runs.areas().double()
        return Objects(
            images=images.to(device, non_blocking=True),
            labels=labels.long(),
            boxes=torch.cat([boxes[:, :2], sides], 1),
            areas=areas,
            scores=torch.ones_like(areas),
            crowd=torch.zeros_like(labels, dtype=torch.bool),
            rows=torch.arange(len(labels), device=device),
            masks=runs,
            bands=bands,
        )

    def _encoded(
        self, holders: Sequence[Prediction | Target], device: torch.device
    ) -> tuple[RunLengths | None, RunLengths | None]:
        """Masks and the bands inside their outlines, each if they are compared."""
        if self.iou_type == "bbox":
            return None, None
        masks = [self._present(holder, "masks")[0].to(device) for holder in holders]
        runs = join_runs([encode(some) for some in masks])
        if self.iou_type == "segm":
            return runs, None
        return runs, join_runs([encode_bands(some) for some in masks])

    def _present(self, holder: Prediction | Target, *names: str) -> list[Tensor]:
        values = [getattr(holder, name) for name in names]
        for name, value in zip(names, values, strict=True):
            if value is None:
                kind = type(holder).__name__.lower()
                raise ValueError(f"{self}: the {kind} has no {name}, which it compares")
        return values


def _placed(objects: Objects, places: Tensor) -> Objects:
    """With the images' places among those of all processes, without those of place -1."""
    objects.images = places.to(objects.images.device)[objects.images]
    return objects.select((objects.images >= 0).nonzero()[:, 0])
