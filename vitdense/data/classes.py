"""Names of semantic classes, from the file that comes with a data set."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from vitdense.data.base import DataError

NAMES = ("classes.json", "classes.txt", "objectInfo150.csv", "objectInfo150.txt")
"""Files that are looked for in the root, in this order."""


def read_classes(path: Path, first: int) -> list[str]:
    """Class names in the order of their labels.

    Args:
        path: .json (a list of names, or `classes`: a list of `id` and `name`); .csv, or ADE20K's
            objectInfo150.txt (a table with the columns Idx and Name); else one name per line.
        first: the label of the first class in the label maps.

    Raises:
        DataError: the file cannot be understood, or its labels leave gaps.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if path.suffix == ".json":
        names = _from_json(path, first)
    elif _is_table(text):
        rows = list(csv.DictReader(io.StringIO(text), delimiter="\t" if "\t" in text else ","))
        names = _ordered(path, [(row["Idx"], row["Name"]) for row in rows], first)
    else:
        names = [line.strip() for line in text.splitlines() if line.strip()]
    return _checked(path, names)


def _checked(path: Path, names: list[str]) -> list[str]:
    if not 0 < len(names) < 256:
        raise DataError(f"{path}: names {len(names)} classes; 1 to 255 are possible")
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise DataError(f"{path}: names the class '{min(twice)}' twice; names must differ")
    return names


def _is_table(text: str) -> bool:
    header = text.partition("\n")[0].replace("\t", ",").split(",")
    return {"Idx", "Name"} <= {column.strip() for column in header}


def _from_json(path: Path, first: int) -> list[str]:
    import json

    try:
        content: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{path}: is not valid JSON at {where}: {error.msg}") from None
    entries = content.get("classes") if isinstance(content, dict) else content
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path}: give a list of names, or `classes`: a list of `id` and `name`")
    if all(isinstance(entry, str) for entry in entries):
        return entries
    try:
        return _ordered(path, [(entry["id"], entry["name"]) for entry in entries], first)
    except (KeyError, TypeError):
        raise DataError(f"{path}: each class needs an `id` (its label) and a `name`") from None


def _ordered(path: Path, pairs: list[tuple[Any, str]], first: int) -> list[str]:
    named = {int(label): str(name) for label, name in pairs}
    labels = sorted(named)
    if labels != list(range(first, first + len(pairs))):
        remedy = "set reduce_zero_label: false" if first == 1 and labels[0] == 0 else ""
        remedy = "set reduce_zero_label: true" if first == 0 and labels[0] == 1 else remedy
        raise DataError(
            f"{path}: has the labels {labels[0]} to {labels[-1]} for {len(pairs)} classes; "
            f"expected {first} to {first + len(pairs) - 1}"
            + (f" ({remedy})" if remedy else ", without gaps")
        )
    return [named[label] for label in labels]
