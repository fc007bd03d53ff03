"""COCO's panoptic format: a JSON file, and a folder of PNG files whose colors are segment ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitdense.data.base import DataError
from vitdense.data.coco_file import read_json
from vitdense.data.images import inside, read_image
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
        """The map of an image and what its segments are."""
        annotation = self.annotations[image_id]
        path = inside(self.folder, annotation["file_name"], self.path)
        infos = sorted(annotation["segments_info"], key=lambda info: info["id"])
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
        annotations = {entry["image_id"]: entry for entry in content["annotations"]}
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: is no panoptic file of COCO ({error!r})") from None
    return PanopticFile(path, annotations, content.get("categories", []))


def score_files(truth_path: Path, answer_path: Path) -> dict[str, float]:
    """The numbers of `PanopticQuality` for predictions in files.

    Raises:
        DataError: files are missing or wrong, or an image has no prediction.
    """
    truth, answers = read_panoptic(truth_path), read_panoptic(answer_path)
    if not truth.categories:
        raise DataError(f"{truth_path}: has no `categories`, which say things from stuff")
    try:
        categories = sorted(truth.categories, key=lambda entry: entry["id"])
        labels = {entry["id"]: label for label, entry in enumerate(categories)}
        things = [entry["name"] for entry in categories if entry.get("isthing")]
        metric = PanopticQuality([entry["name"] for entry in categories], things=things)
        for image_id in truth.annotations:
            _count(metric, image_id, truth, answers, labels)
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{answer_path} or {truth_path}: is no panoptic file of COCO ({error!r})"
        ) from None
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
    odd = {info["category_id"] for info in answer.infos} - labels.keys()
    if odd:
        raise DataError(f"{answer.path}: has category {min(odd)}, which {truth.path} does not list")
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
