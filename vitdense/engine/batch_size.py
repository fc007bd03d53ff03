"""`train.batch_size: auto`: how many images a step takes at a time on the device at hand."""

from __future__ import annotations

import contextlib
import gc
import io
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch

from vitdense import config as configs
from vitdense.config import Config
from vitdense.data.base import DataError
from vitdense.data.collate import collate
from vitdense.engine import build, memory
from vitdense.engine.build import Data
from vitdense.engine.memory import GIB, OutOfMemory, demand, free_memory, is_shortage
from vitdense.engine.promises import check_sample
from vitdense.engine.run import Run
from vitdense.engine.runtime import Runtime, choose_precision, seed_step
from vitdense.models.base import Model
from vitdense.ops.processes import alone
from vitdense.structures import Batch, Sample, Size

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""What is tried, in this order."""

MOST_ON_CPU = 16
"""A larger batch makes no step of a CPU faster."""

SHARE_ON_GPU = 0.9
"""Part of the free memory that a step may take; the rest is for what trials do not show."""

SHARE_ELSEWHERE = 0.5
"""Where memory is also that of the loader's workers and of other programs."""

SAMPLES = 16
"""Training images that are drawn for a trial; the one with most objects stands for all."""

Step = Callable[[Run, Iterator[Batch]], None]


NOTE = "# train.batch_size was found by auto\n"
"""Marks a run's config.yaml: only a number that `auto` found is kept when `auto` is resumed."""


def kept(config: Config) -> Config:
    """The same config, `train.batch_size: auto` replaced by the number that the run has found."""
    written = Path(config.output) / "config.yaml"
    if config.train.batch_size != "auto" or not written.exists():
        return config
    if NOTE not in written.read_text(encoding="utf-8"):
        return config
    return build.with_batch_size(config, build.batch_size(configs.load(written).train))


def note(config: Config) -> str:
    """The comment for config.yaml: `NOTE` where this config, as it was given, asks for `auto`."""
    return NOTE if config.train.batch_size == "auto" else ""


def settle(config: Config, runtime: Runtime, step: Step) -> Config:
    """The same config with a number for `train.batch_size: auto`, the same in all processes.

    It is the largest of `SIZES` that fits: on a GPU by real steps of training that grow, elsewhere
    by the memory that a forward pass keeps.

    Args:
        step: one of training.

    Raises:
        OutOfMemory: not even one image fits.
        ValueError: the model is to be split, which a process alone cannot try.
    """
    if config.train.batch_size != "auto":
        return config
    if config.train.shard and runtime.world_size > 1:
        raise ValueError(
            "train.batch_size: auto tries the whole model in each process, and train.shard is for "
            "models that are too large for that; give a number"
        )
    host = platform.node()
    limit = _limit(runtime.device, runtime.gather(host).count(host))
    me, single = replace(runtime, rank=0, world_size=1), build.with_batch_size(config, 1)
    with alone():  # processes may try other numbers
        if runtime.device.type == "cuda":
            found, needed = find_by_trial(single, me, step, limit)
        else:
            found, needed = find_by_estimate(single, me, limit)
    _forget(runtime.device)
    number = min(runtime.gather(found))
    if runtime.is_main:
        print(
            f"train.batch_size auto: {number} images take {needed / GIB:.1f} of {limit / GIB:.1f} "
            f"GiB on {runtime.device}; optimizer.lr stays {config.optimizer.lr:g}",
            file=sys.stderr,
        )
    return build.with_batch_size(config, number)


def find_by_estimate(config: Config, me: Runtime, limit: float) -> tuple[int, int]:
    """The batch size, from the memory of a forward pass, and the bytes that such a step takes."""
    data = build.build_data(config)
    model = build.build_model(config, data)
    build.weigh_classes(model, data.train, me, config.data.faulty)
    model.to(me.device)
    batch = Heavy.draw(config, data, model).of(min(2, len(data.train)))
    precision = choose_precision(config.train.precision, me.device)
    needs = demand(config, model, batch.to(me.device), precision)
    number = largest(needs.of, limit, min(MOST_ON_CPU, len(data.train)))
    if not number:
        shape = (1, *batch.images.shape[1:])
        raise OutOfMemory(memory.training_advice(config, 0, shape, me.device))
    return number, needs.of(number)


