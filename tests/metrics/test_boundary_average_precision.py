"""Boundary AP equals pycocotools' matching on overlaps by the published definition."""

from __future__ import annotations

import contextlib
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from tests.metrics import test_coco_exactness as exactness
from vitdense.metrics.boundaries import band_width, encode_bands
from vitdense.metrics.coco import CocoMetric
from vitdense.ops.masks import decode_segmentation
from vitdense.structures import Batch, Frame, Prediction, Target

pytest.importorskip("pycocotools")
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval


def band_of(mask: np.ndarray) -> np.ndarray:
    """The mask less its erosion by 2 % of the diagonal, 3 x 3 pixels a step, at least one."""
    steps = max(1, round(0.02 * math.hypot(*mask.shape)))
    return mask & ~ndimage.binary_erosion(mask, np.ones((3, 3)), steps, border_value=0)


class BoundaryEval(COCOeval):  # type: ignore[misc]
    """The smaller of the overlaps of masks and of their bands."""

    def computeIoU(self, imgId: int, catId: int) -> Any:
        whole = super().computeIoU(imgId, catId)
        entries = [*self._gts[imgId, catId], *self._dts[imgId, catId]]
        masks = [entry["segmentation"] for entry in entries]
        for entry, mask in zip(entries, masks, strict=True):
            band = band_of(decode_segmentation(mask, *mask["size"]))
            entry["segmentation"] = coco_mask.encode(np.asfortranarray(band, dtype=np.uint8))
        bands = super().computeIoU(imgId, catId)
        for entry, mask in zip(entries, masks, strict=True):
            entry["segmentation"] = mask
        return np.minimum(whole, bands) if len(whole) else whole


def stacked(entries: list[dict], size: tuple[int, int]) -> torch.Tensor:
    masks = [decode_segmentation(entry["segmentation"], *size) for entry in entries]
    return torch.from_numpy(np.stack(masks) if masks else np.zeros((0, *size), bool))


def fill(metric: CocoMetric, data: exactness.Generator) -> CocoMetric:
    """The data set through the metric, in dense masks."""
    for image in data.truth["images"]:
        size = image["height"], image["width"]
        there, found = (
            [entry for entry in entries if entry["image_id"] == image["id"]]
            for entries in (data.truth["annotations"], data.results)
        )
        labels = [
            torch.tensor([e["category_id"] // 7 for e in its]).long() for its in (there, found)
        ]
        target = Target(
            labels=labels[0],
            boxes=torch.zeros(len(there), 4),
            masks=stacked(there, size),
            crowd=torch.tensor([bool(entry["iscrowd"]) for entry in there]).bool(),
            area=torch.tensor([entry["area"] for entry in there]),
        )
        prediction = Prediction(
            scores=torch.tensor([entry["score"] for entry in found], dtype=torch.float64),
            labels=labels[1],
            boxes=torch.zeros(len(found), 4),
            masks=stacked(found, size),
        )
        frame = Frame(size, size, size)
        path = Path("image.jpg")
        metric.update(
            [prediction], Batch(torch.zeros(1, 3, 1, 1), [target], [frame], [image["id"]], [path])
        )
    return metric


@pytest.mark.parametrize("side", [40, 80])
def test_random_masks_equal_the_definition(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exactness, "SIDE", side)  # bands of 1 and of 2 pixels
    monkeypatch.setattr(exactness, "COCOeval", BoundaryEval)
    monkeypatch.setattr("vitdense.metrics.boundaries.MOST_PIXELS", 3 * side**2)
    values = []
    for seed in range(8):
        data = exactness.Generator(seed, "segm")
        for entry in data.truth["annotations"]:
            entry["area"] = float(np.float32(entry["area"]))
        for result in data.results:
            result["area"] = float(coco_mask.area(result["segmentation"]))
        metric = CocoMetric([str(c) for c in range(data.classes + 1)], iou_type="boundary")
        theirs = exactness.reference(data.truth, data.results, "segm", metric.rules)
        exactness.assert_equal(fill(metric, data).curves(), theirs)
        with contextlib.redirect_stdout(io.StringIO()):
            theirs.summarize()
        expected = np.where(theirs.stats == -1, np.nan, theirs.stats)
        numbers = list(metric.compute().values())[:12]
        np.testing.assert_allclose(numbers, expected, atol=1e-9)
        values.append(expected[0])
    assert np.nanmax(values) > 0.05


def test_bands_equal_the_definition() -> None:
    rng = np.random.default_rng(0)
    for size in ((1, 1), (7, 90), (120, 31), (150, 160)):
        fields = ndimage.gaussian_filter(rng.normal(size=(5, *size)), (0, 3, 3))
        masks = np.concatenate(
            [fields > 0.01, np.ones((1, *size), bool), np.zeros((1, *size), bool)]
        )
        strings = encode_bands(torch.from_numpy(masks)).strings()
        for mask, text in zip(masks, strings, strict=True):
            band = np.asfortranarray(band_of(mask), dtype=np.uint8)
            assert coco_mask.encode(band)["counts"].decode() == text
    assert band_width((150, 160), 0.02) == 4
    assert len(encode_bands(torch.zeros(0, 5, 6, dtype=torch.bool))) == 0


def test_other_programs_are_refused() -> None:
    with pytest.raises(ValueError, match="^backend: pycocotools knows no iou_type boundary"):
        CocoMetric(["a"], iou_type="boundary", backend="pycocotools")


def test_boxes_stand_beside() -> None:
    data = exactness.Generator(2, "segm")
    metric = CocoMetric([str(c) for c in range(data.classes + 1)], iou_type="boundary",
                        boxes_too=True)  # fmt: skip
    assert {"AP", "box_AP"} <= set(fill(metric, data).compute())
