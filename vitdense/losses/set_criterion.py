"""The loss of every head that predicts a set: match, then compare class and box."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

from torch import Tensor

from vitdense.losses.classification import ClassLoss
from vitdense.losses.divisors import divisor, objects
from vitdense.losses.dot_masks import DotMasks
from vitdense.losses.matcher import HungarianMatcher, Truths, full_precision, match
from vitdense.ops.boxes import cxcywh_to_xyxy, overlaps
from vitdense.structures import Size, Target


@dataclass(slots=True)
class Queries:
    """Predictions that are matched together: one set per layer, group and image.

    Attributes:
        logits: float [L, B, G*Q, C].
        boxes: float [L, B, G*Q, 4], cxcywh in 0..1 of the canvas.
        agnostic: whether all truths count as class 0.
        groups: G, groups of Q queries side by side, each matched with all truths by itself.
        matches: int64 [B, T], the query of each truth where it is known (-1 for none); else
            matching finds it.
        details: what else is predicted and trained, float [L, B, G*Q, ...] each; `embeddings`
            [L, B, G*Q, M] are those of masks.
    """

    logits: Tensor
    boxes: Tensor
    agnostic: bool = False
    groups: int = 1
    matches: Tensor | None = None
    details: dict[str, Tensor] = field(default_factory=dict)

    def as_layers(self) -> Self:
        """The same predictions with every group of every layer as a layer: [L*G, B, Q, ...]."""
        if self.groups == 1:
            return self

        def split(x: Tensor) -> Tensor:
            return x.unflatten(2, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

        details = {name: split(x) for name, x in self.details.items()}
        return replace(self, logits=split(self.logits), boxes=split(self.boxes), details=details)


class SetCriterion:
    """Class loss of all queries; L1, generalized IoU and masks of matched ones; deep supervision.

    All layers are matched and compared at once. The last layer's terms have plain names, the sum
    over earlier layers ends in `_aux`: the same keys on every step and rank.

    Args:
        class_loss: the class loss and its cost in matching.
        class_cost: weight of the class in matching; L1 and GIoU have their weights in the loss.
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
        self,
        queries: dict[str, Queries],
        targets: list[Target],
        canvas: Size,
        masks: DotMasks | None = None,
    ) -> dict[str, Tensor]:
        """Compute the weighted terms.

        Args:
            queries: by the suffix of their terms' names, "" for the decoder.
            targets: labels and boxes (xyxy in pixels of the canvas) of each image.
            canvas: size of the canvas in pixels.
            masks: the true masks, for queries that have `embeddings`.

        Returns:
            scalars; zeros with a graph for box and mask terms without any truth.
        """
        truths = Truths.from_targets(targets, canvas)
        normalizer = divisor(sum(truths.counts), objects, truths.boxes)
        parts = {suffix: part.as_layers() for suffix, part in queries.items()}
        weights = self.weights | (masks.weights if masks is not None else {})
        losses = {}
        for suffix, found in self._match(parts, truths, masks).items():
            part = parts[suffix]
            truth = truths.agnostic() if part.agnostic else truths
            terms = self.terms(part, truth, found, normalizer)
            if masks is not None and "embeddings" in part.details:
                sums = masks.terms(part.details["embeddings"], found)
                terms |= {name: each / normalizer for name, each in sums.items()}
            for name, each in terms.items():
                layers = each.unflatten(0, (-1, part.groups)).mean(1) * weights[name]
                losses[name + suffix] = layers[-1]
                if len(layers) > 1:
                    losses[f"{name}{suffix}_aux"] = layers[:-1].sum()
        return losses

    def _match(
        self, parts: dict[str, Queries], truths: Truths, masks: DotMasks | None = None
    ) -> dict[str, Tensor]:
        """The query of each truth, int64 [L, B, T], for each part."""
        known = {
            suffix: part.matches.expand(len(part.logits), -1, -1)
            for suffix, part in parts.items()
            if part.matches is not None
        }
        unknown = [suffix for suffix in parts if suffix not in known]
        costs = [self._cost(parts[suffix], truths, masks) for suffix in unknown]
        found = dict(zip(unknown, match(costs, truths), strict=True)) | known
        return {suffix: found[suffix] for suffix in parts}

    def _cost(self, part: Queries, truths: Truths, masks: DotMasks | None) -> Tensor:
        """Cost of giving each truth to each query, float [L, B, T, Q]."""
        truths = truths.agnostic() if part.agnostic else truths
        of_masks = None
        if masks is not None and "embeddings" in part.details:
            of_masks = masks.cost(part.details["embeddings"])
        return self.matcher.cost(part.logits, part.boxes, truths, of_masks)

    def terms(
        self, queries: Queries, truths: Truths, matches: Tensor, normalizer: Tensor
    ) -> dict[str, Tensor]:
        """Unweighted terms of each layer, float [L], for given matches int64 [L, B, T]."""
        logits, boxes = full_precision(queries.logits), full_precision(queries.boxes)
        found = matches >= 0
        index = matches.clamp(min=0)[..., None].expand(-1, -1, -1, 4)
        chosen, truth = boxes.gather(2, index), truths.boxes.to(boxes.dtype)
        distances = (chosen - truth).abs().sum(-1) * found
        iou, giou = overlaps(cxcywh_to_xyxy(chosen), cxcywh_to_xyxy(truth))
        return {
            "class": self.class_loss.loss(logits, truths.labels, matches, iou.detach(), normalizer),
            "box": distances.sum((1, 2)) / normalizer,
            "giou": ((1 - giou) * found).sum((1, 2)) / normalizer,
        }
