"""Which images a user means, and what the answers for them are called."""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitdense.data.base import DataError
from vitdense.data.coco_file import collector_paused
from vitdense.data.images import SUFFIXES
from vitdense.structures import Size

MAGIC = ("*", "?", "[")


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image to predict.

    Attributes:
        path: the file.
        name: of what is written for it, without suffix; has the subfolders of a given folder.
        image_id: the id that a COCO file beside it gives, else the stem of the file, without the
            `_leftImg8bit` of Cityscapes; where another image has the same, the name.
        size: (height, width) by that file, which tells whether its truth is of the turned photo.
    """

    path: Path
    name: str
    image_id: int | str
    size: Size | None = None


def find_images(inputs: Sequence[Path | str]) -> list[ImageFile]:
    """The images of files, folders (with subfolders) and patterns, each once, in a fixed order.

    Raises:
        DataError: one of the inputs does not exist or holds no image.
    """
    found: dict[Path, Path] = {}
    for given in inputs:
        paths = _expand(Path(given))
        if not paths:
            raise DataError(
                f"{given}: no images found; give image files, folders or patterns of "
                f"{', '.join(sorted(SUFFIXES))}"
            )
        for path, relative in paths:
            found.setdefault(path, relative)
    listed = _Listed()
    names = unique_names(found.values())
    # Cityscapes' own panoptic files leave out that the file is an image
    stems = {path: path.stem.removesuffix("_leftImg8bit") for path in found}
    often = Counter(stems.values())
    files = []
    for path, name in zip(found, names, strict=True):
        own = stems[path] if often[stems[path]] == 1 else name
        files.append(ImageFile(path, name, *listed.get(path, own)))
    return files


def unique_names(relatives: Iterable[Path]) -> list[str]:
    """A name for each file: without suffix where that is unique, else with it, else numbered."""
    taken: set[str] = set()
    names = []
    for relative in relatives:
        name = relative.with_suffix("").as_posix()
        if name in taken:
            name = relative.as_posix()
        base, number = name, 2
        while name in taken:
            name, number = f"{base}_{number}", number + 1
        taken.add(name)
        names.append(name)
    return names


def _expand(given: Path) -> list[tuple[Path, Path]]:
    """(file, path relative to the folder that was given) of each image that is not hidden."""
    if given.is_file():
        return [(given, Path(given.name))]
    if given.is_dir():
        root, paths = given, sorted(given.rglob("*"))
    elif any(sign in str(given) for sign in MAGIC):
        fixed = [part for part in _before_magic(given.parts)]
        root = Path(*fixed)
        paths = [Path(name) for name in sorted(glob.glob(str(given), recursive=True))]
    else:
        raise DataError(f"{given}: no such file or folder")
    images = [p for p in paths if p.suffix.lower() in SUFFIXES and p.is_file()]
    found = [(path, path.relative_to(root)) for path in images]
    return [it for it in found if not any(part.startswith(".") for part in it[1].parts)]


def _before_magic(parts: Sequence[str]) -> Iterable[str]:
    for part in parts:
        if any(sign in part for sign in MAGIC):
            return
        yield part


Entry = tuple[int | str, Size | None]
"""An image's id, and its (height, width)."""


class _Listed:
    """What annotation files of COCO say of images in their folders, and in folders below."""

    def __init__(self) -> None:
        self._of_folder: dict[Path, dict[str, Entry]] = {}

    def get(self, path: Path, own: str) -> Entry:
        """Id and size of an image; `own` and none if no file lists it."""
        path = path.absolute()
        for folder in path.parents:
            if folder not in self._of_folder:
                self._of_folder[folder] = _read_entries(folder)
            listed = self._of_folder[folder]
            if listed and (entry := listed.get(path.relative_to(folder).as_posix())):
                return entry
        return self._of_folder[path.parent].get(f"*/{path.name}", (own, None))


@collector_paused()
def _read_entries(folder: Path) -> dict[str, Entry]:
    """Entries by file name from COCO's, this toolbox's and Roboflow's places, else none.

    Where only one image of a file is called so in whatever folder, `*/name` is its entry too.
    """
    split, above = folder.resolve().name, folder.resolve().parent
    places = [
        place / "annotations" / f"{kind}_{split}.json"
        for kind in ("instances", "panoptic")
        for place in (above, above.parent)
    ]
    entries: dict[str, Entry] = {}
    for file in (folder / "_annotations.coco.json", *places):
        if os.path.isfile(file):  # no error in folders of others above
            try:
                images = json.loads(file.read_bytes())["images"]
                found = {Path(image["file_name"]).as_posix(): _entry(image) for image in images}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f"{file}: is no annotation file of COCO ({error!r})") from None
            often = Counter(Path(name).name for name in found)
            alone = {
                f"*/{Path(name).name}": entry
                for name, entry in found.items()
                if often[Path(name).name] == 1
            }
            entries = found | alone | entries  # each may list images that the others do not
    return entries


def _entry(image: dict[str, Any]) -> Entry:
    height, width = image.get("height"), image.get("width")
    size = (height, width) if isinstance(height, int) and isinstance(width, int) else None
    return image["id"], size
