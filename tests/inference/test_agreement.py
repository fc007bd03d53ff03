"""Evaluation in training, `eval` on its model and `score` on what `predict` wrote say the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.engine.small import SEGMENTATION, VIT, small_config
from vitdense.config import Config
from vitdense.data.shapes import make_shapes
from vitdense.engine.train import train
from vitdense.inference.score import score
from vitdense.inference.tools import evaluate, predict

HEADS = {
    "detection": "name: detr, queries: 9, encoder_layers: 1, decoder_layers: 1, ffn: 16",
    "instance": "name: mask2former, task: instance, queries: 9, encoder_layers: 1, "
    "decoder_layers: 1, ffn: 16, encoder_ffn: 16, mask_points: 64",
}
HEADS["panoptic"] = (
    HEADS["instance"].replace("task: instance", "task: panoptic")
    + ", score_threshold: 0.0, overlap_threshold: 0.0"
)
OBJECTS = f"""
model: {VIT}
  head: {{HEAD, width: 16, heads: 2}}
data:
  dataset: {{name: shapes, task: TASK, images: 30, size: 64}}
  root: ROOT
  transforms: {{name: detection, size: 64}}
  workers: 0
train: {{steps: 2, batch_size: 2, evaluations: 1, pictures: 0}}
output: OUT
device: cpu
"""


def config_of(task: str, root: Path, out: Path) -> Config:
    text = SEGMENTATION.replace("images: 12, size: 32", "images: 30, size: 64")
    if task != "semantic":
        text = OBJECTS.replace("HEAD", HEADS[task]).replace("TASK", task)
    return small_config(root, out, (), text)


def rewrite_truth(task: str, data: Path, found: Path) -> Path:
    """The predictions, moved a little, are what there is; so that numbers are not 0."""
    if task == "semantic":
        truth = data / "annotations/val"
        for path in truth.glob("*.png"):
            labels = np.array(Image.open(found / "labels" / path.name))
            Image.fromarray(np.roll(labels, 3, 1)).save(path)
        return truth
    name = "panoptic_val" if task == "panoptic" else "instances_val"
    truth = data / f"annotations/{name}.json"
    content = json.loads(truth.read_text())
    if task == "panoptic":
        content["annotations"] = move_maps(found / "panoptic.json", truth.with_suffix(""))
    else:
        results = json.loads((found / "predictions.json").read_text())
        content["annotations"] = [moved(it, number) for number, it in enumerate(results)]
    truth.write_text(json.dumps(content))
    return truth


def move_maps(found: Path, folder: Path) -> list[Any]:
    annotations = json.loads(found.read_text())["annotations"]
    for entry in annotations:
        colors = np.array(Image.open(found.with_suffix("") / entry["file_name"]))
        colors[:, :20], colors[:5] = (200, 0, 0), 0
        Image.fromarray(colors).save(folder / entry["file_name"])
        there = set(colors[..., 0].ravel().tolist())
        infos = [it for it in entry["segments_info"] if it["id"] in there]
        entry["segments_info"] = [*infos, {"id": 200, "category_id": 1, "iscrowd": 0}]
    return annotations


def moved(result: dict[str, Any], number: int) -> dict[str, Any]:
    from pycocotools import mask

    x, y, w, h = result["bbox"]
    width = max(1.0, 0.87 * min(w, 64 - x))  # no overlap is a threshold
    entry = {**result, "id": number + 1, "iscrowd": int(number % 7 == 6)}
    entry |= {"bbox": [min(x, 63.0), min(y, 63.0), width, max(h, 1.0)], "area": width * h}
    if "segmentation" in result:
        pixels = np.roll(mask.decode(result["segmentation"]), 1, 1)
        rle = mask.encode(np.asfortranarray(pixels))
        entry["segmentation"] = {**rle, "counts": rle["counts"].decode()}
        entry["area"] = float(pixels.sum())
    return entry


@pytest.mark.parametrize("task", ["detection", "instance", "semantic", "panoptic"])
def test_all_ways_agree(task: str, tmp_path: Path) -> None:
    """The same run twice: the first to have predictions, the second on the truth made of them.

    `predict` gets the batches of the evaluation: in others, a score may round differently.
    """
    data = make_shapes(tmp_path / "data", 30, 64, 0)
    model, images = "model.safetensors", [data / "images/val"]
    train(config_of(task, tmp_path / "data", tmp_path / "first"))
    predict(tmp_path / "first" / model, images, tmp_path / "found", threshold=1.0)
    truth = rewrite_truth(task, data, tmp_path / "found")

    results = train(config_of(task, tmp_path / "data", tmp_path / "second"))
    evaluated = evaluate(tmp_path / "second" / model)
    predict(tmp_path / "second" / model, images, tmp_path / "again", 1.0, batch_size=2)
    found = {"semantic": "labels", "panoptic": "panoptic.json"}.get(task, "predictions.json")
    kinds = {"detection": "bbox", "instance": "segm"}
    options: dict[str, Any] = {"first_label": 0} if task == "semantic" else {}
    kind: Any = kinds.get(task, task)
    scored = score(kind, truth, tmp_path / "again" / found, **options)
    if task == "instance":
        boxes = score("bbox", truth, tmp_path / "again" / found)
        scored |= {f"box_{name}": value for name, value in boxes.items() if "/" not in name}

    assert scored == pytest.approx(evaluated, abs=1e-9, nan_ok=True)
    known = {name: value for name, value in evaluated.items() if value == value}
    assert {name: results[name] for name in known} == pytest.approx(known, abs=1e-9)
    headline = {"semantic": "mIoU", "panoptic": "PQ"}.get(task, "AP")
    assert 0.02 < scored[headline] < 0.98
