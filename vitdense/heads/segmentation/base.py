"""What every semantic head shares: its outputs, its loss, its answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitdense.heads.base import Head
from vitdense.losses.dense import ClassWeights, DenseLoss
from vitdense.ops.rows import chunks, restore_rows
from vitdense.structures import Frame, Level, Prediction, Size, Target


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
        class_weights: ClassWeights | None = None,
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

    def semantic_logits(self, outputs: SemanticOutputs) -> Tensor:
        """float [B, C, h, w] over the canvas: what `predict` decides by, and windows average."""
        return outputs.logits

    def predict(self, outputs: SemanticOutputs, frames: list[Frame]) -> list[Prediction]:
        """The most likely class of each original pixel."""
        pairs = zip(outputs.logits, frames, strict=True)
        return [Prediction(semantic=classify(logits, frame)) for logits, frame in pairs]


def _semantic(target: Target) -> Tensor:
    if target.semantic is None:
        raise ValueError("targets have no semantic maps: a semantic head needs a semantic data set")
    return target.semantic


def classify(logits: Tensor, frame: Frame, chunk: int | None = None) -> Tensor:
    """Most likely class of each pixel, from logits resized a few rows at a time.

    150 classes of a 12-megapixel photo would otherwise take 7 GB.

    Args:
        logits: float [C, h, w] over the whole canvas.
        frame: where the image lies on it.
        chunk: numbers in memory at once, but at least one row; by default what suits the device.

    Returns:
        int64 [H, W] in original pixels.
    """

    def read(first: int, last: int) -> Tensor:
        return logits[:, first:last].float()

    size = (logits.shape[1], logits.shape[2])
    labels = torch.empty(frame.original, dtype=torch.long, device=logits.device)
    for first, last in chunks(len(logits), frame, logits.device, chunk):
        scores = restore_rows(read, size, frame, first, last)
        labels[first:last] = scores.max(dim=0).indices  # on a CPU far faster than argmax
    return labels


def resize(maps: Tensor, size: Size) -> Tensor:
    """Bilinear [B, C, h, w] -> [B, C, *size], corners not aligned."""
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)
