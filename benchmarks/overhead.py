"""What a step of training costs above forward, loss, backward and optimizer, in the real loop.

    python -m benchmarks.overhead --json runs/overhead.json
    python -m benchmarks.overhead data.root=../shared/data/bccd

The loop is that of `engine.train` on `configs/finetune/detection.yaml` (or --config), with timers
around its pieces; evaluation and saving are left out. Without a data.root it learns from the
generated shapes at 320 px. There are two clocks: `cpu` is the time of the main process with all its
threads, which neighbours on the machine do not change; `wall` also has the waiting for the loader,
and means something on a machine of one's own only.

Overhead is all that is not forward, loss, backward and optimizer (its step and its zero_grad), as a
fraction of these: reading batches from the workers, seeding, learning rate, clipping, logs, EMA,
checks; `other` is mostly the freeing of outputs and their graph. Then the loader alone: images per
second of the workers by the wall, and what they could make by their cpu time, beside the model's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from vitdense.config import load
from vitdense.engine import build, runtime
from vitdense.engine import train as loop_module
from vitdense.engine.allocator import keep_memory
from vitdense.engine.run import Run
from vitdense.engine.stopping import StopSignal
from vitdense.structures import Batch

SHAPES = ["data.dataset={name: shapes, images: 64, size: 320}"]
WORK = ("forward", "loss", "backward", "optimizer", "zero_grad")
Times = dict[str, list[float]]


class Enough(Exception):
    """The loop has gone on for as long as was wanted."""


class Watch:
    """Seconds by name on both clocks: [cpu, wall]."""

    def __init__(self) -> None:
        self.spent: Times = defaultdict(lambda: [0.0, 0.0])
        self.marks: list[tuple[float, float]] = []

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its time counted under `name`."""

        def timed(*args: Any, **options: Any) -> Any:
            start = now()
            try:
                return function(*args, **options)
            finally:
                for clock, (end, begin) in enumerate(zip(now(), start, strict=True)):
                    self.spent[name][clock] += end - begin

        return timed

    def steps(self, step: Callable[..., Any], warmup: int, count: int) -> Callable[..., Any]:
        """The same step; counting begins after `warmup` of them and ends with `Enough`."""

        def counted(*args: Any) -> Any:
            self.marks.append(now())
            if len(self.marks) == warmup + 1:
                self.spent.clear()
            if len(self.marks) == warmup + count + 1:
                raise Enough
            return step(*args)

        return counted


def now() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def measure(config: Any, warmup: int, steps: int) -> dict[str, Any]:
    """Milliseconds of a step by piece, and the fractions that are above the work."""
    place = runtime.start(config.device)
    keep_memory(place.device)
    run, watch = Run(config, place), Watch()
    run.observers = loop_module.observe(run)

    def timed_batches(*args: Any, **options: Any) -> Iterator[Batch]:
        batches = build_loader(*args, **options)
        read = watch.around("read batches", lambda: next(batches))
        while True:
            yield read()

    build_loader = build.training_loader
    pieces: list[tuple[Any, str, str]] = [
        (run.model, "forward", "forward"),
        (run.model, "loss", "loss"),
        (torch.Tensor, "backward", "backward"),
        (run.optimizer, "step", "optimizer"),
        (run.optimizer, "zero_grad", "zero_grad"),
        (loop_module, "clip_gradients", "clip"),
        (loop_module, "set_lr", "learning rate"),
        (loop_module, "lr_factor", "learning rate"),
        (loop_module.runtime, "seed_step", "seed"),
        (type(run.tally), "add", "keep losses"),
        (run, "log", "log"),
        (run, "measure", "progress"),
    ]
    if run.ema is not None:
        pieces.append((run.ema, "update", "ema"))
    with ExitStack() as patches, StopSignal() as stop:
        patches.callback(run.observers.close)
        enter = patches.enter_context
        for owner, name, label in pieces:
            enter(patch.object(owner, name, watch.around(label, getattr(owner, name))))
        enter(patch.object(build, "training_loader", timed_batches))
        enter(patch.object(loop_module, "step", watch.steps(loop_module.step, warmup, steps)))
        with suppress(Enough):
            loop_module.loop(run, stop)
    return report(watch, warmup, steps, config.train.batch_size)


def report(watch: Watch, warmup: int, steps: int, batch_size: int) -> dict[str, Any]:
    start, end = watch.marks[warmup], watch.marks[warmup + steps]
    found: dict[str, Any] = {"steps": steps}
    for clock, name in enumerate(("cpu", "wall")):
        total = end[clock] - start[clock]
        each = {key: times[clock] for key, times in watch.spent.items()}
        each["other"] = total - sum(each.values())
        work = sum(each[key] for key in WORK)
        found[name] = {
            "step_ms": 1e3 * total / steps,
            "overhead": (total - work) / work,
            "images_per_second": batch_size * steps / total,
            "pieces_ms": {
                key: round(1e3 * seconds / steps, 3)
                for key, seconds in sorted(each.items(), key=lambda item: -item[1])
            },
        }
    return found


def loader_alone(config: Any, batches: int) -> dict[str, float]:
    """Images per second of the workers, nobody else at work, and what an image costs them."""
    place = runtime.start(config.device)
    data = build.build_data(config)
    model = build.build_model(config, data)
    stream = build.training_loader(config, data, model, place)
    for _ in range(2 * config.data.workers + 1):  # until those that were made ahead are gone
        next(stream)
    start = time.perf_counter()
    for _ in itertools.islice(stream, batches):
        pass
    seconds = time.perf_counter() - start
    alone = config.model_copy(update={"data": config.data.model_copy(update={"workers": 0})})
    stream = build.training_loader(alone, data, model, place)
    next(stream)
    begin = time.process_time()
    for _ in itertools.islice(stream, batches):
        pass
    images = batches * config.train.batch_size
    each = (time.process_time() - begin) / images
    return {
        "workers": config.data.workers,
        "images_per_second": images / seconds,
        "cpu_ms_per_image": 1e3 * each,
        "images_per_second_with_a_core_each": config.data.workers / each,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/finetune/detection.yaml")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", help="of the config; none = the generated shapes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        fixed = [f"output={folder}/run", "data.workers=2", "train.batch_size=4"]
        fixed += ["train.minutes=null", "train.steps=100000", "train.evaluations=1"]
        fixed += ["train.checkpoint_every=100000"]
        data = options.overrides or [*SHAPES, f"data.root={folder}/shapes"]
        config = load(options.config, [*fixed, *data])
        found = measure(config, options.warmup, options.steps)
        loader = found["loader"] = loader_alone(config, options.steps)
        rates = loader["images_per_second_with_a_core_each"], found["cpu"]["images_per_second"]
        loader["times_as_fast_as_the_model"] = rates[0] / rates[1]
    found["settings"] = {key: str(value) for key, value in vars(options).items()}
    text = json.dumps(found, indent=1)
    print(text)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
