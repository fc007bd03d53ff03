"""The neck of BEiT and MAE for dense prediction."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from vitdense.layers.norm import Norm, make_norm
from vitdense.necks.base import Neck, scaled_strides
from vitdense.registry import NECKS
from vitdense.structures import Level

SCALES = (4.0, 2.0, 1.0, 0.5, 0.25)


@NECKS.register("feature2pyramid")
class Feature2Pyramid(Neck):
    """Each map is resampled to its level, and nothing else: as in the code of BEiT (2106.08254).

    The maps are those of four blocks of a plain ViT, the first of which becomes the finest level
    (blocks 3, 5, 7, 11 of 12 in BEiT; 7, 11, 15, 23 of 24). Widths stay. transformers has the same
    layers in BEiT and Data2Vec, as `fpn1` to `fpn4`.

    Raises:
        ValueError: there are not as many scales as maps, one is unknown, or their levels do not
            get coarser.
    """

    def __init__(
        self,
        levels: list[Level],
        *,
        scales: tuple[float, ...] = (4.0, 2.0, 1.0, 0.5),  # of the levels over the maps; .25 too
        norm: Literal["auto", "batch", "sync", "group", "layer"] = "auto",  # in that of scale 4
    ) -> None:
        if set(scales) - set(SCALES):
            raise ValueError(f"scales: {scales} must be of {list(SCALES)}")
        strides = scaled_strides(levels, scales)
        widths = [level.channels for level in levels]
        super().__init__([Level(*level) for level in zip(widths, strides, strict=True)])
        self.stages = nn.ModuleList(
            _stage(width, scale, norm) for width, scale in zip(widths, scales, strict=True)
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """float [B, C_i, H_i, W_i] per incoming level -> [B, C_i, H, W] per scale."""
        return [stage(map_) for stage, map_ in zip(self.stages, features, strict=True)]


def _stage(width: int, scale: float, norm: Norm) -> nn.Sequential:
    def up() -> nn.Module:
        return nn.ConvTranspose2d(width, width, 2, stride=2)

    if scale == 4:
        return nn.Sequential(up(), make_norm(norm, width), nn.GELU(), up())
    if scale == 2:
        return nn.Sequential(up())
    if scale == 1:
        return nn.Sequential()
    # the published maps are even; rounding up keeps level sizes ceil(H / stride) at any size
    return nn.Sequential(nn.MaxPool2d(int(1 / scale), ceil_mode=True))
