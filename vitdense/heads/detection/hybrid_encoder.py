"""RT-DETR's encoder: attention within the coarsest level, convolutions across levels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitdense.heads.detection.detr_transformer import DetrEncoderLayer
from vitdense.layers.conv import ConvNorm, RepBlock
from vitdense.layers.norm import Norm
from vitdense.layers.position import sine_embedding

Fusion = Literal["csp", "elan"]
"""The block that merges two levels: RT-DETR's CSP, or D-FINE's ELAN."""


class HybridEncoder(nn.Module):
    """RT-DETR's encoder (Zhao et al. 2024, section 4.2).

    Attention runs on the coarsest level, where it is cheap and means most; then the levels are
    merged top-down and bottom-up, as in PANet, by CSP or ELAN blocks.

    Args:
        width: channels of every level.
        steps: ratio of each level's stride to the one before, finest first; one fewer than levels.
        heads, ffn, layers, dropout: of the attention layers on each attended level.
        attended: indices of the levels that have attention.
        blocks: RepVGG blocks in each merging block.
        expansion: hidden width of a merging block over its width.
        fusion: kind of the merging blocks.
        norm: of the convolutions.
    """

    def __init__(
        self,
        width: int,
        steps: list[int],
        *,
        heads: int = 8,
        ffn: int = 1024,
        layers: int = 1,
        dropout: float = 0.0,
        attended: Sequence[int] = (-1,),
        blocks: int = 3,
        expansion: float = 1.0,
        fusion: Fusion = "csp",
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        count = len(steps)
        self.attended = sorted({index % (count + 1) for index in attended})
        self.attention = nn.ModuleList(
            nn.ModuleList(
                DetrEncoderLayer(width, heads, ffn, dropout, F.gelu) for _ in range(layers)
            )
            for _ in self.attended
        )
        merge = CSPBlock if fusion == "csp" else ElanBlock
        make = partial(merge, 2 * width, width, blocks, expansion, norm)
        light = fusion == "elan"
        # in the order they run: top_down begins at the coarsest level, bottom_up at the finest
        self.laterals = nn.ModuleList(
            ConvNorm(width, width, 1, norm, active=not light) for _ in range(count)
        )
        self.top_down = nn.ModuleList(make() for _ in range(count))
        self.halvings = nn.ModuleList(_halving(width, step, norm, light) for step in steps)
        self.bottom_up = nn.ModuleList(make() for _ in range(count))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """float [B, width, H_i, W_i], finest first -> the same shapes."""
        maps = list(maps)
        for index, layers in zip(self.attended, self.attention, strict=True):
            maps[index] = self._attend(maps[index], layers)
        return self._rise(self._descend(maps))

    def _attend(self, x: Tensor, layers: nn.Module) -> Tensor:
        height, width = x.shape[-2:]
        cells = x.flatten(2).transpose(1, 2)
        position = grid_position(height, width, x.shape[1], like=cells)[None]
        for layer in layers.children():
            cells = layer(cells, position)
        return cells.transpose(1, 2).unflatten(2, (height, width))

    def _descend(self, maps: list[Tensor]) -> list[Tensor]:
        """Merge each level with the one above it, coarsest first; finest first in and out."""
        *finer, coarse = maps
        merged = []
        for lateral, block in zip(self.laterals, self.top_down, strict=True):
            coarse = lateral(coarse)
            merged.append(coarse)
            fine = finer.pop()
            coarse = block(torch.cat((F.interpolate(coarse, fine.shape[-2:]), fine), 1))
        return [coarse, *reversed(merged)]

    def _rise(self, maps: list[Tensor]) -> list[Tensor]:
        """Merge each level with the one below it, finest first."""
        merged = [maps[0]]
        for halve, block, coarse in zip(self.halvings, self.bottom_up, maps[1:], strict=True):
            merged.append(block(torch.cat((halve(merged[-1]), coarse), 1)))
        return merged


class CSPBlock(nn.Module):
    """One projection goes through RepVGG blocks, another around them (Wang et al. 2020, CSPNet)."""

    def __init__(
        self, channels_in: int, channels: int, blocks: int, expansion: float, norm: Norm
    ) -> None:
        super().__init__()
        hidden = int(channels * expansion)
        self.through = ConvNorm(channels_in, hidden, 1, norm)
        self.around = ConvNorm(channels_in, hidden, 1, norm)
        self.blocks = nn.Sequential(*(RepBlock(hidden, norm) for _ in range(blocks)))
        self.out = nn.Identity() if hidden == channels else ConvNorm(hidden, channels, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        """float [B, channels_in, H, W] -> [B, channels, H, W]."""
        return self.out(self.blocks(self.through(x)) + self.around(x))


class ElanBlock(nn.Module):
    """Two CSP blocks in a row; what each gives reaches the end too (Wang et al. 2024, YOLOv9)."""

    def __init__(
        self, channels_in: int, channels: int, blocks: int, expansion: float, norm: Norm
    ) -> None:
        super().__init__()
        hidden = round(expansion * channels // 2)
        self.enter = ConvNorm(channels_in, 2 * channels, 1, norm)
        self.stages = nn.ModuleList(
            nn.Sequential(
                CSPBlock(incoming, hidden, blocks, 1.0, norm), ConvNorm(hidden, hidden, 3, norm)
            )
            for incoming in (channels, hidden)
        )
        self.leave = ConvNorm(2 * channels + 2 * hidden, channels, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        """float [B, channels_in, H, W] -> [B, channels, H, W]."""
        parts = list(self.enter(x).chunk(2, 1))
        for stage in self.stages:
            parts.append(stage(parts[-1]))
        return self.leave(torch.cat(parts, 1))


def _halving(width: int, step: int, norm: Norm, light: bool) -> nn.Module:
    """A convolution to the next level's size; `light` is 1x1, then depthwise, as in D-FINE."""
    if not light:
        return ConvNorm(width, width, 3, norm, stride=step)
    return nn.Sequential(
        ConvNorm(width, width, 1, norm, active=False),
        ConvNorm(width, width, 3, norm, stride=step, depthwise=True, active=False),
    )


def grid_position(height: int, width: int, features: int, *, like: Tensor) -> Tensor:
    """RT-DETR's position embedding: sines and cosines of each cell's row and column number.

    The first half of the features tells y, the second x; in each, all sines come first.

    Args:
        features: a multiple of 4.
        like: gives the device and the type.

    Returns:
        float [height * width, features], row by row.
    """
    # half precision does not tell the frequencies of far cells apart
    precise = torch.promote_types(like.dtype, torch.float32)

    def axis(size: int) -> Tensor:
        steps = torch.arange(size, device=like.device, dtype=precise)
        pairs = sine_embedding(steps, features // 2)
        return torch.cat((pairs[:, ::2], pairs[:, 1::2]), -1)

    rows = axis(height)[:, None].expand(-1, width, -1)
    columns = axis(width)[None].expand(height, -1, -1)
    return torch.cat((rows, columns), -1).flatten(0, 1).to(like.dtype)


def check_steps(strides: list[float]) -> list[int]:
    """Ratios of neighbouring strides.

    Raises:
        ValueError: if one is not a whole number.
    """
    steps = [coarse / fine for fine, coarse in pairwise(strides)]
    if any(step != int(step) for step in steps):
        raise ValueError(f"input_levels: strides {strides} must be multiples of each other")
    return [int(step) for step in steps]
