"""Classes from the file that comes with a data set: names, with labels or colors if it has them."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitdense.data.base import DataError

NAMES = ("classes.json", "classes.txt", "class_dict.csv", "objectInfo150.csv", "objectInfo150.txt")
"""Files that are looked for in the root, in this order."""

Color = tuple[int, int, int]
"""Red, green, blue, 0..255."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A class as its file tells it; label and color are of the label images."""

    name: str
    label: int | None = None
    color: Color | None = None


def find_classes(root: Path, name: str | None, names: tuple[str, ...] = NAMES) -> Path | None:
    """The file of classes under root: the named one, or the first of those that are usual.

    Raises:
        DataError: there is no file of the given name.
    """
    for path in (root / candidate for candidate in (names if name is None else (name,))):
        if path.is_file():
            return path
    if name is not None:
        raise DataError(f"{root / name}: no such file of class names")
    return None


def read_classes(path: Path, first: int) -> list[str]:
    """Class names in the order of their labels, which go up from `first` without gaps.

    Raises:
        DataError: the file cannot be understood, or its labels leave gaps.
    """
    entries = read_entries(path)
    labels = sorted(entry.label for entry in entries if entry.label is not None)
    if not labels:
        return [entry.name for entry in entries]
    if labels != list(range(first, first + len(entries))):
        remedy = "set reduce_zero_label: false" if first == 1 and labels[0] == 0 else ""
        remedy = "set reduce_zero_label: true" if first == 0 and labels[0] == 1 else remedy
        raise DataError(
            f"{path}: has the labels {labels[0]} to {labels[-1]} for {len(entries)} classes; "
            f"expected {first} to {first + len(entries) - 1}"
            + (f" ({remedy})" if remedy else ", without gaps")
        )
    named = {entry.label: entry.name for entry in entries}
    return [named[label] for label in labels]


def labelled_classes(path: Path, first: int) -> dict[int, str]:
    """Class names by label: the file's, or if it tells none those from `first` on.

    Raises:
        DataError: the file cannot be understood, or only some classes have a label.
    """
    entries = check_labels(read_entries(path), path)
    return {
        first + place if entry.label is None else entry.label: entry.name
        for place, entry in enumerate(entries)
    }


def binary_names(path: Path) -> list[str]:
    """The two classes of masks; one name alone stands for the foreground.

    Raises:
        DataError: the file cannot be understood or names more.
    """
    names = [entry.name for entry in read_entries(path)]
    if len(names) > 2:
        raise DataError(f"{path}: names {len(names)} classes; binary masks have one or two")
    return names if len(names) == 2 else ["background", *names]


def read_entries(path: Path) -> list[Entry]:
    """Classes in the order of the file.

    Args:
        path: .json (a list of names, or `classes`: a list of `name`, `id` and `color`); a table
            with the columns Idx and Name (ADE20K's objectInfo150) or name, r, g and b; else one
            name per line.

    Raises:
        DataError: the file cannot be understood, or two classes share a name, label or color.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    if path.suffix == ".json":
        entries = _from_json(path, text)
    elif _columns(text) & {"idx", "r"}:
        entries = _from_table(path, text)
    else:
        entries = [Entry(line.strip()) for line in text.splitlines() if line.strip()]
    return check_entries(entries, path)


def check_entries(entries: list[Entry], where: Path | str) -> list[Entry]:
    """The entries again; raises DataError for none, too many, or what two of them share."""
    if not 0 < len(entries) < 256:
        raise DataError(f"{where}: names {len(entries)} classes; 1 to 255 are possible")
    for what in ("name", "label", "color"):
        values = [getattr(entry, what) for entry in entries]
        twice = {value for value in values if value is not None and values.count(value) > 1}
        if twice and what == "name":
            raise DataError(f"{where}: names the class '{min(twice)}' twice; names must differ")
        if twice:
            raise DataError(f"{where}: gives the {what} {min(twice)} to two classes")
    return entries


def check_labels(entries: list[Entry], path: Path) -> list[Entry]:
    """The entries again; raises DataError if some have a label and some have none."""
    if 0 < sum(entry.label is not None for entry in entries) < len(entries):
        raise DataError(f"{path}: some classes have an `id`, some have none; give all or none")
    return entries


def parse_color(color: Any) -> Color:
    """Red, green and blue of "#rrggbb" or a list of three numbers; raises ValueError."""
    if isinstance(color, str) and re.fullmatch(r"#?[0-9a-fA-F]{6}", color.strip()):
        digits = color.strip().removeprefix("#")
        return int(digits[:2], 16), int(digits[2:4], 16), int(digits[4:], 16)
    if isinstance(color, list | tuple) and len(color) == 3:
        red, green, blue = (int(value) for value in color)
        if all(0 <= value < 256 for value in (red, green, blue)):
            return red, green, blue
    raise ValueError(f"{color!r} is no color; write '#rrggbb' or three numbers from 0 to 255")


def _columns(text: str) -> set[str]:
    header = text.partition("\n")[0].replace("\t", ",").split(",")
    return {column.strip().lower() for column in header} if len(header) > 1 else set()


def _from_table(path: Path, text: str) -> list[Entry]:
    rows = csv.reader(io.StringIO(text), delimiter="\t" if "\t" in text else ",")
    header = [column.strip().lower() for column in next(rows)]
    named = [dict(zip(header, (cell.strip() for cell in row), strict=False)) for row in rows if row]
    try:
        if "idx" in header:
            return [Entry(row["name"], int(row["idx"])) for row in named]
        return [Entry(row["name"], None, parse_color([row[c] for c in "rgb"])) for row in named]
    except (KeyError, ValueError) as error:
        raise DataError(
            f"{path}: is no table with the columns Idx and Name, or name, r, g and b ({error})"
        ) from None


def _from_json(path: Path, text: str) -> list[Entry]:
    import json

    try:
        content: Any = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{path}: is not valid JSON at {where}: {error.msg}") from None
    if isinstance(content, dict):
        content = content.get("classes", content.get("categories"))
    if not isinstance(content, list) or not content:
        raise DataError(f"{path}: give a list of names, or `classes`: a list of `id` and `name`")
    if all(isinstance(entry, str) for entry in content):
        return [Entry(name) for name in content]
    return [_from_mapping(path, entry) for entry in content]


def _from_mapping(path: Path, entry: Any) -> Entry:
    try:
        color = entry.get("color")
        color = None if color is None else parse_color(color)
        label = entry["id"] if color is None else entry.get("id")
        return Entry(str(entry["name"]), None if label is None else int(label), color)
    except (AttributeError, KeyError, TypeError):
        raise DataError(f"{path}: each class needs an `id` (its label) and a `name`") from None
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
