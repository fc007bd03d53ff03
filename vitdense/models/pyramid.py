"""Backbone -> neck -> head: the default model."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from vitdense.backbones.base import Backbone
from vitdense.heads.base import Head
from vitdense.models.base import Model
from vitdense.necks.base import Neck
from vitdense.registry import MODELS, NECKS, Builder
from vitdense.structures import Frame, Level, Prediction, Target


@MODELS.register("pyramid")
class PyramidModel(Model):
    """A backbone's maps, made a pyramid by a neck where they are none, read by a head."""

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: Builder[Backbone],  # computes the feature maps
        neck: Builder[Neck]
        | None = None,  # by default: none if strides differ, else simple_feature_pyramid
        head: Builder[Head],  # reads the pyramid and answers
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

    def forward(self, images: Tensor, targets: list[Target] | None = None) -> Any:
        """The head's outputs for uint8 images [B, C, H, W]."""
        features = self.backbone(self.normalize(images))
        if self.neck is not None:
            features = self.neck(features)
        return self.head(features, targets)

    def loss(self, outputs: Any, targets: list[Target]) -> dict[str, Tensor]:
        """The head's loss terms."""
        return self.head.loss(outputs, targets)

    def predict(self, outputs: Any, frames: list[Frame]) -> list[Prediction]:
        """The head's answers in original pixels."""
        return self.head.predict(outputs, frames)


def needs_neck(levels: list[Level]) -> bool:
    """Whether all maps have one stride, as a plain ViT's, so that they form no pyramid."""
    return len({level.stride for level in levels}) == 1
