"""Learning rates against torch's schedulers and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer

from vitdense.config.schema import Schedule
from vitdense.engine.schedule import Length, Progress, lr_factor

STEPS = 40


def ours(schedule: Schedule, steps: int = STEPS, per_epoch: int = 10) -> list[float]:
    length = Length(per_epoch, steps=steps)
    return [lr_factor(schedule, length.progress(step, 0.0)) for step in range(steps)]


def theirs(*build: Callable[[Optimizer], LRScheduler]) -> list[float]:
    """Factors of torch's schedulers, multiplied."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedulers = [make(optimizer) for make in build]
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("schedule", "scheduler"),
    [
        (
            Schedule(name="cosine", warmup=0, final=0.1),
            lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, 0.1),
        ),
        (
            Schedule(name="poly", warmup=0, power=0.9),
            lambda o: lr_scheduler.PolynomialLR(o, STEPS, 0.9),
        ),
        (
            Schedule(name="multistep", warmup=0, milestones=(20, "3 epochs"), gamma=0.3),
            lambda o: lr_scheduler.MultiStepLR(o, [20, 30], 0.3),
        ),
        (
            Schedule(name="multistep", warmup=0, milestones=(0.5, 0.75)),
            lambda o: lr_scheduler.MultiStepLR(o, [20, 30]),
        ),
        (
            Schedule(name="constant", warmup=0.25),
            lambda o: lr_scheduler.LinearLR(o, 0.001, 1.0, 10),
        ),
    ],
)
def test_equals_torch(schedule: Schedule, scheduler: Callable[[Optimizer], LRScheduler]) -> None:
    assert ours(schedule) == pytest.approx(theirs(scheduler))


def test_warmup_times_curve_equals_chained_schedulers() -> None:
    rates = theirs(
        lambda o: lr_scheduler.LinearLR(o, 0.001, 1.0, 8),
        lambda o: lr_scheduler.PolynomialLR(o, STEPS, 1.0),
    )
    assert ours(Schedule(name="poly", warmup=8, power=1.0)) == pytest.approx(rates)


def test_spans_are_equivalent() -> None:
    for curve in ("cosine", "poly", "multistep", "constant"):
        by_fraction = ours(Schedule(name=curve, warmup=0.25))
        assert ours(Schedule(name=curve, warmup=10)) == pytest.approx(by_fraction)
        assert ours(Schedule(name=curve, warmup="1 epoch")) == pytest.approx(by_fraction)
        assert ours(Schedule(name=curve, warmup="0.5 epochs")) != pytest.approx(by_fraction)


def test_no_warmup_outlasts_a_small_run() -> None:
    assert max(ours(Schedule(name="constant", warmup=1500))) == 1
    assert ours(Schedule(name="constant", warmup=1500)).index(1) == STEPS // 2


def test_minutes_follow_the_clock() -> None:
    length = Length(steps_per_epoch=10, seconds=120)
    schedule = Schedule(name="cosine", warmup=0.1)
    assert lr_factor(schedule, length.progress(0, 0.0)) == pytest.approx(0.001)
    assert lr_factor(schedule, length.progress(3, 60.0)) == pytest.approx(0.5)
    assert lr_factor(schedule, length.progress(900, 60.0)) == pytest.approx(0.5)
    assert length.progress(5, 500.0) == Progress(5, 0.5, 1.0)
    early = lr_factor(Schedule(name="constant", warmup=100), length.progress(10, 1.2))
    assert early == pytest.approx(0.001 + 0.999 * 0.1)


def test_cosine_closed_form() -> None:
    rate = lr_factor(Schedule(name="cosine", warmup=0, final=0.2), Progress(0, 0, 0.3))
    assert rate == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 0.3)))
