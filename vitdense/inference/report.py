"""Numbers of a metric for people and for programs."""

from __future__ import annotations

import json
import math

OF_IMAGES = "image_"
"""What the names of numbers about labels of whole images begin with."""


def table(numbers: dict[str, float]) -> str:
    """A metric's numbers as text: those of the whole, a row per class, a row per image label.

    Args:
        numbers: as a metric computes them; `AP/cat` is the AP of the class cat.
    """
    whole = {name: value for name, value in numbers.items() if "/" not in name}
    width = max((len(name) for name in whole), default=0)
    lines = [f"{name:<{width}}  {_text(value)}" for name, value in whole.items()]
    images = {name: value for name, value in numbers.items() if name.startswith(OF_IMAGES)}
    pixels = {name: value for name, value in numbers.items() if name not in images}
    return "\n".join(lines + _rows("class", pixels) + _rows("label of images", images))


def _rows(title: str, numbers: dict[str, float]) -> list[str]:
    rows: dict[str, dict[str, float]] = {}
    for name, value in numbers.items():
        kind, slash, label = name.partition("/")
        if slash:
            rows.setdefault(label, {})[kind] = value
    if not rows:
        return []
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row))
    width = max(len(title), *(len(label) for label in rows))
    lines = ["", f"{title:<{width}}" + "".join(f"  {kind:>6}" for kind in kinds)]
    for label, row in rows.items():
        texts = ((kind, _text(row.get(kind, math.nan))) for kind in kinds)
        values = "".join(f"  {text:>{max(6, len(kind))}}" for kind, text in texts)
        lines.append(f"{label:<{width}}{values}")
    return lines


def _text(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


def to_json(numbers: dict[str, float]) -> str:
    """The numbers as JSON; those that do not exist are null."""
    finite = {k: None if math.isnan(value) else value for k, value in numbers.items()}
    return json.dumps(finite, indent=2) + "\n"
