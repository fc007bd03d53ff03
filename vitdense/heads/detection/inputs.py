"""What multi-level heads read: which levels of the pyramid, projected to one width."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vitdense.structures import Level, Size

FINE = 6
"""Finer strides are not read by default: the first is 8, or 7 on a ViT with patch 14."""


def choose_levels(levels: list[Level], wanted: list[int] | None, most: int) -> list[int]:
    """Indices of the levels to read, finest first.

    Raises:
        ValueError: if one does not exist, or if more are wanted than attention has levels.
    """
    if wanted is None:
        coarse = [i for i, level in enumerate(levels) if level.stride >= FINE]
        return (coarse or list(range(len(levels))))[:most]
    if not wanted or wanted != sorted(set(wanted) & set(range(len(levels)))):
        raise ValueError(
            f"input_levels: must be rising numbers below {len(levels)}, the levels of the pyramid, "
            f"not {wanted}"
        )
    if len(wanted) > most:
        raise ValueError(f"num_levels: must be at least the {len(wanted)} input_levels, not {most}")
    return wanted


def project_map(incoming: int, width: int, kernel: int, stride: int) -> nn.Module:
    """A convolution and group norm, as Deformable DETR projects its inputs."""
    conv = nn.Conv2d(incoming, width, kernel, stride, padding=kernel // 2)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return nn.Sequential(conv, nn.GroupNorm(math.gcd(32, width), width))


class LevelInputs(nn.ModuleList):
    """Brings the maps that are read to one width, and makes coarser ones until there are `count`.

    Args:
        channels: of each map that is read.
        width: channels of the maps that come out.
        count: of the maps that come out; those missing are made by halving the last map that is
            read, one after the other.
        project: makes a projection from its input channels, width, kernel and stride.
    """

    def __init__(
        self,
        channels: list[int],
        width: int,
        count: int,
        project: Callable[[int, int, int, int], nn.Module] = project_map,
    ) -> None:
        read = [project(each, width, 1, 1) for each in channels]
        halvings = range(count - len(channels))
        made = [project(channels[-1] if i == 0 else width, width, 3, 2) for i in halvings]
        super().__init__([*read, *made])

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Maps that are read, float [B, C_i, H_i, W_i] -> `count` of float [B, width, H_i, W_i]."""
        maps = [project(x) for project, x in zip(self, features, strict=False)]
        last = features[-1]
        for project in list(self)[len(features) :]:
            last = project(last)
            maps.append(last)
        return maps


def flatten_levels(maps: list[Tensor]) -> tuple[Tensor, list[Size]]:
    """Maps [B, width, H_i, W_i] -> their cells [B, S, width], map after map, and their shapes."""
    shapes = [(x.shape[-2], x.shape[-1]) for x in maps]
    return torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1), shapes


def split_levels(cells: Tensor, shapes: list[Size]) -> list[Tensor]:
    """Cells [B, S, width] -> the maps [B, width, H_i, W_i] that `flatten_levels` was given."""
    levels = cells.split([height * width for height, width in shapes], 1)
    return [x.transpose(1, 2).unflatten(2, shape) for x, shape in zip(levels, shapes, strict=True)]
