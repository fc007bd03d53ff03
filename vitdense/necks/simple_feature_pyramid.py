"""A pyramid from the last map of a plain vision transformer."""

from __future__ import annotations

from pydantic import PositiveInt
from torch import Tensor, nn

from vitdense.layers.norm import make_norm
from vitdense.necks.base import Neck, check_scales, scaled_stride
from vitdense.registry import NECKS
from vitdense.structures import Level

SCALES = (4.0, 2.0, 1.0, 0.5)


@NECKS.register("simple_feature_pyramid")
class SimpleFeaturePyramid(Neck):
    """Each level is made from the last map alone: Li et al., ViTDet (2203.16527), section 3.

    Levels: one for each scale, the finest first; a patch of 14 gives fractional strides.

    Raises:
        ValueError: a scale is none of 4, 2, 1 and 0.5, or is named twice.
    """

    def __init__(
        self,
        levels: list[Level],
        *,
        channels: PositiveInt = 256,  # width of each level
        scales: tuple[float, ...] = (4.0, 2.0, 1.0, 0.5),  # sizes of the levels over the map's
    ) -> None:
        check_scales(scales, SCALES)
        finest_first = sorted(scales, reverse=True)
        last = levels[-1]
        super().__init__([Level(channels, scaled_stride(last, scale)) for scale in finest_first])
        self.stages = nn.ModuleList(
            _stage(last.channels, channels, scale) for scale in finest_first
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """float [B, C_i, H_i, W_i] per incoming level -> [B, channels, H, W] per scale."""
        return [stage(features[-1]) for stage in self.stages]


def _stage(width: int, channels: int, scale: float) -> nn.Sequential:
    """Resampling that halves the width at each step up, then 1x1 and 3x3 with LayerNorm."""
    half, quarter = width // 2, width // 4
    resample: dict[float, list[nn.Module]] = {
        4.0: [
            nn.ConvTranspose2d(width, half, 2, stride=2),
            make_norm("layer", half),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, stride=2),
        ],
        2.0: [nn.ConvTranspose2d(width, half, 2, stride=2)],
        1.0: [],
        # ViTDet's maps are even; rounding up keeps level sizes ceil(H / stride) at any size
        0.5: [nn.MaxPool2d(2, stride=2, ceil_mode=True)],
    }
    resampled = {4.0: quarter, 2.0: half}.get(scale, width)
    return nn.Sequential(
        *resample[scale],
        nn.Conv2d(resampled, channels, 1, bias=False),
        make_norm("layer", channels),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        make_norm("layer", channels),
    )
