"""The projector of LW-DETR and RF-DETR: a plain ViT's maps, fused, at one or more scales."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from vitdense.layers.conv import ConvNorm
from vitdense.layers.norm import Norm
from vitdense.necks.base import Neck
from vitdense.registry import NECKS
from vitdense.structures import Level

SCALES = (4.0, 2.0, 1.0, 0.5, 0.25)


@NECKS.register("multi_scale_projector")
class MultiScaleProjector(Neck):
    """All maps at each scale, fused by a C2f block: Chen et al., LW-DETR (2406.03459), section 3.

    The norm `layer` is RF-DETR's, `batch` LW-DETR's. Levels: one for each scale, the finest first;
    that of scale 0.25 is every second cell of the one before.

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
        _check_scales(scales)
        finest_first = sorted(scales, reverse=True)
        super().__init__([Level(channels, _stride(levels[0].stride / s)) for s in finest_first])
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
    """Every map brought to one scale, side by side, through C2f and a last norm."""

    def __init__(
        self,
        widths: list[int],
        channels: int,
        scale: float,
        halve_above: int | None,
        blocks: int,
        norm: Norm,
    ) -> None:
        from timm.layers import LayerNorm2d

        super().__init__()
        resampled = [_resampling(width, scale, halve_above, norm) for width in widths]
        self.resample = nn.ModuleList(module for module, _ in resampled)
        self.c2f = C2f(sum(width for _, width in resampled), channels, blocks, norm)
        self.norm = LayerNorm2d(channels)

    def forward(self, features: list[Tensor]) -> Tensor:
        """float [B, C_i, H, W] per map -> [B, channels, H * scale, W * scale]."""
        maps = [module(x) for module, x in zip(self.resample, features, strict=True)]
        return self.norm(self.c2f(torch.cat(maps, 1)))


class C2f(nn.Module):
    """The cross-stage block of YOLOv8: half of the channels pass, half go through the blocks.

    What comes out of each block is kept and all is fused by a 1x1 convolution.
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
    """What brings a map to a scale, and the channels that come out."""
    from timm.layers import LayerNorm2d

    def up(incoming: int) -> nn.Module:
        return nn.ConvTranspose2d(incoming, incoming // 2, 2, stride=2)

    def conv(outgoing: int, kernel: int, stride: int = 1) -> list[nn.Module]:
        return [ConvNorm(width, outgoing, kernel, norm, stride, active=False), nn.ReLU()]

    if scale == 4:
        middle = [LayerNorm2d(width // 2), nn.GELU()]
        return nn.Sequential(up(width), *middle, up(width // 2)), width // 2 // 2
    if scale == 2 and halve_above is not None and width > halve_above:
        return nn.Sequential(*conv(width // 2, 1), up(width // 2)), width // 2 // 2
    if scale == 2:
        return nn.Sequential(up(width)), width // 2
    if scale == 0.5:
        return nn.Sequential(*conv(width, 3, stride=2)), width
    return nn.Sequential(), width


def _check_scales(scales: tuple[float, ...]) -> None:
    if not scales or set(scales) - set(SCALES) or len(set(scales)) < len(scales):
        raise ValueError(f"scales: {scales} must be different ones of {list(SCALES)}")
    if 0.25 in scales and 0.5 not in scales:
        raise ValueError("scales: 0.25 is made from 0.5, so both must be there")


def _stride(stride: float) -> float:
    return int(stride) if stride == int(stride) else stride
