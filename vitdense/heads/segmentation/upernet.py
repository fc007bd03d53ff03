"""UPerNet: pooled context on the coarsest map, a feature pyramid, all levels fused."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from vitdense.heads.segmentation.base import SemanticHead, SemanticOutputs
from vitdense.heads.segmentation.blocks import Classifier, ConvNormReLU, pool
from vitdense.layers.resize import resize
from vitdense.registry import HEADS, Fraction
from vitdense.structures import Level, Target


@HEADS.register("upernet")
class UPerNetHead(SemanticHead):
    """UPerNet with an auxiliary FCN classifier (Xiao et al. 2018, arXiv 1807.10221).

    Pyramid pooling on the coarsest level, a top-down path to the finest, and all levels
    concatenated there; the layers are those of mmsegmentation and transformers.
    """

    def __init__(
        self,
        levels: list[Level],
        num_classes: int,
        *,
        channels: PositiveInt = 512,  # width of the pyramid and of the fused map
        pool_scales: tuple[PositiveInt, ...] = (1, 2, 3, 6),  # cells per side of the pooled maps
        dropout: Fraction = 0.1,  # of whole channels, before each classifier
        norm: Literal["auto", "batch", "sync", "group", "layer"] = "auto",  # auto: batch or sync
        aux_weight: NonNegativeFloat = 0.4,  # of the auxiliary classifier's losses; 0 = without it
        aux_channels: PositiveInt = 256,  # width of the auxiliary classifier
        aux_level: NonNegativeInt | None = None,  # 0 = finest; null = nearest to stride 16
        losses: dict[str, PositiveFloat] | None = None,  # weights by name; null = cross_entropy
        class_weights: list[NonNegativeFloat]
        | Literal["inverse", "median"]
        | None = None,  # for the entropies: one per class, or by how rare they are
        label_smoothing: Fraction = 0.0,  # for the cross entropy
    ) -> None:
        super().__init__(levels, num_classes, losses, class_weights, label_smoothing, aux_weight)
        widths = [level.channels for level in levels]
        self.pool_scales = tuple(pool_scales)
        self.pools = nn.ModuleList(
            ConvNormReLU(widths[-1], channels, 1, norm) for _ in self.pool_scales
        )
        self.context = ConvNormReLU(widths[-1] + len(self.pools) * channels, channels, 3, norm)
        self.laterals = nn.ModuleList(
            ConvNormReLU(width, channels, 1, norm) for width in widths[:-1]
        )
        self.smooths = nn.ModuleList(ConvNormReLU(channels, channels, 3, norm) for _ in widths[:-1])
        self.fuse = ConvNormReLU(len(widths) * channels, channels, 3, norm)
        self.classifier = Classifier(channels, num_classes, dropout)
        self.aux_level = _nearest_to_16(levels) if aux_level is None else aux_level
        if self.aux_level >= len(levels):
            raise ValueError(f"aux_level: is {aux_level}, levels are 0..{len(levels) - 1}")
        self.aux = None
        if aux_weight:
            self.aux = nn.Sequential(
                ConvNormReLU(widths[self.aux_level], aux_channels, 3, norm),
                Classifier(aux_channels, num_classes, dropout),
            )

    def forward(
        self, features: list[Tensor], targets: list[Target] | None = None
    ) -> SemanticOutputs:
        """Logits at the stride of the finest level."""
        finest, *coarser = self._pyramid(features)
        enlarged = [resize(map_, finest.shape[-2:]) for map_ in coarser]
        fused = self.fuse(torch.cat([finest, *enlarged], dim=1))
        logits = self.classifier(fused)
        # In evaluation too: it costs a thousandth, and a validation loss needs it.
        return SemanticOutputs(logits, self.aux(features[self.aux_level]) if self.aux else None)

    def _pyramid(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps of `channels` channels, finest first."""
        sums = [self._context(maps[-1])]
        for lateral, map_ in zip(reversed(self.laterals), reversed(maps[:-1]), strict=True):
            sums.insert(0, lateral(map_) + resize(sums[0], map_.shape[-2:]))
        smoothed = [smooth(map_) for smooth, map_ in zip(self.smooths, sums, strict=False)]
        return [*smoothed, sums[-1]]

    def _context(self, map_: Tensor) -> Tensor:
        pooled = [
            resize(conv(pool(map_, scale)), map_.shape[-2:])
            for conv, scale in zip(self.pools, self.pool_scales, strict=True)
        ]
        return self.context(torch.cat([map_, *pooled], dim=1))


def _nearest_to_16(levels: list[Level]) -> int:
    return min(range(len(levels)), key=lambda index: abs(math.log2(levels[index].stride / 16)))
