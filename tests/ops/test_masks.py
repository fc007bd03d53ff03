"""Mask conversions equal pycocotools and torchvision, and refuse what does not fit the image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from vitdense.ops.masks import (
    decode_segmentation,
    mask_nms,
    mask_to_rle,
    masks_to_boxes,
    polygons_to_mask,
    rle_to_mask,
)


def blobs(seed: int, height: int, width: int) -> np.ndarray:
    """A mask with runs of many lengths."""
    noise = np.random.default_rng(seed).normal(size=(height, width)).cumsum(axis=0)
    return noise > 0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 90), st.integers(1, 90))
def test_all_rle_forms_equal_pycocotools(seed: int, height: int, width: int) -> None:
    mask = blobs(seed, height, width)
    reference = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    ours = mask_to_rle(mask)
    assert ours == {"size": [height, width], "counts": reference["counts"].decode()}
    assert mask_to_rle(torch.from_numpy(mask)) == ours
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flat]))).tolist()
    runs = np.diff([0, *edges, flat.size]).tolist()
    for counts in (ours["counts"], reference["counts"], runs):
        decoded = decode_segmentation({"size": [height, width], "counts": counts}, height, width)
        assert decoded.dtype == bool
        assert np.array_equal(decoded, mask)


def test_long_runs_survive_compression() -> None:
    mask = np.zeros((3000, 2000), dtype=bool)
    mask[:, 1500:] = True
    mask[7, 3] = True
    assert np.array_equal(rle_to_mask(mask_to_rle(mask), 3000, 2000), mask)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.floats(-5, 60), min_size=6, max_size=12), min_size=1, max_size=3))
def test_polygons_equal_pycocotools(polygons: list[list[float]]) -> None:
    polygons = [points[: len(points) // 2 * 2] for points in polygons]
    reference = coco.decode(coco.merge(coco.frPyObjects(polygons, 40, 50)))
    assert np.array_equal(polygons_to_mask(polygons, 40, 50), reference.astype(bool))
    assert np.array_equal(decode_segmentation(polygons, 40, 50), reference.astype(bool))


@pytest.mark.parametrize("segmentation", [[], [[]], [[1, 1, 5, 5]], [[3.0, 3.0]]])
def test_polygons_without_area_cover_nothing(segmentation: list) -> None:
    mask = decode_segmentation(segmentation, 8, 9)
    assert mask.shape == (8, 9)
    assert not mask.any()


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, "segmentation is missing"),
        ("abc", "segmentation is a str"),
        ([[1, 2, 3, 4, 5, 6, 7]], "flat list of numbers"),
        ([[[1, 2], [3, 4], [5, 6]]], "flat list of numbers"),
        ([1, 2, 3, 4, 5, 6], "flat list of numbers"),
        ([["a", "b", "c", "d", "e", "f"]], "flat list of numbers"),
        ([[0, 0, 5, 5, float("nan"), 3]], "not finite or more than 14 pixels away"),
        ([[0, 0, 5, 5, 1e9, 3]], "not finite or more than 14 pixels away"),
        ({"counts": [35]}, "needs `size` and `counts`"),
        ({"size": [7, 5], "counts": [35]}, r"size \[7, 5\] does not fit an image of \[5, 7\]"),
        ({"size": 5, "counts": [35]}, "size 5 does not fit"),
        ({"size": [5, 7], "counts": 35}, "`counts` of an RLE is a int"),
        ({"size": [5, 7], "counts": [30, 4]}, "sum to 34"),
        ({"size": [5, 7], "counts": [40, -5]}, "whole numbers between 0"),
        ({"size": [5, 7], "counts": [17.5, 17.5]}, "whole numbers between 0"),
        ({"size": [5, 7], "counts": "0"}, "sum to 0"),
        ({"size": [5, 7], "counts": ""}, "belong to no run"),
        ({"size": [5, 7], "counts": "\x01\x02"}, "belong to no run"),
        ({"size": [5, 7], "counts": "PPYo0PP"}, "belong to no run"),
    ],
)
def test_what_is_wrong_is_said(segmentation: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_segmentation(segmentation, 5, 7)


def test_boxes_enclose_the_last_pixel_and_equal_torchvision_elsewise() -> None:
    masks = torch.from_numpy(np.stack([blobs(seed, 20, 30) for seed in range(5)]))
    last_pixel = torch.tensor([0, 0, 1, 1])
    assert torch.equal(masks_to_boxes(masks), torchvision.ops.masks_to_boxes(masks) + last_pixel)


def test_boxes_of_one_pixel_of_an_empty_mask_and_of_no_mask() -> None:
    masks = torch.zeros(2, 6, 8, dtype=torch.bool)
    masks[0, 2, 5] = True
    assert masks_to_boxes(masks).tolist() == [[5, 2, 6, 3], [0, 0, 0, 0]]
    assert masks_to_boxes(masks[:0]).shape == (0, 4)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.9])
def test_suppression_of_rectangles_is_that_of_their_boxes(threshold: float) -> None:
    torch.manual_seed(0)
    corners = torch.randint(0, 150, (60, 2))
    boxes = torch.cat([corners, corners + torch.randint(20, 50, (60, 2))], 1)
    masks = torch.zeros(60, 200, 200, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.tolist(), strict=True):
        mask[y1:y2, x1:x2] = True
    labels, scores = torch.arange(60) % 2, torch.linspace(1, 0, 60)
    expected = torchvision.ops.batched_nms(boxes.float(), scores, labels, threshold)
    kept = mask_nms(masks, labels, threshold)
    assert torch.equal(kept, expected)
    assert (len(kept) < 60) == (threshold < 0.9)


def test_suppression_of_no_mask() -> None:
    nothing = torch.zeros(0, 5, 5, dtype=torch.bool)
    assert mask_nms(nothing, torch.zeros(0, dtype=torch.int64), 0.5).shape == (0,)
