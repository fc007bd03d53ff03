"""The projector of LW-DETR and RF-DETR: a plain ViT's maps, fused, at one or more scales."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from vitdense.layers.conv import ConvNorm
from vitdense.layers.norm import Norm, make_norm
from vitdense.necks.base import Neck, check_scales, scaled_stride
from vitdense.registry import NECKS
from vitdense.structures import Level

SCALES = (4.0, 2.0, 1.0, 0.5, 0.25)


@NECKS.register("multi_scale_projector")
class MultiScaleProjector(Neck):
    """At each scale a C2f block fuses all maps: Chen et al., LW-DETR (2406.03459), section 3.

    RF-DETR has the norm `layer`, LW-DETR `batch`. There is one level for each scale, the finest
    first; the level of scale 0.25 is every second cell of the level before.

    Raises:
        ValueError: the maps differ in stride; a scale is unknown or twice; 0.25 without 0.5.
    """

    def __init__(
        self,
        levels: list[Level],
        *,
        channels: PositiveInt = 256,  # width of each level
        scales: tuple[float, ...] = (1.0,),  # sizes of the levels over the maps': 4, 2, 1, .5, .25
        halve_above: PositiveInt | None = 512,  # channels halved before a map is made finer
        blocks: PositiveInt = 3,  # of two 3x3 convolutions, in each level's C2f
        norm: Literal["auto", "batch", "sync", "group", "layer"] = "layer",  # of each convolution
        eps: PositiveFloat = 1e-5,  # of these norms
    ) -> None:
        strides = {level.stride for level in levels}
        if len(strides) > 1:
            raise ValueError(
                f"multi_scale_projector: fuses maps of one stride, not of {sorted(strides)}; "
                "use it on a plain ViT, and fpn on a hierarchical backbone"
            )
        check_scales(scales, SCALES)
        if 0.25 in scales and 0.5 not in scales:
            raise ValueError("scales: 0.25 is made from 0.5, so both must be there")
        finest_first = sorted(scales, reverse=True)
        super().__init__([Level(channels, scaled_stride(levels[0], s)) for s in finest_first])
        self.subsample = finest_first[-1] == 0.25
        widths = [level.channels for level in levels]
        self.stages = nn.ModuleList(
            ProjectorStage(widths, channels, scale, halve_above, blocks, norm)
            for scale in finest_first
            if scale > 0.25
        )
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.norm.eps = eps  # type: ignore[assignment]

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """float [B, C_i, H, W] per incoming level -> [B, channels, H * scale, W * scale] each."""
        maps = [stage(features) for stage in self.stages]
        if self.subsample:
            maps.append(F.max_pool2d(maps[-1], kernel_size=1, stride=2))
        return maps


class ProjectorStage(nn.Module):
    """One level: all maps are resampled to its scale, joined, fused by C2f and normed."""

    def __init__(
        self,
        widths: list[int],
        channels: int,
        scale: float,
        halve_above: int | None,
        blocks: int,
        norm: Norm,
    ) -> None:
        super().__init__()
        resampled = [_resampling(width, scale, halve_above, norm) for width in widths]
        self.resample = nn.ModuleList(module for module, _ in resampled)
        self.c2f = C2f(sum(width for _, width in resampled), channels, blocks, norm)
        self.norm = make_norm("layer", channels)

    def forward(self, features: list[Tensor]) -> Tensor:
        """float [B, C_i, H, W] per map -> [B, channels, H * scale, W * scale]."""
        maps = [module(x) for module, x in zip(self.resample, features, strict=True)]
        return self.norm(self.c2f(torch.cat(maps, 1)))


class C2f(nn.Module):
    """The cross-stage partial block of YOLOv8.

    Half of the channels go through the blocks one after the other. A 1x1 convolution fuses both
    halves and what came out of each block.
    """

    def __init__(self, incoming: int, channels: int, blocks: int, norm: Norm) -> None:
        super().__init__()
        half = channels // 2
        self.expand = ConvNorm(incoming, 2 * half, 1, norm)
        self.blocks = nn.ModuleList(
            nn.Sequential(*(ConvNorm(half, half, 3, norm) for _ in range(2))) for _ in range(blocks)
        )
        self.fuse = ConvNorm((2 + blocks) * half, channels, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        """float [B, incoming, H, W] -> [B, channels, H, W]."""
        parts = list(self.expand(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        return self.fuse(torch.cat(parts, 1))


def _resampling(
    width: int, scale: float, halve_above: int | None, norm: Norm
) -> tuple[nn.Sequential, int]:
    """Layers that bring a map to a scale, and how many channels they give."""

    def up(incoming: int) -> nn.Module:
        return nn.ConvTranspose2d(incoming, incoming // 2, 2, stride=2)

    def conv(outgoing: int, kernel: int, stride: int = 1) -> list[nn.Module]:
        return [ConvNorm(width, outgoing, kernel, norm, stride, active=False), nn.ReLU()]

    if scale == 4:
        middle = [make_norm("layer", width // 2), nn.GELU()]
        return nn.Sequential(up(width), *middle, up(width // 2)), width // 2 // 2
    if scale == 2 and halve_above is not None and width > halve_above:
        return nn.Sequential(*conv(width // 2, 1), up(width // 2)), width // 2 // 2
    if scale == 2:
        return nn.Sequential(up(width)), width // 2
    if scale == 0.5:
        return nn.Sequential(*conv(width, 3, stride=2)), width
    return nn.Sequential(), width
