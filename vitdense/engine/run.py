"""A run: what training changes, and how that is saved, restored, evaluated and logged."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler

import vitdense
from vitdense import config as configs
from vitdense.config import Config
from vitdense.engine import build, checkpoint
from vitdense.engine.checkpoint import Meta
from vitdense.engine.ema import Ema
from vitdense.engine.evaluate import check_inference, evaluate
from vitdense.engine.observers import Observers, finite, format_number
from vitdense.engine.optim import build_optimizer
from vitdense.engine.pictures import Pictures
from vitdense.engine.runtime import Runtime, choose_precision, memory_used
from vitdense.engine.stopping import Stopwatch
from vitdense.engine.tally import Tally
from vitdense.models.base import Model


@dataclass(slots=True)
class Best:
    """The best evaluation: its headline number, its step and all its numbers."""

    value: float = -math.inf
    step: int = 0
    numbers: dict[str, float | None] = field(default_factory=dict)


class Run:
    """Everything that a run has.

    Attributes:
        model: what is trained; `net` is the same, wrapped for several processes.
        ema: the averaged model, which then is the one evaluated and saved.
        step: optimizer steps done; `progress` says how far that is.
        clock: seconds of training, without evaluation and saving.
        evaluated: steps and seconds at the latest evaluation.
        saved: step of the latest checkpoint.
    """

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        self.folder = Path(config.output)
        self.last = self.folder / "checkpoints" / "last.pt"
        self.data = build.build_data(config)
        self.model: Model = build.build_model(config, self.data)
        self._start()
        build.weigh_classes(self.model, self.data.train)
        self.model.to(runtime.device)
        self.metric = build.build_metric(
            config,
            self.model.task,
            self.data.train.classes,
            self.data.train.things,
            build.labels_of(self.model, self.data.train),
            self.data.train.frequencies,
        )
        check_inference(config.inference, self.model, self.metric)
        # before wrapping, because it freezes what does not learn
        self.optimizer = build_optimizer(self.model, **dict(config.optimizer))
        self.net: nn.Module = runtime.wrap(self.model)
        self.precision = choose_precision(config.train.precision, runtime.device)
        self.scaler = GradScaler(runtime.device.type, enabled=self.precision == torch.float16)
        self.ema = Ema(self.model, config.train.ema) if config.train.ema is not None else None
        self.length = build.build_length(config.train, len(self.data.train), runtime.world_size)
        self.validation = build.evaluation_loader(config, self.data, self.model, runtime)
        self.pictures = Pictures(self.data.val, config.train.pictures, runtime)
        self.observers, self.tally, self.clock = Observers([]), Tally(), Stopwatch()
        self.step, self.saved, self.best, self.evaluated = 0, 0, Best(), (0, 0.0)
        self.progress = self.length.progress(0, 0.0)
        self._logged = 0, 0.0

    def _start(self) -> None:
        """Start from another model's weights, and say so, unless the run goes on from its own."""
        started = None if self.last.exists() else build.start(self.config, self.data, self.model)
        if started is not None and self.runtime.is_main:
            print(started, file=sys.stderr)

    @property
    def result(self) -> Model:
        """The model that is evaluated and saved."""
        return self.ema.model if self.ema is not None else self.model

    @property
    def images_per_step(self) -> int:
        """Images of all processes that one step learns from."""
        return build.images_per_step(self.config.train, self.runtime.world_size)

    def measure(self) -> None:
        """Bring `progress` up to date; where it counts minutes, by the main process's clock."""
        elapsed = self.clock.elapsed
        if self.length.seconds is not None:
            elapsed = self.runtime.agree(elapsed)
        self.progress = self.length.progress(self.step, elapsed)
        self.observers.advance(self.progress.fraction)

    def log(self) -> None:
        """Read the losses since the last time, and show them; raises NonFiniteLoss."""
        losses = self.tally.read()
        if not losses:
            return
        steps, seconds = self.step - self._logged[0], self.clock.elapsed - self._logged[1]
        self._logged = self.step, self.clock.elapsed
        speed = {
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
            "images_per_second": steps * self.images_per_step / max(seconds, 1e-9),
            "memory_gb": memory_used(self.runtime.device),
            "seconds": self.clock.elapsed,
        }
        epoch = round(self.progress.epochs, 4)
        self.observers.log({"kind": "train", "step": self.step, "epoch": epoch, **losses, **speed})

    def evaluation_due(self) -> bool:
        """Whether one of the evenly spread evaluations has come, or the end."""
        if self.evaluated[0] == self.step:
            return False
        before = self.length.progress(*self.evaluated).fraction
        count = self.config.train.evaluations
        now = self.progress.fraction
        return now == 1 or int(now * count + 1e-9) > int(before * count + 1e-9)

    def evaluate(self) -> None:
        """Measure the result, draw pictures, and keep its weights if it is the best so far."""
        self.evaluated = self.step, self.clock.elapsed
        numbers = evaluate(
            self.result,
            self.validation,
            self.metric,
            self.runtime.device,
            self.precision,
            self.pictures.watch,
            self.config.inference,
        )
        if not self.runtime.is_main:
            return
        self.pictures.save(self.folder / "pictures" / f"step_{self.step:06d}.jpg")
        self.observers.log({"kind": "evaluation", "step": self.step, **numbers})
        value = numbers[self.metric.headline]
        # Of equals the latest: at the start of a run many are 0.
        if not self.best.numbers or value >= self.best.value:
            value = -math.inf if math.isnan(value) else value
            self.best = Best(value, self.step, finite(numbers))
            checkpoint.save_model(self.folder / "model.safetensors", self.result, self.meta())

    def meta(self) -> Meta:
        """What goes with the weights that are carried away."""
        return Meta(
            config=configs.dump(self.config),
            classes=list(self.data.train.classes),
            category_ids=list(self.data.train.category_ids),
            task=self.model.task,
            step=self.best.step,
            metrics=self.best.numbers,
            version=vitdense.__version__,
            image_classes=build.labels_of(self.model, self.data.train),
        )

    def save(self) -> None:
        """Write the checkpoint, after a look at the losses: faulty weights must not be kept."""
        self.log()
        self.saved = self.step
        if self.runtime.is_main:
            checkpoint.save_state(self.last, self.state())

    def state(self) -> dict[str, Any]:
        """All that exact resuming needs; random numbers and data follow from seed and step."""
        return {
            "step": self.step,
            "elapsed": self.clock.elapsed,
            "evaluated": list(self.evaluated),
            "best": asdict(self.best),
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self) -> None:
        """Go on from the checkpoint; raises CheckpointError if it is not of this config."""
        state = checkpoint.load_state(self.last)
        checkpoint.fill(self.model, state["model"], self.last)
        if self.ema is not None:
            # Without an average in the checkpoint, it starts from the weights.
            self.ema.load_state_dict(state["ema"] or {"model": state["model"], "updates": 0})
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise checkpoint.CheckpointError(
                f"{self.last}: the optimizer's groups are not this config's ({error}); resume with "
                "the config.yaml beside it"
            ) from error
        self.scaler.load_state_dict(state["scaler"])
        self.step = self.saved = state["step"]
        self.best = Best(**state["best"])
        self.evaluated = state["evaluated"][0], state["evaluated"][1]
        self.clock.set(state["elapsed"])
        self._logged = self.step, state["elapsed"]
        self.progress = self.length.progress(self.step, state["elapsed"])

    def finish(self) -> dict[str, Any]:
        """Write and return `results.json`: the numbers of the saved model and what it cost."""
        elapsed = self.clock.elapsed
        results = {
            **self.best.numbers,
            "step": self.best.step,
            "steps": self.step,
            "images_per_second": self.step * self.images_per_step / max(elapsed, 1e-9),
            "minutes": elapsed / 60,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
        }
        if self.runtime.is_main:
            text = json.dumps(finite(results), indent=2) + "\n"
            checkpoint.write_text(self.folder / "results.json", text)
            name = self.metric.headline
            number = format_number(self.best.numbers[name])
            print(f"{self.folder}: {name} {number}, from step {self.best.step}", file=sys.stderr)
        return results
