"""Predictions as files: COCO's results, label maps, COCO's panoptic maps, image labels."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vitdense.inference.files import ImageFile
from vitdense.inference.predictor import Predictor
from vitdense.structures import Prediction, Task


class Writer(Protocol):
    """Writes the predictions of many images."""

    def add(self, file: ImageFile, prediction: Prediction) -> None:
        """Take one image's answer."""

    def close(self) -> Path:
        """Write what is left; returns where all of it lies."""


class Detections:
    """`predictions.json`: a list of detections in COCO's result format."""

    def __init__(self, out: Path, category_ids: list[int]) -> None:
        self.path = out / "predictions.json"
        self.category_ids = category_ids
        self.texts: list[str] = []

    def add(self, file: ImageFile, prediction: Prediction) -> None:
        # text, because millions of dictionaries would take several times the memory
        if results := coco_results(prediction, file.image_id, self.category_ids):
            self.texts.append(json.dumps(results)[1:-1])

    def close(self) -> Path:
        with self.path.open("w", encoding="utf-8") as file:
            file.write("[")
            for number, text in enumerate(self.texts):
                file.write(f", {text}" if number else text)
            file.write("]")
        return self.path


class LabelMaps:
    """`labels/<name>.png`: per pixel the label that the data set's own maps have."""

    def __init__(self, out: Path, category_ids: list[int]) -> None:
        self.folder = out / "labels"
        # Only ids beyond a byte need the wider map.
        dtype = np.uint8 if max(category_ids) < 256 else np.uint16
        self.labels = np.array(category_ids, dtype=dtype)

    def add(self, file: ImageFile, prediction: Prediction) -> None:
        from PIL import Image

        assert prediction.semantic is not None
        path = self.folder / f"{file.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self.labels[prediction.semantic.numpy()]).save(path)

    def close(self) -> Path:
        return self.folder


class PanopticMaps:
    """COCO's panoptic format: `panoptic.json`, and `panoptic/<name>.png` whose colors are ids."""

    def __init__(self, out: Path, category_ids: list[int]) -> None:
        self.path = out / "panoptic.json"
        self.category_ids = category_ids
        self.annotations: list[dict[str, Any]] = []

    def add(self, file: ImageFile, prediction: Prediction) -> None:
        from PIL import Image

        assert prediction.panoptic is not None
        name = f"{file.name}.png"
        path = self.path.with_suffix("") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        ids = prediction.panoptic.numpy().astype(np.uint32)
        colors = np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], axis=2)
        Image.fromarray(colors.astype(np.uint8)).save(path)
        segments = panoptic_segments(prediction, self.category_ids)
        self.annotations.append(
            {"image_id": file.image_id, "file_name": name, "segments_info": segments}
        )

    def close(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"annotations": self.annotations}), encoding="utf-8")
        return self.path


class ImageScores:
    """`images.csv`: of each image the likeliest label, and the score of each label in a column.

    It can itself be read as a data set's `image_labels`.
    """

    def __init__(self, out: Path, classes: list[str]) -> None:
        self.path, self.classes = out / "images.csv", classes
        self.rows: list[list[str | float]] = []

    def add(self, file: ImageFile, prediction: Prediction) -> None:
        assert prediction.image_scores is not None
        best = self.classes[int(prediction.image_scores.argmax())]
        self.rows.append([file.name, best, *prediction.image_scores.tolist()])

    def close(self) -> Path:
        with self.path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["image", "label", *self.classes], *self.rows])
        return self.path


def make_writers(predictor: Predictor, out: Path) -> list[Writer]:
    """The writer for the model's task, and that of image labels if it answers with such."""
    kinds: dict[Task, type[Detections] | type[LabelMaps] | type[PanopticMaps]] = {
        "detection": Detections,
        "instance": Detections,
        "semantic": LabelMaps,
        "panoptic": PanopticMaps,
    }
    writers: list[Writer] = [kinds[predictor.task](out, predictor.category_ids)]
    labels = predictor.image_classes
    return [*writers, ImageScores(out, labels)] if labels else writers


def coco_results(
    prediction: Prediction, image_id: int | str, category_ids: list[int]
) -> list[dict[str, Any]]:
    """One image's detections in COCO's result format: bbox is x, y, width, height in pixels."""
    from vitdense.ops.masks import mask_to_rle

    assert prediction.scores is not None and prediction.labels is not None
    results: list[dict[str, Any]] = [
        {"image_id": image_id, "category_id": category_ids[label], "score": score}
        for label, score in zip(prediction.labels.tolist(), prediction.scores.tolist(), strict=True)
    ]
    if prediction.boxes is not None:
        for result, (x1, y1, x2, y2) in zip(results, prediction.boxes.tolist(), strict=True):
            # Not rounded: `vitdense score` must find what the evaluation in training found.
            result["bbox"] = [x1, y1, x2 - x1, y2 - y1]
    if prediction.masks is not None:
        for result, mask in zip(results, prediction.masks, strict=True):
            result["segmentation"] = mask_to_rle(mask)
    return results


def panoptic_segments(prediction: Prediction, category_ids: list[int]) -> list[dict[str, Any]]:
    """COCO's `segments_info` of one image: ids are the numbers of its map, bbox x, y, w, h."""
    from scipy.ndimage import find_objects

    assert prediction.panoptic is not None
    assert prediction.scores is not None and prediction.labels is not None
    numbers = prediction.panoptic.numpy()
    labels, scores = prediction.labels.tolist(), prediction.scores.tolist()
    areas = np.bincount(numbers.ravel(), minlength=len(labels) + 1).tolist()
    segments = []
    for index, place in enumerate(find_objects(numbers, len(labels))):
        if place is None:  # without a pixel
            continue
        rows, columns = place
        box = [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start]
        segments.append(
            {
                "id": index + 1,
                "category_id": category_ids[labels[index]],
                "area": areas[index + 1],
                "bbox": box,
                "iscrowd": 0,
                "score": scores[index],
            }
        )
    return segments
