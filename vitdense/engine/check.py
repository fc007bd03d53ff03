"""What `vitdense check` does: one real batch through all that a config says."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitdense.config import Config
from vitdense.engine import build, runtime, summary
from vitdense.engine.best import headline_of
from vitdense.engine.build import Data
from vitdense.engine.evaluate import answer as answer_batch
from vitdense.engine.evaluate import check_inference, place
from vitdense.engine.optim import build_optimizer
from vitdense.engine.promises import check_answers, check_headline, numbers_of
from vitdense.engine.runtime import Runtime
from vitdense.engine.tally import Tally
from vitdense.metrics.base import Metric
from vitdense.models.base import Model
from vitdense.structures import Batch, Prediction

BATCH_SIZE = 2
"""Images at most: enough for batch statistics, few enough for seconds on a CPU."""

LOOKED_AT = 50
"""Label maps that class weights are counted in; all of a large data set may take an hour."""


def check(config: Config) -> str:
    """Build data and model, train on one batch without a step, predict one image; a report.

    Writes nothing.

    Raises:
        ConfigError: a part refuses its options.
        DataError: a file of the data set is missing or wrong.
        NonFiniteLoss: a term of the loss is infinite or not a number.
    """
    start, asked = time.perf_counter(), config
    config = shrink(config)
    where = runtime.start(config.device)
    data = build.build_data(config)
    model = build.build_model(config, data)
    started = build.start(config, data, model)
    build.weigh_classes(model, data.train, where, config.data.faulty, most=LOOKED_AT)
    model.to(where.device)
    labels = build.labels_of(model, data.train)
    train = data.train
    metric = build.build_metric(
        config, model.task, train.classes, train.things, labels, train.frequencies
    )
    check_inference(config.inference, model, metric)
    optimizer = build_optimizer(model, **dict(config.optimizer))
    headline = headline_of(metric, config.train.best)
    needs = summary.try_out(config, data, model, where)
    rows = [*describe_data(config, data), *describe_model(model)]
    rows += [
        ("start" if i == 0 else "", row) for i, row in enumerate(str(started or "").splitlines())
    ]
    rows += summary.plan_rows(asked, data, model, optimizer, where, needs)
    rows += list(try_training(config, data, model, where))
    rows += list(try_prediction(config, data, model, where, metric, headline.name))
    rows.append(("metric", f"{metric}, the best model by {headline.name}"))
    seconds = time.perf_counter() - start
    rows.append(
        ("all is well", f"on {where.device} in {seconds:.1f} s; a run goes to {config.output}")
    )
    return "\n".join(summary.as_table(rows))


def shrink(config: Config) -> Config:
    """The same config for a small batch, read by this process."""
    asked = config.train.batch_size
    size = BATCH_SIZE if asked == "auto" else min(asked, BATCH_SIZE)
    train = config.train.model_copy(update={"batch_size": size})
    data = config.data.model_copy(update={"workers": 0, "cache": None, "rare": None})
    return config.model_copy(update={"train": train, "data": data})


def describe_data(config: Config, data: Data) -> Iterator[tuple[str, str]]:
    """Where the data is and what it holds."""
    source, classes = config.data, data.train.classes
    yield "data", f"{source.dataset.name} in {source.root}, prepared by {source.transforms.name}"
    for split, dataset in ((source.train, data.train), (source.val, data.val)):
        yield "", f"{len(dataset)} images in {split}"
    yield "", f"{len(classes)} classes: {some(classes)}"
    if labels := data.train.image_classes:
        yield "", f"{len(labels)} labels of images: {some(labels)}"


def some(names: Sequence[str]) -> str:
    """The first ten."""
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def describe_model(model: Model) -> Iterator[tuple[str, str]]:
    """Its pieces, their parameters and the levels that they promise."""
    yield "model", f"{type(model).__name__} for {model.task}, {summary.count(model)}"
    for name, child in model.named_children():
        yield f"  {name}", f"{type(child).__name__}, {summary.count(child)}"
        levels = [f"{it.channels} at {it.stride:g}" for it in getattr(child, "levels", [])]
        if levels:
            yield "", f"channels at stride of its levels: {', '.join(levels)}"


def try_training(
    config: Config, data: Data, model: Model, where: Runtime
) -> Iterator[tuple[str, str]]:
    """Forward, loss and backward of one training batch."""
    batch = next(build.training_loader(config, data, model, where)).to(where.device)
    yield "training", f"images {shapes(batch.images)}{values(batch.images)}, {truth(batch)}"
    model.train()
    precision = runtime.choose_precision(config.train.precision, where.device)
    seen: dict[str, Any] = {}
    with runtime.autocast(where.device, precision), ExitStack() as hooks:
        for name, child in model.named_children():
            hooks.enter_context(watch(name, child, seen))
        outputs = model(batch.images, batch.targets)
    for name, value in seen.items():
        yield f"  {name}", shapes(value)
    losses = model.loss(runtime.to_float(outputs), batch.targets)
    tally = Tally()
    tally.add(0, losses, batch.paths)
    for name, number in tally.read().items():
        yield f"  {name}", f"{number:.4g}"
    torch.stack(list(losses.values())).sum().backward()
    yield "  gradients", gradients(model)


def try_prediction(
    config: Config, data: Data, model: Model, where: Runtime, metric: Metric, headline: str
) -> Iterator[tuple[str, str]]:
    """Answers for one batch of the validation split, which the metric can count."""
    batch = next(iter(build.evaluation_loader(config, data, model, where)))
    batch = place(batch, where.device, config.inference)
    model.eval()
    answers = answer_batch(
        model, batch, torch.float32, config.inference, confidence=metric.confidence
    )
    check_answers(model, answers, len(batch.frames))
    metric.reset()
    metric.update(answers, batch)
    check_headline(metric, headline, numbers_of(metric))
    yield "prediction", f"images {shapes(batch.images)}, the first is {batch.paths[0]}"
    for name in (field.name for field in fields(Prediction)):
        if (value := getattr(answers[0], name)) is not None:
            yield f"  {name}", shapes(value)


def watch(name: str, module: nn.Module, seen: dict[str, Any]) -> Any:
    """Note what a module puts out, as long as the context lasts."""
    return module.register_forward_hook(lambda _module, _inputs, out: seen.update({name: out}))


def gradients(model: nn.Module) -> str:
    """How many parameters get one, its norm, and which get none."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    norms = [p.grad.norm() for _, p in trainable if p.grad is not None]
    norm = float(torch.stack(norms).norm()) if norms else 0.0
    text = f"norm {norm:.4g}, for {len(norms)} of {len(trainable)} tensors"
    without = [name for name, p in trainable if p.grad is None]
    more = f" and {len(without) - 3} more" if len(without) > 3 else ""
    return text + (f"; none for {', '.join(without[:3])}{more}" if without else "")


