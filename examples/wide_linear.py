"""A head of one's own: concatenate the pyramid at its finest level, then classify each pixel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitdense import HEADS, Head
from vitdense.registry import Fraction
from vitdense.structures import IGNORE, Frame, Level, Prediction, Target


@HEADS.register("wide_linear")
class WideLinearHead(Head):
    """Per-pixel classes from all levels at once."""

    task = "semantic"

    def __init__(
        self,
        levels: list[Level],
        num_classes: int,
        *,
        width: int = 256,  # channels after the concatenation
        dropout: Fraction = 0.1,  # before the classifier
    ) -> None:
        super().__init__(levels, num_classes)
        channels = sum(level.channels for level in levels)
        self.fuse = nn.Sequential(nn.Conv2d(channels, width, 1), nn.GroupNorm(1, width), nn.GELU())
        self.classify = nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(width, num_classes, 1))

    def forward(self, features: list[Tensor], targets: list[Target] | None = None) -> Tensor:
        """Logits, float [B, num_classes, h, w] at the finest level's stride."""
        size = features[0].shape[-2:]
        maps = [F.interpolate(m, size, mode="bilinear", align_corners=False) for m in features]
        return self.classify(self.fuse(torch.cat(maps, 1)))

    def loss(self, outputs: Tensor, targets: list[Target]) -> dict[str, Tensor]:
        """Cross-entropy over the pixels that are not ignored."""
        truth = torch.stack([t.semantic for t in targets if t.semantic is not None]).long()
        logits = F.interpolate(
            outputs.float(), truth.shape[-2:], mode="bilinear", align_corners=False
        )
        total = F.cross_entropy(logits, truth, ignore_index=IGNORE, reduction="sum")
        return {"ce": total / (truth != IGNORE).sum().clamp(min=1)}

    def predict(self, outputs: Tensor, frames: list[Frame]) -> list[Prediction]:
        """The best class of each pixel of the original images."""
        return [
            Prediction(semantic=frame.restore_map(logits.float()).argmax(0))
            for logits, frame in zip(outputs, frames, strict=True)
        ]

    def semantic_logits(self, outputs: Tensor) -> Tensor:
        """What windows, flips and scales average."""
        return outputs