def find_by_trial(config: Config, me: Runtime, step: Step, limit: float) -> tuple[int, int]:
    """The same, from real steps with more and more images until they do not fit.

    They run without compilation, which takes no more memory, and without other processes: the
    buckets by which gradients are averaged have to fit into what `SHARE_ON_GPU` leaves.
    """
    update = {"compile": False, "accumulate": min(2, config.train.accumulate)}
    config = config.model_copy(update={"train": config.train.model_copy(update=update)})
    with contextlib.redirect_stderr(io.StringIO()):  # the run itself says the same again
        run = Run(config, me)
    run.net.train()
    heavy = Heavy.draw(config, run.data, run.model)
    peaks: dict[int, int] = {}

    def measure(images: int) -> int | None:
        batch = heavy.of(images)
        peak = peak_of(run, step, batch)
        peaks[images] = peak or 0
        return peak

    number = largest(measure, limit, len(run.data.train))
    if not number:
        shape = tuple(heavy.of(1).images.shape)
        raise OutOfMemory(memory.training_advice(config, 0, shape, me.device))
    return number, peaks[number]


def largest(measure: Callable[[int], int | None], limit: float, most: int) -> int:
    """The largest of `SIZES` up to `most` before one that takes more than the limit; 0 if none.

    Args:
        measure: bytes for so many images; None if they did not fit.
    """
    found = 0
    for size in SIZES:
        if size > most:
            break
        needed = measure(size)
        if needed is None or needed > limit:
            break
        found = size
    return found


def peak_of(run: Run, step: Step, batch: Batch) -> int | None:
    """Most bytes that a step took on a GPU, or None if the memory was too small."""
    device = run.runtime.device
    count = 2 * run.config.train.accumulate  # the first step makes the optimizer's state
    _forget(device)
    batches = iter([batch] * count)
    try:
        seed_step(run.config.seed, 0)
        step(run, batches)
        step(run, batches)
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, OutOfMemory) or is_shortage(error)):
            raise
        run.optimizer.zero_grad(set_to_none=True)
        return None
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0


@dataclass(frozen=True, slots=True)
class Heavy:
    """Training batches as heavy as they come: of the sample with most objects, on large canvases.

    Attributes:
        canvas: before rounding to multiples of `divisor`.
    """

    sample: Sample
    canvas: Size
    divisor: int

    @classmethod
    def draw(cls, config: Config, data: Data, model: Model) -> Self:
        """Look at some samples as training prepares them; raises DataError if none can be read."""
        samples = list(_draw(data, model.divisor, config.seed))
        sides = zip(*(sample.image.shape[1:] for sample in samples), strict=True)
        height, width = map(max, sides)
        canvas = data.policy.largest(model.divisor) or (height, width)
        return cls(max(samples, key=_objects), canvas, model.divisor)

    def of(self, images: int) -> Batch:
        """A batch of so many, on the CPU."""
        samples = [self.sample] * images
        return collate(samples, divisor=self.divisor, canvas=self.canvas, training=True)[0]


def _draw(data: Data, divisor: int, seed: int) -> Iterator[Sample]:
    """Training samples of images that can be read."""
    seed_step(seed, 0)
    policy, dataset, fault = data.policy.for_batch(divisor, False), data.train, None

    def another() -> Sample:
        return dataset[int(torch.randint(len(dataset), ()))]

    drawn = 0
    for index in torch.randperm(len(dataset))[:SAMPLES].tolist():
        try:
            sample = dataset[index]
            check_sample(dataset, sample, dataset)
            sample = policy.compose(sample, another)
            check_sample(policy, sample, dataset)
            yield sample
            drawn += 1
        except DataError as error:  # what becomes of it is for the loader to say
            fault = error
    if not drawn and fault is not None:
        raise fault


def _objects(sample: Sample) -> int:
    return 0 if sample.target.labels is None else len(sample.target.labels)


def _limit(device: torch.device, processes: int) -> float:
    """Bytes that a step may take on the device.

    Args:
        processes: of this machine; they share its memory, but have a GPU each.
    """
    free = free_memory(device)
    if free is None:
        raise ValueError(
            "train.batch_size: how much memory there is cannot be told here; give a number"
        )
    return SHARE_ON_GPU * free if device.type == "cuda" else SHARE_ELSEWHERE * free / processes


def _forget(device: torch.device) -> None:
    """Give memory back that nothing uses any more, and measure its peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
