"""Box conversions and overlaps equal torchvision's."""

from __future__ import annotations

import torch
from torchvision.ops import box_convert, generalized_box_iou, generalized_box_iou_loss

from vitdense.ops.boxes import (
    cxcywh_to_xyxy,
    generalized_iou,
    relative_to_xyxy,
    xyxy_to_cxcywh,
    xyxy_to_relative,
)


def make_boxes(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 50
    size = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 30
    return torch.cat((start, start + size), 1)


def test_conversions_equal_torchvision_and_undo_each_other():
    boxes = make_boxes(20)
    centred = xyxy_to_cxcywh(boxes)
    torch.testing.assert_close(centred, box_convert(boxes, "xyxy", "cxcywh"))
    torch.testing.assert_close(cxcywh_to_xyxy(centred), boxes)


def test_relative_boxes_are_fractions_of_width_and_height():
    relative = xyxy_to_relative(torch.tensor([[20.0, 10, 60, 30]]), (40, 80))
    torch.testing.assert_close(relative, torch.tensor([[0.5, 0.5, 0.5, 0.5]]))
    boxes = make_boxes(20).reshape(4, 5, 4)
    torch.testing.assert_close(relative_to_xyxy(xyxy_to_relative(boxes, (70, 90)), (70, 90)), boxes)


def test_generalized_iou_of_all_pairs_equals_torchvision():
    first, second = make_boxes(30), make_boxes(20, seed=1)
    expected = generalized_box_iou(first, second)
    torch.testing.assert_close(generalized_iou(first[:, None], second[None]), expected)


def test_generalized_iou_of_matched_pairs_equals_torchvision():
    first, second = make_boxes(30), make_boxes(30, seed=1)
    expected = generalized_box_iou_loss(first, second, eps=0)
    torch.testing.assert_close(1 - generalized_iou(first, second), expected)
    torch.testing.assert_close(
        generalized_iou(first, second), generalized_box_iou(first, second).diagonal()
    )


def test_generalized_iou_of_boxes_without_area_is_finite_with_finite_gradients():
    points = torch.tensor([[3.0, 3, 3, 3], [0, 0, 0, 0], [5, 5, 5, 9]], requires_grad=True)
    overlaps = generalized_iou(points[:, None], points[None])
    overlaps.sum().backward()
    assert overlaps.isfinite().all()
    assert points.grad.isfinite().all()
