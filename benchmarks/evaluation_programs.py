"""The other programs of `benchmarks.evaluation`, timed, and the published algorithm of panopticapi.

panopticapi has no wheel; `panoptic_quality` is its algorithm (Kirillov et al., "Panoptic
Segmentation", section 4, with COCO's rules for crowds and void) written as it works: numpy's
sorted counts of each image's pairs of ids, then loops over dictionaries.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pictures
from torch import Tensor

from benchmarks import coco_like
from vitdense.metrics import backends
from vitdense.metrics.backends import PROGRAMS, Backend
from vitdense.metrics.coco import CocoMetric
from vitdense.structures import Batch, Prediction

Seconds = dict[str, float]
Run = Callable[[], tuple[Seconds, Any]]
Infos = dict[int, tuple[int, bool]]
"""By segment's id its category, and whether it is a crowd."""

NAMES = [str(label) for label in range(coco_like.CLASSES)]
TOTALS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def boxes(data: list[coco_like.Image], backend: Backend) -> Run:
    """Boxes through one program: seconds to hold the objects as it wants them, and to score."""

    def run() -> tuple[Seconds, list[float]]:
        metric = CocoMetric(NAMES, backend="device")
        start = time.process_time()
        for predictions, batch in coco_like.batches(data):
            metric.update(predictions, batch)
        if backend != "device":
            return _finish(metric, backend, start)
        numbers = metric.compute()
        return {"own": time.process_time() - start}, [numbers[name] for name in TOTALS]

    return run


