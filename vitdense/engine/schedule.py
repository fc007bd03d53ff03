"""How far a run is, and what the learning rate is there: pure functions of progress."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vitdense.config.schema import Schedule

WARMUP_START = 0.001
"""Learning rate of the first step, as a fraction, when warming up."""

LONGEST_WARMUP = 0.5
"""Fraction of the run at which every warm-up has ended, so that none outlasts a small run."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: `steps` and `epochs` done, and the `fraction` of its length."""

    steps: int
    epochs: float
    fraction: float

    def of(self, span: int | float | str) -> float:
        """How much of a span is done, 1 where it ends; an empty one is done from the start.

        Args:
            span: as the config has it: 0.05 of the run, 500 steps, "2 epochs".
        """
        if isinstance(span, str):
            done, length = self.epochs, float(span.partition(" ")[0])
        else:
            done, length = (self.steps if isinstance(span, int) else self.fraction), span
        return done / length if length else math.inf


@dataclass(frozen=True, slots=True)
class Length:
    """How long a run is: a number of steps, or of seconds that training (not evaluation) takes."""

    steps_per_epoch: float
    steps: int | None = None
    seconds: float | None = None

    def progress(self, steps: int, elapsed: float) -> Progress:
        """Progress after `steps` optimizer steps and `elapsed` seconds of training."""
        done, whole = (elapsed, self.seconds) if self.steps is None else (steps, self.steps)
        return Progress(steps, steps / self.steps_per_epoch, min(done / (whole or 1), 1.0))


def lr_factor(schedule: Schedule, progress: Progress) -> float:
    """Fraction of the highest learning rate for the step after `progress`: warm-up times curve."""
    return warmup(schedule, progress) * curve(schedule, progress)


def warmup(schedule: Schedule, progress: Progress) -> float:
    """The linear rise from `WARMUP_START` to 1."""
    done = max(progress.of(schedule.warmup), progress.of(LONGEST_WARMUP))
    return WARMUP_START + (1 - WARMUP_START) * min(done, 1.0)


def curve(schedule: Schedule, progress: Progress) -> float:
    """The fall over the whole run, from 1."""
    left = 1 - progress.fraction
    if schedule.name == "cosine":
        return schedule.final + (1 - schedule.final) * (1 - math.cos(math.pi * left)) / 2
    if schedule.name == "poly":
        return schedule.final + (1 - schedule.final) * left**schedule.power
    if schedule.name == "multistep":
        return schedule.gamma ** sum(progress.of(span) >= 1 for span in schedule.milestones)
    return 1.0
