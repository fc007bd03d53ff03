"""The metric equals pycocotools run from its own JSON files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vitdense.metrics.average_precision import RECALLS, Curves
from vitdense.metrics.coco import CocoMetric, best_thresholds
from vitdense.metrics.lvis import LvisMetric
from vitdense.metrics.voc import VocMetric
from vitdense.ops.masks import decode_segmentation, mask_to_rle
from vitdense.structures import Batch, Frame, Prediction, Target

pycocotools = pytest.importorskip("pycocotools")

NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl"]
NAMES += ["AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
COCO_OPEN = Path(__file__).parents[3] / "shared/data/coco_open/annotations/instances_val.json"


def reference(truth: dict, results: list[dict], folder: Path, iou_type: str) -> dict[str, float]:
    """The 12 numbers, undefined ones as NaN, and the defined class APs, by pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "results.json").write_text(json.dumps(results))
    coco = COCO(str(folder / "truth.json"))
    evaluation = COCOeval(coco, coco.loadRes(str(folder / "results.json")), iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    numbers = dict(zip(NAMES, evaluation.stats.tolist(), strict=True))
    for index, category in enumerate(sorted(truth["categories"], key=lambda c: c["id"])):
        values = evaluation.eval["precision"][:, :, index, 0, -1]
        if (values > -1).any():
            numbers[f"AP/{category['name']}"] = values[values > -1].mean()
    return {name: math.nan if value == -1 else float(value) for name, value in numbers.items()}


def batch_of(truth: dict, image: dict, masks: bool) -> Batch:
    """The batch that a data set of COCO's format would give for one image."""
    ids = sorted(category["id"] for category in truth["categories"])
    size = image["height"], image["width"]
    found = [entry for entry in truth["annotations"] if entry["image_id"] == image["id"]]
    boxes = torch.tensor([entry["bbox"] for entry in found], dtype=torch.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    target = Target(
        labels=torch.tensor([ids.index(entry["category_id"]) for entry in found]).long(),
        boxes=boxes.float(),
        crowd=torch.tensor([bool(entry["iscrowd"]) for entry in found]).bool(),
        area=torch.tensor([entry["area"] for entry in found]).float(),
    )
    if masks:
        drawn = [decode_segmentation(entry["segmentation"], *size) for entry in found]
        target.masks = torch.from_numpy(np.stack(drawn) if drawn else np.zeros((0, *size), bool))
    frame = Frame(size, size, size)
    return Batch(torch.zeros(1, 3, 1, 1), [target], [frame], [image["id"]], [Path("image.jpg")])


def prediction_of(truth: dict, results: list[dict], image: dict, masks: bool) -> Prediction:
    ids = sorted(category["id"] for category in truth["categories"])
    size = image["height"], image["width"]
    found = [entry for entry in results if entry["image_id"] == image["id"]]
    boxes = torch.tensor([entry["bbox"] for entry in found], dtype=torch.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    prediction = Prediction(
        scores=torch.tensor([entry["score"] for entry in found]),
        labels=torch.tensor([ids.index(entry["category_id"]) for entry in found]).long(),
        boxes=boxes.float(),
    )
    if masks:
        drawn = [decode_segmentation(entry["segmentation"], *size) for entry in found]
        prediction.masks = torch.from_numpy(
            np.stack(drawn) if drawn else np.zeros((0, *size), bool)
        )
    return prediction


def fill(metric: CocoMetric, truth: dict, results: list[dict], images: list[dict]) -> CocoMetric:
    masks = metric.iou_type == "segm"
    for image in images:
        prediction = prediction_of(truth, results, image, masks)
        metric.update([prediction], batch_of(truth, image, masks))
    return metric


def names_of(truth: dict) -> list[str]:
    return [c["name"] for c in sorted(truth["categories"], key=lambda c: c["id"])]


def assert_equal(ours: dict[str, float], theirs: dict[str, float]) -> None:
    more = ("F1/", "threshold/")  # what pycocotools has not
    plain = {name for name in ours if not name.startswith(more)}
    assert plain == {name for name in theirs if not name.startswith(more)}
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, abs=1e-12, nan_ok=True), name


def random_truth(rng: np.random.Generator, images: int = 12, classes: int = 5) -> dict[str, Any]:
    """Boxes on a quarter-pixel grid, so that float32 holds them exactly; class 2 is absent."""
    truth: dict[str, Any] = {
        "images": [{"id": 7 * i + 3, "height": 160, "width": 200} for i in range(images)],
        "categories": [{"id": 10 * c + 1, "name": f"class {c}"} for c in range(classes)],
        "annotations": [],
    }
    for image in truth["images"][1:]:  # the first image is empty
        for _ in range(rng.integers(0, 9)):
            left, top = rng.integers(0, 400, 2) / 4
            width, height = rng.integers(8, 480, 2) / 4
            crowd = int(rng.random() < 0.15)
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": image["id"],
                    "category_id": int(rng.choice([1, 11, 31, 41])),
                    "bbox": [left, top, min(width, 200 - left), min(height, 160 - top)],
                    "area": float(width * height * 0.75),
                    "iscrowd": crowd,
                }
            )
    return truth


