"""How far a run is, and what the learning rate is there: pure functions of progress."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vitdense.config.schema import Schedule

WARMUP_START = 0.001
"""Learning rate of the first step, as a fraction, when warming up."""

LONGEST_WARMUP = 0.5
"""Fraction of the run at which every warm-up has ended."""

LONGEST_COUNTED_WARMUP = 0.05
"""The same for a warm-up in steps: a recipe's 2000 would be all of a small run."""

TOLERANCE = 1e-9
"""Fractions that differ by rounding alone are equal."""


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

    def share(self, span: int | float | str) -> float:
        """The fraction of the run that a span takes, by the pace so far; 0 at the first step."""
        if isinstance(span, float):
            return span
        done = self.of(span)
        return min(self.fraction / done, 1.0) if done else 0.0

    def closes(self, span: int | float | str) -> bool:
        """Whether what is left of the run lies in its last `span`; never if that is empty."""
        share = self.share(span)
        return share > 0 and self.fraction >= 1 - share - TOLERANCE


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
    longest = LONGEST_COUNTED_WARMUP if isinstance(schedule.warmup, int) else LONGEST_WARMUP
    done = max(progress.of(schedule.warmup), progress.of(longest))
    return WARMUP_START + (1 - WARMUP_START) * min(done, 1.0)


def curve(schedule: Schedule, progress: Progress) -> float:
    """The fall over the whole run, from 1."""
    left = 1 - progress.fraction
    if schedule.name == "cosine":
        return schedule.final + (1 - schedule.final) * half_wave(left)
    if schedule.name == "flat_cosine":
        return schedule.final + (1 - schedule.final) * half_wave(1 - fallen(schedule, progress))
    if schedule.name == "poly":
        return schedule.final + (1 - schedule.final) * left**schedule.power
    if schedule.name == "multistep":
        return schedule.gamma ** sum(progress.of(span) >= 1 for span in schedule.milestones)
    return 1.0


def half_wave(height: float) -> float:
    """The cosine's fall: 1 at height 1, 0 at height 0."""
    return (1 - math.cos(math.pi * height)) / 2


def fallen(schedule: Schedule, progress: Progress) -> float:
    """How much of the way from the end of `flat` to the start of `tail` is done, in 0..1."""
    past = progress.fraction - progress.share(schedule.flat)
    if past <= 0:
        return 0.0
    way = 1 - progress.share(schedule.flat) - progress.share(schedule.tail)
    return min(past / way, 1.0) if way > 0 else 1.0
