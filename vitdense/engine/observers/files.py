"""Records in files of the run's folder: JSON lines and tables."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from vitdense.engine.checkpoint import write_text
from vitdense.engine.observers.base import Observer, Record, finite


class JsonLines(Observer):
    """One JSON object per record; what a resumed run does again is dropped first.

    Args:
        step: that the run goes on from.
        evaluated: step of the latest evaluation that is not done again; by default `step`.
    """

    def __init__(self, path: Path, step: int = 0, evaluated: int | None = None) -> None:
        self.path = path
        last = kept_until(step, evaluated)
        records = [it for it in read_records(path) if it["step"] <= last.get(it["kind"], step)]
        write_text(path, "".join(map(json_line, records)))

    def log(self, record: Record) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json_line(record))


def kept_until(step: int, evaluated: int | None) -> dict[str, int]:
    """The last step of each kind of record that a resumed run does not do again."""
    return {"train": step, "evaluation": step if evaluated is None else evaluated}


def json_line(record: Record) -> str:
    """A record as a line of a metrics.jsonl."""
    return json.dumps(finite(record)) + "\n"


def read_records(path: Path) -> list[Record]:
    """The records of a metrics.jsonl; a last line that was cut off is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


class Tables(Observer):
    """`train.csv` and `evaluation.csv`: a row for each record, a column for each number.

    A number that comes later than others adds a column; the file is then written anew. Numbers
    that a record has not, or that are not finite, are empty cells. What a resumed run does again is
    dropped first.
    """

    KINDS = ("train", "evaluation")

    def __init__(self, folder: Path, step: int = 0, evaluated: int | None = None) -> None:
        self.folder = folder
        last = kept_until(step, evaluated)
        self.columns: dict[str, list[str]] = {}
        for kind in self.KINDS:
            path = folder / f"{kind}.csv"
            rows = [row for row in read_rows(path) if int(row["step"]) <= last[kind]]
            path.unlink(missing_ok=True)
            if rows:
                self._write(kind, list(rows[0]), rows)

    def log(self, record: Record) -> None:
        kind = record["kind"]
        row = {key: value for key, value in finite(record).items() if key != "kind"}
        known = self.columns.get(kind, [])
        new = [key for key in row if key not in known]
        path = self.folder / f"{kind}.csv"
        if new:
            self._write(kind, known + new, [*read_rows(path), row])
            return
        with path.open("a", encoding="utf-8", newline="") as file:
            file.write(table(known, [row]))

    def _write(self, kind: str, columns: list[str], rows: Iterable[Record]) -> None:
        head = dict(zip(columns, columns, strict=True))
        write_text(self.folder / f"{kind}.csv", table(columns, [head, *rows]))
        self.columns[kind] = columns


def table(columns: Sequence[str], rows: Iterable[Record]) -> str:
    """Rows as lines of CSV, without a head; what a row has not is an empty cell."""
    lines = io.StringIO()
    writer = csv.DictWriter(lines, columns, restval="", lineterminator="\n")
    writer.writerows(rows)
    return lines.getvalue()


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table, as text; a last line that was cut off is left out."""
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return list(csv.DictReader(io.StringIO(whole)))
