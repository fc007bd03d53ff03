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

    def segments(self, image_id: int | str) -> tuple[Tensor, list[dict[str, Any]], Path]:
        """Map of an image [H, W] (0 = void, k = the k-th segment), its segments, and its file.

        Raises:
            DataError: the map has segments that the JSON has not, or the other way round.
        """
        annotation = self.annotations[image_id]
        path = inside(self.folder, annotation["file_name"], self.path)
        red, green, blue = read_image(path, 3).long()
        raw = red + 256 * green + 65536 * blue
        infos = sorted(annotation["segments_info"], key=lambda info: info["id"])
        ids = torch.tensor([0, *(info["id"] for info in infos)], dtype=torch.int64)
        there = raw.unique()
        for kind, odd in (("map", ~torch.isin(there, ids)), ("JSON", ~torch.isin(ids[1:], there))):
            if odd.any():
                segment = int((there if kind == "map" else ids[1:])[odd][0])
                raise DataError(
                    f"{path}: segment {segment} is in the {kind} only; {self.path} and its "
                    "folder must hold the same segments"
                )
        return torch.searchsorted(ids, raw), infos, path


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
    there, infos, path = truth.segments(image_id)
    answer, found, other = answers.segments(image_id)
    if there.shape != answer.shape:
        raise DataError(
            f"{other}: is of size {list(answer.shape)}, the truth {path} of {list(there.shape)}"
        )
    odd = {info["category_id"] for info in found} - labels.keys()
    if odd:
        raise DataError(f"{other}: has category {min(odd)}, which {truth.path} does not list")
    metric.count(
        answer,
        torch.tensor([labels[info["category_id"]] for info in found], dtype=torch.int64),
        there,
        torch.tensor([labels[info["category_id"]] for info in infos], dtype=torch.int64),
        torch.tensor([bool(info.get("iscrowd")) for info in infos]).bool(),
    )
