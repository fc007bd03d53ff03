"""Backbone -> neck -> head: the default model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import PositiveFloat
from torch import Tensor

from vitdense.backbones.base import Backbone
from vitdense.heads.base import Head
from vitdense.heads.image import ImageHead
from vitdense.models.base import Model
from vitdense.necks.base import Neck
from vitdense.registry import MODELS, NECKS, Builder
from vitdense.structures import Frame, Level, Prediction, Target


@dataclass(slots=True)
class ImageOutputs:
    """Outputs with an image head.

    Attributes:
        pixels: the head's own outputs.
        image: float [B, K], logits of the image classes.
    """

    pixels: Any
    image: Tensor


@MODELS.register("pyramid")
class PyramidModel(Model):
    """A backbone's maps, made a pyramid by a neck where they are none, read by a head.

    With `image_head` another head labels the whole image, from the last map or the class token of
    the backbone; the first is not changed by it.
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
        self.image_weight = image_weight
        self.image_head: ImageHead | None = None
        if image_head is not None:
            self.image_classes = image_classes
            channels = check_image_head(image_head, image_classes, self.backbone)
            self.image_head = ImageHead(channels, image_classes, image_head)

    def forward(self, images: Tensor, targets: list[Target] | None = None) -> Any:
        """The head's outputs for uint8 images [B, C, H, W]; within `ImageOutputs` if there are."""
        pixels = self.normalize(images)
        if self.image_head is None:
            return self._answer(self.backbone(pixels), targets)
        if self.image_head.pooling == "token":
            features, pooled = self.backbone.forward_with_token(pixels)
        else:
            features = self.backbone(pixels)
            pooled = features[-1]
        return ImageOutputs(self._answer(features, targets), self.image_head(pooled))

    def _answer(self, features: list[Tensor], targets: list[Target] | None) -> Any:
        if self.neck is not None:
            features = self.neck(features)
        return self.head(features, targets)

    def loss(self, outputs: Any, targets: list[Target]) -> dict[str, Tensor]:
        """The head's loss terms, and `image` of the image head."""
        if self.image_head is None:
            return self.head.loss(outputs, targets)
        image = self.image_weight * self.image_head.loss(outputs.image, targets)
        return {**self.head.loss(outputs.pixels, targets), "image": image}

    def predict(self, outputs: Any, frames: list[Frame]) -> list[Prediction]:
        """The head's answers in original pixels."""
        if self.image_head is None:
            return self.head.predict(outputs, frames)
        predictions = self.head.predict(outputs.pixels, frames)
        for prediction, logits in zip(predictions, outputs.image, strict=True):
            prediction.image_scores = logits.float().sigmoid()
        return predictions

    def semantic_logits(self, outputs: Any) -> Tensor:
        """The head's scores of each class."""
        return self.head.semantic_logits(outputs if self.image_head is None else outputs.pixels)

    def probabilities(self, scores: Tensor) -> Tensor:
        """As the head understands its scores."""
        return self.head.probabilities(scores)

    def image_logits(self, outputs: ImageOutputs) -> Tensor:
        """The image head's scores."""
        return outputs.image


def needs_neck(levels: list[Level]) -> bool:
    """Whether all maps have one stride, as a plain ViT's, so that they form no pyramid."""
    return len({level.stride for level in levels}) == 1


def check_image_head(pooling: str, classes: int, backbone: Backbone) -> int:
    """Channels that an image head reads.

    Raises:
        ValueError: there is nothing to learn, or no class token.
    """
    if not classes:
        raise ValueError(
            "image_head: the data has no labels of whole images; name their file in "
            "data.image_labels, or remove image_head"
        )
    if pooling != "token":
        return backbone.levels[-1].channels
    if not backbone.token_channels:
        name = getattr(backbone, "name", type(backbone).__name__)
        raise ValueError(
            f"image_head: {name} has no class token, or one in each of its windows; take mean or "
            "attention"
        )
    return backbone.token_channels
