"""No neck: the backbone's maps as they are."""

from __future__ import annotations

from torch import Tensor

from vitdense.necks.base import Neck
from vitdense.registry import NECKS
from vitdense.structures import Level


@NECKS.register("none")
class IdentityNeck(Neck):
    """Hands the maps to the head unchanged, also where a pyramid would be the default."""

    def __init__(self, levels: list[Level]) -> None:
        super().__init__(levels)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """The same maps."""
        return features
