"""The feature pyramid network for hierarchical backbones."""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from vitdense.necks.base import Neck
from vitdense.registry import NECKS
from vitdense.structures import Level


@NECKS.register("fpn")
class FPN(Neck):
    """Lateral 1x1 convolutions, a top-down path, 3x3 convolutions: Lin et al. (1612.03144).

    Levels: the incoming strides, then `extra_levels` that each double the last stride.
    """

    def __init__(
        self,
        levels: list[Level],
        *,
        channels: PositiveInt = 256,  # width of each level
        extra_levels: NonNegativeInt = 0,  # coarser levels behind the last, each subsampled by 2
    ) -> None:
        from torchvision.ops import FeaturePyramidNetwork

        coarsest = levels[-1].stride
        strides = [level.stride for level in levels]
        strides += [coarsest * 2 ** (step + 1) for step in range(extra_levels)]
        super().__init__([Level(channels, stride) for stride in strides])
        self.pyramid = FeaturePyramidNetwork([level.channels for level in levels], channels)
        self.extra_levels = extra_levels

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """float [B, C_i, H_i, W_i] per incoming level -> [B, channels, H_i, W_i] and the extras."""
        named = {str(index): feature for index, feature in enumerate(features)}
        maps = list(self.pyramid(named).values())
        for _ in range(self.extra_levels):
            maps.append(F.max_pool2d(maps[-1], kernel_size=1, stride=2))
        return maps
