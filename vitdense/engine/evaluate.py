"""A model's answers to a batch, and its numbers over a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vitdense.config.schema import Inference
from vitdense.data.base import DataError
from vitdense.engine.memory import explained_answer
from vitdense.engine.promises import numbers_of
from vitdense.engine.runtime import autocast, to_float
from vitdense.engine.views import Advance, Glances, segment
from vitdense.engine.windows import window_size
from vitdense.heads.base import Head
from vitdense.metrics.base import Metric
from vitdense.models.base import Model
from vitdense.models.headed import HeadedModel
from vitdense.structures import Batch, Prediction

Watcher = Callable[[Batch, list[Prediction]], None]

WHOLE = Inference()
"""One look at the whole image."""


@torch.no_grad()
def evaluate(
    model: Model,
    loader: Iterable[Batch],
    metric: Metric,
    device: torch.device,
    precision: torch.dtype = torch.float32,
    watch: Watcher | None = None,
    inference: Inference = WHOLE,
) -> dict[str, float]:
    """Predict every batch of `loader` and count it into `metric`.

    With several processes each goes over its share, and all get the numbers over everything.

    Args:
        model: is put into evaluation mode, and back into its own afterwards.
        loader: batches with truth in original pixels.
        metric: is reset first, and again at the end, because it holds objects of all images.
        device: where the model lies.
        precision: of autocast.
        watch: is shown every batch with its predictions, to draw or to keep them.
        inference: windows, flips and scales.

    Raises:
        DataError: two images have the same id, of which metrics would count the first alone.
    """
    was_training = model.training
    model.eval()
    metric.reset()
    paths: dict[int | str, Path] = {}
    for batch in loader:
        for image_id, path in zip(batch.image_ids, batch.paths, strict=True):
            if (other := paths.setdefault(image_id, path)) != path:
                raise DataError(
                    f"{path}: has the id {image_id!r}, and so has {other}; metrics tell images by "
                    "their ids, so let `image_id` be another for each"
                )
        batch = place(batch, device, inference)
        predictions = answer(model, batch, precision, inference, confidence=metric.confidence)
        metric.update(predictions, batch)
        if watch is not None:
            watch(batch, predictions)
    model.train(was_training)
    numbers = numbers_of(metric)
    metric.reset()  # training goes on and wants the memory, mostly that of a GPU
    return numbers


@explained_answer
@torch.no_grad()
def answer(
    model: Model,
    batch: Batch,
    precision: torch.dtype,
    inference: Inference = WHOLE,
    advance: Advance | None = None,
    confidence: bool = False,
) -> list[Prediction]:
    """Predictions for a batch: computed under autocast, decoded in fp32, on the model's device.

    The one way from images to answers: of training, `eval`, `predict` and `vitdense.load`.

    Args:
        batch: as `place` lays it.
        inference: windows, flips and scales; checked by `check_inference`.
        advance: is told of each part of the batch that is done, to show progress.
        confidence: semantic models also say how sure they are of each pixel.
    """
    if not options_used(inference) and not confidence:
        with autocast(batch.images.device, precision):
            outputs = model(batch.images)
        predictions = model.predict(to_float(outputs), batch.frames)
        if advance is not None:
            advance(1.0)
        return predictions
    device = next(model.parameters(), batch.images).device
    glances = Glances() if model.image_classes else None

    def compute(images: Tensor) -> Tensor:
        images = images.to(device, non_blocking=True)
        with autocast(device, precision):
            outputs = model(images)
        outputs = to_float(outputs)
        if glances is not None:
            glances.add(model.image_logits(outputs))
        return model.semantic_logits(outputs).float()

    inputs = (compute, batch.images, batch.frames, inference, model.divisor, device)
    return segment(*inputs, advance, glances, confidence, model.probabilities)


def place(batch: Batch, device: torch.device, inference: Inference = WHOLE) -> Batch:
    """The batch on the device, but for images that `answer` moves there window by window."""
    if inference.window is None:
        return batch.to(device, non_blocking=True)
    rest = replace(batch, images=batch.images[:0]).to(device, non_blocking=True)
    return replace(rest, images=batch.images)


def options_used(inference: Inference) -> list[str]:
    """Which options ask for more than one look at the whole image."""
    keys = ("window", "flip", "scales")
    return [key for key in keys if getattr(inference, key) != getattr(WHOLE, key)]


def _without_scores(model: Model) -> str | None:
    """The name of the class that lacks `semantic_logits`; None if the model has them."""
    if type(model).semantic_logits is Model.semantic_logits:
        return type(model).__name__
    if isinstance(model, HeadedModel):
        missing = type(model.head).semantic_logits is Head.semantic_logits
        return type(model.head).__name__ if missing else None
    return None


def check_inference(inference: Inference, model: Model, metric: Metric | None = None) -> None:
    """Raise ValueError if the model cannot answer so, naming the option and what to do.

    Args:
        metric: what reads the answers; it may want to know how sure they are.
    """
    used = options_used(inference)
    if used and model.task != "semantic":
        raise ValueError(
            f"inference.{used[0]}: is for semantic models, and this one's task is {model.task}; "
            "remove it"
        )
    if used and (mute := _without_scores(model)):
        raise ValueError(
            f"inference.{used[0]}: {mute} has no method semantic_logits, which gives the scores "
            "that are averaged; write it, or remove the option"
        )
    if metric is not None and metric.confidence and (mute := _without_scores(model)):
        raise ValueError(
            f"metric.calibration: {mute} has no method semantic_logits, which gives the scores "
            "that confidence is computed from; write it, or remove the option"
        )
    sides = inference.window or ()
    for side in (sides,) if isinstance(sides, int) else sides:
        if side % model.divisor:
            below = side // model.divisor * model.divisor
            near = [size for size in (below, below + model.divisor) if size]
            raise ValueError(
                f"inference.window: {side} is no multiple of {model.divisor}, of which this model "
                f"takes images; give {' or '.join(map(str, near))}"
            )
    canvas = getattr(getattr(model, "backbone", None), "canvas", None)
    if inference.window is not None and canvas is not None:
        try:
            canvas.fit(window_size(inference, (0, 0)))
        except ValueError as error:  # it takes images of one size alone
            reason = str(error).removeprefix("img_size: ")
            raise ValueError(f"inference.window: {reason}, or give windows of that size") from None
