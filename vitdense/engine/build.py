"""From a config to data, model, metric and loaders."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from vitdense.config import Config
from vitdense.config.schema import Data as Source
from vitdense.config.schema import Train
from vitdense.data import loader
from vitdense.data.base import DataError, Dataset, Policy
from vitdense.data.cache import open_cache
from vitdense.data.frequency import class_frequencies, images_with_class, repeat_factors
from vitdense.data.image_labels import LabelledDataset, check_splits
from vitdense.data.loader import EvaluationLoader, Report, warn
from vitdense.data.workers import count
from vitdense.engine.checkpoint import changed, make_model, without_weights
from vitdense.engine.runtime import Runtime, seed_step
from vitdense.engine.schedule import Length
from vitdense.engine.transfer import Transfer, transfer
from vitdense.losses.dense import DenseLoss
from vitdense.metrics.base import Metric
from vitdense.metrics.image_labels import ImageLabels, Several
from vitdense.models.base import Model
from vitdense.registry import METRICS
from vitdense.structures import Batch, Target, Task

log = logging.getLogger(__name__)

METRIC_OF: dict[Task, tuple[str, dict[str, Any]]] = {
    "detection": ("coco", {}),
    "instance": ("coco", {"iou_type": "segm", "boxes_too": True}),
    "semantic": ("miou", {}),
    "panoptic": ("panoptic", {}),
}
"""Which metric, with which options, judges a task unless the config names one."""


@dataclass(frozen=True, slots=True)
class Data:
    """The splits and how their samples are prepared."""

    train: Dataset
    val: Dataset
    policy: Policy


def build_data(config: Config) -> Data:
    """Both splits and the policy.

    Raises:
        DataError: files are missing or wrong, a split is empty, or the splits' classes differ.
    """
    source = config.data
    data = Data(
        build_split(source, source.train), build_split(source, source.val), source.transforms()
    )
    data.train.cache = data.val.cache = open_cache(source.cache, config.output)
    for split, dataset in ((source.train, data.train), (source.val, data.val)):
        if len(dataset) == 0:
            raise DataError(f"{source.root}: split '{split}' has no images")
    ours, theirs = list(data.train.classes), list(data.val.classes)
    if ours != theirs:
        odd = sorted(set(ours) ^ set(theirs))
        what = f"only one of them has {', '.join(odd[:5])}" if odd else "their order differs"
        raise DataError(
            f"{source.root}: splits '{source.train}' and '{source.val}' differ in their classes: "
            f"{what}; both must list the same ones"
        )
    check_splits(data.train, data.val)
    _warn_of_splits(source, data)
    return data


def _warn_of_splits(source: Source, data: Data) -> None:
    """Tell of splits that are right each for itself, but not together."""
    file, other = (getattr(it, "annotations", None) for it in (data.train, data.val))
    if source.train == source.val or (file is not None and file == other and file.is_file()):
        log.warning(
            "%s: the splits '%s' and '%s' are the same images: the numbers of an evaluation will "
            "say nothing about others", source.root, source.train, source.val,
        )  # fmt: skip
    if data.train.category_ids != data.val.category_ids:
        log.warning(
            "%s: the splits '%s' and '%s' have other ids for the same classes: predictions are "
            "written with those of '%s'", source.root, source.train, source.val, source.train,
        )  # fmt: skip


def build_split(source: Source, split: str, image_classes: list[str] | None = None) -> Dataset:
    """One split, its images labelled as wholes if the config names a file of labels.

    Args:
        image_classes: names that a model knows, in its order; by default those of the file.

    Raises:
        DataError: files are missing or wrong.
    """
    dataset: Dataset = source.dataset(source.root, split)
    if source.image_labels is None:
        return dataset
    return LabelledDataset(dataset, source.root / source.image_labels, image_classes)


def build_model(config: Config, data: Data, fetch: bool = True) -> Model:
    """The model for the data's classes, drawn from the config's seed; sets the data's channels.

    Args:
        fetch: weights of the backbone; none where `train.init` or a checkpoint will give them all.
    """
    seed_step(config.seed, 0)
    fetch = fetch and config.train.init is None
    part = config.model if fetch else without_weights(config.model)
    model = make_model(part, len(data.train.classes), len(data.train.image_classes))
    check_truth(model.task, data.train)
    data.train.channels = data.val.channels = model.in_chans
    _set_things(model, data.train)
    return model


def check_truth(task: Task, dataset: Dataset) -> None:
    """Raise ValueError if the truth is of another task, or if there is nothing to learn from it."""
    if task == "semantic" and len(dataset.classes) == 1:
        raise ValueError(
            f"data.dataset: {dataset.root} has the one class {dataset.classes[0]!r}, so it is the "
            "answer for every pixel; let the rest be a class too (ade20k: reduce_zero_label: "
            "false, and its name before the other; folders: binary: true)"
        )
    if task == "panoptic" and dataset.things is None:
        raise ValueError(
            f"data.dataset: the truth in {dataset.root} does not tell things from stuff, and the "
            "model's task is panoptic; take coco_panoptic, or `task: panoptic` of a data set that "
            "has it, or set another `task` of the model or its head"
        )
    if task in ("detection", "instance") and dataset.things is not None:
        raise ValueError(
            f"data.dataset: the truth in {dataset.root} is panoptic, its stuff is no object, and "
            f"the model's task is {task}; take coco, or `task: {task}` of a data set that has it"
        )


TRUTH: dict[Task, tuple[str, ...]] = {
    "detection": ("labels", "boxes"),
    "instance": ("labels", "masks"),
    "semantic": ("semantic",),
    "panoptic": ("labels", "masks"),
}
"""Fields of a target that a task is learnt from."""


def check_targets(task: Task, targets: Sequence[Target], dataset: Dataset) -> None:
    """Raise ValueError if a field is missing that the model's task is learnt from."""
    for name in TRUTH.get(task, ()):
        if any(getattr(target, name) is None for target in targets):
            raise ValueError(
                f"data.dataset: the truth in {dataset.root} has no `{name}`, from which the task "
                f"of the model, {task}, is learnt; set `task` or `masks` of the data set, or take "
                "one that has it, or another head"
            )


