"""What a run is about to do, in a few lines: parameters, rates, steps, memory."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import nn
from torch.optim import Optimizer

from vitdense.config import Config
from vitdense.data.base import DataError, Dataset
from vitdense.data.images import image_size
from vitdense.engine import build, memory, speed
from vitdense.engine.batch_size import Heavy
from vitdense.engine.build import Data
from vitdense.engine.memory import GIB, Demand
from vitdense.engine.run import Run
from vitdense.engine.runtime import Runtime, choose_precision
from vitdense.models.base import Model

Row = tuple[str, str]

MOST_RATES = 8
"""Lines for groups of parameters; what would be more is told as one."""

LOOKED_AT = 20
"""Images whose sizes say how much a cache of all will hold."""


def tell(run: Run) -> None:
    """Print the summary, from the main process; the others take part in the trial."""
    try:
        needs = try_out(run.config, run.data, run.model, run.runtime)
    except DataError as error:  # what becomes of it is for the loader to say
        needs = None
        print(f"the memory of a step is not known: {error}", file=sys.stderr)
    if run.runtime.is_main:
        rows = [
            ("run", f"{run.config.name}, to {run.folder}"),
            *model_rows(run.model),
            *plan_rows(run.config, run.data, run.model, run.optimizer, run.runtime, needs),
        ]
        print("\n".join(as_table(rows)), file=sys.stderr)


def as_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def try_out(config: Config, data: Data, model: Model, runtime: Runtime) -> Demand | None:
    """Memory of a step, from a forward pass; None if that needs other processes, or more memory.

    Raises:
        DataError: no image can be read.
    """
    if runtime.world_size > 1 and (config.train.shard or config.train.sync_batch_norm):
        return None
    images = min(2, build.batch_size(config.train))
    batch = Heavy.draw(config, data, model).of(images).to(runtime.device)
    build.check_targets(model.task, batch.targets, data.train)
    precision = choose_precision(config.train.precision, runtime.device)
    try:
        with speed.uncompiled(config):
            return memory.demand(config, model, batch, precision)
    except (RuntimeError, MemoryError) as error:
        if not memory.is_shortage(error):
            raise
        return None


def model_rows(model: Model) -> Iterator[Row]:
    """Parameters of the model and of its parts."""
    yield "model", f"{type(model).__name__} for {model.task}, {count(model)}"
    for name, child in model.named_children():
        yield f"  {name}", f"{type(child).__name__}, {count(child)}"


def count(module: nn.Module) -> str:
    """How many parameters learn, and how many do not."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    total = sum(size for size, _ in sizes)
    frozen = total - sum(size for size, learns in sizes if learns)
    text = f"{total / 1e6:.2f} M parameters"
    return text + (f", {frozen / 1e6:.2f} M of them frozen" if frozen else "")


def plan_rows(
    config: Config,
    data: Data,
    model: Model,
    optimizer: Optimizer,
    runtime: Runtime,
    needs: Demand | None,
) -> Iterator[Row]:
    """How it learns, for how long, from how many images, where and in how much memory."""
    for index, row in enumerate(rate_rows(optimizer, model)):
        yield "" if index else config.optimizer.name, row
    yield "rate", f"{config.schedule.name} from these peak rates, warm-up {config.schedule.warmup}"
    yield from length_rows(config, data, runtime)
    yield "device", describe_device(config, runtime)
    if needs is not None:
        yield "memory", describe_memory(needs, config)
    if data.train.cache is not None:
        yield "cache", describe_cache(data)


@dataclass(slots=True)
class _Rates:
    """Parameters of the same parts and weight decay."""

    rates: set[float] = field(default_factory=set)
    count: int = 0