def values(images: Tensor) -> str:
    """What deep images hold: little of 0..255 where the data set's `range` is too wide for them."""
    if images.dtype == torch.uint8:
        return ""
    return f" with values from {images.min():.4g} to {images.max():.4g} of 0..255"


def truth(batch: Batch) -> str:
    """What the targets of a batch hold."""
    labels = [target.labels for target in batch.targets if target.labels is not None]
    names = [
        field.name
        for field in fields(batch.targets[0])
        if getattr(batch.targets[0], field.name) is not None
    ]
    objects = f"{sum(map(len, labels))} objects, " if labels else ""
    return f"{objects}truth: {', '.join(names) or 'none'}"


def shapes(value: Any) -> str:
    """Types and sizes of the tensors in a value."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if is_dataclass(value) and not isinstance(value, type):
        named: Iterable[tuple[str, Any]] = [(f.name, getattr(value, f.name)) for f in fields(value)]
    elif isinstance(value, dict):
        named = value.items()
    elif isinstance(value, list | tuple):
        inner = list(dict.fromkeys(map(shapes, value)))
        return f"{len(value)} x {inner[0]}" if len(inner) == 1 < len(value) else ", ".join(inner)
    else:
        return "-" if value is None else type(value).__name__
    return "; ".join(f"{name} {shapes(item)}" for name, item in named if item is not None)
