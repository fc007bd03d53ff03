"""RT-DETR's smaller ResNets."""

from __future__ import annotations

from typing import Any

from pydantic import NonNegativeInt, PositiveInt

from vitdense.backbones.timm import TimmBackbone
from vitdense.registry import BACKBONES


@BACKBONES.register("presnet")
class PResNetBackbone(TimmBackbone):
    """timm's resnet18d or resnet34d with a convolution in the shortcut of the first block too.

    This is the backbone of the public RT-DETR-R18 and R34. Those of R50 and R101 are timm's
    resnet50d and resnet101d as they are.

    Raises:
        ValueError: the model is no ResNet of basic blocks.
    """

    def __init__(
        self,
        *,
        model: str = "resnet18d",  # a ResNet-D of timm with basic blocks
        in_chans: PositiveInt = 3,  # channels of the images
        out_indices: list[int] | None = None,  # maps to give; by default those of stride 4 and more
        frozen: bool | NonNegativeInt = False,  # true: all; n: the stem and the first n blocks
        frozen_norms: bool = False,  # batch norms keep their statistics and weights, as in RT-DETR
        checkpointing: bool = False,  # recompute activations in backward: less memory, more time
        mean: list[float] | None = None,  # of pixels in 0..1; by default ImageNet's
        std: list[float] | None = None,  # of pixels in 0..1; by default ImageNet's
        options: dict[str, Any] | None = None,  # more arguments of timm's constructor
    ) -> None:
        super().__init__(
            model=model,
            in_chans=in_chans,
            out_indices=out_indices,
            frozen_norms=frozen_norms,
            checkpointing=checkpointing,
            mean=mean,
            std=std,
            options=options,
        )
        from timm.models.resnet import BasicBlock, downsample_avg

        from vitdense.backbones import creation

        first = getattr(self.model, "layer1", [None])[0]
        if not isinstance(first, BasicBlock):
            raise ValueError(f"model: {model} is no ResNet of basic blocks, such as resnet18d")
        width = first.conv1.in_channels
        shortcut = downsample_avg(width, width, 1)
        first.downsample = creation.freeze_norms(shortcut, model) if frozen_norms else shortcut
        if frozen is not False:
            self._freeze(frozen)
