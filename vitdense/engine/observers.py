"""Those who watch a run: progress bar, metrics.jsonl, TensorBoard. They only observe.

A record is a flat mapping of numbers at a `step`, of kind "train" or "evaluation".
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Observer:
    """Sees every record and how far the run is; each method may be left as it is."""

    def log(self, record: Record) -> None:
        """See numbers."""

    def advance(self, fraction: float) -> None:
        """See how much of the run is done, after every step."""

    def close(self) -> None:
        """The run ends."""


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

    def close(self) -> None:
        self._tell(lambda member: member.close())

    def _tell(self, call: Callable[[Observer], None]) -> None:
        for member in list(self.members):
            try:
                call(member)
            except Exception as error:
                self.members.remove(member)
                name = type(member).__name__
                warnings.warn(f"{name} failed and is left out: {error}", stacklevel=3)


def finite(value: Any) -> Any:
    """The value as JSON has it: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class JsonLines(Observer):
    """One JSON object per record; what a resumed run does again is dropped first."""

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path = path
        records = read_records(path) if step else []
        path.write_text("", encoding="utf-8")
        for record in records:
            if record["step"] <= step:
                self.log(record)

    def log(self, record: Record) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(record)) + "\n")


def read_records(path: Path) -> list[Record]:
    """The records of a metrics.jsonl; a last line that was cut off is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


class TensorBoard(Observer):
    """Curves for TensorBoard in the run's folder."""

    def __init__(self, folder: Path, step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            message = "no curves for TensorBoard; install it by `pip install 'vitdense[log]'`"
            raise ImportError(message) from error
        self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def log(self, record: Record) -> None:
        for key, value in record.items():
            if isinstance(value, int | float) and key != "step":
                self.writer.add_scalar(f"{record['kind']}/{key}", value, record["step"])

    def close(self) -> None:
        self.writer.close()


class ProgressBar(Observer):
    """How far the run is, when it will end, and its latest numbers, on standard error."""

    def __init__(self, title: str, fraction: float = 0.0) -> None:
        from tqdm import tqdm

        self.bar = tqdm(
            total=100.0,
            initial=100 * fraction,
            desc=title,
            bar_format="{desc} {percentage:3.0f}%|{bar:16}| {elapsed}<{remaining}{postfix}",
            mininterval=0.5 if sys.stderr.isatty() else 15.0,
            dynamic_ncols=True,
        )

    def advance(self, fraction: float) -> None:
        self.bar.update(100 * fraction - self.bar.n)

    def log(self, record: Record) -> None:
        if record["kind"] == "train":
            self.bar.set_postfix_str(describe(record), refresh=False)
        else:
            self.bar.write(describe(record), file=sys.stderr)

    def close(self) -> None:
        self.bar.close()


def describe(record: Record) -> str:
    """A record in one line; loss terms if they are few, and no numbers of single classes."""
    terms = [key for key in record if key.startswith("loss/")]
    hidden = {"kind", "epoch", "seconds", *(key for key in record if "/" in key)}
    shown = [key for key in record if key not in hidden or (key in terms and len(terms) <= 4)]
    return " ".join(
        f"{key.removeprefix('loss/')} {format_number(record[key])}"
        for key in shown
        if record[key] is not None
    )


def format_number(value: Any) -> str:
    """Four significant digits, or the value as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
