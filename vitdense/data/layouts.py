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
    annotated = [(it, name) for it in tried for name in sorted(_annotated(root, it))]
    splits = {name for it, name in annotated if (root / _fill(it.images, name)).is_dir()} - {split}
    if splits:
        listed = ", ".join(sorted(splits))
        hint = f"there are the splits {listed}: name them by data.train and data.val"
    elif annotated:
        layout, name = next((it for it in annotated if it[1] == split), annotated[0])
        hint = (
            f"{_fill(layout.annotations, name)} is there: name its split by data.train or "
            "data.val, and the folder of its images by data.dataset.images"
        )
    else:
        hint = "name other places by data.dataset.annotations and data.dataset.images"
    return f"{root}: no split '{split}': looked for {wanted}; {hint}"


def _annotated(root: Path, layout: Layout) -> set[str]:
    """Names of splits whose annotations this layout would find."""
    template = layout.annotations
    if template.count("{split}") != 1:
        return set()
    before, after = (re.escape(part) for part in template.split("{split}"))
    pattern = re.compile(f"{before}([^/]+){after}")
    found = (path.relative_to(root).as_posix() for path in root.glob(_fill(template, "*")))
    return {match[1] for path in found if (match := pattern.fullmatch(path))}
