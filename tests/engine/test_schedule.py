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
    assert ours(Schedule(name="poly", warmup=0.2, power=1.0)) == pytest.approx(rates)


def test_spans_are_equivalent() -> None:
    for curve in ("cosine", "flat_cosine", "poly", "multistep", "constant"):
        by_fraction = ours(Schedule(name=curve, warmup=0.05))
        assert ours(Schedule(name=curve, warmup=2)) == pytest.approx(by_fraction)
        assert ours(Schedule(name=curve, warmup="0.2 epochs")) == pytest.approx(by_fraction)
        assert ours(Schedule(name=curve, warmup="0.5 epochs")) != pytest.approx(by_fraction)


def test_no_warmup_outlasts_a_small_run() -> None:
    in_steps = ours(Schedule(name="constant", warmup=1500))
    assert in_steps.index(1) == STEPS // 20 and in_steps[0] == pytest.approx(0.001)
    assert ours(Schedule(name="constant", warmup="9 epochs")).index(1) == STEPS // 2
    long = ours(Schedule(name="constant", warmup=8), steps=400)
    assert long.index(1) == 8


def test_minutes_follow_the_clock() -> None:
    length = Length(steps_per_epoch=10, seconds=120)
    schedule = Schedule(name="cosine", warmup=0.1)
    assert lr_factor(schedule, length.progress(0, 0.0)) == pytest.approx(0.001)
    assert lr_factor(schedule, length.progress(3, 60.0)) == pytest.approx(0.5)
    assert lr_factor(schedule, length.progress(900, 60.0)) == pytest.approx(0.5)
    assert length.progress(5, 500.0) == Progress(5, 0.5, 1.0)
    early = lr_factor(Schedule(name="constant", warmup=100), length.progress(10, 0.3))
    assert early == pytest.approx(0.001 + 0.999 * 0.1)


def test_cosine_closed_form() -> None:
    rate = lr_factor(Schedule(name="cosine", warmup=0, final=0.2), Progress(0, 0, 0.3))
    assert rate == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 0.3)))


@pytest.mark.parametrize(
    ("flat", "tail"), [(0.5, 0.1), (20, 4), ("2 epochs", 0.1), (0.5, "0.4 epochs"), ("2 epochs", 4)]
)
def test_flat_cosine_is_flat_then_torchs_cosine_then_flat(flat, tail) -> None:
    middle = theirs(lambda o: lr_scheduler.CosineAnnealingLR(o, 16, 0.3))[:16]
    found = ours(Schedule(name="flat_cosine", warmup=0, flat=flat, tail=tail, final=0.3))
    assert found == pytest.approx([1.0] * 20 + middle + [0.3] * 4)


def test_flat_cosine_at_its_limits() -> None:
    cosine = ours(Schedule(name="cosine", warmup=0))
    assert ours(Schedule(name="flat_cosine", warmup=0, flat=0, tail=0)) == pytest.approx(cosine)
    found = ours(Schedule(name="flat_cosine", warmup=0, flat=0.5, tail=0.5, final=0.2))
    assert found == pytest.approx([1.0] * 21 + [0.2] * 19)
    longer = ours(Schedule(name="flat_cosine", warmup=0, flat="9 epochs", tail=500))
    assert longer[1] == 1.0 and all(0 <= rate <= 1 for rate in longer)
    with pytest.raises(ValueError, match="flat: with tail it is longer than the run"):
        Schedule(name="flat_cosine", flat=0.8, tail=0.4)


@pytest.mark.parametrize("close", [0.3, 12, "1.2 epochs"])
def test_the_last_span_begins_at_its_step(close) -> None:
    length = Length(10, steps=STEPS)
    closed = [length.progress(step, 0.0).closes(close) for step in range(STEPS)]
    assert closed == [False] * 28 + [True] * 12


@pytest.mark.parametrize("close", [0.3, 12, "1.2 epochs"])
def test_the_last_span_of_a_run_in_minutes_follows_the_clock(close) -> None:
    """At four seconds a step, 40 steps fit."""
    length = Length(10, seconds=160.0)
    closed = [length.progress(step, 4.0 * step).closes(close) for step in range(STEPS)]
    assert closed == [False] * 28 + [True] * 12


@pytest.mark.parametrize("steps", [1, 3, 7, 30, 999])
def test_the_whole_run_or_nothing_can_be_its_last_span(steps: int) -> None:
    states = [Length(10, steps=steps).progress(step, 0.0) for step in range(steps)]
    assert not any(state.closes(empty) for state in states for empty in (0, 0.0, "0 epochs"))
    assert all(state.closes(1.0) for state in states)
    assert all(state.closes(steps + 5) for state in states[1:])
