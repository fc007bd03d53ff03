"""`score --kind lvis` and `--kind voc` give the numbers of their metrics on the same data."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vitdense.cli import main
from vitdense.data.base import DataError, Dataset
from vitdense.data.lvis import LvisDataset
from vitdense.data.voc import VocDataset
from vitdense.inference.outputs import coco_results
from vitdense.inference.score import score
from vitdense.metrics.base import Metric
from vitdense.metrics.lvis import LvisMetric
from vitdense.metrics.voc import VocMetric
from vitdense.structures import Batch, Frame, Prediction

SIDE, NAMES = 60, ["cat", "traffic light", "dog"]


def whole(low: int, high: int, count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(low, high, (count,), generator=generator).tolist()


def scored(
    metric: Metric, dataset: Dataset, seed: int = 0
) -> tuple[dict[str, float], list[dict[str, Any]], list[Prediction]]:
    """Detections near the truth: the metric's numbers, results of COCO's format, predictions."""
    generator = torch.Generator().manual_seed(seed)
    results, predictions = [], []
    for sample in (dataset[index] for index in range(len(dataset))):
        target = sample.target
        again = torch.arange(len(target.labels)).repeat_interleave(2)
        labels = target.labels[again].roll(1) if len(again) > 6 else target.labels[again]
        scores = torch.rand(len(again), generator=generator).clamp(0.01).sort(descending=True)[0]
        moved = torch.randint(-2, 3, (len(again), 4), generator=generator)
        boxes = (target.boxes[again] + moved).clamp(0, SIDE)
        masks = None if target.masks is None else target.masks[again].roll(1, 2)
        boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        prediction = Prediction(scores, labels, boxes, masks)
        frame = Frame(sample.original, sample.original, sample.original)
        batch = Batch(sample.image[None], [target], [frame], [sample.image_id], [sample.path])
        metric.update([prediction], batch)
        results += coco_results(prediction, sample.image_id, dataset.category_ids)
        predictions.append(prediction)
    return metric.compute(), results, predictions


def write_lvis(root: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    (root / "val2017").mkdir()
    ids = [5, 2, 9, 12]
    images, annotations = [], []
    for number in range(6):
        Image.new("RGB", (SIDE, SIDE)).save(root / f"val2017/{number}.jpg")
        images.append({"id": 9 - number, "coco_url": f"http://host/val2017/{number}.jpg",
                       "height": SIDE, "width": SIDE, "neg_category_ids": [ids[number % 4]],
                       "not_exhaustive_category_ids": [ids[(number + 1) % 4]]})  # fmt: skip
        for _ in range(number + 1):
            x, y, w, h = whole(2, 28, 4, generator)
            entry = {"id": len(annotations) + 1, "image_id": 9 - number, "area": w * h}
            entry |= {"category_id": ids[(number + w) % 4], "bbox": [x, y, w, h]}
            entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            annotations.append(entry)
    kinds = [{"id": key, "name": f"class {key}", "frequency": f}
             for key, f in zip(ids, "rcff", strict=True)]  # fmt: skip
    path = root / "lvis_v1_val.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": kinds}))
    return path


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_lvis(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lvis(tmp_path)
    dataset = LvisDataset(tmp_path, "val", masks=kind == "segm")
    metric = LvisMetric(dataset.classes, iou_type=kind, max_detections=7)  # type: ignore[arg-type]
    metric.frequencies = dataset.frequencies
    numbers, results, _ = scored(metric, dataset)
    found, out = tmp_path / "results.json", tmp_path / "numbers.json"
    found.write_text(json.dumps(results))
    call = ["score", "--kind", "lvis", "--truth", str(path), "--predictions", str(found)]
    assert main([*call, "--max-detections", "7", "--json", str(out)]) == 0
    assert "class 12" in capsys.readouterr().out
    expected = {name: None if math.isnan(value) else value for name, value in numbers.items()}
    assert json.loads(out.read_text()) == pytest.approx(expected, abs=1e-12)
    assert 0.02 < numbers["AP"] < 0.98 and "APr" in numbers
    if kind == "segm":
        assert score("lvis", path, found, iou_type="bbox")["AP"] != numbers["AP"]
    assert "AR300" in score("lvis", path, found)


def test_lvis_faults(tmp_path: Path) -> None:
    path, found = write_lvis(tmp_path), tmp_path / "results.json"
    found.write_text("[]")
    with pytest.raises(ValueError, match="^max_detections: must be 1 or more"):
        score("lvis", path, found, max_detections=0)
    content = json.loads(path.read_text())
    del content["images"][0]["neg_category_ids"]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="is no annotation file of LVIS .*neg_category_ids"):
        score("lvis", path, found)


def write_voc(root: Path) -> Path:
    generator = torch.Generator().manual_seed(2)
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(NAMES))
    stems = [f"2007_{number:03}" for number in range(6)]
    (root / "ImageSets/Main/val.txt").write_text("\n".join(stems[1:]))
    for number, stem in enumerate(stems):
        Image.new("RGB", (SIDE, SIDE)).save(root / f"JPEGImages/{stem}.jpg")
        entries = ""
        for place in range(number + 1):
            x, y, w, h = whole(2, 28, 4, generator)
            entries += (
                f"<object><name>{NAMES[(place + number) % 3]}</name>"
                f"<difficult>{int(place == 3)}</difficult><bndbox><xmin>{x}</xmin><ymin>{y}"
                f"</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
            )
        (root / f"Annotations/{stem}.xml").write_text(f"<annotation>{entries}</annotation>")
    return root


def write_detections(folder: Path, dataset: VocDataset, predictions: list[Prediction]) -> Path:
    """VOC's files of each class, whose boxes name their first and last pixels from 1 on."""
    folder.mkdir()
    for label, name in enumerate(NAMES):
        lines = []
        for index, prediction in enumerate(predictions):
            for kind, value, box in zip(
                prediction.labels.tolist(), prediction.scores.tolist(), prediction.boxes.tolist(),
                strict=True,
            ):  # fmt: skip
                if kind == label:
                    corners = box[0] + 1, box[1] + 1, box[2], box[3]
                    row = [dataset.image_id(index), repr(value), *map(str, corners)]
                    lines.append(" ".join(map(str, row)))
        (folder / f"comp4_det_val_{name}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("points", [11, "all"])
def test_voc(points: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_voc(tmp_path / "VOC2007")
    dataset = VocDataset(root, "val", task="detection")
    metric = VocMetric(dataset.classes, points=points, iou=0.6)
    numbers, results, predictions = scored(metric, dataset)
    folder, out = write_detections(tmp_path / "Main", dataset, predictions), tmp_path / "out.json"
    call = ["score", "--kind", "voc", "--truth", str(root), "--predictions", str(folder)]
    assert main([*call, "--points", str(points), "--iou", "0.6", "--json", str(out)]) == 0
    assert "traffic light" in capsys.readouterr().out
    assert json.loads(out.read_text()) == pytest.approx(numbers, abs=1e-12)
    assert 0.05 < numbers["mAP"] < 0.98
    found = tmp_path / "results.json"
    found.write_text(json.dumps(results))
    assert score("voc", root, found, points=points, iou=0.6) == pytest.approx(numbers, abs=1e-12)
    # of the annotations alone, all images count
    every = score("voc", root / "Annotations", folder, classes=root / "classes.txt", iou=0.6)
    assert every["mAP"] < score("voc", root, folder, iou=0.6)["mAP"]


def test_voc_takes_equal_scores_as_the_lines_come(tmp_path: Path) -> None:
    truth, folder = tmp_path / "truth", tmp_path / "found"
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    for path in (truth, folder):
        path.mkdir()
    for stem, name in (("a", "cat"), ("b", "dog")):
        text = f"<annotation><object><name>{name}</name>{box}</object></annotation>"
        (truth / f"{stem}.xml").write_text(text)
    for lines, expected in (("ab", 1.0), ("ba", 0.5)):
        text = "".join(f"{stem} 0.5 1 1 9 9\n" for stem in lines)
        (folder / "comp3_det_test_cat.txt").write_text(text)
        assert score("voc", truth, folder)["AP/cat"] == pytest.approx(expected)


def test_voc_faults(tmp_path: Path) -> None:
    root, folder = write_voc(tmp_path / "VOC2007"), tmp_path / "found"
    folder.mkdir()
    with pytest.raises(DataError, match="found: has no detection files of VOC, as comp4_det_val_"):
        score("voc", root, folder)
    path = folder / "comp3_det_val_cat.txt"
    path.write_text("2007_001 0.5 1 1 9 9\n\n2007_000 0.5 1 1 9 9\n")
    with pytest.raises(DataError, match=r"cat.txt:3: is of image '2007_000', which is not among"):
        score("voc", root, folder)
    path.write_text("2007_001 0.5 1 1 9\n")
    with pytest.raises(DataError, match=r"cat.txt:1: must be an image, a score, and xmin"):
        score("voc", root, folder)
    for line in ("2007_001 nan 1 1 9 9", "2007_001 0.5 1 1 inf 9", "2007_001 0.5 1 nan 9 9"):
        path.write_text(line)
        with pytest.raises(DataError, match=r"cat.txt:1: must be .*, finite numbers"):
            score("voc", root, folder)
    path.rename(folder / "comp3_det_val_bird.txt")
    with pytest.raises(DataError, match="bird.txt: 'bird' is no class of .*VOC2007"):
        score("voc", root, folder)
    with pytest.raises(DataError, match="test.txt: no such list of images; there are the splits v"):
        score("voc", root, folder, split="test")
    with pytest.raises(ValueError, match="^iou: must be above 0"):
        score("voc", root, folder, iou=0.0)
    with pytest.raises(DataError, match="which is no class; give a file of all with --classes"):
        score("voc", root / "Annotations", folder)
    with pytest.raises(DataError, match="found: has no XML files of VOC"):
        score("voc", folder, folder)
