"""The base of heads that classify masks: outputs, loss, answers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vitdense.heads.base import Head
from vitdense.heads.segmentation.base import classify
from vitdense.losses.mask_criterion import MaskCriterion
from vitdense.losses.matcher import full_precision
from vitdense.ops.masks import mask_nms, masks_to_boxes
from vitdense.ops.panoptic import merge_masks
from vitdense.ops.restoring import restore_masks
from vitdense.structures import Frame, Level, Prediction, Size, Target, Task

TASKS: tuple[Task, ...] = ("semantic", "instance", "panoptic")
"""Values of the option `task`."""


@dataclass(slots=True)
class MaskOutputs:
    """Predictions of every layer that is trained, first to last.

    Attributes:
        logits: float [L, B, Q, C + 1], the last class is "no object".
        masks: L times float [B, Q, h, w], logits over the canvas. A list, because stacking would
            copy them, and not raised to float32: they are read at points, or a few at a time.
        canvas: (height, width) in pixels.
    """

    logits: Tensor
    masks: list[Tensor] = field(metadata={"own_type": True})
    canvas: Size


class MaskHead(Head):
    """Each query is a mask with a class; subclasses write `forward`, which gives `MaskOutputs`.

    All tasks are trained alike. They differ in what a true mask is (an object, a segment, or all
    pixels of a class), and in how masks become an answer.

    Args:
        task: what it answers.
        criterion: its loss.
        max_detections: instance: how many pairs of query and class are kept for each image.
        nms: instance: IoU above which the lesser of two masks of a class is dropped.
        score_threshold, overlap_threshold: panoptic: see `merge_masks`.

    Raises:
        ValueError: the task is none of these.
    """

    things: Tensor

    def __init__(
        self,
        levels: list[Level],
        num_classes: int,
        task: Task,
        criterion: MaskCriterion | None = None,
        max_detections: int = 100,
        nms: float | None = None,
        score_threshold: float = 0.8,
        overlap_threshold: float = 0.8,
    ) -> None:
        super().__init__(levels, num_classes)
        if task not in TASKS:
            raise ValueError(f"task: is {task!r}, not one of {', '.join(TASKS)}")
        self.task = task
        self.criterion = criterion or MaskCriterion()
        self.max_detections, self.nms = max_detections, nms
        self.score_threshold, self.overlap_threshold = score_threshold, overlap_threshold
        self.register_buffer("things", torch.ones(num_classes, dtype=torch.bool))

    def loss(self, outputs: MaskOutputs, targets: list[Target]) -> dict[str, Tensor]:
        """`class`, `mask` and `dice` of the last layer, and `_aux` of earlier ones."""
        return self.criterion(outputs.logits, outputs.masks, targets, self.task)

    def semantic_logits(self, outputs: MaskOutputs) -> Tensor:
        """Sum over queries of class times mask probability, float [B, C, h, w] in 0..Q."""
        classes = outputs.logits[-1].softmax(-1)[..., :-1]
        return torch.einsum("bqc,bqhw->bchw", classes, full_precision(outputs.masks[-1]).sigmoid())

    def probabilities(self, scores: Tensor) -> Tensor:
        """The share of each class, as the scores are sums of probabilities, not logits."""
        return scores / scores.sum(0).clamp(min=1e-6)

    def predict(self, outputs: MaskOutputs, frames: list[Frame]) -> list[Prediction]:
        """Answers of the last layer, for the head's task."""
        if self.task == "semantic":
            pairs = zip(self.semantic_logits(outputs), frames, strict=True)
            return [Prediction(semantic=classify(logits, frame)) for logits, frame in pairs]
        answer = self._instances if self.task == "instance" else self._segments
        triples = zip(outputs.logits[-1].float(), outputs.masks[-1], frames, strict=True)
        return [answer(*triple) for triple in triples]

    def _instances(self, logits: Tensor, masks: Tensor, frame: Frame) -> Prediction:
        """The best pairs of query and class whose masks have a pixel, best first."""
        # a stable sort: topk orders equal scores differently on every device
        scores, order = logits.softmax(-1)[:, :-1].flatten().sort(descending=True, stable=True)
        scores, best = scores[: self.max_detections], order[: self.max_detections]
        found, sureness = restore_masks(masks[best // self.num_classes], frame)
        scores, order = (scores * sureness).sort(descending=True, stable=True)
        order = order[: int((scores > 0).sum())]
        found, labels, scores = found[order], best[order] % self.num_classes, scores[: len(order)]
        if self.nms is not None:
            kept = mask_nms(found, labels, self.nms)
            found, labels, scores = found[kept], labels[kept], scores[kept]
        return Prediction(scores, labels, masks_to_boxes(found), found)

    def _segments(self, logits: Tensor, masks: Tensor, frame: Frame) -> Prediction:
        return merge_masks(
            logits, masks, self.things, frame, self.score_threshold, self.overlap_threshold
        )
