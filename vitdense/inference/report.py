"""Numbers of a metric for people and for programs."""

from __future__ import annotations

import json
import math


def table(numbers: dict[str, float]) -> str:
    """A metric's numbers as text: those of the whole first, then a row per class.

    Args:
        numbers: as a metric computes them; `AP/cat` is the AP of the class cat.
    """
    whole = {name: value for name, value in numbers.items() if "/" not in name}
    width = max((len(name) for name in whole), default=0)
    lines = [f"{name:<{width}}  {_text(value)}" for name, value in whole.items()]
    return "\n".join(lines + _class_rows(numbers))


def _class_rows(numbers: dict[str, float]) -> list[str]:
    rows: dict[str, dict[str, float]] = {}
    for name, value in numbers.items():
        kind, slash, label = name.partition("/")
        if slash:
            rows.setdefault(label, {})[kind] = value
    if not rows:
        return []
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row))
    width = max(len("class"), *(len(label) for label in rows))
    lines = ["", f"{'class':<{width}}" + "".join(f"  {kind:>6}" for kind in kinds)]
    for label, row in rows.items():
        values = "".join(f"  {_text(row.get(kind, math.nan)):>6}" for kind in kinds)
        lines.append(f"{label:<{width}}{values}")
    return lines


def _text(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


def to_json(numbers: dict[str, float]) -> str:
    """The numbers as JSON; those that do not exist are null."""
    finite = {k: None if math.isnan(value) else value for k, value in numbers.items()}
    return json.dumps(finite, indent=2) + "\n"
