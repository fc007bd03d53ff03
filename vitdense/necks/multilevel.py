"""mmsegmentation's neck for plain vision transformers under UPerNet."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from vitdense.layers.norm import Norm, make_norm
from vitdense.layers.resize import resize
from vitdense.necks.base import Neck, scaled_strides
from vitdense.registry import NECKS
from vitdense.structures import Level


@NECKS.register("multilevel")
class MultiLevelNeck(Neck):
    """1x1 convolution, bilinear resizing and 3x3 convolution, one of each per level.

    The maps are those of four blocks of a plain ViT, the first of which becomes the finest level;
    where a backbone gives one map, all levels are made from it. This is the `MultiLevelNeck` of
    mmsegmentation's ViT and DeiT recipes, with the scales of its configs.

    Raises:
        ValueError: there are not as many scales as maps, or their levels do not get coarser.
    """

    def __init__(
        self,
        levels: list[Level],
        *,
        channels: PositiveInt | None = None,  # width of each level; null = the last map's
        scales: tuple[PositiveFloat, ...] = (4.0, 2.0, 1.0, 0.5),  # sizes of the levels, in order
        norm: Literal["none", "auto", "batch", "sync", "group", "layer"] = "none",  # of each conv
        relu: bool = False,  # after each convolution
    ) -> None:
        sources = levels * len(scales) if len(levels) == 1 else levels
        width = channels or levels[-1].channels
        super().__init__([Level(width, stride) for stride in scaled_strides(sources, scales)])
        self.scales = tuple(scales)
        self.laterals = nn.ModuleList(
            _convolution(level.channels, width, 1, norm, relu) for level in sources
        )
        self.smooths = nn.ModuleList(_convolution(width, width, 3, norm, relu) for _ in sources)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """float [B, C_i, H_i, W_i] per incoming level -> [B, channels, H, W] per scale."""
        maps = features * len(self.scales) if len(features) == 1 else features
        parts = zip(self.laterals, self.smooths, maps, self.scales, strict=True)
        return [smooth(_rescale(lateral(map_), scale)) for lateral, smooth, map_, scale in parts]


def _rescale(maps: Tensor, scale: float) -> Tensor:
    """Bilinear; sizes are rounded up, as those of every level."""
    return resize(maps, [math.ceil(side * scale) for side in maps.shape[-2:]])


def _convolution(
    width: int, channels: int, kernel: int, norm: Norm | Literal["none"], relu: bool
) -> nn.Sequential:
    """Convolution of the same size, with a norm and ReLU if they are asked for."""
    conv = nn.Conv2d(width, channels, kernel, padding=kernel // 2, bias=norm == "none")
    nn.init.xavier_uniform_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    layers: list[nn.Module] = [conv]
    if norm != "none":
        layers.append(make_norm(norm, channels))
    if relu:
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)
