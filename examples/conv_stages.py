"""A backbone of one's own: four stages of depthwise convolutions, in plain torch."""

from __future__ import annotations

from torch import Tensor, nn

from vitdense import BACKBONES, Backbone
from vitdense.structures import Level


class Block(nn.Module):
    """Depthwise 7x7, then a bottleneck of two 1x1 convolutions, beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 7, padding=3, groups=width),
            nn.GroupNorm(1, width),
            nn.Conv2d(width, 4 * width, 1),
            nn.GELU(),
            nn.Conv2d(4 * width, width, 1),
        )

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.layers(maps)


@BACKBONES.register("conv_stages")
class ConvStages(Backbone):
    """Maps of strides 4, 8, 16 and 32."""

    def __init__(
        self,
        *,
        width: int = 32,  # channels of the first stage; each later one has twice as many
        depth: int = 2,  # blocks per stage
        in_chans: int = 3,  # channels of the images
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.mean, self.std = (0.5,) * in_chans, (0.25,) * in_chans
        self.levels = [Level(width * 2**i, 4 * 2**i) for i in range(4)]
        channels = [in_chans, *(level.channels for level in self.levels)]
        self.stages = nn.ModuleList(
            nn.Sequential(
                # padding 3 and 1: any size n becomes ceil(n / stride), as the levels promise
                nn.Conv2d(channels[i], channels[i + 1], 7, 4, 3)
                if i == 0
                else nn.Conv2d(channels[i], channels[i + 1], 3, 2, 1),
                *(Block(channels[i + 1]) for _ in range(depth)),
            )
            for i in range(4)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """float [B, in_chans, H, W] -> four maps, finest first."""
        features: list[Tensor] = []
        for stage in self.stages:
            images = stage(images)
            features.append(images)
        return features

    def layer_depths(self) -> dict[str, int]:
        """The stage of each parameter, for `optimizer.layer_decay`."""
        return {name: int(name.split(".")[1]) for name, _ in self.named_parameters()}