def rate_rows(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """Highest learning rates and weight decays, and of which parameters; a line for each kind."""
    part_of = {p: name.partition(".")[0] for name, p in model.named_parameters()}
    found: dict[tuple[str, float], _Rates] = {}
    top = optimizer.defaults["lr"]  # that of the groups changes as the run goes on
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            rates = found.setdefault((part_of[parameter], group["weight_decay"]), _Rates())
            rates.rates.add(top * group["lr_scale"])
            rates.count += parameter.numel()
    # parts that learn alike share a line
    lines: dict[tuple[tuple[float, ...], float], tuple[list[str], int]] = {}
    for (part, decay), it in found.items():
        key = tuple(sorted(it.rates)), decay
        parts, number = lines.get(key, ([], 0))
        lines[key] = [*parts, part], number + it.count
    texts = [
        f"lr {_span(rates)}, weight decay {decay:g}: {number / 1e6:.2f} M of {', '.join(parts)}"
        for (rates, decay), (parts, number) in lines.items()
    ]
    more = len(texts) - MOST_RATES
    return texts if more <= 0 else [*texts[:MOST_RATES], f"and {more} kinds more"]


def _span(rates: Sequence[float]) -> str:
    if len(rates) == 1:
        return f"{rates[0]:.3g}"
    return f"{rates[0]:.3g} to {rates[-1]:.3g} ({len(rates)} rates)"


def length_rows(config: Config, data: Data, runtime: Runtime) -> Iterator[Row]:
    """Images of a step, steps and epochs, and the time where it is planned."""
    settings, images = config.train, len(data.train)
    if settings.batch_size == "auto":
        yield "step", f"as many images of {images} in {config.data.train} as fit the device"
        return
    size = settings.batch_size
    parts = [f"{size} image{'s' * (size > 1)}"]
    if settings.accumulate > 1:
        parts.append(f"{settings.accumulate} batches")
    if runtime.world_size > 1:
        parts.append(f"{runtime.world_size} processes")
    per_step = build.images_per_step(settings, runtime.world_size)
    product = f" = {per_step} images" if len(parts) > 1 else ""
    yield "step", f"{' x '.join(parts)}{product}, of {images} in {config.data.train}"
    length = build.build_length(settings, images, runtime.world_size)
    if length.seconds is not None:
        text = f"{length.seconds / 60:g} minutes of training, as many steps as they allow"
    else:
        assert length.steps is not None
        epochs = length.steps / length.steps_per_epoch
        text = f"{length.steps} steps, {epochs:.3g} epochs; the remaining time is shown as it runs"
    yield "length", f"{text}; evaluations on top: {settings.evaluations}"


def describe_device(config: Config, runtime: Runtime) -> str:
    """Where it computes, in which precision, and with which levers."""
    device, settings = runtime.device, config.train
    name = f"{device}"
    if device.type == "cuda":
        name += f" ({torch.cuda.get_device_name(device)})"
    precision = choose_precision(settings.precision, device)
    words = [name, str(precision).removeprefix("torch.")]
    if runtime.world_size > 1:
        words.insert(0, f"process 0 of {runtime.world_size}")
    words += [lever for lever in ("compile", "channels_last") if getattr(settings, lever)]
    return ", ".join(words)


def describe_memory(needs: Demand, config: Config) -> str:
    """What a step takes, by purpose."""
    size = 1 if config.train.batch_size == "auto" else config.train.batch_size
    exact = {
        "weights": needs.weights,
        "gradients": needs.gradients,
        "optimizer": needs.optimizer,
        "average": needs.average,
    }
    terms = [f"{name} {_amount(value)}" for name, value in exact.items() if value]
    terms.append(f"activations about {_amount(size * needs.activations)}")
    canvas = " x ".join(map(str, needs.canvas))
    return f"{_amount(needs.of(size))}: {', '.join(terms)} ({size} on {canvas} pixels)"


def describe_cache(data: Data) -> str:
    """Where decoded images go, how much they are, and how much fits."""
    cache = data.train.cache
    assert cache is not None
    wanted = sum(decoded_size(dataset) for dataset in (data.train, data.val))
    room, fits = max(0.0, cache.room), "all fit"
    if wanted > room:
        fits = "images beyond that are decoded each time"
    if wanted > room and cache.in_memory:
        fits += "; a container may need a larger /dev/shm (docker: --shm-size), or name a folder"
    return f"{cache.folder}: about {_amount(wanted)} of images, room for {_amount(room)}; {fits}"


def decoded_size(dataset: Dataset) -> float:
    """Bytes of all its images with 8 bits a channel, from the sizes of some."""
    step = max(1, len(dataset) // LOOKED_AT)
    sizes = [image_size(path) for path in _paths(dataset, step)]
    area = sum(height * width for height, width in sizes) / max(1, len(sizes))
    return area * dataset.channels * len(dataset)


def _paths(dataset: Dataset, step: int) -> Iterable:
    found = (dataset.image_path(index) for index in range(0, len(dataset), step))
    return (path for path in islice(found, LOOKED_AT) if path.is_file())


def _amount(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"
