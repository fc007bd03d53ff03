"""The training loop."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from vitdense import config as configs
from vitdense.config import Config
from vitdense.engine import batch_size, build, checkpoint, faults, folder, runtime, summary
from vitdense.engine.allocator import keep_memory
from vitdense.engine.memory import explained_training
from vitdense.engine.observers import Observers, choose
from vitdense.engine.optim import clip_gradients, set_lr
from vitdense.engine.peers import attended
from vitdense.engine.run import Run
from vitdense.engine.schedule import lr_factor
from vitdense.engine.stopping import Stopped, StopSignal
from vitdense.losses.divisors import one_step
from vitdense.structures import Batch

LOG_EVERY = 20
"""Steps between readings of the losses: each waits for the device."""


def train(config: Config, resume: bool = False) -> dict[str, Any]:
    """Train what the config says, evaluate it, and keep everything in `config.output`.

    Args:
        resume: go on from the latest checkpoint in that folder; without one, start.

    Returns:
        what `results.json` holds: the numbers of the saved model, its step, and the cost.

    Raises:
        ValueError: the folder holds a run and `resume` is not set, or cannot be written.
        CheckpointError: the checkpoint is of another model, or the disk is full.
        NonFiniteLoss: a loss was infinite or not a number.
        LostProcess: another process has ended, or hangs.
        Stopped: after Ctrl-C or SIGTERM, when the state is saved.
    """
    place, asked = runtime.start(config.device), config
    config = batch_size.kept(config) if resume else config
    finished = folder.prepare(config, resume, place)
    if finished is not None:
        return finished
    keep_memory(place.device)
    with StopSignal() as stop, attended():
        with stop.at_once():
            run = Run(batch_size.settle(config, place, step), place)
            if place.agree(bool(run.states.entries)):
                run.restore()
            summary.tell(run)
        with closing(observe(run, batch_size.note(asked))) as run.observers, run.states:
            with faults.kept(run):
                loop(run, stop)
            results = run.finish() if run.done else None
    if results is None:
        raise Stopped(f"stopped after step {run.step}, all is saved; go on with --resume")
    if run.runtime.is_main:
        print(run.verdict(), file=sys.stderr)
    return results


def loop(run: Run, stop: StopSignal) -> None:
    """Train from where the run is to its end, or until it is told to stop."""
    settings = run.config.train
    run.net.train()
    batches = build.training_loader(
        run.config,
        run.data,
        run.model,
        run.runtime,
        start=run.step * settings.accumulate,
        elapsed=lambda: run.clock.elapsed,
        report=run.left_out,
        repeats=run.repeats,
    )
    batches = faults.rescued(run, batches, stop)
    run.clock.start()
    while True:
        stopped = told_to_stop(run, stop)
        ends = stopped or run.done
        if run.step % LOG_EVERY == 0:
            run.log()
        if run.evaluation_due() and not stopped:
            with run.clock.paused():
                run.save()
                with stop.at_once():  # it comes again
                    run.evaluate()
                run.save()
            ends = run.done
        elif ends or run.checkpoint_due():
            with run.clock.paused():
                run.save(stopped and not run.checkpoint_due())
        if ends:
            run.clock.set(run.clock.elapsed)
            return
        runtime.seed_step(run.config.seed, run.step, run.runtime.rank)
        rate = run.config.optimizer.lr * lr_factor(run.config.schedule, run.progress)
        set_lr(run.optimizer, rate)
        run.model.progress = run.progress.fraction
        step(run, batches)
        run.step += 1
        run.measure()


def told_to_stop(run: Run, stop: StopSignal) -> bool:
    """Whether to end before the next step, because one of the processes was told to."""
    return run.runtime.anyone(stop.requested)


@explained_training
def step(run: Run, batches: Iterator[Batch]) -> None:
    """One step of the optimizer, from `accumulate` batches."""
    settings = run.config.train
    parts = [next(batches) for _ in range(settings.accumulate)]
    with one_step([part.targets for part in parts]):
        for left, part in zip(reversed(range(len(parts))), parts, strict=True):
            batch = part.to(run.runtime.device, non_blocking=True)
            with synchronizing(run, last=left == 0):
                with runtime.autocast(run.runtime.device, run.precision):
                    outputs = run.net(batch.images, batch.targets)
                losses = run.model.loss(runtime.to_float(outputs), batch.targets)
                loss = torch.stack(list(losses.values())).sum() / len(parts)
                run.scaler.scale(loss).backward()
            run.tally.add(run.step, losses, batch.paths, run.progress.fraction)
    run.scaler.unscale_(run.optimizer)
    norm = clip_gradients(run.model, settings.clip)
    run.tally.add_norm(norm, scaled=run.scaler.is_enabled())
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    if run.ema is not None:
        run.ema.update(run.model)


def synchronizing(run: Run, last: bool) -> AbstractContextManager[Any]:
    """Processes average their gradients in the last backward pass of a step only."""
    if isinstance(run.net, DistributedDataParallel) and not last:
        return run.net.no_sync()
    return nullcontext()


def observe(run: Run, note: str = "") -> Observers:
    """Write the resolved config with a note, and let the main process watch the run."""
    if not run.runtime.is_main:
        return Observers([])
    (run.folder / "results.json").unlink(missing_ok=True)  # of a run that now gets longer
    checkpoint.write_text(run.folder / "config.yaml", note + configs.dump(run.config))
    return choose(run.config, run.step, run.progress.fraction, run.headline.name, run.evaluated[0])