def _finish(metric: CocoMetric, backend: Backend, start: float) -> tuple[Seconds, list[float]]:
    """From the objects that a metric holds through another program to the 12 numbers."""
    objects = metric.held()
    kind = metric.iou_type
    with contextlib.redirect_stdout(io.StringIO()):
        program: Any = importlib.import_module(PROGRAMS[backend][1])
        indices = backends.index(*objects, coco_like.CLASSES, backend)
        indexed = time.process_time()
        evaluation = getattr(program, PROGRAMS[backend][2])(*indices, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    end = time.process_time()
    seconds = {"own": end - indexed, "conversion": indexed - start}
    return seconds, [float(number) for number in evaluation.stats[:12]]


def masks(data: list[coco_like.Image], backend: Backend) -> Run:
    """Masks through one program, image by image; only what is not drawing is timed."""
    encode = {"device": None, "hotcoco": _encode_by_hotcoco}.get(backend, _encode_by_pycocotools)

    def run() -> tuple[Seconds, list[float]]:
        metric, encoding, other = CocoMetric(NAMES, iou_type="segm"), 0.0, 0.0
        for predictions, batch in coco_like.batches(data, 1):
            predictions, batch = _with_masks(predictions, batch)
            start = time.process_time()
            if encode is not None:
                for some in (predictions[0].masks, batch.targets[0].masks):
                    encode(some)
                encoding += time.process_time() - start
                start = time.process_time()
            metric.update(predictions, batch)
            other += time.process_time() - start
        start = time.process_time()
        if backend != "device":
            # The run lengths of the metric stand in for those that were encoded just so.
            seconds, numbers = _finish(metric, backend, start)
            return {"encoding": encoding, **seconds}, numbers
        numbers = metric.compute()
        end = time.process_time()
        return {"encoding": other, "own": end - start}, [numbers[name] for name in TOTALS]

    return run


def _with_masks(predictions: list[Prediction], batch: Batch) -> tuple[list[Prediction], Batch]:
    """The same with masks in the boxes; their areas are the masks'."""
    found = [replace(one, masks=coco_like.draw(_there(one.boxes))) for one in predictions]
    targets = [
        replace(one, masks=coco_like.draw(_there(one.boxes)), area=None) for one in batch.targets
    ]
    return found, replace(batch, targets=targets)


def _there(boxes: Tensor | None) -> Tensor:
    assert boxes is not None
    return boxes


def _encode_by_pycocotools(masks: Tensor) -> None:
    from pycocotools import mask

    for one in masks.numpy():
        mask.encode(np.asfortranarray(one, dtype=np.uint8))


def _encode_by_hotcoco(masks: Tensor) -> None:
    from hotcoco import mask

    for one in masks.numpy():
        mask.encode(one)


def rgb2id(colors: np.ndarray) -> np.ndarray:
    """uint32 [H, W] from colors, as panopticapi reads its PNG files."""
    wide = colors.astype(np.uint32)
    return wide[:, :, 0] + 256 * wide[:, :, 1] + 256 * 256 * wide[:, :, 2]


def infos(classes: Tensor, factor: int = 5001) -> Any:
    """Segments of a map as its JSON file lists them."""
    return [
        {"id": factor * (place + 1), "category_id": label, "iscrowd": 0}
        for place, label in enumerate(classes.tolist())
    ]


def panoptic_quality(
    images: Iterable[tuple[np.ndarray, np.ndarray, list[dict[str, Any]], list[dict[str, Any]]]],
) -> float:
    """PQ over all classes from maps of ids and their segments."""
    sums = np.zeros((4, coco_like.CLASSES))  # right, their IoU, wrong, missed
    for truth, answer, there, found in images:
        _count(sums, truth, answer, {i["id"]: i for i in there}, {i["id"]: i for i in found})
    right, overlap, wrong, missed = sums
    weight = right + wrong / 2 + missed / 2
    return float((overlap[weight > 0] / weight[weight > 0]).mean())


def _count(
    sums: np.ndarray,
    truth: np.ndarray,
    answer: np.ndarray,
    there: dict[int, dict[str, Any]],
    found: dict[int, dict[str, Any]],
) -> None:
    offset = 256**3
    area = dict(zip(*(column.tolist() for column in _counts(answer)), strict=True))
    pairs, pixels = _counts(truth.astype(np.uint64) * offset + answer.astype(np.uint64))
    common = {
        (int(p) // offset, int(p) % offset): int(n) for p, n in zip(pairs, pixels, strict=True)
    }
    true_area: dict[int, int] = {}
    for (true, _), number in common.items():
        true_area[true] = true_area.get(true, 0) + number
    matched: set[tuple[str, int]] = set()
    for (true, answered), number in common.items():
        if true not in there or answered not in found or there[true]["iscrowd"]:
            continue
        label = there[true]["category_id"]
        if label != found[answered]["category_id"]:
            continue
        union = area[answered] + true_area[true] - number - common.get((0, answered), 0)
        if number / union > 0.5:
            sums[:2, label] += 1, number / union
            matched |= {("true", true), ("answered", answered)}
    crowds = {info["category_id"]: key for key, info in there.items() if info["iscrowd"]}
    for key, info in there.items():
        sums[3, info["category_id"]] += ("true", key) not in matched and not info["iscrowd"]
    for key, info in found.items():
        if ("answered", key) not in matched:
            label = info["category_id"]
            ignored = common.get((0, key), 0) + common.get((crowds.get(label, -1), key), 0)
            sums[2, label] += ignored / area[key] <= 0.5


def _counts(values: np.ndarray) -> Any:
    return np.unique(values, return_counts=True)


def write_panoptic(data: list[coco_like.Maps], folder: Path) -> list[Path]:
    """Truth and answers as COCO's files."""
    paths = [folder / "truth.json", folder / "answers.json"]
    categories = [{"id": k, "name": str(k), "isthing": k % 2} for k in range(coco_like.CLASSES)]
    pictures = [{"id": k, "file_name": f"{k}.jpg", "height": 480, "width": 640}
                for k in range(len(data))]  # fmt: skip
    for side, path in enumerate(paths):
        path.with_suffix("").mkdir()
        entries = []
        for number, maps in enumerate(data):
            name = f"{number}.png"
            Pictures.fromarray(coco_like.colors(maps[side])).save(path.with_suffix("") / name)
            entry = {"image_id": number, "file_name": name}
            entries.append({**entry, "segments_info": infos(maps[2 + side])})
        content = {"images": pictures, "annotations": entries, "categories": categories}
        path.write_text(json.dumps(content))
    return paths


def panoptic_from_files(truth_path: Path, answer_path: Path) -> float:
    """The same from COCO's files, one after another in one process."""
    entries = [json.loads(path.read_text())["annotations"] for path in (truth_path, answer_path)]

    def read(path: Path, name: str) -> np.ndarray:
        with Pictures.open(path.with_suffix("") / name) as picture:
            return rgb2id(np.array(picture))

    return panoptic_quality(
        (
            read(truth_path, one["file_name"]),
            read(answer_path, other["file_name"]),
            one["segments_info"],
            other["segments_info"],
        )
        for one, other in zip(*entries, strict=True)
    )


def panoptic_by_hotcoco(truth_path: Path, answer_path: Path) -> float:
    from hotcoco.panoptic import pq_compute

    with contextlib.redirect_stdout(io.StringIO()):
        return float(pq_compute(str(truth_path), str(answer_path))["All"]["pq"])


def semantic_by_numpy(data: list[tuple[Tensor, Tensor]], classes: int) -> float:
    """mIoU by np.bincount, as mmsegmentation's and many others' loops count."""
    matrix = np.zeros((classes, classes), np.int64)
    for truth, answer in data:
        counted = truth.numpy() != 255
        there, found = truth.numpy()[counted].astype(np.int64), answer.numpy()[counted]
        cells = np.bincount(there * classes + found, minlength=classes**2)
        matrix += cells.reshape(classes, classes)
    hits = np.diag(matrix)
    either = matrix.sum(0) + matrix.sum(1) - hits
    return float((hits[either > 0] / either[either > 0]).mean())


def semantic_by_hotcoco(data: list[tuple[Tensor, Tensor]], names: list[str]) -> float:
    from hotcoco.semantic import SemanticEval

    evaluation = SemanticEval(names)
    for truth, answer in data:
        evaluation.update(truth.numpy(), answer.numpy())
    return float(evaluation.results()["mIoU"])