def perturb(truth: dict, rng: np.random.Generator, masks: bool = False) -> list[dict]:
    """Detections near the truth, some doubled, some of another class, with many equal scores."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    ids = [category["id"] for category in truth["categories"]]
    results = []
    for entry in truth["annotations"]:
        for _ in range(rng.integers(0, 4)):
            shift = np.round(rng.normal(0, 0.1, 4) * np.tile(entry["bbox"][2:], 2) * 8) / 8
            left, top, width, height = np.asarray(entry["bbox"]) + shift
            result = {
                "image_id": entry["image_id"],
                "category_id": entry["category_id"] if rng.random() < 0.8 else int(rng.choice(ids)),
                "score": int(rng.integers(1, 9)) / 8,
                "bbox": [float(v) for v in np.float32([left, top, max(width, 1), max(height, 1)])],
            }
            if masks:
                mask = decode_segmentation(entry["segmentation"], *sizes[entry["image_id"]])
                mask = np.roll(mask, tuple(rng.integers(-6, 7, 2)), (0, 1))
                result["segmentation"] = mask_to_rle(mask)
                del result["bbox"]
            results.append(result)
    return results


@pytest.mark.parametrize("seed", range(6))
def test_random_boxes_equal_pycocotools(seed: int, tmp_path: Path) -> None:
    """Crowds, an empty image, an absent class and equal scores included."""
    rng = np.random.default_rng(seed)
    truth = random_truth(rng)
    results = perturb(truth, rng)
    metric = fill(CocoMetric(names_of(truth)), truth, results, truth["images"][::-1])
    numbers = metric.compute()
    assert_equal(numbers, reference(truth, results, tmp_path, "bbox"))
    assert "AP/class 2" not in numbers
    assert 0 < numbers["AP"] < 1


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_real_coco_equals_pycocotools(iou_type: str, tmp_path: Path) -> None:
    if not COCO_OPEN.exists():
        pytest.skip(f"{COCO_OPEN} is absent")
    truth = json.loads(COCO_OPEN.read_text())
    results = perturb(truth, np.random.default_rng(0), masks=iou_type == "segm")
    theirs = reference(truth, results, tmp_path, iou_type)
    if iou_type == "segm":
        for result in results:
            result["bbox"] = [0, 0, 1, 1]  # boxes must not matter
    metric = CocoMetric(names_of(truth), iou_type=iou_type)
    assert_equal(fill(metric, truth, results, truth["images"]).compute(), theirs)
    assert 0.05 < theirs["AP"] < 0.95


def test_more_detections_than_the_limit(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    truth = random_truth(rng, images=3, classes=5)
    results = perturb(truth, rng) * 40
    assert_equal(
        fill(CocoMetric(names_of(truth)), truth, results, truth["images"]).compute(),
        reference(truth, results, tmp_path, "bbox"),
    )


def test_an_image_counts_once() -> None:
    rng = np.random.default_rng(1)
    truth = random_truth(rng)
    results = perturb(truth, rng)
    once = fill(CocoMetric(names_of(truth)), truth, results, truth["images"])
    twice = fill(CocoMetric(names_of(truth)), truth, results, truth["images"] + truth["images"][:4])
    assert_equal(twice.compute(), once.compute())


def test_nothing_found_and_nothing_there() -> None:
    truth = random_truth(np.random.default_rng(2))
    numbers = fill(CocoMetric(names_of(truth)), truth, [], truth["images"]).compute()
    assert numbers["AP"] == numbers["AR100"] == 0
    numbers = fill(CocoMetric(names_of(truth)), truth, [], truth["images"][:1]).compute()
    assert all(math.isnan(value) for value in numbers.values())


def test_reset_and_max_detections() -> None:
    rng = np.random.default_rng(3)
    truth = random_truth(rng)
    metric = CocoMetric(names_of(truth), max_detections=300)
    fill(metric, truth, perturb(truth, rng), truth["images"])
    assert "AR300" in metric.compute()
    metric.reset()
    assert math.isnan(metric.compute()["AP"])
    with pytest.raises(ValueError, match="^max_detections: must be above 10"):
        CocoMetric(["a"], max_detections=5)


def test_missing_masks_are_named() -> None:
    truth = random_truth(np.random.default_rng(4))
    batch = batch_of(truth, truth["images"][1], masks=False)
    prediction = prediction_of(truth, [], truth["images"][1], masks=False)
    with pytest.raises(ValueError, match="prediction has no masks"):
        CocoMetric(["a"] * 5, iou_type="segm").update([prediction], batch)


@pytest.mark.parametrize("kind", [CocoMetric, LvisMetric, VocMetric])
@pytest.mark.parametrize("label", [-1, 2])
def test_a_class_that_there_is_not_names_its_image(kind: type[CocoMetric], label: int) -> None:
    """It would be taken for a class of the next image."""
    frame, boxes = Frame((64, 64), (64, 64), (64, 64)), torch.tensor([[0.0, 0, 9, 9]])
    for wrong in ("truth", "prediction"):
        metric = kind(["a", "b"])
        with pytest.raises(ValueError, match=f"{wrong} of image 'x' has .* class {label}, .* 0..1"):
            for image in ("w", "x"):
                there, found = (
                    torch.tensor([label if image == "x" and side == wrong else 1])
                    for side in ("truth", "prediction")
                )
                target, answer = Target(there, boxes), Prediction(torch.ones(1), found, boxes)
                batch = Batch(torch.zeros(1, 3, 1, 1), [target], [frame], [image], [Path("x.jpg")])
                metric.update([answer], batch)
            metric.compute()


def test_size_defaults_to_the_box() -> None:
    target = Target(labels=torch.tensor([0]), boxes=torch.tensor([[0.0, 0.0, 50.0, 50.0]]))
    frame = Frame((64, 64), (64, 64), (64, 64))
    batch = Batch(torch.zeros(1, 3, 1, 1), [target], [frame], ["name"], [Path("name.jpg")])
    metric = CocoMetric(["a"])
    metric.update(
        [Prediction(torch.ones(1), torch.zeros(1, dtype=torch.long), target.boxes)], batch
    )
    numbers = metric.compute()
    assert numbers["APm"] == pytest.approx(1) and math.isnan(numbers["APs"])


def test_best_f1_and_its_threshold() -> None:
    """Found at 0.9 and 0.5, a false one at 0.7: taking all is best, F1 = 2 * 2 / (2 + 3)."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]])
    labels = torch.zeros(3, dtype=torch.long)
    target = Target(labels=labels[:2], boxes=boxes[[0, 1]])
    prediction = Prediction(torch.tensor([0.9, 0.7, 0.5]), labels, boxes[[0, 2, 1]])
    frame = Frame((64, 64), (64, 64), (64, 64))
    metric = CocoMetric(["a", "absent"])
    batch = Batch(torch.zeros(1, 3, 1, 1), [target], [frame], [1], [Path("1.jpg")])
    metric.update([prediction], batch)
    numbers = metric.compute()
    assert numbers["F1/a"] == pytest.approx(0.8)
    assert numbers["threshold/a"] == 0.5
    assert not {"F1/absent", "threshold/absent"} & set(numbers)


