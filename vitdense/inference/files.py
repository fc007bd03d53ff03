"""Which images a user means, and what the answers for them are called."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitdense.data.base import DataError
from vitdense.data.images import SUFFIXES

MAGIC = ("*", "?", "[")


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image to predict.

    Attributes:
        path: the file.
        name: of what is written for it, without suffix; has the subfolders of a given folder.
        image_id: the id that a COCO file beside it gives, else the stem of the file, without the
            `_leftImg8bit` of Cityscapes.
    """

    path: Path
    name: str
    image_id: int | str


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
    ids = _CocoIds()
    names = unique_names(found.values())
    return [ImageFile(path, name, ids.get(path)) for path, name in zip(found, names, strict=True)]


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
    """(file, path relative to the folder that was given) of each image."""
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
    return [(path, path.relative_to(root)) for path in images]


def _before_magic(parts: Sequence[str]) -> Iterable[str]:
    for part in parts:
        if any(sign in part for sign in MAGIC):
            return
        yield part


class _CocoIds:
    """Image ids from the annotation files that lie beside folders of images."""

    def __init__(self) -> None:
        self._of_folder: dict[Path, dict[str, int]] = {}

    def get(self, path: Path) -> int | str:
        folder = path.parent
        if folder not in self._of_folder:
            self._of_folder[folder] = _read_ids(folder)
        # Cityscapes' own panoptic files leave out that the file is an image
        return self._of_folder[folder].get(path.name, path.stem.removesuffix("_leftImg8bit"))


def _read_ids(folder: Path) -> dict[str, int]:
    """Ids by file name from COCO's, this toolbox's and Roboflow's places, else none."""
    split, above = folder.resolve().name, folder.resolve().parent
    places = [
        place / "annotations" / f"{kind}_{split}.json"
        for kind in ("instances", "panoptic")
        for place in (above, above.parent)
    ]
    for file in (folder / "_annotations.coco.json", *places):
        if file.is_file():
            try:
                images = json.loads(file.read_bytes())["images"]
                return {Path(image["file_name"]).name: image["id"] for image in images}
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{file}: is no annotation file of COCO ({error!r})") from None
    return {}
