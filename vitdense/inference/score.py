"""Numbers for predictions in files, whichever program wrote them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
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
    kind: Kind, truth: Path, predictions: Path, *, json_path: Path | None = None, **options: Any
) -> dict[str, float]:
    """Score files, print a table, and write the numbers as `results.json` has them.

    Args:
        kind: bbox, segm: COCO's JSON files; panoptic: COCO's JSON files, each beside its folder of
            maps; semantic: folders of label maps; voc: VOC's annotations and detection files; lvis:
            LVIS's annotations beside results of COCO's format.
        truth, predictions: what is compared.
        json_path: file for the numbers.
        options: of that kind, as its function in `SCORERS` takes them.

    Raises:
        DataError: files are missing or wrong.
        ValueError: an option has no such value, or is of another kind.
    """
    for name in options:
        kinds = [each for each in SCORERS if name in signature(SCORERS[each]).parameters]
        if kind not in kinds:
            known = ", ".join(kinds)
            raise ValueError(f"{name}: is for --kind {known}, not for {kind}; leave it out")
    numbers = SCORERS[kind](truth, predictions, **options)
    if json_path is not None:  # first: a reader like `head` may end the printing
        checkpoint.write_text(json_path, to_json(numbers))
    print(table(numbers))
    return numbers


def score_detections(
    kind: Literal["bbox", "segm"],
    truth_path: Path,
    results_path: Path,
    *,
    backend: Backend = "auto",
    max_detections: int = 100,
) -> dict[str, float]:
    """The numbers of the `coco` metric, with boxes and areas as the files have them.

    Args:
        backend: who computes.
        max_detections: best detections of an image and class that count.

    Raises:
        DataError: files are missing or wrong.
        ValueError: the backend is not installed, or the detections are too few.
    """
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
        cls, truth: Path, classes: Path | None, first: Literal[0, 1], ignore: Sequence[int]
    ) -> LabelMaps:
        """By a file of class names, which wins over the label of the first class."""
        path = classes or _find_classes(truth)
        if min(ignore, default=0) < 0:
            raise ValueError(f"ignore: {min(ignore)} is no label; labels begin with 0")
        labelled = labelled_classes(path, first)
        return cls(list(labelled.values()), list(labelled), list(ignore), path)

    @classmethod
    def of_masks(cls, truth: Path, classes: Path | None) -> LabelMaps:
        """Masks of two classes."""
        path = classes or _find_classes(truth)
        return cls(binary_names(path), None, [], path)

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
    truth: Path,
    predictions: Path,
    *,
    classes: Path | None = None,
    first_label: Literal[0, 1] = 1,
    ignore: Sequence[int] = (),
    binary: bool = False,
    absent: Literal["skip", "zero"] = "skip",
) -> dict[str, float]:
    """The numbers of the `miou` metric for two folders of label maps of the same names.

    Args:
        classes: the file of class names; by default one beside the folder or above.
        first_label: label of the first class, if the file of classes tells no labels.
        ignore: labels of the truth that count nowhere, beside 0 and 255 where they are no class.
        binary: the maps are masks, as those of the data set `folders`.
        absent: whether classes without pixels are left out or count as 0.

    Raises:
        DataError: files are missing or wrong.
        ValueError: a label is below 0.
    """
    if binary:
        maps = LabelMaps.of_masks(truth, classes)
    else:
        maps = LabelMaps.find(truth, classes, first_label, ignore)
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


SCORERS: dict[Kind, Callable[..., dict[str, float]]] = {
    "bbox": partial(score_detections, "bbox"),
    "segm": partial(score_detections, "segm"),
    "panoptic": panoptic_files.score_files,
    "semantic": score_label_maps,
    "voc": voc_files.score_files,
    "lvis": lvis_files.score_files,
}
"""What takes the files of each kind: truth, predictions, and its options by name."""
