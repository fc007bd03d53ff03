"""Labels of the whole image, beside what another head says about its pixels."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitdense.losses.divisors import divisor
from vitdense.structures import Target

Pooling = Literal["mean", "attention", "token"]


class ImageHead(nn.Module):
    """A map or a class token, pooled and classified; each label is a yes or no of its own.

    Args:
        channels: of the map, or of the token.
        classes: K.
        pooling: `mean` of all cells; `attention`, where each label has weights for the cells, equal
            at first (Ilse et al., "Attention-based Deep Multiple Instance Learning", arXiv
            1802.04712, with a linear score); `token`: the features are pooled already.
    """

    def __init__(self, channels: int, classes: int, pooling: Pooling) -> None:
        super().__init__()
        self.pooling = pooling
        self.norm = nn.LayerNorm(channels)
        self.classifier = nn.Linear(channels, classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)
        if pooling == "attention":
            self.attention = nn.Linear(channels, classes, bias=False)
            nn.init.zeros_(self.attention.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Logits [B, K] of a map [B, channels, h, w] or of a token [B, channels]."""
        if self.pooling == "token":
            return self.classifier(self.norm(features))
        if self.pooling == "mean":
            return self.classifier(self.norm(features.mean((2, 3))))
        cells = self.norm(features.flatten(2).mT)
        # without the scale, Adam's first steps on all channels would put all weight on single cells
        weights = (self.attention(cells) / math.sqrt(cells.shape[2])).softmax(1)
        return (weights * self.classifier(cells)).sum(1)

    @staticmethod
    def loss(logits: Tensor, targets: list[Target]) -> Tensor:
        """Binary cross-entropy, the mean over images that have a truth and over labels.

        Zero, but part of the graph, if no image has one.
        """
        known = [i for i, target in enumerate(targets) if target.image_labels is not None]
        labels = [target.image_labels for target in targets if target.image_labels is not None]
        images = divisor(len(known), _is_labelled, logits)
        if not labels:
            return 0 * logits.sum()
        if len(known) < len(targets):
            # indexing by a list would make the host wait
            index = torch.tensor(known).to(logits.device, non_blocking=True)
            logits = logits.index_select(0, index)
        truth = torch.stack(labels).to(logits.dtype)
        total = F.binary_cross_entropy_with_logits(logits, truth, reduction="sum")
        return total / (images * truth.shape[1])


def _is_labelled(target: Target) -> int:
    return int(target.image_labels is not None)
