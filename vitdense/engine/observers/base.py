"""What every observer promises, and how several are told at once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

Record = dict[str, Any]
"""Numbers by name at a `step`, of kind "train" or "evaluation"."""


class Observer:
    """Sees every record and how far the run is; each method may be left as it is."""

    def __str__(self) -> str:
        return type(self).__name__

    def log(self, record: Record) -> None:
        """See numbers."""

    def advance(self, fraction: float) -> None:
        """See how much of the run is done, after every step."""

    def finish(self, results: Record) -> None:
        """See the numbers of a run that is complete; one that is interrupted has none."""

    def close(self) -> None:
        """The run ends, whatever the reason."""


class Observers(Observer):
    """Several observers; one that fails is left out with a warning, the run goes on."""

    def __init__(self, builders: Iterable[Callable[[], Observer]]) -> None:
        self.members: list[Observer] = []
        for build in builders:
            try:
                self.members.append(build())
            except Exception as error:
                warnings.warn(f"a logger is left out: {error}", stacklevel=2)

    def log(self, record: Record) -> None:
        self._tell(lambda member: member.log(record))

    def advance(self, fraction: float) -> None:
        self._tell(lambda member: member.advance(fraction))

    def finish(self, results: Record) -> None:
        self._tell(lambda member: member.finish(results))

    def close(self) -> None:
        self._tell(lambda member: member.close())

    def _tell(self, call: Callable[[Observer], None]) -> None:
        for member in list(self.members):
            try:
                call(member)
            except Exception as error:
                self.members.remove(member)
                reason = str(error) or type(error).__name__
                warnings.warn(f"{member} failed and is left out: {reason}", stacklevel=3)


def finite(value: Any) -> Any:
    """The value as JSON has it: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def numbers(record: Record) -> dict[str, float]:
    """The finite numbers of a record, named as curves: `train/loss`, `evaluation/AP/cat`."""
    return {
        f"{record['kind']}/{key}": value
        for key, value in finite(record).items()
        if isinstance(value, int | float) and key != "step"
    }


def format_number(value: Any) -> str:
    """Four significant digits, or the value as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
