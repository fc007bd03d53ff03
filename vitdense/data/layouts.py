"""Where a data set's files lie under its root."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from vitdense.data.base import DataError

LONG = {"train": "training", "val": "validation"}
"""What ADE20K's folders are called where its files say train and val."""


class Layout(NamedTuple):
    """Templates relative to the root, with {split} for the split's name, or {long} for LONG's."""

    annotations: str
    images: str


class Places(NamedTuple):
    """The paths of one split; both exist."""

    annotations: Path
    images: Path


def find_layout(
    root: Path,
    split: str,
    layouts: tuple[Layout, ...],
    annotations: str | None = None,
    images: str | None = None,
) -> Places:
    """The first layout whose files exist; `annotations` and `images` replace their parts.

    Raises:
        DataError: no layout fits; names what was looked for and the splits that there are.
    """
    tried = [Layout(annotations or it.annotations, images or it.images) for it in layouts]
    tried = list(dict.fromkeys(tried))
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; set data.root to the data set's folder")
    for layout in tried:
        places = Places(*(root / _fill(template, split) for template in layout))
        if places.annotations.exists() and places.images.is_dir():
            return places
    raise DataError(_message(root, split, tried))


def _fill(template: str, split: str) -> str:
    return template.replace("{split}", split).replace("{long}", LONG.get(split, split))


def _message(root: Path, split: str, tried: list[Layout]) -> str:
    wanted = " or ".join(
        f"{_fill(it.annotations, split)} with {_fill(it.images, split)}/" for it in tried
    )
    splits = sorted({name for layout in tried for name in _splits(root, layout)} - {split})
    if splits:
        hint = f"there are the splits {', '.join(splits)}"
    else:
        hint = "name other places by the options `annotations` and `images`"
    return f"{root}: no split '{split}': looked for {wanted}; {hint}"


def _splits(root: Path, layout: Layout) -> set[str]:
    """Names of splits that this layout would find."""
    template = layout.annotations
    if template.count("{split}") != 1:
        return set()
    before, after = (re.escape(part) for part in template.split("{split}"))
    pattern = re.compile(f"{before}([^/]+){after}")
    found = (path.relative_to(root).as_posix() for path in root.glob(_fill(template, "*")))
    names = {match[1] for path in found if (match := pattern.fullmatch(path))}
    return {name for name in names if (root / _fill(layout.images, name)).is_dir()}
