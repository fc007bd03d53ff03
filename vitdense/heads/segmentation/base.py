"""What every semantic head shares: its outputs, its loss, its answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitdense.heads.base import Head
from vitdense.losses.dense import DenseLoss
from vitdense.structures import Frame, Level, Prediction, Size, Target

CHUNK = 2**26
"""Logits that are brought to original size at once: 256 MiB of float32."""


@dataclass(slots=True)
class SemanticOutputs:
    """Logits of each class at the stride of a level.

    Attributes:
        logits: float [B, C, h, w].
        aux: float [B, C, h', w'] of the auxiliary classifier, None if the head has none.
    """

    logits: Tensor
    aux: Tensor | None = None


class SemanticHead(Head):
    """One class per pixel; subclasses only write `forward`, which returns `SemanticOutputs`.

    Args:
        losses, class_weights, label_smoothing: see `DenseLoss`.
        aux_weight: factor on the loss of `outputs.aux`.
    """

    task = "semantic"

    def __init__(
        self,
        levels: list[Level],
        num_classes: int,
        losses: dict[str, float] | None = None,
        class_weights: list[float] | None = None,
        label_smoothing: float = 0.0,
        aux_weight: float = 0.0,
    ) -> None:
        super().__init__(levels, num_classes)
        self.criterion = DenseLoss(num_classes, losses, class_weights, label_smoothing)
        self.aux_weight = aux_weight

    def loss(self, outputs: SemanticOutputs, targets: list[Target]) -> dict[str, Tensor]:
        """Terms of the logits, and of the auxiliary ones under `aux_` names, at label size."""
        labels = torch.stack([_semantic(target) for target in targets]).long()
        terms = self._terms(outputs.logits, labels)
        if outputs.aux is not None:
            for name, term in self._terms(outputs.aux, labels).items():
                terms[f"aux_{name}"] = self.aux_weight * term
        return terms

    def _terms(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return self.criterion(resize(precise, (labels.shape[-2], labels.shape[-1])), labels)

    def predict(self, outputs: SemanticOutputs, frames: list[Frame]) -> list[Prediction]:
        """The most likely class of each original pixel."""
        pairs = zip(outputs.logits, frames, strict=True)
        return [Prediction(semantic=classify(logits, frame)) for logits, frame in pairs]


def _semantic(target: Target) -> Tensor:
    if target.semantic is None:
        raise ValueError("targets have no semantic maps: a semantic head needs a semantic data set")
    return target.semantic


def classify(logits: Tensor, frame: Frame, chunk: int = CHUNK) -> Tensor:
    """Most likely class of each pixel, from logits resized a few classes at a time.

    150 classes of a 12-megapixel photo would otherwise take 7 GB.

    Args:
        logits: float [C, h, w] over the whole canvas.
        frame: where the image lies on it.
        chunk: numbers in memory at once, but at least one class.

    Returns:
        int64 [H, W] in original pixels.
    """
    area = max(height * width for height, width in (frame.canvas, frame.original))
    parts = logits.split(max(1, chunk // area))
    best, labels = frame.restore_map(parts[0].float()).max(dim=0)
    for index, part in enumerate(parts[1:], start=1):
        scores, classes = frame.restore_map(part.float()).max(dim=0)
        labels = torch.where(scores > best, classes + index * len(parts[0]), labels)
        best = torch.maximum(scores, best)
    return labels


def resize(maps: Tensor, size: Size) -> Tensor:
    """Bilinear [B, C, h, w] -> [B, C, *size], corners not aligned."""
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)
