"""Labels of whole images, from one file beside any data set."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from vitdense.data.base import DataError, Dataset
from vitdense.structures import Sample, Target

Rows = dict[str, set[str]]
"""Labels by the name of their image, as the file writes it."""


class LabelledDataset(Dataset):
    """Any data set, its images labelled as wholes by a file.

    A row names its image by the file's name, with or without ending and folders.

    Attributes:
        files: the data set.
        path: of the file of labels.
        rows: the name that each image has in it.

    Raises:
        DataError: the file is missing or wrong, an image has no row, or two share one.
    """

    def __init__(self, files: Dataset, path: Path, classes: Sequence[str] | None = None) -> None:
        """Read the file.

        Args:
            classes: names in the order of a model that knows them; by default those of the whole
                file, sorted, so that all splits have the same.
        """
        super().__init__(files.root, files.split)
        self.files, self.path, self.range = files, path, files.range
        self.classes, self.category_ids = files.classes, files.category_ids
        self.things, self.frequencies = files.things, files.frequencies
        rows = read_image_labels(path)
        self.image_classes = sorted(set().union(*rows.values())) if classes is None else classes
        if not self.image_classes:
            raise DataError(f"{path}: has no label")
        self.rows = self._find_rows(rows)
        self._labels = self._multi_hot([rows[name] for name in self.rows])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        self.files.channels, self.files.cache = self.channels, self.cache
        sample = self.files[index]
        return replace(sample, target=self._label(sample.target, index))

    def target(self, index: int) -> Target:
        return self._label(self.files.target(index), index)

    def labels(self, index: int) -> torch.Tensor:
        return self.files.labels(index)

    def image_path(self, index: int) -> Path:
        return self.files.image_path(index)

    def _label(self, target: Target, index: int) -> Target:
        return replace(target, image_labels=torch.from_numpy(self._labels[index].copy()))

    def _multi_hot(self, labels: list[set[str]]) -> np.ndarray:
        """bool [images, K]."""
        columns = {name: column for column, name in enumerate(self.image_classes)}
        flags = np.zeros((len(labels), len(columns)), dtype=bool)
        for row, its in zip(flags, labels, strict=True):
            if unknown := sorted(its - columns.keys()):
                raise DataError(
                    f"{self.path}: has the label '{unknown[0]}', which the model does not know; "
                    f"its labels of images are {', '.join(self.image_classes)}"
                )
            row[[columns[name] for name in its]] = True
        return flags

    def _find_rows(self, rows: Rows) -> list[str]:
        """The row of each image: of those that could be meant the one that says most."""
        images = [self.image_path(index) for index in range(len(self))]
        found = [next((n for n in names_of(image) if n in rows), None) for image in images]
        missing = [image for image, row in zip(images, found, strict=True) if row is None]
        if missing:
            raise DataError(
                f"{self.path}: has no row for the image {missing[0]} ({len(missing)} of "
                f"{len(images)} have none); add one, with an empty label if it has none of them"
            )
        named = [row for row in found if row is not None]
        _refuse_twins(self.path, list(zip(named, images, strict=True)))
        return named


def check_splits(first: Dataset, second: Dataset) -> None:
    """Raise DataError if one row labels two images, one in each split."""
    if isinstance(first, LabelledDataset) and isinstance(second, LabelledDataset):
        pairs = [(row, it.image_path(i)) for it in (first, second) for i, row in enumerate(it.rows)]
        _refuse_twins(first.path, pairs)


def _refuse_twins(path: Path, images: list[tuple[str, Path]]) -> None:
    owners: dict[str, Path] = {}
    for row, image in images:
        other = owners.setdefault(row, image)
        if other != image and other.resolve() != image.resolve():
            raise DataError(
                f"{path}: '{row}' may be {other} or {image}; write the folder too, as in "
                f"{image.parent.name}/{image.name}"
            )


def names_of(image: Path) -> Iterator[str]:
    """What a row may call an image: its path or an end of it, with the file's ending or without."""
    parts = [part for part in image.parts if part != image.anchor]
    for start in range(len(parts)):
        name = "/".join(parts[start:])
        yield name
        yield name.removesuffix(image.suffix)


def read_image_labels(path: Path) -> Rows:
    """Labels of images.

    Args:
        path: a table with the columns `image` and `label` among others, one row for each label or
            several labels between semicolons; or, in a .txt, lines of an image and its label, as
            in ADE20K's sceneCategories.txt. An empty label is no label.

    Raises:
        DataError: the file is missing or none of these.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file of image labels; see data.image_labels, a name under data.root"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    rows: Rows = {}
    for name, label in _pairs(path, [line for line in lines if line.strip()]):
        key = name.strip().replace("\\", "/").removeprefix("./")
        if not key:
            raise DataError(f"{path}: the label '{label}' is of no image; each row needs its name")
        rows.setdefault(key, set()).update({part.strip() for part in label.split(";")} - {""})
    return rows


def _pairs(path: Path, lines: list[str]) -> list[tuple[str, str]]:
    """Image and label of each row."""
    first = lines[0] if lines else ""
    delimiter = next((sign for sign in "\t;," if sign in first), ",")
    header = next(csv.reader([first], delimiter=delimiter), [])
    columns = [column.strip().casefold() for column in header]
    if {"image", "label"} <= set(columns):
        table = csv.DictReader(lines[1:], columns, restval="", delimiter=delimiter)
        return [(row["image"], row["label"]) for row in table]
    if path.suffix != ".txt":
        raise DataError(f"{path}: its first line must name the columns `image` and `label`")
    parts = [line.split(maxsplit=1) for line in lines]
    return [(part[0], part[1] if len(part) > 1 else "") for part in parts]
