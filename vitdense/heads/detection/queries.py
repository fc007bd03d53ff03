"""What heads with object queries share: outputs, losses, answers."""

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
"""Candidates that non-maximum suppression chooses from, in multiples of what is kept."""


@dataclass(slots=True)
class QueryOutputs:
    """Predictions of every decoder layer, first to last.

    Attributes:
        logits: float [L, B, Q, C].
        boxes: float [L, B, Q, 4], cxcywh in 0..1 of the canvas.
        canvas: (height, width) in pixels.
        groups: sets of queries that Q consists of; answers come from the first.
        others: what is trained beside them, by the suffix of its terms: `_encoder` are the
            proposals of the first stage, `_denoising` the queries made of noisy truth.
        details: what else is predicted and trained, float [L, B, Q, ...] each: of heads with masks
            the `embeddings` [L, B, Q, M].
        pixels: float [B, M, h, w], features over the canvas: their products with an embedding are
            the logits of its mask.
    """

    logits: Tensor
    boxes: Tensor
    canvas: Size
    groups: int = 1
    others: dict[str, Queries] = field(default_factory=dict)
    details: dict[str, Tensor] = field(default_factory=dict)
    pixels: Tensor | None = None


class QueryHead(Head):
    """A detection head whose outputs are `QueryOutputs`.

    Subclasses set `criterion` and say in `candidates` what their logits mean.
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
            wanted: else nothing is added, and ValueError raised for options that need masks.
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
        """What makes mask embeddings of queries."""
        return None if self.masks is None else self.masks.embed

    def pixels(self, finest: Tensor, features: list[Tensor]) -> Tensor | None:
        """What makes masks of them: `MaskBranch.forward`, if there is one."""
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

        Returns:
            scores float [B, N] in 0..1, labels int64 [B, N], and the query of each int64 [B, N].
        """
        raise NotImplementedError

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
        """Without the lesser of boxes that overlap, if so wanted; and the queries of the rest."""
        if self.nms is None:
            return found, queries
        from torchvision.ops import batched_nms

        scores, labels, boxes = found.scores, found.labels, found.boxes
        assert scores is not None and labels is not None and boxes is not None
        kept = batched_nms(boxes, scores, labels, self.nms)[: self.max_detections]
        return Prediction(scores[kept], labels[kept], boxes[kept]), queries[kept]


class SigmoidQueryHead(QueryHead):
    """A query head whose classes are independent: every pair of query and class may answer."""

    def candidates(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Every pair of query and class."""
        scores = logits.sigmoid().flatten(1)
        pairs = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
        return scores, pairs % self.num_classes, pairs // self.num_classes


def best_first(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest of each row, best first, and their places; equal ones in their order.

    Args:
        scores: float32 [B, N], not negative.
    """
    # Such numbers are in the order of their bits. Places behind these break ties, which topk itself
    # orders differently on every device; a stable sort of all takes ten times as long.
    places = torch.arange(scores.shape[1], device=scores.device)
    keys = (scores.view(torch.int32).long() << 32) - places
    best = keys.topk(min(count, len(places)), dim=1).indices
    return scores.gather(1, best), best
