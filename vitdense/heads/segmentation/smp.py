"""The decoders of segmentation_models_pytorch on any backbone, plain vision transformers too."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from vitdense.heads.segmentation.base import SemanticHead, SemanticOutputs
from vitdense.layers.norm import Norm, make_norm
from vitdense.layers.resize import resize
from vitdense.registry import HEADS, Fraction, suggest
from vitdense.structures import Level, Target

BLOCKS = (256, 128, 64, 32, 16)
ATROUS = {"atrous_rates": (12, 24, 36), "aspp_dropout": 0.5}
POOLED = 8
"""Cells per side that PAN needs of the coarsest map, which its attention halves three times."""


@dataclass(frozen=True)
class Design:
    """Facts about a decoder of smp.

    Attributes:
        module, name: of its class within smp.
        channels: default width, or widths for the blocks of a U-Net.
        argument: smp's name for `channels`.
        kernel: size of the classifier's convolution.
        needs: the fewest and the most levels that it can read.
        doubles: whether each level must have twice the stride of the one before.
        reads: `all` levels, or the `last` alone.
        options: values of arguments that have no default in smp.
    """

    module: str
    name: str
    channels: int | tuple[int, ...]
    argument: str = "decoder_channels"
    kernel: int = 1
    needs: tuple[int, float] = (1, math.inf)
    doubles: bool = False
    reads: Literal["all", "last"] = "all"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_u(self) -> bool:
        """Whether it is a U-Net: its blocks double the size, up to that of the image."""
        return self.argument == "prefinal_channels" or isinstance(self.channels, tuple)

    def load(self) -> Callable[..., nn.Module]:
        """The decoder's class."""
        package = f"segmentation_models_pytorch.decoders.{self.module}.decoder"
        return getattr(importlib.import_module(package), self.name)


DESIGNS = {
    "unet": Design("unet", "UnetDecoder", BLOCKS, kernel=3, doubles=True),
    "unetplusplus": Design("unetplusplus", "UnetPlusPlusDecoder", BLOCKS, kernel=3, doubles=True),
    "manet": Design("manet", "MAnetDecoder", BLOCKS, kernel=3, doubles=True),
    "linknet": Design("linknet", "LinknetDecoder", 32, "prefinal_channels", doubles=True),
    "fpn": Design("fpn", "FPNDecoder", 128, "segmentation_channels", needs=(4, 5), doubles=True),
    "pspnet": Design("pspnet", "PSPDecoder", 512, "out_channels", kernel=3, reads="last"),
    "pan": Design("pan", "PANDecoder", 32, kernel=3, needs=(2, 4)),
    "deeplabv3": Design(
        "deeplabv3", "DeepLabV3Decoder", 256, "out_channels", reads="last",
        options=ATROUS | {"aspp_separable": False},
    ),
    "deeplabv3plus": Design(
        "deeplabv3", "DeepLabV3PlusDecoder", 256, "out_channels", needs=(2, math.inf),
        options=ATROUS | {"aspp_separable": True},
    ),
    "upernet": Design("upernet", "UPerNetDecoder", 256),
    "segformer": Design("segformer", "SegformerDecoder", 256, "segmentation_channels"),
}  # fmt: skip


@HEADS.register("smp")
class SmpHead(SemanticHead):
    """A decoder of segmentation_models_pytorch, equal to its model on the same feature maps.

    smp's decoders read the image and maps from stride 2 on. For those that the backbone lacks they
    get maps without channels, as smp itself does for Swin, so that their blocks only enlarge. A
    U-Net thus ends at the size of the image, whatever its finest level; fewer `channels` end it
    earlier. Convolutional nets have a level of stride 2 too with `out_indices: [0, 1, 2, 3, 4]`.
    Plain ViTs need a neck that makes a pyramid.

    Different from smp: `norm` replaces batch norms (but for those of one channel), DeepLabV3+ takes
    any stride, and PAN's coarsest map is enlarged where it has fewer than 8 cells a side. smp's DPT
    is the head `dpt` here.

    Raises:
        ValueError: the decoder cannot read the levels, or has no such option.
    """

    def __init__(
        self,
        levels: list[Level],
        num_classes: int,
        *,
        decoder: Literal[
            "unet",
            "unetplusplus",
            "manet",
            "linknet",
            "fpn",
            "pspnet",
            "pan",
            "deeplabv3",
            "deeplabv3plus",
            "upernet",
            "segformer",
        ] = "unet",  # as smp.create_model calls it
        channels: PositiveInt | list[PositiveInt] | None = None,  # a list for U-Nets; null = smp's
        norm: Literal["auto", "batch", "sync", "group", "layer"] = "auto",  # auto: batch or sync
        options: dict[str, Any] | None = None,  # more arguments of smp's decoder: {dropout: 0.1}
        losses: dict[str, PositiveFloat] | None = None,  # weights by name; null = cross_entropy
        class_weights: list[NonNegativeFloat]
        | Literal["inverse", "median"]
        | None = None,  # for the entropies: one per class, or by how rare they are
        label_smoothing: Fraction = 0.0,  # for the cross entropy
    ) -> None:
        super().__init__(levels, num_classes, losses, class_weights, label_smoothing)
        from segmentation_models_pytorch.base import SegmentationHead
        from segmentation_models_pytorch.base.initialization import (
            initialize_decoder,
            initialize_head,
        )

        self.design = design = DESIGNS[decoder]
        _check_levels(decoder, levels)
        self.missing = _missing(levels, design)
        widths = [0] * self.missing + [level.channels for level in levels]
        blocks = _blocks(decoder, channels, len(widths) - 1)
        self.decoder = _with_norms(_build(decoder, widths, blocks, options or {}), norm)
        width = blocks[-1] if isinstance(blocks, list) else blocks
        width = getattr(self.decoder, "out_channels", width) if decoder == "fpn" else width
        finest = levels[max(0, 2 - self.missing)]
        stride = (levels[-1] if design.reads == "last" else finest).stride
        if decoder == "deeplabv3plus":
            ratio = levels[-1].stride / stride
            self.decoder.up = nn.Upsample(scale_factor=ratio, mode="bilinear", align_corners=True)
        enlarged = 1 if design.is_u else 2 ** round(math.log2(stride))
        self.classifier = SegmentationHead(width, num_classes, design.kernel, None, enlarged)
        initialize_decoder(self.decoder)
        initialize_head(self.classifier)

    def forward(
        self, features: list[Tensor], targets: list[Target] | None = None
    ) -> SemanticOutputs:
        """Logits of the size of the image; coarser from a U of fewer blocks."""
        batch, _, height, width = features[0].shape
        empty = [
            features[0].new_empty(batch, 0, height * 2**step, width * 2**step)
            for step in range(self.missing, 0, -1)
        ]
        *finer, coarsest = features
        if self.design.module == "pan":
            rows, columns = coarsest.shape[-2:]
            if min(rows, columns) < POOLED:
                coarsest = resize(coarsest, (max(rows, POOLED), max(columns, POOLED)))
        return SemanticOutputs(self.classifier(self.decoder([*empty, *finer, coarsest])))


