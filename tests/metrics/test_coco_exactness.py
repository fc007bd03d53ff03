"""The curves equal pycocotools' on random data of every awkward kind, to the last bit."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vitdense.metrics.average_precision import RECALLS, Curves
from vitdense.metrics.backends import score
from vitdense.metrics.coco import summarize
from vitdense.metrics.coco_files import Truth, to_objects
from vitdense.metrics.matching import AREAS, IOU_THRESHOLDS, Rules
from vitdense.ops.masks import decode_segmentation

pycocotools = pytest.importorskip("pycocotools")
from pycocotools import mask as coco_mask  # noqa: E402
from pycocotools.coco import COCO  # noqa: E402
from pycocotools.cocoeval import COCOeval, Params  # noqa: E402

COCO_OPEN = Path(__file__).parents[3] / "shared/data/coco_open/annotations/instances_val.json"
SIDE = 40
LIMITS = ((1, 10, 100), (1, 2, 3), (1, 10, 300))


def index_of(dataset: dict[str, Any]) -> COCO:
    index = COCO()
    index.dataset = dataset
    index.createIndex()
    return index


def reference(truth: dict, results: list[dict], kind: str, rules: Rules) -> COCOeval:
    """pycocotools over copies, as it writes into what it is given."""
    with contextlib.redirect_stdout(io.StringIO()):
        found = {**truth, "annotations": results}
        evaluation = COCOeval(index_of(deepcopy(truth)), index_of(deepcopy(found)), kind)
        evaluation.params.maxDets = list(rules.limits)
        evaluation.params.useCats = int(not rules.class_agnostic)
        evaluation.evaluate()
        evaluation.accumulate()
        if rules == Rules():
            evaluation.summarize()
    return evaluation


def ours(truth: dict, results: list[dict], kind: str, rules: Rules, backend: str) -> Curves:
    categories = sorted(category["id"] for category in truth["categories"])
    listed = sorted(truth["images"], key=lambda image: image["id"])
    held = Truth(
        path=Path("truth.json"),
        classes=[str(key) for key in categories],
        labels={key: label for label, key in enumerate(categories)},
        images={image["id"]: place for place, image in enumerate(listed)},
        sizes=[(image["height"], image["width"]) for image in listed],
        objects=None,
    )
    there = to_objects(truth["annotations"], held, held.path, kind)
    found = to_objects(results, held, Path("results.json"), kind, are_results=True)
    return score(there, found, len(categories), rules, backend)


def assert_equal(curves: Curves, theirs: COCOeval) -> None:
    for name in ("precision", "recall", "scores"):
        np.testing.assert_array_equal(getattr(curves, name).numpy(), theirs.eval[name], name)


class Generator:
    """Small data sets with all that is awkward, drawn from a seed."""

    def __init__(self, seed: int, kind: str) -> None:
        self.rng = np.random.default_rng(seed)
        self.kind = kind
        self.classes = int(self.rng.integers(1, 5))
        self.steps = int(self.rng.choice([3, 1000]))  # with 3 scores, most are equal
        self.truth: dict[str, Any] = {
            "images": [
                {"id": 5 * i + 2, "height": SIDE, "width": SIDE}
                for i in range(self.rng.integers(1, 6))
            ],
            "categories": [{"id": 7 * c + 1, "name": str(c)} for c in range(self.classes + 1)],
            "annotations": [],  # the last class stays absent
        }
        self.results: list[dict[str, Any]] = []
        for image in self.truth["images"]:
            if self.rng.random() < 0.85:
                self.fill(image["id"])
        self.rng.shuffle(self.results)  # type: ignore[arg-type]
        for entries in (self.truth["annotations"], self.results):
            for number, entry in enumerate(entries):
                entry["id"] = number + 1

    def fill(self, image: int) -> None:
        rng = self.rng
        for _ in range(rng.integers(0, 10)):
            box, label = self.box(), int(rng.integers(self.classes))
            annotation = self.entry(image, label, box)
            annotation["iscrowd"] = int(rng.random() < 0.15)
            annotation["area"] *= float(rng.choice([1, 1, 30, 1024 / annotation["area"]]))
            self.truth["annotations"].append(annotation)
            if self.kind == "segm" and rng.random() < 0.4 and not annotation["iscrowd"]:
                annotation["segmentation"] = self.polygon(box)
            for _ in range(rng.integers(0, 4)):
                other = label if rng.random() < 0.85 else int(rng.integers(self.classes + 1))
                self.detect(image, other, self.moved(box))
        for _ in range(int(rng.choice([0, 5, 130], p=[0.5, 0.45, 0.05]))):
            self.detect(image, int(rng.integers(self.classes + 1)), self.box())

    def box(self) -> list[float]:
        """Anything from a point to the whole image, often whole numbers, so that boxes touch."""
        sides = np.maximum(self.rng.random(2) * SIDE * self.rng.choice([1, 0.3, 0.1]), 0.3)
        box = [*(self.rng.random(2) * (SIDE - sides)), *sides]
        if self.rng.random() < 0.6:
            box = [float(round(value)) for value in box]
            box[2:] = [max(side, 1.0) for side in box[2:]]
        return [float(value) for value in box]

    def moved(self, box: list[float]) -> list[float]:
        if self.rng.random() < 0.25:
            return list(box)
        near = np.array(box) + self.rng.normal(0, 0.08, 4) * np.tile(box[2:], 2)
        return [max(0.0, near[0]), max(0.0, near[1]), max(0.3, near[2]), max(0.3, near[3])]

    def polygon(self, box: list[float]) -> list[list[float]]:
        x, y, width, height = box
        corner = [x, y, x + width, y, x + width / 2, y + height]
        return [corner, [x, y, x, y + height, x + width / 3, y + height / 2, x + 1, y]]

    def detect(self, image: int, label: int, box: list[float]) -> None:
        entry = self.entry(image, label, box)
        entry["score"] = int(self.rng.integers(self.steps)) / self.steps
        self.results.append(entry)

    def entry(self, image: int, label: int, box: list[float]) -> dict[str, Any]:
        entry = {"image_id": image, "category_id": 7 * label + 1, "bbox": box, "iscrowd": 0}
        if self.kind == "bbox":
            return entry | {"area": box[2] * box[3]}
        mask = np.zeros((SIDE, SIDE), np.uint8)
        x, y, width, height = box
        mask[int(y) : int(np.ceil(y + height)), int(x) : int(np.ceil(x + width))] = 1
        if self.rng.random() < 0.3:
            mask &= self.rng.random(mask.shape) < 0.8
        rle = coco_mask.encode(np.asfortranarray(mask))
        area = max(float(coco_mask.area(rle)), 0.0)
        return entry | {"area": area or 0.5, "segmentation": rle}


def compare(seed: int, backend: str = "device") -> None:
    kind = ("bbox", "segm")[seed % 2]
    data = Generator(seed, kind)
    for result in data.results:
        if kind == "segm":
            result["area"] = float(coco_mask.area(result["segmentation"]))
    rules = Rules(limits=LIMITS[seed % 3], class_agnostic=seed % 5 == 0)
    theirs = reference(data.truth, data.results, kind, rules)
    curves = ours(data.truth, data.results, kind, rules, backend)
    assert_equal(curves, theirs)
    if rules == Rules():
        numbers = list(summarize(curves, [], rules.limits).values())
        expected = np.where(theirs.stats == -1, np.nan, theirs.stats)
        np.testing.assert_allclose(numbers, expected, atol=1e-12)


@pytest.mark.parametrize("part", range(10))
def test_300_random_data_sets(part: int) -> None:
    for seed in range(30 * part, 30 * part + 30):
        compare(seed)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(30))
def test_3000_random_data_sets(part: int) -> None:
    for seed in range(1000 + 100 * part, 1000 + 100 * part + 100):
        compare(seed)


@pytest.mark.parametrize("backend", ["pycocotools", "hotcoco", "faster-coco-eval"])
def test_other_programs(backend: str) -> None:
    package = backend.replace("-", "_")
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{backend} is not installed")
    for seed in range(12):
        if backend == "faster-coco-eval":
            compare_nearly(seed, backend)
        else:
            compare(seed, backend)


def compare_nearly(seed: int, backend: str) -> None:
    """faster-coco-eval's precision may differ in the last bit."""
    kind = ("bbox", "segm")[seed % 2]
    data = Generator(seed, kind)
    curves = [ours(data.truth, data.results, kind, Rules(), b) for b in (backend, "device")]
    for name in ("precision", "recall", "scores"):
        torch.testing.assert_close(*(getattr(c, name) for c in curves), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_real_coco(kind: str) -> None:
    if not COCO_OPEN.exists():
        pytest.skip(f"{COCO_OPEN} is absent")
    truth = json.loads(COCO_OPEN.read_text())
    rng = np.random.default_rng(0)
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    results = []
    for entry in truth["annotations"]:
        for _ in range(rng.integers(0, 4)):
            shift = rng.normal(0, 0.1, 4) * np.tile(entry["bbox"][2:], 2)
            box = [float(v) for v in np.maximum(np.array(entry["bbox"]) + shift, 1)]
            result = {**entry, "bbox": box, "id": len(results) + 1, "iscrowd": 0}
            result |= {"score": float(rng.integers(1, 50)) / 50, "area": box[2] * box[3]}
            if kind == "segm":
                mask = decode_segmentation(entry["segmentation"], *sizes[entry["image_id"]])
                mask = np.roll(mask, tuple(rng.integers(-6, 7, 2)), (0, 1))
                rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
                result |= {"segmentation": rle, "area": float(coco_mask.area(rle))}
            results.append(result)
    theirs = reference(truth, results, kind, Rules())
    assert_equal(ours(truth, results, kind, Rules(), "device"), theirs)
    assert 0.05 < theirs.stats[0] < 0.95


def test_the_levels_are_pycocotools_own() -> None:
    params = Params("bbox")
    assert list(IOU_THRESHOLDS) == params.iouThrs.tolist()
    assert list(RECALLS) == params.recThrs.tolist()
    assert [list(area) for area in AREAS] == params.areaRng


@pytest.mark.parametrize("most", [1, 7])
def test_bounded_memory_gives_the_same(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitdense.metrics.matching.MOST_PAIRS", most)
    monkeypatch.setattr("vitdense.metrics.overlaps.MOST_EDGES", most)
    monkeypatch.setattr("vitdense.ops.run_length.MOST_EDGES", most)
    for seed in range(4):
        compare(seed)
