"""What every neck promises."""

from __future__ import annotations

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
