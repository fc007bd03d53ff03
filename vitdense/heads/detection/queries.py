"""What heads with object queries share: outputs, losses, answers.

In this folder a *cell* is a position of a feature map. A query has a *content* (what it has found
so far), a *place* (its position embedding) and a *reference* (the point or box to which the box
that it predicts is relative).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vitdense.heads.base import Head
from vitdense.heads.detection.masks import MaskBranch, check_mask_options
from vitdense.losses.dot_masks import DotMasks
from vitdense.losses.set_criterion import Queries, SetCriterion
from vitdense.ops.boxes import relative_to_xyxy
from vitdense.ops.restoring import restore_products
from vitdense.structures import Frame, Level, Prediction, Size, Target, Task

SUPPRESSED = 10
"""Non-maximum suppression chooses from this many times `max_detections` candidates."""


@dataclass(slots=True)
class QueryOutputs:
    """Predictions of every decoder layer, first to last.

    Attributes:
        logits: float [L, B, Q, C].
        boxes: float [L, B, Q, 4], cxcywh in 0..1 of the canvas.
        canvas: (height, width) in pixels.
        groups: how many groups the Q queries consist of; only the first group answers.
        others: other queries that are trained, by the suffix of their loss terms: `_encoder` are
            the proposals of the first stage, `_denoising` the queries made of noisy truth.
        details: what is predicted beside classes and boxes, float [L, B, Q, ...] each; heads with
            masks have `embeddings` [L, B, Q, M].
        pixels: float [B, M, h, w], features over the canvas; the product with a query's embedding
            gives the logits of its mask. None without masks.
    """

    logits: Tensor
    boxes: Tensor
    canvas: Size
    groups: int = 1
    others: dict[str, Queries] = field(default_factory=dict)
    details: dict[str, Tensor] = field(default_factory=dict)
    pixels: Tensor | None = None


class QueryHead(Head):
    """A detection head whose outputs are `QueryOutputs`; subclasses set `criterion`.

    Args:
        max_detections: answers that are kept for each image.
        nms: IoU from which the lesser of two boxes of a class is dropped; None = none is.
        score_threshold: answers with a lower score are left out.
    """

    task: Task = "detection"
    criterion: SetCriterion

    def __init__(
        self,
        levels: list[Level],
        num_classes: int,
        max_detections: int,
        nms: float | None,
        score_threshold: float = 0.0,
    ) -> None:
        super().__init__(levels, num_classes)
        self.max_detections, self.nms = max_detections, nms
        self.score_threshold = score_threshold
        self.masks: MaskBranch | None = None
        self.mask_points, self.mask_weight = 0, 0.0

    def add_masks(self, wanted: bool, finest: int, width: int, points: int, weight: float) -> None:
        """Answer masks beside boxes, and learn them; see `MaskBranch` and `DotMasks`.

        Args:
            wanted: the option `masks`; without it nothing is added, and `points` and `weight` must
                have their defaults (ValueError).
            finest: index of the finest level that the encoder reads.
            width: of queries and cells.
            points, weight: of the mask losses.
        """
        check_mask_options(wanted, points, weight)
        if not wanted:
            return
        self.task = "instance"
        self.mask_points, self.mask_weight = points, weight
        self.masks = MaskBranch(self.levels, finest, width)

    @property
    def embed(self) -> nn.Module | None:
        """The layers that make mask embeddings of queries; None without masks."""
        return None if self.masks is None else self.masks.embed

    def pixels(self, finest: Tensor, features: list[Tensor]) -> Tensor | None:
        """Features of pixels, as `MaskBranch.forward` gives them; None without masks."""
        return None if self.masks is None else self.masks(finest, features)

    def loss(self, outputs: QueryOutputs, targets: list[Target]) -> dict[str, Tensor]:
        """`class`, `box` and `giou` of the last layer, `_aux` of earlier ones, and of `others`.

        With masks also `mask` (cross-entropy) and `dice`.
        """
        queries = Queries(
            outputs.logits, outputs.boxes, groups=outputs.groups, details=outputs.details
        )
        masks = None
        if outputs.pixels is not None:
            masks = DotMasks(outputs.pixels, targets, self.mask_points, self.mask_weight)
        return self.criterion({"": queries, **outputs.others}, targets, outputs.canvas, masks)

    def candidates(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the last layer's logits [B, Q, C] could answer, in any order.

        Classes are independent here: every pair of query and class may answer.

        Returns:
            scores float [B, N] in 0..1, labels int64 [B, N], and the query of each int64 [B, N].
        """
        scores = logits.sigmoid().flatten(1)
        pairs = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
        return scores, pairs % self.num_classes, pairs // self.num_classes

    def predict(self, outputs: QueryOutputs, frames: list[Frame]) -> list[Prediction]:
        """The best `max_detections` candidates of each image that are sure enough, best first."""
        first = outputs.logits.shape[2] // outputs.groups
        scores, labels, queries = self.candidates(outputs.logits[-1, :, :first].float())
        count = self.max_detections if self.nms is None else SUPPRESSED * self.max_detections
        scores, best = best_first(scores, count)
        labels, chosen = labels.gather(1, best), queries.gather(1, best)
        boxes = outputs.boxes[-1].float().gather(1, chosen[..., None].expand(-1, -1, 4))
        boxes = relative_to_xyxy(boxes, outputs.canvas)
        answers = []
        for i, (frame, sure) in enumerate(zip(frames, self._sure(scores), strict=True)):
            found = Prediction(
                scores[i, :sure], labels[i, :sure], frame.restore_boxes(boxes[i, :sure])
            )
            found, its_queries = self._suppress(found, chosen[i, :sure])
            if outputs.pixels is not None:
                embeddings = outputs.details["embeddings"][-1, i, its_queries].float()
                found.masks = restore_products(embeddings, outputs.pixels[i].float(), frame)
            answers.append(found)
        return answers

    def _sure(self, scores: Tensor) -> list[int]:
        """How many of each image's scores [B, N], best first, reach the threshold."""
        if not self.score_threshold:
            return [scores.shape[1]] * len(scores)
        return (scores >= self.score_threshold).sum(1).tolist()

    def _suppress(self, found: Prediction, queries: Tensor) -> tuple[Prediction, Tensor]:
        """What non-maximum suppression keeps, if there is any, and the queries of that."""
        if self.nms is None:
            return found, queries
        from torchvision.ops import batched_nms

        scores, labels, boxes = found.scores, found.labels, found.boxes
        assert scores is not None and labels is not None and boxes is not None
        kept = batched_nms(boxes, scores, labels, self.nms)[: self.max_detections]
        return Prediction(scores[kept], labels[kept], boxes[kept]), queries[kept]


def best_first(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest scores of each row, best first, and their indices.

    Equal scores stay in their order, on every device. A stable sort does that too, but takes ten
    times as long as this `topk`, whose keys are all different.

    Args:
        scores: float32 [B, N], not negative.
    """
    # the bits of floats from 0 on sort like the numbers; the index below them breaks ties
    places = torch.arange(scores.shape[1], device=scores.device)
    keys = (scores.view(torch.int32).long() << 32) - places
    best = keys.topk(min(count, len(places)), dim=1).indices
    return scores.gather(1, best), best