def _set_things(model: Model, dataset: Dataset) -> None:
    if dataset.things is not None:
        model.set_things(dataset.things)


def weigh_classes(
    model: Model,
    dataset: Dataset,
    runtime: Runtime,
    faulty: Literal["stop", "skip"] = "stop",
    most: int | None = None,
) -> None:
    """Tell losses that make up for rare classes how often the data has each.

    Each process counts in a share of the images, so all must call this.

    Args:
        faulty: what to do at a label map that is missing or wrong.
        most: label maps that are looked at, spread over the data set; by default all.

    Raises:
        DataError: there is one, and it is not to be skipped.
    """
    losses = [module for module in model.modules() if isinstance(module, DenseLoss)]
    losses = [loss for loss in losses if loss.balanced]
    if losses:
        step = 1 if most is None else math.ceil(len(dataset) / most)
        share = range(runtime.rank * step, len(dataset), runtime.world_size * step)
        parts = runtime.gather(class_frequencies(dataset, faulty == "skip", share))
        pixels, shared = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
        for loss in losses:
            loss.set_frequencies(pixels, shared)


def image_repeats(config: Config, dataset: Dataset, runtime: Runtime) -> NDArray[np.float64] | None:
    """[images], how often each is to be seen, by `data.rare`; None = all as often.

    Each process looks at a share of the images, so all must call this; raises DataError.
    """
    if config.data.rare is None:
        return None
    share = range(runtime.rank, len(dataset), runtime.world_size)
    parts = runtime.gather(images_with_class(dataset, config.data.faulty == "skip", share))
    shown = torch.empty(len(dataset), parts[0].shape[1], dtype=torch.bool)
    for rank, part in enumerate(parts):
        shown[rank :: runtime.world_size] = part
    return repeat_factors(shown, config.data.rare).numpy()


def start(config: Config, data: Data, model: Model) -> Transfer | None:
    """Give the model the weights of `train.init`, if there are any to start from.

    Raises:
        CheckpointError: the file is absent, or does not match in more than the classes.
    """
    settings = config.train
    if settings.init is None:
        return None
    # weights of a loss are one per class, and no part of the state
    part = changed(without_weights(config.model), "head", {"class_weights": None})
    classes, image_classes = list(data.train.classes), labels_of(model, data.train)
    report = transfer(
        settings.init,
        model,
        lambda count: make_model(part, count, len(image_classes)),
        classes,
        settings.new_head,
        image_classes,
        lambda count: make_model(part, len(classes), count),
    )
    _set_things(model, data.train)
    return report


def labels_of(model: Model, dataset: Dataset) -> list[str]:
    """The labels of whole images that a model learns or is judged by."""
    return list(dataset.image_classes) if model.image_classes else []


