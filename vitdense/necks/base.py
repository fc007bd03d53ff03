"""What every neck promises."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor, nn

from vitdense.structures import Level


class Neck(nn.Module):
    """Feature maps in, a pyramid out.

    Subclasses take the incoming levels first and their options after `*`.

    Attributes:
        levels: channels and stride of each map that comes out, finest first.
    """

    levels: list[Level]

    def __init__(self, levels: list[Level]) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """float [B, C_i, H_i, W_i] per incoming level -> the same per outgoing level."""
        raise NotImplementedError


def check_scales(scales: Collection[float], known: Collection[float]) -> None:
    """Raise ValueError unless the scales are different ones of those known, at least one."""
    if not scales or not set(scales) <= set(known) or len(set(scales)) < len(scales):
        raise ValueError(f"scales: {scales} must be different ones of {list(known)}")


def scaled_stride(level: Level, scale: float) -> float:
    """Stride of the level's map after it was made `scale` times as large; an int if it is whole."""
    stride = level.stride / scale
    return int(stride) if stride == int(stride) else stride


def scaled_strides(levels: list[Level], scales: Sequence[float]) -> list[float]:
    """Strides where each level has a scale of its own.

    Raises:
        ValueError: there are not as many scales as levels, or the strides do not rise.
    """
    if len(scales) != len(levels):
        raise ValueError(f"scales: there are {len(scales)} of them for {len(levels)} maps")
    strides = [scaled_stride(level, scale) for level, scale in zip(levels, scales, strict=True)]
    if strides != sorted(strides):
        raise ValueError(f"scales: {scales} make strides {strides}, which must not get finer")
    return strides
