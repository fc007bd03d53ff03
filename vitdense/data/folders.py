"""Semantic label maps of any kind: numbers, palettes, colors or binary masks, in two folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import NonNegativeInt

from vitdense.data.ade20k import LAYOUTS
from vitdense.data.base import DataError
from vitdense.data.classes import (
    Entry,
    binary_names,
    check_entries,
    check_labels,
    find_classes,
    parse_color,
    read_entries,
)
from vitdense.data.deep import check_range
from vitdense.data.images import inside, is_colored, list_images, read_labels
from vitdense.data.label_maps import (
    LOOKED_AT,
    binary_labels,
    color_labels,
    hides_masks,
    label_table,
    labels_in,
    look_up,
    warn_of_no_class,
)
from vitdense.data.layouts import Layout, find_layout
from vitdense.data.segments import MapDataset, check_maps, folders_below
from vitdense.data.voc_file import read_list
from vitdense.registry import DATASETS
from vitdense.structures import IGNORE, Target

LISTED = (Layout("labels", "images"), Layout("masks", "images"), Layout("annotations", "images"))
"""Where the files lie if lists say which belong to a split."""


@DATASETS.register("folders")
class FoldersDataset(MapDataset):
    """A folder of images and a folder of label images, each split in its own or by `{split}.txt`.

    What a label image holds is told by the classes: their `id`s, in its pixels or palette places;
    or their colors, where it has colors; or nothing, with `binary`.

    Raises:
        DataError: files are missing or wrong.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        classes: str | None = None,  # file of class names under root: .json, .csv or .txt
        colors: dict[str, str] | None = None,  # color of each class, as {road: "#6ec1e4"}
        ignore: list[NonNegativeInt | str] | None = None,  # labels or colors that count nowhere
        binary: bool = False,  # masks: above 0, in .jpg and .webp above 127, is the second class
        image_suffix: str = "",  # end of the images' names that label images do not share
        label_suffix: str = ".png",  # what they have in its place, as "_mask.png"
        annotations: str | None = None,  # the folder of label images, as "masks/{split}"
        images: str | None = None,  # the folder of images under root, as "photos/{split}"
        range: tuple[float, float] | None = None,  # values of deep images that become 0 and 255
    ) -> None:
        super().__init__(root, split)
        if binary and (colors or ignore):
            option = "colors" if colors else "labels to `ignore`"
            raise ValueError(f"binary: masks have no {option}; leave out one of the two options")
        self.range, self.binary = check_range(range), binary
        self.image_suffix, self.label_suffix = image_suffix, label_suffix
        listed = (self.root / f"{split}.txt").is_file()
        layouts = LISTED if listed else LAYOUTS
        self.annotations, self.images = find_layout(self.root, split, layouts, annotations, images)
        self.names = np.array(self._list(read_list(self.root, ".", split) if listed else None))
        self._check_maps()
        self._source = "option `colors`" if colors else str(find_classes(self.root, classes))
        entries = self._entries(classes, colors)
        self.classes = [entry.name for entry in entries]
        self._read_ignored(ignore or [])
        labels = [place if it.label is None else it.label for place, it in enumerate(entries)]
        self.category_ids = labels
        told = {label: k for k, label in enumerate(labels) if label not in (ignore or [])}
        self._table = label_table(told, self._ignored)
        known = {entry.color: k for k, entry in enumerate(entries) if entry.color is not None}
        self._colors = known | dict.fromkeys(self._ignored_colors, IGNORE)
        self._by_color = bool(known) and all(entry.label is None for entry in entries)
        self._check_labels()

    def target(self, index: int) -> Target:
        path = inside(self.annotations, self._label_name(str(self.names[index])))
        if self.binary:
            return Target(semantic=binary_labels(path))
        if self._by_color or (self._colors and is_colored(path)):
            return Target(semantic=color_labels(path, self._colors, self._source))
        labels = [str(label) for label in self.category_ids]
        remedy = (
            f"but the classes are labels {', '.join(labels[:12])}{', ...' * (len(labels) > 12)}; "
            f"name its class in {self._source}, or add it to the option `ignore`"
        )
        return Target(semantic=look_up(path, read_labels(path), self._table, remedy))

    def image_id(self, index: int) -> str:
        return self._stem(str(self.names[index]))

    def _stem(self, name: str) -> str:
        return name.removesuffix(self.image_suffix) if self.image_suffix else Path(name).stem

    def _label_name(self, name: str) -> str:
        return self._stem(name) + self.label_suffix

    def _list(self, listed: list[str] | None) -> list[str]:
        """Names of the images: those of the folder, or the listed ones among them."""
        there = [name for name in list_images(self.images) if name.endswith(self.image_suffix)]
        if listed is None:
            if not there:
                end = f" that end in '{self.image_suffix}'" if self.image_suffix else ""
                deeper = folders_below(self.images)
                raise DataError(f"{self.images}: no images{end} in this folder{deeper}")
            return there
        stems = {key: name for name in there for key in (self._stem(name), name)}
        missing = [name for name in listed if name not in stems]
        if missing:
            raise DataError(
                f"{self.root / self.split}.txt: lists '{missing[0]}', which is no image in "
                f"{self.images} ({len(missing)} of {len(listed)} are missing)"
            )
        return [stems[name] for name in listed]

    def _check_maps(self) -> None:
        there = dict.fromkeys(list_images(self.annotations))  # in their order
        maps = {str(name): self._label_name(str(name)) for name in self.names}
        try:
            check_maps(self.annotations, set(there), maps)
        except DataError as error:
            missing = [name for name, map_ in maps.items() if map_ not in there]
            others = [it for it in there if self.annotations != self.images or it not in maps]
            stem = self._stem(missing[0]) if missing else ""
            ends = [it.removeprefix(stem) for it in others if missing and it.startswith(stem)]
            ends = [end for end in ends if end and not end[0].isalnum()]  # 10.png is not of 1.jpg
            if not ends:
                raise
            raise DataError(f"{error}; for {stem}{ends[0]} set label_suffix: {ends[0]}") from None

    def _entries(self, name: str | None, colors: dict[str, str] | None) -> list[Entry]:
        if colors:
            entries = [Entry(key, None, _color("colors", it)) for key, it in colors.items()]
            return check_entries(entries, "option `colors`")
        path = find_classes(self.root, name)
        if path is None:
            files = [self.annotations / self._label_name(str(it)) for it in self.names[:LOOKED_AT]]
            raise DataError(
                f"{self.root}: no file of class names; write classes.txt there with one name per "
                f"line, in the order of the labels from 0, or classes.json with ids or colors "
                f"({_contents(files)})"
            )
        if self.binary:
            return [Entry(it) for it in binary_names(path)]
        return check_labels(read_entries(path), path)

    def _read_ignored(self, ignore: list[int | str]) -> None:
        numbers = [label for label in ignore if isinstance(label, int)]
        self._ignored = [IGNORE, *numbers]
        self._ignored_colors = [_color("ignore", it) for it in ignore if isinstance(it, str)]

    def _check_labels(self) -> None:
        """Look for the usual misunderstandings in the first maps."""
        if self.binary or self._by_color:
            return
        files = [self.annotations / self._label_name(str(it)) for it in self.names[:LOOKED_AT]]
        if hides_masks(files, self.category_ids):
            raise DataError(
                f"{self.annotations}: the first {len(files)} label images hold 0 and 255 alone: "
                "set binary: true for masks, or give a class the id 255"
            )
        warn_of_no_class(self.annotations, files, self.category_ids)


def _color(option: str, value: str) -> tuple[int, int, int]:
    try:
        return parse_color(value)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


def _contents(files: list[Path]) -> str:
    if any(map(is_colored, files)):
        return "the label images hold colors"
    found = ", ".join(map(str, labels_in(files)[:20]))
    return f"the first {len(files)} label images hold the labels {found}"
