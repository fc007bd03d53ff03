"""COCO's panoptic format: a JSON file, and a folder of PNG files whose colors are segment ids."""

from __future__ import annotations

from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitdense.data.base import DataError
from vitdense.data.coco_file import read_json
from vitdense.data.images import inside, read_image
from vitdense.metrics.coco_files import by_id, holds
from vitdense.metrics.panoptic import PanopticQuality
from vitdense.ops.panoptic import common_runs


@dataclass(slots=True)
class PanopticFile:
    """One file with its folder, which is called as the file without `.json`.

    Attributes:
        path: the JSON file.
        annotations: by image id.
        categories: as in the file; predictions need none.
    """

    path: Path
    annotations: dict[int | str, dict[str, Any]]
    categories: list[dict[str, Any]]

    @property
    def folder(self) -> Path:
        return self.path.with_suffix("")

    def image(self, image_id: int | str) -> PanopticImage:
        """The map of an image and what its segments are.

        Raises:
            DataError: the map is missing or broken, or the entry is no such one.
        """
        annotation = self.annotations[image_id]
        try:
            path = inside(self.folder, annotation["file_name"], self.path)
            infos = sorted(annotation["segments_info"], key=lambda info: info["id"])
            ids = {index(info["id"]): info["category_id"] for info in infos}
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{self.path}: the entry of image {image_id!r} needs `file_name` and "
                f"`segments_info`, and each segment `id` and `category_id` ({error!r})"
            ) from None
        if len(ids) < len(infos):
            raise DataError(f"{self.path}: two segments of image {image_id!r} have the same id")
        if ids and not 0 < min(ids) <= max(ids) < 1 << 24:
            raise DataError(
                f"{self.path}: ids of segments are from 1 to {(1 << 24) - 1}; image {image_id!r} "
                f"has {min(ids)} to {max(ids)}"
            )
        return PanopticImage(path, self.path, read_image(path, 3).permute(1, 2, 0), infos)


@dataclass(slots=True)
class PanopticImage:
    """One image of a panoptic file.

    Attributes:
        path: of its map.
        source: the JSON file.
        colors: uint8 [H, W, 3]; red + 256 * green + 65536 * blue is a segment's id, 0 = void.
        infos: what the JSON file says of its segments, by id.
    """

    path: Path
    source: Path
    colors: Tensor
    infos: list[dict[str, Any]]

    def numbers(self, pixels: Tensor) -> Tensor:
        """The segments at some pixels, among which all are: int64 [R], 0 = void, k = the k-th.

        Raises:
            DataError: the map has segments that the JSON has not, or the other way round.
        """
        flat = self.colors.reshape(-1)
        bytes_ = 3 * pixels
        red, green, blue = (flat[k:].index_select(0, bytes_).long() for k in range(3))
        raw = red + 256 * green + 65536 * blue
        ids = torch.tensor([0, *(info["id"] for info in self.infos)], dtype=torch.int64)
        places = torch.searchsorted(ids, raw).clamp(max=len(ids) - 1)
        missing = torch.bincount(places, minlength=len(ids))[1:] == 0
        for kind, odd in (
            ("map", raw[ids.index_select(0, places) != raw]),
            ("JSON", ids[1:][missing]),
        ):
            if len(odd):
                raise DataError(
                    f"{self.path}: segment {int(odd.min())} is in the {kind} only; {self.source} "
                    "and its folder must hold the same segments"
                )
        return places


def read_panoptic(path: Path) -> PanopticFile:
    """Read the JSON file.

    Raises:
        DataError: it is missing or wrong.
    """
    content = read_json(path)
    try:
        entries = content["annotations"]
        annotations = {entry["image_id"]: entry for entry in entries}
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: is no panoptic file of COCO ({error!r})") from None
    if len(annotations) < len(entries):
        twice = next(it["image_id"] for it in entries if annotations[it["image_id"]] is not it)
        raise DataError(f"{path}: has two entries of image {twice!r}; take one out")
    return PanopticFile(path, annotations, content.get("categories", []))


def score_files(truth_path: Path, answer_path: Path) -> dict[str, float]:
    """The numbers of `PanopticQuality` for predictions in files.

    Raises:
        DataError: files are missing or wrong, or an image has no prediction.
    """
    truth, answers = read_panoptic(truth_path), read_panoptic(answer_path)
    if not truth.categories:
        raise DataError(f"{truth_path}: has no `categories`, which say things from stuff")
    if not truth.annotations:
        raise DataError(f"{truth_path}: `annotations` is empty; there is nothing to score")
    categories = by_id({"categories": truth.categories}, "categories", truth_path)
    unsaid = [key for key, entry in categories.items() if entry.get("isthing") is None]
    if unsaid:
        raise DataError(f"{truth_path}: category {unsaid[0]!r} has no `isthing`, 1 or 0 for stuff")
    labels = {key: label for label, key in enumerate(categories)}
    names = {key: str(entry.get("name", key)) for key, entry in categories.items()}
    things = [names[key] for key, entry in categories.items() if entry["isthing"]]
    metric = PanopticQuality(list(names.values()), things=things)
    for image_id in truth.annotations:
        _count(metric, image_id, truth, answers, labels)
    return metric.compute()


def _count(
    metric: PanopticQuality,
    image_id: int | str,
    truth: PanopticFile,
    answers: PanopticFile,
    labels: dict[int, int],
) -> None:
    if image_id not in answers.annotations:
        raise DataError(f"{answers.path}: has no prediction for image {image_id!r}")
    there, answer = truth.image(image_id), answers.image(image_id)
    if there.colors.shape != answer.colors.shape:
        raise DataError(
            f"{answer.path}: is of size {list(answer.colors.shape[:2])}, the truth {there.path} "
            f"of {list(there.colors.shape[:2])}"
        )
    for image in (there, answer):
        kinds = (info["category_id"] for info in image.infos)
        odd = [kind for kind in kinds if not holds(labels, kind)]
        if odd:
            raise DataError(
                f"{image.source}: the map {image.path.name} has a segment of category {odd[0]!r}, "
                f"which {truth.path} does not list"
            )
    count_image(metric, there, answer, labels)


def count_image(
    metric: PanopticQuality, there: PanopticImage, answer: PanopticImage, labels: dict[int, int]
) -> None:
    """Count one image in, whose maps are of one size; `labels` are the classes of categories."""
    starts, lengths = common_runs(there.colors, answer.colors)
    numbers = there.numbers(starts), answer.numbers(starts)
    classes, found = (
        torch.tensor([labels[info["category_id"]] for info in image.infos], dtype=torch.int64)
        for image in (there, answer)
    )
    crowd = torch.tensor([bool(info.get("iscrowd")) for info in there.infos]).bool()
    pixels = lengths.new_zeros(len(classes) + 1, len(found) + 1)
    pixels.view(-1).index_add_(0, numbers[0] * (len(found) + 1) + numbers[1], lengths)
    metric.count(pixels, found, classes, crowd)
