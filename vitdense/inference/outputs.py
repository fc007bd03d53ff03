"""Predictions as files: overlays, COCO's results, label maps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vitdense.inference.files import ImageFile
from vitdense.inference.predictor import Predictor
from vitdense.structures import Prediction

MIN_SCORE = 1e-3
"""Detections below it are left out of `predictions.json`."""


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
        self.results: list[dict[str, Any]] = []

    def add(self, file: ImageFile, prediction: Prediction) -> None:
        self.results += coco_results(prediction, file.image_id, self.category_ids)

    def close(self) -> Path:
        self.path.write_text(json.dumps(self.results), encoding="utf-8")
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


def make_writer(predictor: Predictor, out: Path) -> Writer:
    """The writer for the model's task.

    Raises:
        ValueError: there is no file format here for the task.
    """
    kinds: dict[str, type[Detections] | type[LabelMaps]] = {
        "detection": Detections,
        "instance": Detections,
        "semantic": LabelMaps,
    }
    if predictor.task not in kinds:
        raise ValueError(
            f"model: its task is {predictor.task}; files are written for {', '.join(kinds)}, "
            "for others use vitdense.load in Python"
        )
    return kinds[predictor.task](out, predictor.category_ids)


def coco_results(
    prediction: Prediction, image_id: int | str, category_ids: list[int]
) -> list[dict[str, Any]]:
    """One image's detections in COCO's result format: bbox is x, y, width, height in pixels."""
    from vitdense.ops.masks import mask_to_rle

    assert prediction.scores is not None and prediction.labels is not None
    results = []
    for index, score in enumerate(prediction.scores.tolist()):
        if score < MIN_SCORE:
            break  # they descend
        result: dict[str, Any] = {
            "image_id": image_id,
            "category_id": category_ids[int(prediction.labels[index])],
            "score": score,
        }
        if prediction.boxes is not None:
            x1, y1, x2, y2 = prediction.boxes[index].tolist()
            # Not rounded: `vitdense score` must find what the evaluation in training found.
            result["bbox"] = [x1, y1, x2 - x1, y2 - y1]
        if prediction.masks is not None:
            rle = mask_to_rle(prediction.masks[index])
            result["segmentation"] = rle
        results.append(result)
    return results
