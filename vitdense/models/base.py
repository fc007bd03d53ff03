"""What every model promises."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitdense.backbones.base import Backbone
from vitdense.structures import Frame, Prediction, Target, Task


class Model(nn.Module):
    """Images in, answers out: the one object that is trained, saved and used.

    Subclasses take the number of classes first, then `image_classes` if they can answer for whole
    images, and their options after `*`, and build `backbone` before anything that reads it.

    Attributes:
        task: what it answers.
        num_classes: classes 0..num_classes-1.
        image_classes: number of labels of whole images that it answers with beside; often none.
        backbone: owns normalisation constants and the order of layers.
        divisor: pixels; heights and widths of canvases must be multiples of it.
        progress: the part of the run that is done, 0..1; the training loop sets it.
    """

    task: Task
    num_classes: int
    image_classes: int = 0
    backbone: Backbone
    divisor: int
    progress: float = 0.0

    @property
    def in_chans(self) -> int:
        """Channels of the images it takes; the data set decodes to this number."""
        return self.backbone.in_chans

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 or float [B, C, H, W] in 0..255 -> float, by the backbone's mean and deviation."""
        statistics = torch.tensor([self.backbone.mean, self.backbone.std]).mul_(255)
        # made on the host: the host waits while a tensor is made from numbers on a GPU
        mean, std = statistics[..., None, None].to(images.device, non_blocking=True)
        return (images - mean) / std

    def set_things(self, things: list[bool]) -> None:
        """Tell the parts that have a buffer `things`, bool [C], which classes are things.

        It is saved with the weights, so that a loaded model knows it too.
        """
        for module in self.modules():
            buffer = dict(module.named_buffers(recurse=False)).get("things")
            if buffer is not None:
                buffer.copy_(torch.tensor(things))

    def forward(self, images: Tensor, targets: list[Target] | None = None) -> Any:
        """Outputs of the head for uint8 images [B, C, H, W]; the same type in both modes."""
        raise NotImplementedError

    def loss(self, outputs: Any, targets: list[Target]) -> dict[str, Tensor]:
        """Named, already weighted terms whose sum is the objective."""
        raise NotImplementedError

    def predict(self, outputs: Any, frames: list[Frame]) -> list[Prediction]:
        """Answers in the pixels of each original image."""
        raise NotImplementedError

    def semantic_logits(self, outputs: Any) -> Tensor:
        """Scores of each class, float [B, C, h, w] over the canvas, if the task is semantic."""
        raise NotImplementedError

    def probabilities(self, scores: Tensor) -> Tensor:
        """Probability of each class, 0..1, from `semantic_logits` of one image, float [C, h, w]."""
        return scores.softmax(0)

    def image_logits(self, outputs: Any) -> Tensor:
        """Scores of each image class before the sigmoid, float [B, K], if there are any."""
        raise NotImplementedError
