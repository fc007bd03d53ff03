"""A neck of one's own: a pyramid by plain resizing, the cheapest that a plain ViT can have."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vitdense import NECKS, Neck
from vitdense.structures import Level


@NECKS.register("resized_pyramid")
class ResizedPyramid(Neck):
    """The last map at several strides: 1x1 convolution, resize, 3x3 convolution each."""

    def __init__(
        self,
        levels: list[Level],
        *,
        channels: int = 128,  # of every map that comes out
        scales: tuple[float, ...] = (4.0, 2.0, 1.0, 0.5),  # of the maps, as factors of the last one
    ) -> None:
        stride = levels[-1].stride
        super().__init__([Level(channels, stride / scale) for scale in scales])
        self.source_stride = stride
        self.reduce = nn.Conv2d(levels[-1].channels, channels, 1)
        self.smooth = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in scales)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """float [B, C, H, W] per incoming level -> [B, channels, H * scale, W * scale] each."""
        source = self.reduce(features[-1])
        height, width = source.shape[-2:]
        maps = []
        for level, smooth in zip(self.levels, self.smooth, strict=True):
            scale = self.source_stride / level.stride
            size = round(height * scale), round(width * scale)
            maps.append(smooth(F.interpolate(source, size, mode="bilinear", align_corners=False)))
        return maps
