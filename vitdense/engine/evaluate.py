"""A model's numbers over a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from vitdense.engine.runtime import autocast, to_float
from vitdense.metrics.base import Metric
from vitdense.models.base import Model
from vitdense.structures import Batch, Prediction

Watcher = Callable[[Batch, list[Prediction]], None]


@torch.no_grad()
def evaluate(
    model: Model,
    loader: Iterable[Batch],
    metric: Metric,
    device: torch.device,
    precision: torch.dtype = torch.float32,
    watch: Watcher | None = None,
) -> dict[str, float]:
    """Predict every batch of `loader` and count it into `metric`.

    With several processes each goes over its share, and all get the numbers over everything.

    Args:
        model: is put into evaluation mode, and back into its own afterwards.
        loader: batches with truth in original pixels.
        metric: is reset first.
        device: where the model lies.
        precision: of autocast.
        watch: is shown every batch with its predictions, to draw or to keep them.
    """
    was_training = model.training
    model.eval()
    metric.reset()
    for batch in loader:
        batch = batch.to(device, non_blocking=True)
        predictions = answer(model, batch, precision)
        metric.update(predictions, batch)
        if watch is not None:
            watch(batch, predictions)
    model.train(was_training)
    return metric.compute()


@torch.no_grad()
def answer(model: Model, batch: Batch, precision: torch.dtype) -> list[Prediction]:
    """Predictions for a batch on the model's device: computed under autocast, decoded in fp32."""
    with autocast(batch.images.device, precision):
        outputs = model(batch.images)
    return model.predict(to_float(outputs), batch.frames)
