"""DPT: maps of several blocks, reassembled at rising strides and fused from the coarsest up."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from vitdense.heads.segmentation.base import SemanticHead, SemanticOutputs
from vitdense.layers.norm import Norm, make_norm
from vitdense.registry import HEADS, Fraction
from vitdense.structures import Level, Size, Target

FusionNorm = Norm | Literal["none"]


@HEADS.register("dpt")
class DPTHead(SemanticHead):
    """Dense prediction transformer (Ranftl et al. 2021, arXiv 2103.13413), as in transformers.

    The maps of a plain ViT (`neck: none`) are resampled to 1/4, 1/2, 1 and 2 times the stride of
    its patches; the levels of a pyramid keep theirs. A fused map is resized to the next finer map,
    so that odd sizes stay aligned. Logits have twice the size of the last fused map, which is the
    size of the image for patches of 16.

    The readout `project` mixes the class token into every patch. For that the backbone has to give
    maps that end in the channels of the token: `class_token: concat`. The readout `add` of the
    paper is the backbone's `class_token: add`.

    Raises:
        ValueError: there is one level, a map would be resampled by a factor that is no integer
            nor one over an integer, or `widths` or `readout` do not fit the levels.
    """

    def __init__(
        self,
        levels: list[Level],
        num_classes: int,
        *,
        channels: PositiveInt = 256,  # width of the fused maps
        widths: list[PositiveInt] | None = None,  # of reassembled maps; null: C/8, C/4, C/2, C
        readout: Literal["ignore", "project"] = "ignore",  # project: maps end in the class token
        norm: Literal["none", "auto", "batch", "sync", "group", "layer"] = "auto",  # in fusion
        dropout: Fraction = 0.1,  # before each classifier
        aux_weight: NonNegativeFloat = 0.4,  # of the auxiliary classifier's losses; 0 = without it
        losses: dict[str, PositiveFloat] | None = None,  # weights by name; null = cross_entropy
        class_weights: list[NonNegativeFloat]
        | Literal["inverse", "median"]
        | None = None,  # for the entropies: one per class, or by how rare they are
        label_smoothing: Fraction = 0.0,  # for the cross entropy
    ) -> None:
        super().__init__(levels, num_classes, losses, class_weights, label_smoothing, aux_weight)
        sources = _without_token(levels) if readout == "project" else levels
        widths = widths or _usual_widths(sources)
        if len(widths) != len(levels):
            raise ValueError(f"widths: there are {len(widths)} of them for {len(levels)} levels")
        scales = _scales(sources)
        self.readouts = nn.ModuleList(
            _readout(level.channels) if readout == "project" else nn.Identity() for level in sources
        )
        self.reassemble = nn.ModuleList(
            _reassemble(level.channels, width, scale)
            for level, width, scale in zip(sources, widths, scales, strict=True)
        )
        self.convs = nn.ModuleList(
            nn.Conv2d(width, channels, 3, padding=1, bias=False) for width in widths
        )
        self.fusions = nn.ModuleList(
            Fusion(channels, norm, alone=index == len(widths) - 1) for index in range(len(widths))
        )
        self.classifier = _classifier(channels, num_classes, dropout, norm)
        self.aux = _classifier(channels, num_classes, dropout, norm) if aux_weight else None

    def forward(
        self, features: list[Tensor], targets: list[Target] | None = None
    ) -> SemanticOutputs:
        """Logits at a quarter of the finest level's stride after reassembly."""
        stages = zip(self.readouts, self.reassemble, self.convs, features, strict=True)
        maps = [conv(layers(readout(map_))) for readout, layers, conv, map_ in stages]
        fused = None
        for index in reversed(range(len(maps))):
            finer = maps[index - 1] if index else None
            fused = self.fusions[index](maps[index], fused, finer)
        logits = _enlarge(self.classifier(fused))
        return SemanticOutputs(logits, self.aux(fused) if self.aux is not None else None)


class Fusion(nn.Module):
    """Add a map to the fused ones, refine the sum, and double its size.

    Args:
        alone: for the coarsest map, to which nothing is added.
    """

    def __init__(self, channels: int, norm: FusionNorm, alone: bool) -> None:
        super().__init__()
        self.merge = None if alone else Residual(channels, norm)
        self.refine = Residual(channels, norm)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, map_: Tensor, fused: Tensor | None, finer: Tensor | None) -> Tensor:
        """float [B, C, h, w] and the same fused -> [B, C, *size of `finer`], or [B, C, 2h, 2w]."""
        if self.merge is not None and fused is not None:
            map_ = fused + self.merge(map_)
        size = None if finer is None else (finer.shape[-2], finer.shape[-1])
        return self.project(_enlarge(self.refine(map_), size))


class Residual(nn.Module):
    """Two 3x3 convolutions with ReLU before each, beside the identity."""

    def __init__(self, channels: int, norm: FusionNorm) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers.append(nn.ReLU())
            layers.append(nn.Conv2d(channels, channels, 3, padding=1, bias=norm == "none"))
            if norm != "none":
                layers.append(make_norm(norm, channels))
        self.layers = nn.Sequential(*layers)

    def forward(self, maps: Tensor) -> Tensor:
        """float [B, C, H, W] -> the same shape."""
        return maps + self.layers(maps)


def _enlarge(maps: Tensor, size: Size | None = None) -> Tensor:
    """Bilinear resizing, by default to twice the size; corners are aligned, as in DPT."""
    size = size or (2 * maps.shape[-2], 2 * maps.shape[-1])
    return F.interpolate(maps, size, mode="bilinear", align_corners=True)


def _scales(levels: list[Level]) -> list[float]:
    """Factors that resize the levels so that each has twice the stride of the one before."""
    if len(levels) < 2:
        raise ValueError(
            "levels: DPT fuses at least two; set backbone.out_indices and `neck: none`"
        )
    plain = len({level.stride for level in levels}) == 1
    finest = levels[0].stride / (4 if plain else 1)
    scales = [level.stride / (finest * 2**index) for index, level in enumerate(levels)]
    if any(max(scale, 1 / scale) % 1 for scale in scales):
        strides = [level.stride for level in levels]
        raise ValueError(f"levels: DPT cannot make each of {strides} twice as coarse as the last")
    return scales


def _usual_widths(levels: list[Level]) -> list[int]:
    """C/8, C/4, C/2, C of a plain ViT, as DPT-Base; a pyramid's levels keep their widths."""
    plain = len({level.stride for level in levels}) == 1
    last = len(levels) - 1
    return [level.channels >> (last - i if plain else 0) for i, level in enumerate(levels)]


def _without_token(levels: list[Level]) -> list[Level]:
    odd = [level.channels for level in levels if level.channels % 2]
    if odd:
        raise ValueError(f"readout: `project` needs backbone.class_token: concat, not {odd[0]}")
    return [Level(level.channels // 2, level.stride) for level in levels]


def _readout(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2 * width, width, 1), nn.GELU())


def _reassemble(width: int, channels: int, scale: float) -> nn.Sequential:
    """1x1 convolution, then a learned change of size."""
    layers: list[nn.Module] = [nn.Conv2d(width, channels, 1)]
    if scale > 1:
        layers.append(nn.ConvTranspose2d(channels, channels, int(scale), stride=int(scale)))
    elif scale < 1:
        layers.append(nn.Conv2d(channels, channels, 3, stride=int(1 / scale), padding=1))
    return nn.Sequential(*layers)


def _classifier(channels: int, num_classes: int, dropout: float, norm: FusionNorm) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        make_norm("auto" if norm == "none" else norm, channels),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Conv2d(channels, num_classes, 1),
    )
