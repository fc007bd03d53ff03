"""SegFormer's head: one linear map for each level, all fused at the finest."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from vitdense.heads.segmentation.base import SemanticHead, SemanticOutputs
from vitdense.heads.segmentation.blocks import Classifier, ConvNormReLU
from vitdense.layers.resize import resize
from vitdense.registry import HEADS, Fraction
from vitdense.structures import Level, Target


@HEADS.register("segformer")
class SegFormerHead(SemanticHead):
    """The all-MLP decoder of SegFormer (Xie et al. 2021, arXiv 2105.15203, section 3.2).

    All levels are fused by a 1x1 convolution. Because that commutes with resizing, each level goes
    through its part of the weights at its own size, and the results are summed at the finest.
    """

    def __init__(
        self,
        levels: list[Level],
        num_classes: int,
        *,
        channels: PositiveInt = 256,  # width of each level and of the fused map; 768 from B2 on
        dropout: Fraction = 0.1,  # of whole channels, before the classifier
        norm: Literal["auto", "batch", "sync", "group", "layer"] = "auto",  # auto: batch or sync
        losses: dict[str, PositiveFloat] | None = None,  # weights by name; null = cross_entropy
        class_weights: list[NonNegativeFloat]
        | Literal["inverse", "median"]
        | None = None,  # for the entropies: one per class, or by how rare they are
        label_smoothing: Fraction = 0.0,  # for the cross entropy
    ) -> None:
        super().__init__(levels, num_classes, losses, class_weights, label_smoothing)
        self.inputs = nn.ModuleList(nn.Conv2d(level.channels, channels, 1) for level in levels)
        self.fuse = ConvNormReLU(len(levels) * channels, channels, 1, norm)
        self.classifier = Classifier(channels, num_classes, dropout)

    def forward(
        self, features: list[Tensor], targets: list[Target] | None = None
    ) -> SemanticOutputs:
        """Logits at the stride of the finest level."""
        conv, norm, activation = self.fuse
        weights = conv.get_parameter("weight").chunk(len(features), dim=1)
        levels = zip(self.inputs, weights, features, strict=True)
        finest, *coarser = [F.conv2d(project(map_), weight) for project, weight, map_ in levels]
        fused = sum((resize(map_, finest.shape[-2:]) for map_ in coarser), start=finest)
        return SemanticOutputs(self.classifier(activation(norm(fused))))