def build_metric(
    config: Config,
    task: Task,
    classes: list[str],
    things: list[bool] | None = None,
    image_classes: Sequence[str] = (),
    frequencies: list[str] | None = None,
) -> Metric:
    """The config's metric, or the one for the model's task; that of image labels beside it.

    Args:
        things, frequencies: the data set's.

    Raises:
        ValueError: there is none for the task, or the config's is of another.
    """
    if image_classes:
        pixels = build_metric(config, task, classes, things, frequencies=frequencies)
        return Several([pixels, ImageLabels(list(image_classes))])
    named = None
    if things is not None:
        named = [label for label, thing in zip(classes, things, strict=True) if thing]
    part = config.metric
    if part is not None:
        facts = {"things": named, "iou_type": "segm" if task == "instance" else "bbox"}
        options = {
            name: facts[name] if value is None and name in facts else value
            for name, value in part.options.items()
        }
        part = replace(part, options=options)
        metric: Metric = part(classes)
        metric.frequencies = frequencies
        if metric.tasks is not None and task not in metric.tasks:
            raise ValueError(
                f"metric: {part.name} with these options judges {' or '.join(metric.tasks)}, and "
                f"the model's task is {task}; remove it to take the usual one"
            )
        return metric
    if task not in METRIC_OF:
        raise ValueError(f"metric: none is built in for the task {task!r}; name one in the config")
    name, given = METRIC_OF[task]
    options = dict(given)
    if task == "panoptic":
        options["things"] = named
    return METRICS.get(name)(classes, **options)


def training_loader(
    config: Config,
    data: Data,
    model: Model,
    runtime: Runtime,
    start: int = 0,
    elapsed: Callable[[], float] = lambda: 0.0,
    report: Report = warn,
    repeats: NDArray[np.float64] | None = None,
) -> Iterator[Batch]:
    """Batches without end, from batch number `start` on.

    Args:
        elapsed: seconds of training so far, for the policy's last span of a run in minutes.
        report: is told of images that are left out because they cannot be read.
        repeats: what `image_repeats` found, if it was asked already.
    """
    length = build_length(config.train, len(data.train), runtime.world_size)
    if repeats is None:
        repeats = image_repeats(config, data.train, runtime)

    def closing(batch: int) -> bool:
        progress = length.progress(batch // config.train.accumulate, elapsed())
        return progress.closes(data.policy.close)

    return loader.training_loader(
        data.train,
        data.policy,
        batch_size(config.train),
        model.divisor,
        workers=count(config.data.workers, runtime.cores, runtime.device.type == "cuda"),
        faulty=config.data.faulty,
        report=report,
        seed=config.seed,
        start_step=start,
        closing=closing,
        repeats=repeats,
        rank=runtime.rank,
        world_size=runtime.world_size,
        pin_memory=runtime.device.type == "cuda",
    )


def evaluation_loader(
    config: Config, data: Data, model: Model, runtime: Runtime, report: Report = warn
) -> EvaluationLoader:
    """The validation split, once through each time it is iterated."""
    return loader.evaluation_loader(
        data.val,
        data.policy,
        batch_size(config.train),
        model.divisor,
        workers=count(config.data.workers, runtime.cores, runtime.device.type == "cuda"),
        faulty=config.data.faulty,
        report=report,
        rank=runtime.rank,
        world_size=runtime.world_size,
        pin_memory=runtime.device.type == "cuda",
    )


def build_length(settings: Train, images: int, world_size: int = 1) -> Length:
    """How long the config wants to train on so many images."""
    per_step = images_per_step(settings, world_size)
    per_epoch = images / per_step
    if settings.minutes is not None:
        return Length(per_epoch, seconds=60 * settings.minutes)
    if settings.epochs is not None:
        # rounded once: 100 epochs of 0.07 steps would be 7.000000000000001
        return Length(per_epoch, steps=math.ceil(settings.epochs * images / per_step))
    return Length(per_epoch, steps=settings.steps)


def images_per_step(settings: Train, world_size: int = 1) -> int:
    """Images of all processes that one optimizer step learns from."""
    return batch_size(settings) * settings.accumulate * world_size


def batch_size(settings: Train) -> int:
    """Images that a process reads at a time.

    Raises:
        ValueError: it is `auto`, which only training settles.
    """
    if settings.batch_size == "auto":
        raise ValueError("train.batch_size: auto is for training; give a number")
    return settings.batch_size


def with_batch_size(config: Config, number: int) -> Config:
    """The same config with another `train.batch_size`."""
    train = config.train.model_copy(update={"batch_size": number})
    return config.model_copy(update={"train": train})
