"""Which evaluation of a run is the best one, and for how long none has been better."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from vitdense.metrics.base import Metric
from vitdense.metrics.image_labels import Several
from vitdense.registry import suggest

Numbers = Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Headline:
    """The number that says which evaluation is the best one.

    Attributes:
        lower: whether lower is better.
    """

    name: str
    lower: bool = False

    def height(self, numbers: Numbers) -> float:
        """How good they are: higher is better, and what is no number is the worst.

        Raises:
            ValueError: it is not among them; names those that are.
        """
        if self.name not in numbers:
            raise ValueError(unknown(self.name, numbers))
        value = numbers[self.name]
        if value is None or math.isnan(value):
            return -math.inf
        return -value if self.lower else value


def headline_of(metric: Metric, name: str | None) -> Headline:
    """The number of that name, or the metric's own.

    Raises:
        ValueError: the metric has no such number, as far as it can tell before it has counted.
    """
    if name is None:
        return Headline(metric.headline, metric.headline in metric.lower)
    known = _known(metric)
    kind, of_a_class, _ = name.partition("/")
    if known and of_a_class:  # these are there once it has counted
        metrics = metric.metrics if isinstance(metric, Several) else [metric]
        known += [f"{kind}/{label}" for each in metrics for label in each.classes]
    if known and name not in known:
        raise ValueError(unknown(name, known))
    return Headline(name, name in metric.lower)


def _known(metric: Metric) -> list[str]:
    """What a metric computes from nothing; empty if it cannot."""
    metric.reset()
    try:
        return list(metric.compute())
    except Exception:
        return []


def unknown(name: str, known: Iterable[str]) -> str:
    """The message for a name that none of the numbers has."""
    whole = [key for key in known if "/" not in key]
    kinds = sorted({f"{key.partition('/')[0]}/<class>" for key in known if "/" in key})
    return (
        f"train.best: no number is called {name!r}.{suggest(name, list(known))} There are "
        f"{', '.join([*whole, *kinds])}"
    )


@dataclass(slots=True)
class Best:
    """The best evaluation so far: its step and all its numbers.

    Attributes:
        waited: evaluations since one was better than all before it.
    """

    step: int = 0
    numbers: dict[str, float | None] = field(default_factory=dict)
    waited: int = 0

    def offer(self, step: int, numbers: dict[str, float | None], headline: Headline) -> bool:
        """Take an evaluation if none was better; returns whether it is now the best.

        Of equals the latest: at the start of a run many are 0.

        Raises:
            ValueError: the headline is not among its numbers.
        """
        height = headline.height(numbers)
        # a resumed run may have another metric, which begins anew
        before = headline.height(self.numbers) if headline.name in self.numbers else None
        self.waited = 0 if before is None or height > before else self.waited + 1
        if before is not None and height < before:
            return False
        self.step, self.numbers = step, numbers
        return True
