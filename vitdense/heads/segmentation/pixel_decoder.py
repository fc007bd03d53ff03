"""Mask2Former's pixel decoder: a pyramid in, cells to attend to and features for masks out."""

from __future__ import annotations

import math

from torch import Tensor, nn

from vitdense.heads.detection.deformable_encoder import DeformableEncoder
from vitdense.heads.detection.deformable_transformer import DeformableEncoderLayer
from vitdense.heads.detection.inputs import LevelInputs, flatten_levels, split_levels
from vitdense.layers.resize import resize


class PixelDecoder(nn.Module):
    """Deformable attention over the coarse levels, then an FPN up to the finest (Cheng et al. 2022,
    Mask2Former, section 3.2.2).

    Args:
        fine: channels of the maps that only the FPN reads, finest first; may be none.
        coarse: channels of the maps that attention reads, finest first.
        levels: of attention; those missing are made by halving the last map.
        width, heads, hidden, dropout, points: of the layers of attention.
        layers: how many of them, which may be none.
        checkpointing: the backward pass computes them again instead of keeping activations.
    """

    def __init__(
        self,
        fine: list[int],
        coarse: list[int],
        levels: int,
        width: int,
        heads: int,
        hidden: int,
        layers: int,
        dropout: float,
        points: int,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.inputs = LevelInputs(coarse, width, levels)
        sizes = (width, heads, hidden, dropout, levels, points)
        self.encoder = DeformableEncoder(
            [DeformableEncoderLayer(*sizes) for _ in range(layers)],
            levels,
            width,
            offset=0.0,
            checkpointing=checkpointing,
        )
        self.fpn = nn.ModuleList(FpnStep(channels, width) for channels in fine)
        self.project = _xavier(nn.Conv2d(width, width, 1))

    def forward(self, fine: list[Tensor], coarse: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Refine the maps.

        Args:
            fine, coarse: float [B, C_i, H_i, W_i], finest first.

        Returns:
            `levels` maps float [B, width, H_i, W_i], coarsest first, and the features of masks,
            float [B, width, H, W] at the size of the finest map.
        """
        cells, shapes = flatten_levels(self.inputs(coarse)[::-1])
        maps = split_levels(self.encoder(cells, shapes), shapes)
        finest = maps[-1]
        for step, features in zip(reversed(self.fpn), reversed(fine), strict=True):
            finest = step(finest, features)
        return maps, self.project(finest)


class FpnStep(nn.Module):
    """Add a coarse map to a finer one, and smooth the sum."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.lateral = nn.Sequential(
            _xavier(nn.Conv2d(channels, width, 1, bias=False)), _norm(width)
        )
        self.smooth = nn.Sequential(
            _xavier(nn.Conv2d(width, width, 3, padding=1, bias=False)), _norm(width), nn.ReLU()
        )

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """float [B, width, h, w], [B, channels, H, W] -> [B, width, H, W]."""
        return self.smooth(self.lateral(fine) + resize(coarse, fine.shape[-2:]))


def _norm(width: int) -> nn.Module:
    return nn.GroupNorm(math.gcd(32, width), width)


def _xavier(conv: nn.Conv2d) -> nn.Conv2d:
    """Caffe2's Xavier initialisation, which detectron2 gives to the convolutions of a pyramid."""
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv
