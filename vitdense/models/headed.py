"""Models with one head, and perhaps a second head that labels the whole image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vitdense.backbones.base import Backbone
from vitdense.heads.base import Head
from vitdense.heads.image import ImageHead, Pooling
from vitdense.models.base import Model
from vitdense.structures import Frame, Prediction, Target


@dataclass(slots=True)
class ImageOutputs:
    """Outputs with an image head.

    Attributes:
        pixels: the head's own outputs.
        image: float [B, K], logits of the image classes.
    """

    pixels: Any
    image: Tensor


class HeadedModel(Model):
    """Answers of `head`, and beside them those of `image_head` if there is one.

    Subclasses call `add_image_head` in their constructor once there is a backbone, and write
    `forward`, which returns `self.with_image(outputs, features)`.
    """

    head: Head
    image_head: ImageHead | None
    image_weight: float

    def add_image_head(self, pooling: Pooling | None, classes: int, weight: float) -> None:
        """Label whole images too, unless `pooling` is None.

        Args:
            weight: of its loss.

        Raises:
            ValueError: the data has no labels of whole images, or the backbone no class token.
        """
        self.image_head, self.image_weight = None, weight
        if pooling is not None:
            self.image_classes = classes
            channels = check_image_head(pooling, classes, self.backbone)
            self.image_head = ImageHead(channels, classes, pooling)

    @property
    def wants_token(self) -> bool:
        """Whether the image head reads the class token."""
        return self.image_head is not None and self.image_head.pooling == "token"

    def with_image(self, outputs: Any, features: Tensor) -> Any:
        """The head's outputs, within `ImageOutputs` if there is an image head.

        Args:
            features: the last map [B, C, h, w], or the class token [B, C] if it `wants_token`.
        """
        if self.image_head is None:
            return outputs
        return ImageOutputs(outputs, self.image_head(features))

    def loss(self, outputs: Any, targets: list[Target]) -> dict[str, Tensor]:
        """The head's loss terms, and `image` of the image head."""
        losses = self.head.loss(self._pixels(outputs), targets)
        if self.image_head is None:
            return losses
        return {**losses, "image": self.image_weight * self.image_head.loss(outputs.image, targets)}

    def predict(self, outputs: Any, frames: list[Frame]) -> list[Prediction]:
        """The head's answers in original pixels."""
        predictions = self.head.predict(self._pixels(outputs), frames)
        if self.image_head is not None:
            for prediction, logits in zip(predictions, outputs.image, strict=True):
                prediction.image_scores = logits.float().sigmoid()
        return predictions

    def semantic_logits(self, outputs: Any) -> Tensor:
        """Those of the head."""
        return self.head.semantic_logits(self._pixels(outputs))

    def probabilities(self, scores: Tensor) -> Tensor:
        """Those of the head."""
        return self.head.probabilities(scores)

    def image_logits(self, outputs: ImageOutputs) -> Tensor:
        """Those of the image head."""
        return outputs.image

    def _pixels(self, outputs: Any) -> Any:
        return outputs if self.image_head is None else outputs.pixels


def check_image_head(pooling: Pooling, classes: int, backbone: Backbone) -> int:
    """Channels that an image head reads.

    Raises:
        ValueError: the data has no labels of whole images, or the backbone no class token.
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
