"""How far a run is, on standard error: a bar on a terminal, plain lines in a file."""

from __future__ import annotations

import sys
import time
from datetime import timedelta

from vitdense.engine.observers.base import Observer, Record, format_number

SHORTEST, LONGEST, SHARE = 10.0, 300.0, 0.01
"""Between two lines of a file: seconds at least, seconds at most, and a fraction of the run."""


def console(title: str, fraction: float = 0.0, headline: str = "") -> Observer:
    """A progress bar where standard error is a terminal, else plain lines.

    Args:
        title: name of the run.
        fraction: of the run that is done already.
        headline: the number of an evaluation that comes first.
    """
    kind = ProgressBar if sys.stderr.isatty() else LogLines
    return kind(title, fraction, headline)


class ProgressBar(Observer):
    """A bar, when the run will end, and its latest numbers; evaluations stay above it."""

    def __init__(self, title: str, fraction: float = 0.0, headline: str = "") -> None:
        from tqdm import tqdm

        self.headline = headline
        self.bar = tqdm(
            total=100.0,
            initial=100 * fraction,
            desc=title,
            bar_format="{desc} {percentage:3.0f}%|{bar:16}| {elapsed}<{remaining}{postfix}",
            mininterval=0.5,
            dynamic_ncols=True,
        )

    def advance(self, fraction: float) -> None:
        self.bar.update(100 * fraction - self.bar.n)

    def log(self, record: Record) -> None:
        if record["kind"] == "train":
            self.bar.set_postfix_str(describe(record), refresh=False)
        else:
            self.bar.write(describe(record, self.headline), file=sys.stderr)

    def close(self) -> None:
        self.bar.close()


class LogLines(Observer):
    """A line with the time of day for each evaluation, and for some of the records of training.

    The first record has one, then one record in 1 % of the run, though not in less than 10 seconds
    and at least every 5 minutes.
    """

    def __init__(self, title: str, fraction: float = 0.0, headline: str = "") -> None:
        self.headline = headline
        self.start = self.fraction = fraction
        self.started = time.monotonic()
        self._shown: tuple[float, float] | None = None
        self._write(f"{title}, {'from the start' if not fraction else 'resumed'}")

    def advance(self, fraction: float) -> None:
        self.fraction = fraction

    def log(self, record: Record) -> None:
        if record["kind"] != "train":
            self._write(f"{record['kind']} {describe(record, self.headline)}")
        elif self._due():
            self._shown = time.monotonic(), self.fraction
            self._write(f"{describe(record)}{self._left()}")

    def _due(self) -> bool:
        if self._shown is None or self.fraction == 1:
            return True
        seconds, share = time.monotonic() - self._shown[0], self.fraction - self._shown[1]
        return seconds >= LONGEST or (seconds >= SHORTEST and share >= SHARE)

    def _left(self) -> str:
        """Time to the end, evaluations included, at the pace since the start or the resumption."""
        done = self.fraction - self.start
        if done <= 0 or self.fraction == 1:
            return ""
        seconds = (time.monotonic() - self.started) / done * (1 - self.fraction)
        return f" left {timedelta(seconds=round(seconds))}"

    def _write(self, text: str) -> None:
        now = time.strftime("%H:%M:%S")
        print(f"{now} {100 * self.fraction:3.0f}% {text}", file=sys.stderr, flush=True)


def describe(record: Record, headline: str = "") -> str:
    """A record in one line; loss terms if they are few, and no numbers of single classes.

    Args:
        headline: the number that comes first, after the step.
    """
    terms = [key for key in record if key.startswith("loss/")]
    hidden = {"kind", "epoch", "seconds", *(key for key in record if "/" in key)}
    shown = [key for key in record if key not in hidden or (key in terms and len(terms) <= 4)]
    first = [key for key in ("step", headline) if key in record]
    return " ".join(
        f"{key.removeprefix('loss/')} {format_number(record[key])}"
        for key in dict.fromkeys([*first, *shown])
        if record[key] is not None
    )
