"""A trained model as a function from images to predictions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, overload

import torch
from torch import Tensor

from vitdense import config as configs
from vitdense.data.collate import collate
from vitdense.engine.checkpoint import Meta, load_model
from vitdense.engine.evaluate import answer, check_inference, place
from vitdense.engine.runtime import choose_device, choose_precision
from vitdense.engine.views import Advance
from vitdense.inference.inputs import to_sample, to_tensor
from vitdense.models.base import Model
from vitdense.ops.draw import draw
from vitdense.structures import Prediction, Sample

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

    from vitdense.inference.inputs import Image

    Images = list[Any] | tuple[Any, ...]

READABLE = 512
"""Pictures of images with a longer side below this are enlarged, to have room for text."""


class Predictor:
    """Predictions for images, prepared exactly as training prepared them for evaluation.

    Attributes:
        model: in evaluation mode, on `device`.
        classes: names, in the order of the labels.
        category_ids: the data set's own id of each class.
        image_classes: labels of whole images, in the order of `Prediction.image_scores`.
        task: what the model answers.
        device: where it computes.
        inference: windows, flips and scales.
        range: values of images deeper than 8 bits that become 0 and 255; None = their type's.
    """

    def __init__(self, model: Model, meta: Meta, device: torch.device) -> None:
        config = configs.loads(meta.config, "the model's config")
        check_inference(config.inference, model)
        self.model = model.to(device).eval()
        self.classes = meta.classes
        self.category_ids = meta.category_ids
        self.image_classes = meta.image_classes
        self.task = model.task
        self.device = device
        self.inference = config.inference
        self.policy = config.data.transforms()
        self.range = config.data.dataset.options.get("range")
        self.precision = choose_precision(config.train.precision, device)

    @classmethod
    def load(cls, path: Path, device: str = "auto", overrides: Iterable[str] = ()) -> Self:
        """From the `model.safetensors` of a run; see `vitdense.load`."""
        model, meta = load_model(path, overrides)
        return cls(model, meta, choose_device(device))

    @overload
    def __call__(self, images: Image, batch_size: int = ...) -> Prediction: ...

    @overload
    def __call__(self, images: Images, batch_size: int = ...) -> list[Prediction]: ...

    def __call__(
        self, images: Image | Images, batch_size: int = 8
    ) -> Prediction | list[Prediction]:
        """Answer for one image, or for each of a list.

        Args:
            images: files; PIL images; arrays [H, W] or [H, W, C]; tensors [C, H, W]; or a list of
                them, of any sizes. Types are uint8, uint16, or any if the data had a `range`.
            batch_size: images that are computed at a time, where their canvases are equal.

        Returns:
            Predictions on the CPU, in the pixels of each image as it was given.

        Raises:
            DataError: a file is missing or broken.
            ValueError: an array or a tensor of another type or shape, or a batch size below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: {batch_size} must be at least 1")
        if not isinstance(images, list | tuple):
            return self.answer([self.sample(images)])[0]
        answers = []
        for start in range(0, len(images), batch_size):
            places = range(start, min(start + batch_size, len(images)))
            answers += self.answer([self._sample_of(images, place) for place in places])
        return answers

    def _sample_of(self, images: Images, place: int) -> Sample:
        try:
            return self.sample(images[place])
        except ValueError as error:
            message = str(error).replace("image:", f"images[{place}]:", 1)
            raise ValueError(message) from error

    def sample(self, image: Image) -> Sample:
        """The image as the model takes it, before batching."""
        return self.policy.evaluate(to_sample(image, self.model.in_chans, limits=self.range))

    def answer(self, samples: Sequence[Sample], advance: Advance | None = None) -> list[Prediction]:
        """Predictions on the CPU for prepared samples, in their order.

        Args:
            advance: is told of parts of images that are done; all together they are `samples`.
        """
        numbered = [replace(sample, image_id=index) for index, sample in enumerate(samples)]
        batches = collate(
            numbered, divisor=self.model.divisor, canvas=self.policy.canvas, training=False
        )
        answers: dict[int | str, Prediction] = {}
        for batch in batches:
            count = len(batch.images)

            def watch(part: float, count: int = count) -> None:
                if advance is not None:
                    advance(part * count)

            batch = place(batch, self.device, self.inference)
            predictions = answer(self.model, batch, self.precision, self.inference, watch)
            found = [prediction.to("cpu") for prediction in predictions]
            answers.update(zip(batch.image_ids, found, strict=True))
        return [answers[index] for index in range(len(samples))]

    def draw(self, image: Image, prediction: Prediction, threshold: float = 0.3) -> PilImage:
        """A picture of the prediction over its image; small images are enlarged by whole factors.

        Args:
            threshold: objects of a lower score are left out.
        """
        pixels = to_tensor(image, self.model.in_chans, self.range)
        return self.draw_pixels(pixels, prediction, threshold)

    def draw_pixels(
        self, pixels: Tensor, prediction: Prediction, threshold: float = 0.3
    ) -> PilImage:
        """The same for pixels as a `Sample` has them: uint8, or float in 0..255, [C, H, W]."""
        from PIL.Image import fromarray

        scale = max(1, READABLE // max(pixels.shape[1:]))
        picture = draw(pixels, prediction, self.classes, threshold, scale, self.image_classes)
        return fromarray(picture.permute(1, 2, 0).contiguous().numpy())
