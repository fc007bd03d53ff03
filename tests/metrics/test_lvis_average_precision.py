"""The metric `lvis` on the data set `lvis` equals LVIS's own program on the same files."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vitdense.config import Part
from vitdense.data.lvis import LvisDataset
from vitdense.engine.build import build_metric
from vitdense.metrics.image_labels import Several
from vitdense.metrics.lvis import LvisMetric
from vitdense.ops.masks import decode_segmentation
from vitdense.structures import Batch, Frame, Prediction, Target

pytest.importorskip("pycocotools")
from pycocotools import mask as coco_mask

SIDE, CLASSES = 200, 7


@pytest.fixture(scope="module")
def program() -> ModuleType:
    """Its pictures need OpenCV, its numbers do not."""
    if importlib.util.find_spec("lvis") is None:
        pytest.skip("lvis is not installed")
    absent = "cv2" not in sys.modules
    sys.modules.setdefault("cv2", ModuleType("cv2"))
    module = importlib.import_module("lvis")
    if absent:
        del sys.modules["cv2"]
    return module


def rectangle(box: list[float]) -> np.ndarray:
    x, y, width, height = (round(value) for value in box)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[y : y + height, x : x + width] = 1
    return np.asfortranarray(mask)


def draw(seed: int, folder: Path, masks: bool) -> tuple[LvisDataset, list[dict[str, Any]]]:
    """Files of a small set, and detections near its objects, with many equal scores."""
    rng = np.random.default_rng(seed)
    ids = [3 * label + 2 for label in range(CLASSES)]
    images, annotations, results = [], [], []
    for number in range(6):
        image = 11 * (6 - number)
        known = rng.permutation(ids)
        here, absent, partial = known[:3], known[3:5], rng.choice(known[:5], 1)
        name = f"val2017/{image:012}.jpg"
        (folder / "val2017").mkdir(exist_ok=True)
        (folder / name).touch()
        images.append({
            "id": image, "coco_url": f"http://host/{name}", "height": SIDE, "width": SIDE,
            "neg_category_ids": absent.tolist(), "not_exhaustive_category_ids": partial.tolist(),
        })  # fmt: skip
        for _ in range(rng.integers(0, 9)):
            sides = rng.integers(4, rng.choice([40, 90, 180]), 2).tolist()
            box = [*(int(rng.integers(0, SIDE - side + 1)) for side in sides), *sides]
            kind = int(rng.choice(here))
            segmentation = coco_mask.encode(rectangle(box))
            segmentation["counts"] = segmentation["counts"].decode()
            annotations.append({
                "id": len(annotations) + 1, "image_id": image, "category_id": kind, "bbox": box,
                "area": float(box[2] * box[3]), "segmentation": segmentation,
            })  # fmt: skip
            for _ in range(rng.integers(0, 6)):
                shift = rng.integers(-4, 5, 4)
                found = np.maximum(np.array(box) + shift, [0, 0, 1, 1])
                result = {
                    "image_id": image,
                    "category_id": kind if rng.random() < 0.7 else int(rng.choice(ids)),
                    "score": int(rng.integers(1, 12)) / 16,
                    "bbox": [float(value) for value in found],
                }
                if masks:
                    result["segmentation"] = coco_mask.encode(rectangle(result.pop("bbox")))
                results.append(result)
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": key, "name": f"class {key}", "frequency": "rcf"[key // 3 % 3 if seed else 2]}
            for key in ids
        ],
    }
    (folder / "lvis_v1_val.json").write_text(json.dumps(content))
    return LvisDataset(folder, "val", masks=masks), results


def prediction_of(found: list[dict[str, Any]], dataset: LvisDataset) -> Prediction:
    boxes = torch.tensor([entry.get("bbox", [0, 0, 1, 1]) for entry in found]).reshape(-1, 4)
    labels = [dataset.category_ids.index(entry["category_id"]) for entry in found]
    masks = [decode_segmentation(e["segmentation"], SIDE, SIDE) for e in found if "bbox" not in e]
    return Prediction(
        scores=torch.tensor([entry["score"] for entry in found]),
        labels=torch.tensor(labels, dtype=torch.int64),
        boxes=torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1).float(),
        masks=torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, SIDE, SIDE).bool(),
    )


def update(metric: LvisMetric, target: Target, prediction: Prediction, image: int) -> None:
    frame = Frame((SIDE, SIDE), (SIDE, SIDE), (SIDE, SIDE))
    path = Path(f"{image}.jpg")
    metric.update([prediction], Batch(torch.zeros(1, 3, 1, 1), [target], [frame], [image], [path]))


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("limit", [300, 12])
def test_random_sets_equal_lvis(iou_type, limit, program, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(np, "float", float, raising=False)  # which numpy no longer has
    seen = []
    for seed in range(3):
        folder = tmp_path / str(seed)
        folder.mkdir()
        dataset, results = draw(seed, folder, iou_type == "segm")
        metric = LvisMetric(dataset.classes, iou_type=iou_type, max_detections=limit)
        metric.frequencies = dataset.frequencies
        for index in range(len(dataset)):
            image = int(dataset._file.image_ids[index])
            found = [entry for entry in results if entry["image_id"] == image]
            update(metric, dataset.target(index), prediction_of(found, dataset), image)
        truth = program.LVIS(str(folder / "lvis_v1_val.json"))
        theirs = program.LVISEval(truth, program.LVISResults(truth, results, limit), iou_type)
        theirs.run()
        curves = metric.curves()
        np.testing.assert_allclose(curves.precision[..., 0], theirs.eval["precision"], atol=1e-9)
        np.testing.assert_allclose(curves.recall[..., 0], theirs.eval["recall"], atol=1e-9)
        numbers = metric.compute()
        for name, value in theirs.results.items():
            key = name.replace("@300", "" if name[2:3] in ("s", "m", "l") else str(limit))
            expected = np.nan if value == -1 else value
            assert numbers[key] == pytest.approx(expected, abs=1e-9, rel=0, nan_ok=True), key
        seen.append(numbers["AP"])
    assert 0.05 < max(seen) < 0.95


def one_object(**known: torch.Tensor) -> dict[str, float]:
    """The object is found at 0.8; at 0.9 there is one beside it, and at 0.95 one of class 1."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60], [0, 0, 10, 10]])
    target = Target(labels=torch.tensor([0]), boxes=boxes[:1], **known)
    prediction = Prediction(
        torch.tensor([0.95, 0.9, 0.8]), torch.tensor([1, 0, 0]), boxes[[2, 1, 0]]
    )
    metric = LvisMetric(["a", "b"])
    update(metric, target, prediction, 1)
    other = Target(labels=torch.tensor([1]), boxes=boxes[:1])
    answer = Prediction(torch.tensor([0.5]), torch.tensor([1]), boxes[:1])
    update(metric, other, answer, 2)
    return metric.compute()


