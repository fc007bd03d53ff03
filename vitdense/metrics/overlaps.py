"""Overlap of pairs of boxes or masks, equal to pycocotools' to the last bit.

Overlap is intersection over union; with a crowd region, over the area of the detection alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitdense.ops.run_length import MOST_EDGES, RunLengths, chunks, spread


def box_overlaps(detections: Tensor, truth: Tensor, crowd: Tensor) -> Tensor:
    """Overlap of each pair of boxes, computed in the order in which pycocotools does.

    Args:
        detections, truth: float64 [P, 4], x, y, width and height.
        crowd: bool [P], whether the truth is a crowd region.

    Returns:
        float64 [P] in 0..1.
    """
    common = _common_area(detections, truth)
    area = detections[:, 2] * detections[:, 3]
    union = area + truth[:, 2] * truth[:, 3] - common
    return torch.where(common > 0, common / torch.where(crowd, area, union), 0.0)


def _common_area(first: Tensor, second: Tensor) -> Tensor:
    """float64 [P] area that two xywh boxes share."""
    far = torch.minimum(first[:, 2:] + first[:, :2], second[:, 2:] + second[:, :2])
    sides = (far - torch.maximum(first[:, :2], second[:, :2])).clamp(min=0)
    return sides[:, 0] * sides[:, 1]


class MaskOverlaps:
    """Overlap of pairs of masks, from their run lengths: no mask is ever unpacked.

    Pairs whose boxes and areas cannot reach `lowest` get 0 without a look at their runs.
    """

    def __init__(self, detections: RunLengths, truth: RunLengths, lowest: float) -> None:
        self.detections, self.truth, self.lowest = detections, truth, lowest
        self.areas = detections.areas(), truth.areas()
        self.boxes = _xywh(detections.boxes()), _xywh(truth.boxes())
        self._index_truth(truth)

    def _index_truth(self, truth: RunLengths) -> None:
        """One sorted list of all edges, so that one search serves all masks."""
        self.stride = int(truth.sizes.prod(1).max()) + 1 if len(truth) else 1
        self.keys = truth.edges + truth.owners() * self.stride
        spans = truth.edges[1::2].long() - truth.edges[::2]
        # Pixels of this mask and those before it in the list, up to each edge.
        self.covered = spans.cumsum(0).repeat_interleave(2)
        self.covered[::2] -= spans

    def __call__(self, detection: Tensor, truth: Tensor, crowd: Tensor) -> Tensor:
        """Overlap of each pair.

        Args:
            detection, truth: int64 [P], positions of the masks.
            crowd: bool [P], whether the truth is a crowd region.

        Returns:
            float64 [P] in 0..1.
        """
        area, other = self.areas[0][detection], self.areas[1][truth]
        most = _common_area(self.boxes[0][detection], self.boxes[1][truth]).long()
        most = most.minimum(area).minimum(other)
        whole = torch.where(crowd, area, area + other - most).clamp(min=1)
        same = (self.detections.sizes[detection] == self.truth.sizes[truth]).all(1)
        near = (same & (most > 0) & (most / whole.double() >= self.lowest - 1e-9)).nonzero()[:, 0]
        common = torch.zeros_like(area)
        common[near] = self._intersections(detection[near], truth[near])
        whole = torch.where(crowd, area, area + other - common).clamp(min=1)
        return common.double() / whole.double()

    def _intersections(self, detection: Tensor, truth: Tensor) -> Tensor:
        """int64 [P] pixels that both masks cover."""
        lengths = self.detections.starts.diff()[detection]
        common = torch.zeros_like(detection)
        for part in chunks(lengths, MOST_EDGES):
            places = spread(self.detections.starts[detection[part]], lengths[part])
            owner = torch.arange(len(lengths[part]), device=places.device)
            owner = owner.repeat_interleave(lengths[part], output_size=len(places))
            edges = self.detections.edges[places]
            covered = self._covered(edges, truth[part][owner])
            spans = covered[1::2] - covered[::2]
            common[part] = common.new_zeros(len(lengths[part])).index_add_(0, owner[::2], spans)
        return common

    def _covered(self, pixels: Tensor, truth: Tensor) -> Tensor:
        """Pixels before `pixels` that a mask covers, plus the same number for all of one mask."""
        # The edge at or before the pixel; before the first edge of all nothing is covered.
        place = torch.searchsorted(self.keys, pixels + truth * self.stride, right=True) - 1
        edge = place.clamp(min=0)
        inside = (place % 2 == 0) & (place >= 0)
        beyond = pixels + truth * self.stride - self.keys[edge]
        return torch.where(place >= 0, self.covered[edge], 0) + torch.where(inside, beyond, 0)


def _xywh(boxes: Tensor) -> Tensor:
    boxes = boxes.double()
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
