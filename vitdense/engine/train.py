"""The training loop."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from vitdense import config as configs
from vitdense.config import Config
from vitdense.engine import build, checkpoint, runtime
from vitdense.engine.observers import JsonLines, Observers, ProgressBar, TensorBoard
from vitdense.engine.optim import clip_gradients, set_lr
from vitdense.engine.run import Run
from vitdense.engine.schedule import lr_factor
from vitdense.engine.stopping import StopSignal
from vitdense.structures import Batch

LOG_EVERY = 20
"""Steps between readings of the losses: each waits for the device."""


def train(config: Config, resume: bool = False) -> dict[str, Any]:
    """Train what the config says, evaluate it, and keep everything in `config.output`.

    Args:
        resume: go on from `checkpoints/last.pt` in that folder.

    Returns:
        what `results.json` holds: the numbers of the saved model, its step, and the cost.

    Raises:
        ValueError: the folder holds a run and `resume` is not set, or holds none and it is.
        NonFiniteLoss: a loss was infinite or not a number.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, when the state is saved.
    """
    check_folder(Path(config.output), resume)
    run = Run(config, runtime.start(config.device))
    if resume and run.last.exists():
        run.restore()
    with StopSignal() as stop:
        run.observers = observe(run)
        try:
            loop(run, stop)
        finally:
            run.observers.close()
    if run.progress.fraction < 1:
        print(f"stopped at step {run.step}; continue with --resume", file=sys.stderr)
        raise KeyboardInterrupt
    return run.finish()


def loop(run: Run, stop: StopSignal) -> None:
    """Train from where the run is to its end, or until it is told to stop."""
    settings = run.config.train
    run.net.train()
    run.clock.start()
    batches = build.training_loader(
        run.config,
        run.data,
        run.model,
        run.runtime,
        start=run.step * settings.accumulate,
        elapsed=lambda: run.clock.elapsed,
    )
    while True:
        stopped = told_to_stop(run, stop)
        ends = stopped or run.progress.fraction == 1
        if run.step % LOG_EVERY == 0 or ends:
            run.log()
        if run.evaluation_due() and not stopped:
            with run.clock.paused():
                run.save()
                run.evaluate()
                run.save()
        elif ends or run.step - run.saved >= settings.checkpoint_every:
            with run.clock.paused():
                run.save()
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
    """Whether to end before the next step; several processes agree now and then."""
    if run.runtime.world_size > 1 and run.step % LOG_EVERY:
        return False
    return run.runtime.agree(stop.requested)


def step(run: Run, batches: Iterator[Batch]) -> None:
    """One step of the optimizer, from `accumulate` batches."""
    settings = run.config.train
    for left in reversed(range(settings.accumulate)):
        batch = next(batches).to(run.runtime.device, non_blocking=True)
        with synchronizing(run, last=left == 0):
            with runtime.autocast(run.runtime.device, run.precision):
                outputs = run.net(batch.images, batch.targets)
            losses = run.model.loss(runtime.to_float(outputs), batch.targets)
            loss = torch.stack(list(losses.values())).sum() / settings.accumulate
            run.scaler.scale(loss).backward()
        run.tally.add(run.step, losses, batch.paths)
    run.scaler.unscale_(run.optimizer)
    if settings.clip is not None:
        run.tally.add_norm(clip_gradients(run.model, settings.clip))
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


def check_folder(folder: Path, resume: bool) -> None:
    """Refuse to overwrite a run, and to resume none; raises ValueError."""
    kept = [name for name in ("checkpoints/last.pt", "results.json") if (folder / name).exists()]
    if kept and not resume:
        raise ValueError(
            f"output: {folder} already holds a run ({kept[0]}); continue it with --resume, or "
            f"write elsewhere with output={folder}-2"
        )
    if resume and not (folder / "config.yaml").exists():
        raise ValueError(f"output: {folder} holds no run to resume; leave out --resume")


def observe(run: Run) -> Observers:
    """Write the resolved config, and let the main process watch the run."""
    if not run.runtime.is_main:
        return Observers([])
    folder, at = run.folder, run.step
    checkpoint.write_text(folder / "config.yaml", configs.dump(run.config))
    return Observers(
        [
            lambda: JsonLines(folder / "metrics.jsonl", at),
            lambda: TensorBoard(folder / "tensorboard", at),
            lambda: ProgressBar(run.config.name, run.progress.fraction),
        ]
    )
