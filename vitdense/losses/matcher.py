"""Bipartite matching of queries and truths, for all images and layers in one trip to the host."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vitdense.losses.classification import ClassLoss
from vitdense.ops.boxes import cxcywh_to_xyxy, generalized_iou, xyxy_to_relative
from vitdense.structures import Size, Target

log = logging.getLogger(__name__)

FAULT = -1e6
"""Replaces a cost that is not finite: such a pair is matched first, so that the loss shows it."""


class Counted(Protocol):
    """Padded truths: labels int64 [B, T], and how many of the T are real in each image."""

    labels: Tensor
    counts: list[int]


@dataclass(slots=True)
class Truths:
    """The truth of a batch, padded to the image with most objects.

    Attributes:
        labels: int64 [B, T].
        boxes: float [B, T, 4], cxcywh in 0..1 of the canvas.
        counts: how many of the T are real in each image.
    """

    labels: Tensor
    boxes: Tensor
    counts: list[int]

    @classmethod
    def from_targets(cls, targets: list[Target], canvas: Size) -> Self:
        """Pad the labels and the boxes (xyxy in pixels of the canvas) of each image."""
        labels = [target.labels for target in targets if target.labels is not None]
        boxes = [target.boxes for target in targets if target.boxes is not None]
        if not len(labels) == len(boxes) == len(targets):
            raise ValueError("targets: a detection head needs the labels and the boxes of each")
        padded = pad_sequence(boxes, batch_first=True)
        return cls(
            labels=pad_sequence(labels, batch_first=True),
            boxes=xyxy_to_relative(padded, canvas),
            counts=[len(each) for each in labels],
        )

    def agnostic(self) -> Self:
        """The same boxes, all labelled 0, for queries that do not tell classes apart."""
        return type(self)(torch.zeros_like(self.labels), self.boxes, self.counts)


class HungarianMatcher:
    """What it costs to match a query with a truth; `match` then finds the assignment.

    Args:
        class_loss: gives the class cost.
        class_weight, box_weight, giou_weight: of the class cost, of the L1 distance between
            cxcywh in 0..1, and of minus the generalized IoU.
    """

    def __init__(
        self,
        class_loss: ClassLoss,
        class_weight: float,
        box_weight: float,
        giou_weight: float,
    ) -> None:
        self.class_loss = class_loss
        self.class_weight = class_weight
        self.box_weight = box_weight
        self.giou_weight = giou_weight

    @torch.no_grad()
    def cost(
        self, logits: Tensor, boxes: Tensor, truths: Truths, others: Tensor | None = None
    ) -> Tensor:
        """Cost of giving each truth to each query of its own image.

        Args:
            logits: float [L, B, Q, C]; boxes: float [L, B, Q, 4], cxcywh in 0..1.
            others: float [L, B, T, Q], further costs, such as those of masks.

        Returns:
            float32 (float64 for such inputs) [L, B, T, Q], finite.
        """
        logits, boxes = full_precision(logits), full_precision(boxes)
        truth = truths.boxes.to(boxes.dtype)
        classes = self.class_loss.cost(logits, truths.labels)
        distances = torch.cdist(truth.expand(len(boxes), -1, -1, -1), boxes, p=1)
        overlaps = generalized_iou(
            cxcywh_to_xyxy(truth)[None, :, :, None], cxcywh_to_xyxy(boxes)[:, :, None]
        )
        cost = (
            self.class_weight * classes + self.box_weight * distances - self.giou_weight * overlaps
        )
        if others is not None:
            cost = cost + others
        return cost.nan_to_num(FAULT, FAULT, FAULT)


def match(costs: list[Tensor], truths: Counted) -> list[Tensor]:
    """Assign queries to truths, each at most once, at the least total cost.

    Args:
        costs: float [L, B, T, Q] each; L and Q may differ.

    Returns:
        int64 [L, B, T] for each: the query of each truth, -1 for padding and for truths that
        found no query because there are more truths than queries.
    """
    if not costs:
        return []
    queries = min(cost.shape[-1] for cost in costs)
    if max(truths.counts, default=0) > queries:
        _warn_of_few(queries)
    device = costs[0].device
    host = copy_to_host(torch.cat([cost.flatten() for cost in costs])).numpy()
    matches = np.full(sum(cost[..., 0].numel() for cost in costs), -1)
    parts = np.split(host, np.cumsum([cost.numel() for cost in costs[:-1]]))
    places = np.split(matches, np.cumsum([cost[..., 0].numel() for cost in costs[:-1]]))
    for cost, part, place in zip(costs, parts, places, strict=True):
        _assign(part.reshape(cost.shape), place.reshape(cost.shape[:3]), truths.counts)
    back = torch.from_numpy(matches).to(device, non_blocking=True)
    pieces = back.split([len(place) for place in places])
    return [piece.view(cost.shape[:3]) for piece, cost in zip(pieces, costs, strict=True)]


@cache
def _warn_of_few(queries: int) -> None:
    """Once for each number."""
    log.warning(
        "an image has more objects than the head has queries, %d: the rest are not learned; raise "
        "model.head.queries",
        queries,
    )


def _assign(costs: np.ndarray, matches: np.ndarray, counts: list[int]) -> None:
    from scipy.optimize import linear_sum_assignment

    for layer, image in np.ndindex(costs.shape[:2]):
        truths, queries = linear_sum_assignment(costs[layer, image, : counts[image]])
        matches[layer, image, truths] = queries


def copy_to_host(costs: Tensor) -> Tensor:
    """The only copy of a training step that waits for the device."""
    return costs.cpu()


def full_precision(x: Tensor) -> Tensor:
    """At least float32: overlaps and assignments do not survive in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
