"""Numbers for predictions in files, whichever program wrote them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vitdense.data.base import DataError
from vitdense.data.classes import NAMES, binary_names, labelled_classes
from vitdense.data.images import list_images, read_labels
from vitdense.data.label_maps import binary_labels, hides_masks, label_table, look_up
from vitdense.engine import checkpoint
from vitdense.inference.report import table, to_json
from vitdense.metrics import coco_files, lvis_files, panoptic_files, voc_files
from vitdense.metrics.backends import Backend
from vitdense.metrics.backends import score as score_objects
from vitdense.metrics.coco import limits_to, summarize
from vitdense.metrics.matching import Rules
from vitdense.metrics.miou import MeanIoU
from vitdense.structures import IGNORE, Batch, Frame, Prediction, Target

Kind = Literal["bbox", "segm", "panoptic", "semantic", "voc", "lvis"]


def score(
    kind: Kind,
    truth: Path,
    predictions: Path,
    *,
    backend: Backend = "auto",
    max_detections: int | None = None,
    iou_type: Literal["bbox", "segm"] | None = None,
    split: str | None = None,
    iou: float = 0.5,
    points: Literal[11, "all"] = "all",
    classes: Path | None = None,
    first_label: Literal[0, 1] = 1,
    ignore: Sequence[int] = (),
    binary: bool = False,
    absent: Literal["skip", "zero"] = "skip",
    json_path: Path | None = None,
) -> dict[str, float]:
    """Score files, print a table, and write the numbers as `results.json` has them.

    Args:
        kind: bbox, segm: COCO's JSON files; panoptic: COCO's JSON files, each beside its folder of
            maps; semantic: folders of label maps; voc: see `voc_files.score_files`; lvis: LVIS's
            annotations beside results of COCO's format.
        truth, predictions: what is compared.
        backend: for bbox and segm, who computes.
        max_detections: for bbox and segm, best detections of an image and class that count, 100;
            for lvis those of an image, 300.
        iou_type: for lvis, what is compared; by default masks if the predictions have them.
        split: for voc, which images.
        iou: for voc, the overlap from which a detection is right.
        points: for voc, recalls that are averaged.
        classes: for semantic and voc, the file of class names; by default one beside the folder
            or above, and VOC's own.
        first_label: for semantic, label of the first class, if the file of classes tells no labels.
        ignore: for semantic, labels of the truth that count nowhere, beside 0 and 255 where they
            are no class.
        binary: for semantic, the maps are masks, as those of the data set `folders`.
        absent: for semantic, whether classes without pixels are left out or count as 0.
        json_path: file for the numbers.

    Raises:
        DataError: files are missing or wrong.
        ValueError: the backend is not installed, a label below 0, or an option of another kind.
    """
    _check_options(kind, {**locals(), "ignore": tuple(ignore)})
    if kind == "panoptic":
        numbers = panoptic_files.score_files(truth, predictions)
    elif kind == "semantic":
        maps = LabelMaps.find(truth, classes, first_label, ignore, binary)
        numbers = score_label_maps(truth, predictions, maps, absent)
    elif kind == "voc":
        options = {"split": split, "classes": classes, "iou": iou, "points": points}
        numbers = voc_files.score_files(truth, predictions, **options)  # type: ignore[arg-type]
    elif kind == "lvis":
        limit = 300 if max_detections is None else max_detections
        numbers = lvis_files.score_files(truth, predictions, iou_type, limit)
    else:
        limit = 100 if max_detections is None else max_detections
        numbers = score_detections(kind, truth, predictions, backend, limit)
    print(table(numbers))
    if json_path is not None:
        checkpoint.write_text(json_path, to_json(numbers))
    return numbers


OPTIONS: dict[str, tuple[Any, tuple[Kind, ...]]] = {
    "backend": ("auto", ("bbox", "segm")),
    "max_detections": (None, ("bbox", "segm", "lvis")),
    "iou_type": (None, ("lvis",)),
    "split": (None, ("voc",)),
    "iou": (0.5, ("voc",)),
    "points": ("all", ("voc",)),
    "classes": (None, ("semantic", "voc")),
    "first_label": (1, ("semantic",)),
    "ignore": ((), ("semantic",)),
    "binary": (False, ("semantic",)),
    "absent": ("skip", ("semantic",)),
}
"""Of each option its default, and the kinds that take it."""


def _check_options(kind: Kind, given: dict[str, Any]) -> None:
    """An option that would do nothing is a mistake of whoever gives it."""
    for name, (default, kinds) in OPTIONS.items():
        if kind not in kinds and given[name] != default:
            known = ", ".join(kinds)
            raise ValueError(f"{name}: is for --kind {known}, not for {kind}; leave it out")


def score_detections(
    kind: Literal["bbox", "segm"],
    truth_path: Path,
    results_path: Path,
    backend: Backend = "auto",
    max_detections: int = 100,
) -> dict[str, float]:
    """The numbers of the `coco` metric, with boxes and areas as the files have them."""
    if max_detections <= 10:
        raise ValueError("max_detections: must be above 10, beside which AR1 and AR10 stand")
    truth = coco_files.read_truth(truth_path, kind)
    found = coco_files.read_results(results_path, truth, kind)
    rules = Rules(limits=limits_to(max_detections))
    curves = score_objects(truth.objects, found, len(truth.classes), rules, backend)
    return summarize(curves, truth.classes, rules.limits)


@dataclass
class LabelMaps:
    """How label maps are read.

    Attributes:
        names: of the classes.
        labels: of the classes in the maps; None if the maps are masks of 0 and more.
        ignored: labels of the truth that count nowhere, beside 0 and 255 where they are no class.
        source: the file of classes, for messages.
    """

    names: list[str]
    labels: list[int] | None
    ignored: list[int]
    source: Path

    @classmethod
    def find(
        cls,
        truth: Path,
        classes: Path | None = None,
        first_label: Literal[0, 1] = 1,
        ignore: Sequence[int] = (),
        binary: bool = False,
    ) -> LabelMaps:
        """By a file of class names, which wins over `first_label`; arguments as of `score`."""
        path = classes or _find_classes(truth)
        if binary:
            return cls(binary_names(path), None, [], path)
        if min(ignore, default=0) < 0:
            raise ValueError(f"ignore: {min(ignore)} is no label; labels begin with 0")
        labelled = labelled_classes(path, first_label)
        return cls(list(labelled.values()), list(labelled), list(ignore), path)

    def read(self, path: Path, truth: bool) -> Tensor:
        """Classes uint8 [H, W] of a file, in truth also IGNORE."""
        if self.labels is None:
            return binary_labels(path)
        dropped = self.ignored if truth else []
        known = {label: k for k, label in enumerate(self.labels) if label not in dropped}
        table = label_table(known, [0, IGNORE, *dropped] if truth else [])
        low, high = min(self.labels), max(self.labels)
        remedy = (
            f"but the {len(self.labels)} classes of {self.source} are labels from {low} to {high}; "
            "see --classes, --first-label" + (" and --ignore" if truth else "")
        )
        return look_up(path, read_labels(path), table, remedy)

    def check(self, files: list[Path]) -> None:
        """Raise DataError for masks that would pass for maps of one class and ignored pixels."""
        if self.labels is not None and hides_masks(files, self.labels):
            raise DataError(f"{files[0].parent}: label maps hold 0 and 255 alone: give --binary")


def score_label_maps(
    truth: Path, predictions: Path, maps: LabelMaps, absent: Literal["skip", "zero"] = "skip"
) -> dict[str, float]:
    """The numbers of the `miou` metric for two folders of label maps of the same names."""
    names = list_images(truth)
    if not names:
        raise DataError(f"{truth}: no label maps in this folder")
    maps.check([truth / name for name in names])
    metric = MeanIoU(maps.names, absent=absent)
    folder = predictions / "labels" if (predictions / "labels").is_dir() else predictions
    for number, name in enumerate(names):
        path = folder / f"{Path(name).stem}.png"
        there, answer = maps.read(truth / name, truth=True), maps.read(path, truth=False)
        size = (there.shape[0], there.shape[1])
        batch = Batch(
            images=torch.zeros(1, 3, 1, 1, dtype=torch.uint8),
            targets=[Target(semantic=there)],
            frames=[Frame(size, size, size)],
            image_ids=[number],
            paths=[path],
        )
        try:
            metric.update([Prediction(semantic=answer)], batch)
        except ValueError as error:  # of another size
            raise DataError(str(error)) from None
    return metric.compute()


def _find_classes(folder: Path) -> Path:
    places = [folder, *list(folder.resolve().parents)[:2]]
    for path in (place / name for place in places for name in NAMES):
        if path.is_file():
            return path
    raise DataError(
        f"{folder}: no file of class names ({', '.join(NAMES)}) there or above; give --classes FILE"
    )
