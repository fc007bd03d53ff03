"""A run: what training changes, and how that is saved, restored, evaluated and logged."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.amp import GradScaler

import vitdense
from vitdense import config as configs
from vitdense.config import Config
from vitdense.engine import build, checkpoint, sharding, speed
from vitdense.engine.best import Best, headline_of
from vitdense.engine.changes import Change, table
from vitdense.engine.checkpoint import Meta
from vitdense.engine.ema import Ema
from vitdense.engine.evaluate import check_inference, evaluate
from vitdense.engine.faults import LeftOut
from vitdense.engine.observers import Observers, finite, format_number
from vitdense.engine.optim import build_optimizer, load_named_state, named_state
from vitdense.engine.pictures import Pictures, picture_path
from vitdense.engine.runtime import Runtime, choose_precision, memory_used
from vitdense.engine.states import State, States, clone
from vitdense.engine.stopping import Stopwatch
from vitdense.engine.tally import Tally, hold_at_fault
from vitdense.models.base import Model

OTHER_MODEL = "go on with the config.yaml beside the checkpoints, or write to another output"
"""What to do where a checkpoint does not fit."""


class Run:
    """Everything that a run has.

    Attributes:
        model: what is trained; `net` is the same, wrapped for several processes.
        ema: the averaged model, which then is the one evaluated and saved.
        step: optimizer steps done; `progress` says how far that is.
        clock: seconds of training, without evaluation and saving.
        evaluated: steps and seconds at the latest evaluation.
        best: the evaluation whose weights are kept, by the number `headline`.
        saved: step of the latest checkpoint.
    """

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        self.folder = Path(config.output)
        self.states = States(self.folder / "checkpoints", config.train.keep)
        self.data = build.build_data(config)
        resumes = bool(self.states.entries)
        self.model: Model = build.build_model(config, self.data, fetch=not resumes)
        if not resumes:
            self._start()
        build.weigh_classes(self.model, self.data.train, runtime, config.data.faulty)
        self.model.to(runtime.device)
        if config.train.sync_batch_norm:
            self.model = runtime.synchronize_norms(self.model)
        if config.train.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.metric = build.build_metric(
            config,
            self.model.task,
            self.data.train.classes,
            self.data.train.things,
            build.labels_of(self.model, self.data.train),
            self.data.train.frequencies,
        )
        check_inference(config.inference, self.model, self.metric)
        self.headline = headline_of(self.metric, config.train.best)
        self.ema = Ema(self.model, config.train.ema) if config.train.ema is not None else None
        if config.train.shard and runtime.world_size > 1:
            self._shard()
        # before wrapping, because it freezes what does not learn
        self.optimizer = build_optimizer(self.model, **dict(config.optimizer))
        self.net: nn.Module = runtime.wrap(self.model)
        if config.train.compile:
            speed.compile_calls(self.net, runtime.device)
        self.precision = choose_precision(config.train.precision, runtime.device)
        self.scaler = GradScaler(runtime.device.type, enabled=self.precision == torch.float16)
        self.length = build.build_length(config.train, len(self.data.train), runtime.world_size)
        self.left_out = LeftOut(self.folder / "skipped.txt")
        self.validation = build.evaluation_loader(
            config, self.data, self.model, runtime, self.left_out
        )
        self.pictures = Pictures(self.data.val, config.train.pictures, runtime)
        self.tally = Tally()
        hold_at_fault(self.optimizer, self.tally)
        self.observers, self.clock = Observers([]), Stopwatch()
        self.step, self.saved, self.best, self.evaluated = 0, 0, Best(), (0, 0.0)
        self.progress = self.length.progress(0, 0.0)
        self._logged = 0, 0.0

    def _start(self) -> None:
        """Start from another model's weights, if the config names one, and say so."""
        started = build.start(self.config, self.data, self.model)
        if started is not None and self.runtime.is_main:
            print(started, file=sys.stderr)

    def _shard(self) -> None:
        """Split what is trained, and what is kept of it, over the processes."""
        for model in (self.model, self.result):
            if not sharding.is_sharded(model):
                sharding.shard(model)
        states = self.states
        self.states = sharding.ShardedStates(states.folder, states.keep, self.model)

    @property
    def result(self) -> Model:
        """The model that is evaluated and saved."""
        return self.ema.model if self.ema is not None else self.model

    @property
    def images_per_step(self) -> int:
        """Images of all processes that one step learns from."""
        return build.images_per_step(self.config.train, self.runtime.world_size)

    @cached_property
    def repeats(self) -> NDArray[np.float64] | None:
        """`image_repeats`; counted once, because a process that breaks has to do without others."""
        return build.image_repeats(self.config, self.data.train, self.runtime)

    def measure(self) -> None:
        """Bring `progress` up to date; where it counts minutes, by the main process's clock."""
        elapsed = self.clock.elapsed
        if self.length.seconds is not None:
            elapsed = self.runtime.agree(elapsed)
        self.progress = self.length.progress(self.step, elapsed)
        self.observers.advance(self.progress.fraction)
        self.states.check()

    @property
    def exhausted(self) -> bool:
        """Whether no evaluation has been better for as many as `train.patience` says."""
        patience = self.config.train.patience
        return patience is not None and self.best.waited >= patience

    @property
    def stopped_early(self) -> bool:
        """Whether it is over before its end, because evaluations were no better."""
        return self.exhausted and self.progress.fraction < 1

    @property
    def done(self) -> bool:
        """Whether the run is at its end and has been evaluated there, or has stopped early."""
        at_end = self.progress.fraction == 1 and self.evaluated[0] == self.step
        return at_end or self.exhausted

    def log(self) -> None:
        """Read the losses since the last time, and show them; raises NonFiniteLoss."""
        losses = self.runtime.mean(self.tally.read)
        if not losses:
            return
        steps, seconds = self.step - self._logged[0], self.clock.elapsed - self._logged[1]
        self._logged = self.step, self.clock.elapsed
        speed = {
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
            "images_per_second": steps * self.images_per_step / max(seconds, 1e-9),
            "memory_gb": memory_used(self.runtime.device),
            "seconds": self.clock.elapsed,
            **self.left_out.numbers(self.data.train.split),
        }
        epoch = round(self.progress.epochs, 4)
        self.observers.log({"kind": "train", "step": self.step, "epoch": epoch, **losses, **speed})

    def checkpoint_due(self) -> bool:
        """Whether there is to be a checkpoint at this step, wherever the run was resumed."""
        return self.step % self.config.train.checkpoint_every == 0 and self.saved != self.step

    def evaluation_due(self) -> bool:
        """Whether one of the evenly spread evaluations has come, or the end."""
        if self.evaluated[0] == self.step:
            return False
        before = self.length.progress(*self.evaluated).fraction
        count = self.config.train.evaluations
        now = self.progress.fraction
        return now == 1 or int(now * count + 1e-9) > int(before * count + 1e-9)

    def evaluate(self) -> None:
        """Measure the result, draw pictures, and see whether it is the best so far."""
        # all must find the next one due at the same step, and their clocks differ
        self.evaluated = self.step, self.runtime.agree(self.clock.elapsed)
        with speed.uncompiled(self.config), sharding.gathered(self.result):
            numbers = evaluate(
                self.result,
                self.validation,
                self.metric,
                self.runtime.device,
                self.precision,
                self.pictures.watch,
                self.config.inference,
            )
        numbers |= self.left_out.numbers(self.data.val.split)
        self.best.offer(self.step, finite(numbers), self.headline)
        self.best = self.runtime.agree(self.best)
        if not self.runtime.is_main:
            return
        self.pictures.save(picture_path(self.folder, self.step))
        self.observers.log({"kind": "evaluation", "step": self.step, **numbers})

    def meta(self) -> Meta:
        """What goes with the weights that are carried away."""
        return Meta(
            config=configs.dump(self.config),
            classes=list(self.data.train.classes),
            category_ids=np.asarray(self.data.train.category_ids).tolist(),  # JSON's integers
            task=self.model.task,
            step=self.best.step,
            metrics=self.best.numbers,
            version=vitdense.__version__,
            image_classes=build.labels_of(self.model, self.data.train),
        )

    def save(self, stopped: bool = False) -> None:
        """Log, and write a checkpoint; a loss that is not finite raises before that.

        Right after the best evaluation `model.safetensors` is written too. It comes second,
        because a run that is resumed from the checkpoint can make it again.

        Args:
            stopped: in between two logs; the checkpoint then has the losses since the last one, so
                that a resumed run logs them as one that was never stopped.
        """
        tallies = []
        if stopped:
            self.runtime.mean(self.tally.peek)
            tallies = self.runtime.gather(clone(self.tally.state_dict()))
        else:
            self.log()
        self.saved = self.step
        if self.runtime.is_main or self.states.together:
            publish = partial(self.publish, self.meta()) if self.at_best else None
            self.states.save(self.step, self.state() | {"tallies": tallies}, publish)

    @property
    def at_best(self) -> bool:
        """Whether the weights are those of the best evaluation."""
        return bool(self.best.numbers) and self.best.step == self.step

    def publish(self, meta: Meta, state: State) -> None:
        """Write `model.safetensors` from the state of a run that is `at_best`."""
        weights = (state["ema"] or state)["model"]
        checkpoint.save_weights(self.folder / "model.safetensors", weights, meta)

    def state(self) -> State:
        """All that exact resuming needs.

        The learning rate, the order and augmentation of images and all random numbers are not
        here: they are functions of seed, step and elapsed time.
        """
        return {
            "step": self.step,
            "surroundings": self.surroundings,
            "elapsed": self.clock.elapsed,
            "evaluated": list(self.evaluated),
            "best": asdict(self.best),
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "optimizer": {
                "name": type(self.optimizer).__name__,
                "state": named_state(self.optimizer, self.model),
                "rates": [group["lr"] for group in self.optimizer.param_groups],
            },
            "scaler": self.scaler.state_dict(),
        }

    @property
    def surroundings(self) -> dict[str, int]:
        """What the order of the images depends on beside the config."""
        return {"processes": self.runtime.world_size, "images": len(self.data.train)}

    def restore(self) -> None:
        """Go on from the latest checkpoint that is whole.

        Raises:
            CheckpointError: none is, or it is of another model.
        """
        path, state = self.states.load()
        if self.runtime.agree(path.name) != path.name:
            raise checkpoint.CheckpointError(
                f"{path}: is not the latest checkpoint of the main process; all processes must see "
                "the same folder, on a disk that they share"
            )
        checkpoint.fill(self.model, state["model"], path, OTHER_MODEL)
        if self.ema is not None:
            # Without an average in the checkpoint, it starts from the weights.
            self.ema.load_state_dict(state["ema"] or {"model": state["model"], "updates": 0})
        self._restore_optimizer(**state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.step = self.saved = state["step"]
        self.best = Best(**state["best"])
        self.evaluated = state["evaluated"][0], state["evaluated"][1]
        self.clock.set(state["elapsed"])
        self._logged = self.step, state["elapsed"]
        self.progress = self.length.progress(self.step, state["elapsed"])
        if tallies := state["tallies"]:
            mine = tallies[self.runtime.rank % len(tallies)]
            self.tally.load_state_dict(clone(mine, self.runtime.device))
        if self.runtime.is_main:
            if self.at_best:
                self.publish(self.meta(), self.states.whole(path, state))
            known = state["surroundings"]
            changes = [
                Change(name, str(known[name]), str(now))
                for name, now in self.surroundings.items()
                if known[name] != now
            ]
            if changes:
                print(f"{path}: goes on elsewhere:\n{table(changes)}", file=sys.stderr)

    def _restore_optimizer(self, name: str, state: State, rates: list[float]) -> None:
        """Give back its state, unless it is of another kind now, and the rates of its last step."""
        if name == type(self.optimizer).__name__:
            load_named_state(self.optimizer, self.model, state)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=False):
            group["lr"] = rate

    def finish(self) -> dict[str, Any]:
        """Write and return `results.json`: the numbers of the saved model and what it cost."""
        self.states.wait()
        elapsed = self.clock.elapsed
        results = {
            **self.best.numbers,
            "step": self.best.step,
            "steps": self.step,
            "images_per_second": self.step * self.images_per_step / max(elapsed, 1e-9),
            "minutes": elapsed / 60,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "stopped_early": self.stopped_early,
        }
        if self.runtime.is_main:
            text = json.dumps(finite(results), indent=2) + "\n"
            checkpoint.write_text(self.folder / "results.json", text)
            self.observers.finish(results)
        return results

    def verdict(self) -> str:
        """The best number and its step, and why the run ended if that was early."""
        name = self.headline.name
        number = self.best.numbers.get(name)
        found = "undefined for want of ground truth" if number is None else format_number(number)
        text = f"{self.folder}: {name} {found}, from step {self.best.step}"
        if self.stopped_early:
            text += (
                f"; stopped early at step {self.step}, because {self.best.waited} evaluations in "
                "a row were no better (train.patience)"
            )
        return text