def _missing(levels: list[Level], design: Design) -> int:
    """How many levels finer than the backbone's are passed empty; at most two if not a U-Net."""
    count = round(math.log2(levels[0].stride))
    return count if design.is_u else min(count, 2)


def _blocks(decoder: str, channels: int | list[int] | None, most: int) -> int | list[int]:
    """The decoder's `channels`, checked; a U-Net has at most `most` blocks."""
    usual = DESIGNS[decoder].channels
    if isinstance(usual, int):
        if isinstance(channels, list):
            raise ValueError(f"channels: {decoder} has one width, not {channels}")
        return channels or usual
    if isinstance(channels, int):
        raise ValueError(f"channels: {decoder} has one width per block: give {most} of them")
    blocks = channels or [*usual, *usual[-1:] * most][:most]
    if len(blocks) > most or (decoder == "unetplusplus" and len(blocks) < most):
        fewer = "" if decoder == "unetplusplus" else " at most"
        raise ValueError(
            f"channels: {decoder} has{fewer} {most} blocks on these levels, not {len(blocks)}"
        )
    return blocks


def _build(
    decoder: str, widths: list[int], blocks: int | list[int], options: dict[str, Any]
) -> Any:
    """smp's decoder for these widths of levels, with the user's options."""
    design = DESIGNS[decoder]
    cls = design.load()
    known = inspect.signature(cls).parameters
    facts = {
        "encoder_channels": widths,
        "in_channels": widths[-1],
        "encoder_depth": max(3, len(widths) - 1),
        "n_blocks": len(blocks) if isinstance(blocks, list) else len(widths) - 1,
        "output_stride": 16,
        "center": False,
        "add_center_block": False,
    }
    free = sorted(set(known) - set(facts) - {design.argument, "use_norm"})
    for name in options:
        if name not in free:
            raise ValueError(
                f"options: {decoder} has no {name!r}.{suggest(name, free)} It has {', '.join(free)}"
            )
    needed = {name: value for name, value in facts.items() if name in known}
    return cls(**needed, **{design.argument: blocks}, **(design.options | options))


def _with_norms(module: Any, norm: Norm) -> Any:
    """The module with its batch norms replaced: smp's fail to train on one image pooled to a pixel.

    Maps of one channel, which PAN has, keep batch norm: a norm over channels would make them 0.
    """
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            single = child.num_features == 1 and norm in ("group", "layer")
            setattr(module, name, make_norm("batch" if single else norm, child.num_features))
        else:
            _with_norms(child, norm)
    return module


def _check_levels(decoder: str, levels: list[Level]) -> None:
    """Raise ValueError if the decoder cannot read the levels."""
    design = DESIGNS[decoder]
    strides = [level.stride for level in levels]
    least, most = design.needs
    if not least <= len(levels) <= most:
        count = f"{least}" if most == math.inf else f"{least} to {most}"
        raise ValueError(
            f"decoder: {decoder} reads {count} levels, there are {len(levels)}; set "
            "backbone.out_indices, or a neck that makes a pyramid"
        )
    if design.doubles and any(b != 2 * a for a, b in zip(strides, strides[1:], strict=False)):
        raise ValueError(
            f"decoder: {decoder} needs strides that double, not {strides}; a plain ViT needs a "
            "neck, as simple_feature_pyramid"
        )
    if decoder == "unetplusplus" and strides[0] > 4:
        raise ValueError(
            f"decoder: unetplusplus needs a level of stride 4 or finer, not {strides[0]}"
        )
