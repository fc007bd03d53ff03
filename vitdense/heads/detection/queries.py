"""What heads with object queries share: outputs, losses, answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vitdense.heads.base import Head
from vitdense.losses.set_criterion import Queries, SetCriterion
from vitdense.ops.boxes import relative_to_xyxy
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
        encoder_logits: float [1, B, S, C], of every cell as a proposal; None without two stages.
        encoder_boxes: float [1, B, S, 4], like `boxes`.
    """

    logits: Tensor
    boxes: Tensor
    canvas: Size
    encoder_logits: Tensor | None = None
    encoder_boxes: Tensor | None = None


class QueryHead(Head):
    """A detection head whose outputs are `QueryOutputs`.

    Subclasses set `criterion` and say in `candidates` what their logits mean.
    """

    task: ClassVar[Task] = "detection"
    criterion: SetCriterion

    def __init__(
        self, levels: list[Level], num_classes: int, max_detections: int, nms: float | None
    ) -> None:
        super().__init__(levels, num_classes)
        self.max_detections, self.nms = max_detections, nms

    def loss(self, outputs: QueryOutputs, targets: list[Target]) -> dict[str, Tensor]:
        """`class`, `box` and `giou` of the last layer, `_aux` of earlier ones, `_encoder`."""
        queries = {"": Queries(outputs.logits, outputs.boxes)}
        if outputs.encoder_logits is not None and outputs.encoder_boxes is not None:
            queries["_encoder"] = self.proposals(outputs.encoder_logits, outputs.encoder_boxes)
        return self.criterion(queries, targets, outputs.canvas)

    def proposals(self, logits: Tensor, boxes: Tensor) -> Queries:
        """How the first stage is trained: for each cell's class by default."""
        return Queries(logits, boxes)

    def candidates(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the last layer's logits [B, Q, C] could answer, in any order.

        Returns:
            scores float [B, N] in 0..1, labels int64 [B, N], and the query of each int64 [B, N].
        """
        raise NotImplementedError

    def predict(self, outputs: QueryOutputs, frames: list[Frame]) -> list[Prediction]:
        """The best `max_detections` candidates of each image, best first."""
        scores, labels, queries = self.candidates(outputs.logits[-1].float())
        # a stable sort: topk orders equal scores differently on every device
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        count = self.max_detections if self.nms is None else SUPPRESSED * self.max_detections
        scores, best = scores[:, :count], order[:, :count]
        labels, chosen = labels.gather(1, best), queries.gather(1, best)
        boxes = outputs.boxes[-1].float().gather(1, chosen[..., None].expand(-1, -1, 4))
        boxes = relative_to_xyxy(boxes, outputs.canvas)
        return [
            self._answer(scores[i], labels[i], frame.restore_boxes(boxes[i]))
            for i, frame in enumerate(frames)
        ]

    def _answer(self, scores: Tensor, labels: Tensor, boxes: Tensor) -> Prediction:
        if self.nms is not None:
            from torchvision.ops import batched_nms

            kept = batched_nms(boxes, scores, labels, self.nms)[: self.max_detections]
            scores, labels, boxes = scores[kept], labels[kept], boxes[kept]
        return Prediction(scores=scores, labels=labels, boxes=boxes)
