"""The loss of every head that predicts a set: match, then compare class and box."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitdense.losses.classification import ClassLoss
from vitdense.losses.matcher import HungarianMatcher, Truths, full_precision, match
from vitdense.ops.boxes import cxcywh_to_xyxy, generalized_iou
from vitdense.structures import Size, Target


@dataclass(slots=True)
class Queries:
    """Predictions that are matched together: one set per layer and image.

    Attributes:
        logits: float [L, B, Q, C].
        boxes: float [L, B, Q, 4], cxcywh in 0..1 of the canvas.
        agnostic: whether the truth is one class, 0.
    """

    logits: Tensor
    boxes: Tensor
    agnostic: bool = False


class SetCriterion:
    """Class loss, L1 and generalized IoU of matched queries, with deep supervision.

    All layers are matched and compared at once. The last layer's terms carry plain names, the
    sum over earlier layers ends in `_aux`: the same keys on every step and rank.

    Args:
        class_loss: which class loss, and its cost.
        class_cost: of the class in matching; the box terms cost what they weigh.
        class_weight, box_weight, giou_weight: of the terms.
    """

    def __init__(
        self,
        class_loss: ClassLoss,
        *,
        class_cost: float,
        class_weight: float,
        box_weight: float = 5.0,
        giou_weight: float = 2.0,
    ) -> None:
        self.class_loss = class_loss
        self.matcher = HungarianMatcher(class_loss, class_cost, box_weight, giou_weight)
        self.weights = {"class": class_weight, "box": box_weight, "giou": giou_weight}

    def __call__(
        self, queries: dict[str, Queries], targets: list[Target], canvas: Size
    ) -> dict[str, Tensor]:
        """Compute the weighted terms.

        Args:
            queries: by the suffix of their terms' names, "" for the decoder.
            targets: labels and boxes (xyxy in pixels of the canvas) of each image.
            canvas: size of the canvas in pixels.

        Returns:
            scalars; zeros with a graph for box terms without any truth.
        """
        truths = Truths.from_targets(targets, canvas)
        normalizer = count_truths(truths)
        parts = [(q, truths.agnostic() if q.agnostic else truths) for q in queries.values()]
        matches = match([self.matcher.cost(q.logits, q.boxes, t) for q, t in parts], truths)
        losses = {}
        for suffix, (part, truth), found in zip(queries, parts, matches, strict=True):
            for name, layers in self.terms(part, truth, found, normalizer).items():
                weighted = layers * self.weights[name]
                losses[name + suffix] = weighted[-1]
                if len(weighted) > 1:
                    losses[f"{name}{suffix}_aux"] = weighted[:-1].sum()
        return losses

    def terms(
        self, queries: Queries, truths: Truths, matches: Tensor, normalizer: Tensor
    ) -> dict[str, Tensor]:
        """Unweighted terms of each layer, float [L], for given matches int64 [L, B, T]."""
        logits, boxes = full_precision(queries.logits), full_precision(queries.boxes)
        classes = self.class_loss.loss(logits, truths.labels, matches, normalizer)
        found = matches >= 0
        index = matches.clamp(min=0)[..., None].expand(-1, -1, -1, 4)
        chosen, truth = boxes.gather(2, index), truths.boxes.to(boxes.dtype)
        distances = (chosen - truth).abs().sum(-1) * found
        overlaps = generalized_iou(cxcywh_to_xyxy(chosen), cxcywh_to_xyxy(truth))
        return {
            "class": classes,
            "box": distances.sum((1, 2)) / normalizer,
            "giou": ((1 - overlaps) * found).sum((1, 2)) / normalizer,
        }


def count_truths(truths: Truths) -> Tensor:
    """Number of truths in the batch, averaged over the ranks, at least 1; a scalar."""
    count = torch.full((), float(sum(truths.counts)), device=truths.boxes.device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
        count /= torch.distributed.get_world_size()
    return count.clamp(min=1)
