"""The base of semantic heads: outputs, loss, answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitdense.heads.base import Head
from vitdense.layers.resize import resize
from vitdense.losses.dense import ClassWeights, DenseLoss
from vitdense.ops.restoring import restored
from vitdense.structures import Frame, Level, Prediction, Target


@dataclass(slots=True)
class SemanticOutputs:
    """Logits of each class over the canvas.

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
        """Terms of `DenseLoss` at the size of the labels; those of `aux` begin with `aux_`."""
        labels = torch.stack([_semantic(target) for target in targets]).long()
        terms = self._terms(outputs.logits, labels)
        if outputs.aux is not None:
            for name, term in self._terms(outputs.aux, labels).items():
                terms[f"aux_{name}"] = self.aux_weight * term
        return terms

    def _terms(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return self.criterion(resize(precise, labels.shape[-2:]), labels)

    def semantic_logits(self, outputs: SemanticOutputs) -> Tensor:
        """The logits, float [B, C, h, w] over the canvas."""
        return outputs.logits

    def predict(self, outputs: SemanticOutputs, frames: list[Frame]) -> list[Prediction]:
        """The most likely class of each original pixel."""
        pairs = zip(outputs.logits, frames, strict=True)
        return [Prediction(semantic=classify(logits, frame)) for logits, frame in pairs]


def _semantic(target: Target) -> Tensor:
    if target.semantic is None:
        raise ValueError("targets have no semantic maps: a semantic head needs a semantic data set")
    return target.semantic


def classify(logits: Tensor, frame: Frame) -> Tensor:
    """Most likely class of each pixel, from logits resized a few rows at a time.

    All at once, 150 classes of a 12-megapixel photo would take 7 GB.

    Args:
        logits: float [C, h, w] over the whole canvas.
        frame: where the image lies on it.

    Returns:
        int64 [H, W] in original pixels.
    """
    labels = torch.empty(frame.original, dtype=torch.long, device=logits.device)
    for rows, scores in restored(logits, frame):
        labels[rows] = scores.max(dim=0).indices  # on a CPU far faster than argmax
    return labels
