"""Backbone -> neck -> head: the default model."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import PositiveFloat
from torch import Tensor

from vitdense.backbones.base import Backbone
from vitdense.heads.base import Head
from vitdense.models.headed import HeadedModel
from vitdense.necks.base import Neck
from vitdense.registry import MODELS, NECKS, Builder
from vitdense.structures import Level, Target


@MODELS.register("pyramid")
class PyramidModel(HeadedModel):
    """Backbone, neck and head.

    Without a `neck` the maps of a hierarchical backbone go to the head as they are; the maps of a
    plain ViT, which have one stride, become a pyramid (`simple_feature_pyramid`). With `image_head`
    a second head labels the whole image, from the last map or the class token of the backbone.
    """

    def __init__(
        self,
        num_classes: int,
        image_classes: int = 0,
        *,
        backbone: Builder[Backbone],  # computes the feature maps
        neck: Builder[Neck]
        | None = None,  # by default: none if strides differ, else simple_feature_pyramid
        head: Builder[Head],  # reads the pyramid and answers
        image_head: Literal["mean", "attention", "token"]
        | None = None,  # labels whole images too: by the pooled last map, or by the class token
        image_weight: PositiveFloat = 1.0,  # of the loss of image_head
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = backbone()
        levels = self.backbone.levels
        if neck is None and needs_neck(levels):
            neck = NECKS.get("simple_feature_pyramid")
        self.neck = neck(levels) if neck is not None else None
        self.head = head(self.neck.levels if self.neck else levels, num_classes)
        self.task = self.head.task
        strides = [level.stride for level in [*levels, *self.head.levels]]
        self.divisor = math.lcm(*(int(stride) for stride in strides if stride == int(stride)))
        self.add_image_head(image_head, image_classes, image_weight)

    def forward(self, images: Tensor, targets: list[Target] | None = None) -> Any:
        """The head's outputs for uint8 images [B, C, H, W]; `ImageOutputs` with an image head."""
        pixels = self.normalize(images)
        if self.wants_token:
            features, pooled = self.backbone.forward_with_token(pixels)
        else:
            features = self.backbone(pixels)
            pooled = features[-1]
        maps = features if self.neck is None else self.neck(features)
        return self.with_image(self.head(maps, targets), pooled)


def needs_neck(levels: list[Level]) -> bool:
    """Whether all maps have one stride, as a plain ViT's, so that they form no pyramid."""
    return len({level.stride for level in levels}) == 1
