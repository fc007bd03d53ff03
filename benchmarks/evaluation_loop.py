"""Where the time of an evaluation goes, by torch's profiler and by a plain clock."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from vitdense.config import load, loads
from vitdense.data.loader import evaluation_loader
from vitdense.engine.allocator import keep_memory
from vitdense.engine.build import build_data, build_metric, build_model
from vitdense.engine.checkpoint import load_weights, read_meta
from vitdense.engine.evaluate import evaluate
from vitdense.structures import Batch

PARTS = ("loader", "forward", "predict", "update", "compute")
SIZE = 8


def shares(sources: list[str], images: int) -> dict[str, dict[str, float]]:
    """Parts of the time of `engine.evaluate` in 0..1, for configs and trained models.

    A config's model has random weights: it gives the most detections that it can, and masks of
    noise, which is the most work for the metric. A trained one is a `model.safetensors`. The
    loader works in this process, so that its work is seen; in training it has its own. Freed
    memory stays with the process, as in training. The profiler itself costs time with each small
    operation, so the clock tells more.
    """
    keep_memory(torch.device("cpu"))
    return {source: _shares(source, images) for source in sources}


def _shares(source: str, images: int) -> dict[str, float]:
    trained, overrides = source.endswith(".safetensors"), ["data.workers=0"]
    config = (
        loads(read_meta(source).config, source, overrides) if trained else load(source, overrides)
    )
    data = build_data(config)
    model = build_model(config, data)
    if trained:
        load_weights(source, model)
    metric = build_metric(config, model.task, list(data.val.classes), data.val.things)
    batches = evaluation_loader(data.val, data.policy, SIZE, model.divisor, workers=0)
    count, device = min(images, len(data.val)) // SIZE, torch.device("cpu")
    evaluate(model, _loaded(batches, 2), metric, device)
    for owner, names in ((model, PARTS[1:3]), (metric, PARTS[3:])):
        for name in names:
            setattr(owner, name, _named(name, getattr(owner, name)))
    SPENT.clear()
    with _part("everything"):
        evaluate(model, _loaded(batches, count), metric, device)
    clock = dict(SPENT)
    with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function("everything"):
        evaluate(model, _loaded(batches, count), metric, device)
    seen = {event.key: event.cpu_time_total for event in profiler.key_averages()}
    return {
        "milliseconds_per_image": 1e3 * clock["everything"] / (SIZE * count),
        **{name: clock[name] / clock["everything"] for name in PARTS},
        **{f"profiled_{name}": seen[name] / seen["everything"] for name in PARTS},
    }


SPENT: dict[str, float] = defaultdict(float)
"""Processor seconds of each part."""


@contextlib.contextmanager
def _part(name: str) -> Iterator[None]:
    start = time.process_time()
    with record_function(name):
        yield
    SPENT[name] += time.process_time() - start


def _named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **options: Any) -> Any:
        with _part(name):
            return function(*args, **options)

    return called


def _loaded(batches: Iterable[Batch], most: int) -> Iterator[Batch]:
    source = iter(batches)
    for _ in range(most):
        with _part("loader"):
            batch = next(source, None)
        if batch is None:
            return
        yield batch