def test_thresholds_of_curves_equal_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    precision = torch.rand(10, 101, 3, 4, 3, generator=generator, dtype=torch.float64)
    precision[:, :, 1] = -1
    scores = torch.rand(precision.shape, generator=generator, dtype=torch.float64)
    f1, threshold = best_thresholds(Curves(precision, precision[:, 0], scores))
    for label in (0, 2):
        values = [
            2 * p * r / (p + r)
            for p, r in zip(precision[0, :, label, 0, 2].tolist(), RECALLS, strict=True)
        ]
        assert f1[label] == pytest.approx(max(values))
        assert threshold[label] == scores[0, values.index(max(values)), label, 0, 2]
    assert math.isnan(f1[1]) and math.isnan(threshold[1])


def test_one_class_for_all_has_no_numbers_by_class() -> None:
    rng = np.random.default_rng(6)
    truth = random_truth(rng)
    results = perturb(truth, rng)
    merged = {**truth, "categories": truth["categories"][:1]}
    merged["annotations"] = [{**entry, "category_id": 1} for entry in truth["annotations"]]
    one = fill(CocoMetric(["all"]), merged, [{**r, "category_id": 1} for r in results],
               truth["images"])  # fmt: skip
    agnostic = fill(
        CocoMetric(names_of(truth), class_agnostic=True), truth, results, truth["images"]
    ).compute()
    assert not any("/" in name for name in agnostic)
    # Equal scores come by class there, and in the order of the file here.
    assert agnostic["AR100"] == pytest.approx(one.compute()["AR100"], abs=0.02)


def test_half_precision_and_the_backends_agree() -> None:
    rng = np.random.default_rng(7)
    truth = random_truth(rng, images=4)
    results = perturb(truth, rng)
    metrics = [CocoMetric(names_of(truth), backend=b) for b in ("device", "pycocotools")]
    for image in truth["images"]:
        prediction = prediction_of(truth, results, image, masks=False)
        prediction.boxes, prediction.scores = prediction.boxes.half(), prediction.scores.bfloat16()
        for metric in metrics:
            metric.update([prediction], batch_of(truth, image, masks=False))
    first, second = (metric.compute() for metric in metrics)
    assert first == pytest.approx(second, abs=1e-12, nan_ok=True)


def test_a_program_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="^backend: hotcoco is not installed; `pip install"):
        CocoMetric(["a"], backend="hotcoco")
    assert CocoMetric(["a"], backend="auto").backend == "device"
