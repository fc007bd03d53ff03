"""What metrics of objects share: they hold truth and detections until all images are seen."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vitdense.metrics.base import Metric
from vitdense.metrics.boundaries import encode_bands
from vitdense.metrics.objects import Objects, join
from vitdense.metrics.processes import share
from vitdense.ops.run_length import encode
from vitdense.structures import Batch, Prediction, Target

IouType = Literal["bbox", "segm", "boundary"]


class ObjectMetric(Metric):
    """Holds the objects of each image once, on the device of its predictions.

    Attributes:
        iou_type: what is compared: boxes, masks, or masks and the bands inside their outlines.
        image_ids: the place of each image that was seen.
        truth, detections: one per image.
    """

    def __init__(self, classes: list[str], iou_type: IouType = "bbox") -> None:
        super().__init__(classes)
        self.iou_type = iou_type
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self.image_ids: dict[int | str, int] = {}
        self.truth: list[Objects] = []
        self.detections: list[Objects] = []

    def update(self, predictions: list[Prediction], batch: Batch) -> None:
        """Count one batch in; needs labels and boxes, but for `bbox` also masks."""
        for prediction, target, image_id in zip(
            predictions, batch.targets, batch.image_ids, strict=True
        ):
            if image_id in self.image_ids:
                continue
            truth, detections = self.objects(len(self.image_ids), prediction, target)
            self.image_ids[image_id] = len(self.image_ids)
            self.truth.append(truth)
            self.detections.append(detections)

    def objects(
        self, image: int, prediction: Prediction, target: Target
    ) -> tuple[Objects, Objects]:
        """Truth and detections of one image; of masks the area is theirs.

        The area of the truth is its mask's or its box's where none is given.
        """
        scores, labels, boxes = self._present(prediction, "scores", "labels", "boxes")
        masks = self._masks(prediction)
        crowd = torch.zeros_like(labels, dtype=torch.bool)
        detections = self._pack(image, labels, boxes, None, scores, crowd, masks)
        target = target.to(boxes.device)
        labels, boxes = self._present(target, "labels", "boxes")
        masks = self._masks(target)
        crowd = torch.zeros_like(labels) if target.crowd is None else target.crowd
        ones = torch.ones_like(labels)
        return self._pack(image, labels, boxes, target.area, ones, crowd, masks), detections

    def held(self) -> tuple[Objects, Objects]:
        """Truth and detections of this process, with the images' places among those of all."""
        places = torch.tensor(share(list(self.image_ids)), dtype=torch.int64)
        return _placed(join(self.truth), places), _placed(join(self.detections), places)

    def _masks(self, holder: Prediction | Target) -> Tensor | None:
        return None if self.iou_type == "bbox" else self._present(holder, "masks")[0]

    def _pack(
        self,
        image: int,
        labels: Tensor,
        boxes: Tensor,
        areas: Tensor | None,
        scores: Tensor,
        crowd: Tensor,
        masks: Tensor | None,
    ) -> Objects:
        boxes = boxes.double()
        sides = boxes[:, 2:] - boxes[:, :2]
        runs = None if masks is None else encode(masks)
        if areas is None:
            areas = sides.prod(1) if runs is None else runs.areas()
        bands = None
        if masks is not None and self.iou_type == "boundary":
            bands = encode_bands(masks)
        return Objects(
            images=torch.full_like(labels, image, dtype=torch.int64),
            labels=labels.long(),
            boxes=torch.cat([boxes[:, :2], sides], 1),
            areas=areas.double(),
            scores=scores.double(),
            crowd=crowd.bool(),
            rows=torch.arange(len(labels), device=labels.device),
            masks=runs,
            bands=bands,
        )

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