def test_what_is_not_known_is_not_wrong() -> None:
    everything, first = torch.tensor([True, True]), torch.tensor([True, False])
    assert {k: v for k, v in one_object().items() if "/" in k} == {"AP/a": 0.5, "AP/b": 0.5}
    assert one_object(judged=everything) == pytest.approx(one_object(), nan_ok=True)
    assert one_object(judged=first)["AP/b"] == pytest.approx(1)
    assert one_object(partial=first)["AP/a"] == pytest.approx(1)
    assert "APr" not in one_object()


def test_what_has_no_area_is_not_seen() -> None:
    """As in LVIS's program: neither missed nor wrong, but among the best of its image."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 5, 50]])
    target = Target(labels=torch.tensor([0, 0]), boxes=boxes)
    prediction = Prediction(torch.tensor([0.9, 0.8]), torch.tensor([0, 0]), boxes[[1, 0]])
    found = []
    for limit in (2, 1):
        metric = LvisMetric(["a"], max_detections=limit)
        update(metric, target, prediction, 1)
        found.append(metric.compute()["AP"])
    assert found == [pytest.approx(1.0), 0.0]


def test_flags_must_be_one_per_class() -> None:
    with pytest.raises(ValueError, match="target.judged has 3 flags, there are 2 classes"):
        one_object(judged=torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize("image_classes", [[], ["day", "night"]])
def test_a_run_tells_the_frequencies(image_classes: list[str]) -> None:
    config: Any = SimpleNamespace(metric=Part("metric", "lvis"))
    metric = build_metric(config, "detection", ["a", "b"], None, image_classes, ["r", "f"])
    parts = metric.metrics if isinstance(metric, Several) else [metric]
    assert parts[0].frequencies == ["r", "f"] and {"APr", "APc", "APf"} <= set(parts[0].compute())
