"""What every head promises."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vitdense.structures import Frame, Level, Prediction, Size, Target, Task


class Head(nn.Module):
    """A pyramid in, answers out.

    Subclasses take the levels and the number of classes first and their options after `*`.
    The canvas is a multiple of every level's stride, so level sizes times strides are exact.

    Attributes:
        task: what the head answers; it chooses the metric.
        levels: the maps it reads, finest first.
        num_classes: classes 0..num_classes-1.
    """

    task: Task

    def __init__(self, levels: list[Level], num_classes: int) -> None:
        super().__init__()
        self.levels = levels
        self.num_classes = num_classes

    def forward(self, features: list[Tensor], targets: list[Target] | None = None) -> Any:
        """Compute the outputs: the same type in training and in evaluation.

        Args:
            features: float [B, C_i, H_i, W_i], one per level, finest first.
            targets: in training, for heads that show truth to their queries; else None.
        """
        raise NotImplementedError

    def loss(self, outputs: Any, targets: list[Target]) -> dict[str, Tensor]:
        """Named, already weighted terms whose sum is the objective; finite for empty targets."""
        raise NotImplementedError

    def predict(self, outputs: Any, frames: list[Frame]) -> list[Prediction]:
        """Answers in the pixels of each original image."""
        raise NotImplementedError

    def semantic_logits(self, outputs: Any) -> Tensor:
        """Scores of each class, float [B, C, h, w] over the canvas, for heads with task semantic.

        `predict` answers with the best class of each pixel. Sliding windows and flipped or scaled
        images average them before.
        """
        raise NotImplementedError

    def probabilities(self, scores: Tensor) -> Tensor:
        """Probability of each class, 0..1, from `semantic_logits` of one image, float [C, h, w]."""
        return scores.softmax(0)

    def canvas(self, features: list[Tensor]) -> Size:
        """(height, width) in pixels of the canvas that the features cover."""
        height, width = features[0].shape[-2:]
        stride = self.levels[0].stride
        return round(height * stride), round(width * stride)
