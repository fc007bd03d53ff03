"""Where the time of an evaluation goes, by torch's profiler and by a plain clock."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from vitdense.config import load
from vitdense.data.loader import evaluation_loader
from vitdense.engine.build import build_data, build_metric, build_model
from vitdense.engine.evaluate import evaluate
from vitdense.structures import Batch

PARTS = ("loader", "forward", "predict", "update", "compute")
SIZE = 8


def shares(configs: list[str], images: int) -> dict[str, dict[str, float]]:
    """Of each config's model with random weights, parts of the time of `engine.evaluate` in 0..1.

    Such a model gives the most detections that it can, and masks of noise, which is the most work
    for the metric. The loader works in this process, so that its work is seen; in training it has
    its own. The profiler itself costs time with each small operation, so the clock tells more.
    """
    return {config: _shares(config, images) for config in configs}


def _shares(path: str, images: int) -> dict[str, float]:
    config = load(path, ["data.workers=0"])
    data = build_data(config)
    model = build_model(config, data)
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
