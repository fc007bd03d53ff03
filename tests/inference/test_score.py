"""`vitdense score` gives the numbers of the official programs and of the metrics in training."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vitdense.cli import main
from vitdense.data.base import DataError
from vitdense.data.coco import CocoDataset
from vitdense.inference.outputs import coco_results
from vitdense.inference.score import score
from vitdense.metrics import coco_files
from vitdense.metrics.coco import CocoMetric
from vitdense.metrics.miou import MeanIoU
from vitdense.ops.run_length import RunLengths, encode, from_strings
from vitdense.structures import Batch, Frame, Prediction, Size, Target

SHARED = Path(__file__).parents[3] / "shared/data"
COCO_OPEN = SHARED / "coco_open/annotations"
needs_coco = pytest.mark.skipif(not COCO_OPEN.exists(), reason="the real data is not here")


def shifted(truth: dict[str, Any], seed: int = 0) -> list[dict[str, Any]]:
    """Results near the truth: boxes moved, masks as wide as the boxes."""
    from pycocotools import mask

    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    rng = np.random.default_rng(seed)
    results = []
    for entry in truth["annotations"]:
        x, y, w, h = (np.array(entry["bbox"]) + rng.normal(0, 2, 4)).round(2).tolist()
        x, y, w, h = max(x, 0.0), max(y, 0.0), max(w, 1.0), max(h, 1.0)
        ring = [x, y, x + w, y, x + w, y + h, x, y + h]
        rle = mask.frPyObjects([ring], *sizes[entry["image_id"]])[0]
        results.append(
            {
                "image_id": entry["image_id"],
                "category_id": entry["category_id"],
                "bbox": [x, y, w, h],
                "segmentation": {**rle, "counts": rle["counts"].decode()},
                "score": round(float(rng.random()), 3),
            }
        )
    return results


@needs_coco
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_detections_equal_pycocotools_on_the_same_files(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    path = COCO_OPEN / "instances_val.json"
    results = shifted(json.loads(path.read_text()))
    found, out = tmp_path / "results.json", tmp_path / "out.json"
    found.write_text(json.dumps(results))
    call = ["score", "--kind", kind, "--truth", str(path), "--predictions", str(found)]
    assert main([*call, "--json", str(out)]) == 0
    assert "person" in capsys.readouterr().out
    numbers = json.loads(out.read_text())

    if kind == "segm":  # with boxes, pycocotools takes the area of the box
        for result in results:
            del result["bbox"]
        found.write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        theirs = COCOeval(truth, truth.loadRes(str(found)), kind)
        theirs.evaluate()
        theirs.accumulate()
        theirs.summarize()
    assert [value for name, value in numbers.items() if "/" not in name] == pytest.approx(
        theirs.stats.tolist(), abs=1e-12
    )
    assert 0.1 < numbers["AP"] < 0.95


@needs_coco
def test_panoptic_truth_is_its_own_best_prediction(tmp_path: Path) -> None:
    path = COCO_OPEN / "panoptic_val.json"
    numbers = score("panoptic", path, path, json_path=tmp_path / "out.json")
    assert numbers["PQ"] == numbers["SQth"] == numbers["RQst"] == 1.0
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:  # a crowd's own name must not matter
        for info in annotation["segments_info"]:
            info["iscrowd"] = 0
    changed = tmp_path / "panoptic_val.json"
    changed.write_text(json.dumps(content))
    (tmp_path / "panoptic_val").symlink_to(COCO_OPEN / "panoptic_val")
    assert score("panoptic", path, changed)["PQ"] == 1.0


def write_panoptic(path: Path, maps: dict[int, np.ndarray], categories: dict[int, int]) -> None:
    """Segments by id; each of the category that is given for it."""
    path.with_suffix("").mkdir()
    annotations = []
    for image_id, ids in maps.items():
        colors = np.stack([ids % 256, ids // 256 % 256, ids // 65536], 2).astype(np.uint8)
        Image.fromarray(colors).save(path.with_suffix("") / f"{image_id}.png")
        infos = [{"id": int(i), "category_id": categories[int(i)]} for i in np.unique(ids) if i]
        annotations.append(
            {"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": infos}
        )
    kinds = [{"id": 3, "name": "cat", "isthing": 1}, {"id": 9, "name": "sky", "isthing": 0}]
    path.write_text(json.dumps({"annotations": annotations, "categories": kinds}))


def test_panoptic_by_hand_and_its_faults(tmp_path: Path) -> None:
    truth, answers = tmp_path / "truth.json", tmp_path / "answers.json"
    there = np.array([[0, 300, 300, 300], [70000, 70000, 70000, 70000]])
    found = np.array([[5, 5, 5, 5], [6, 6, 6, 7]])
    write_panoptic(truth, {1: there}, {300: 3, 70000: 9})
    write_panoptic(answers, {1: found}, {5: 3, 6: 9, 7: 3})
    numbers = score("panoptic", truth, answers)
    assert numbers["PQ/cat"] == pytest.approx(1 / 1.5)  # void does not count, 7 is wrong
    assert numbers["PQ/sky"] == pytest.approx(0.75)
    assert numbers["PQ"] == pytest.approx((numbers["PQth"] + numbers["PQst"]) / 2)
    content = json.loads(answers.read_text())
    content["annotations"][0]["segments_info"].pop()
    answers.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"1.png: segment 7 is in the map only"):
        score("panoptic", truth, answers)
    good = content["annotations"][0]
    for entries, fault in (
        ([], "has no prediction for image 1"),
        ([good, good], "has two entries of image 1; take one out"),
        ([{**good, "file_name": "../1.png"}], "leads out of"),
        ([{"image_id": 1, "file_name": "1.png"}], r"image 1 needs .*\(KeyError\('segments_info'\)"),
        ([{**good, "segments_info": [{"id": 5}]}], r"image 1 needs .*\(KeyError\('category_id'\)"),
        ([{**good, "segments_info": [{"id": "5", "category_id": 3}]}], "image 1 needs .*TypeError"),
        ([{**good, "segments_info": [{"id": 5, "category_id": None}]}], "1.png has .* None, which"),
        ([{**good, "segments_info": [{"id": -5, "category_id": 3}]}], "image 1 has -5 to -5"),
        ([{**good, "segments_info": good["segments_info"] * 2}], "two segments of image 1 have"),
        ([{**good, "segments_info": [{"id": 5, "category_id": 4}]}], "1.png has .* category 4, wh"),
    ):
        write(answers, {"annotations": entries})
        with pytest.raises(DataError, match=rf"answers.json: .*{fault}"):
            score("panoptic", truth, answers)
    whole = json.loads(truth.read_text())
    write(truth, {**whole, "categories": [{"id": 3, "name": "cat"}]})
    with pytest.raises(DataError, match="truth.json: category 3 has no `isthing`"):
        score("panoptic", truth, answers)
    write(truth, {**whole, "annotations": []})
    with pytest.raises(DataError, match="truth.json: `annotations` is empty"):
        score("panoptic", truth, answers)


def test_label_maps(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    for folder in ("truth", "found"):
        (tmp_path / folder).mkdir()
    metric = MeanIoU(["a", "b", "c"])
    for name in ("1", "2"):
        there = generator.integers(0, 4, (6, 9)).astype(np.uint8)
        answer = generator.integers(1, 4, (6, 9)).astype(np.uint8)
        Image.fromarray(there).save(tmp_path / f"truth/{name}.png")
        Image.fromarray(answer).save(tmp_path / f"found/{name}.png")
        target = Target(semantic=torch.from_numpy(np.where(there == 0, 255, there - 1)))
        prediction = Prediction(semantic=torch.from_numpy(answer).long() - 1)
        frame = Frame((6, 9), (6, 9), (6, 9))
        batch = Batch(torch.zeros(1), [target], [frame], [name], [Path(name)])
        metric.update([prediction], batch)
    assert score("semantic", tmp_path / "truth", tmp_path / "found") == metric.compute()
    Image.fromarray(np.full((6, 9), 4, np.uint8)).save(tmp_path / "found/2.png")
    with pytest.raises(DataError, match=r"found.2.png: has the label 4, but the 3 classes of"):
        score("semantic", tmp_path / "truth", tmp_path / "found")
    (tmp_path / "found/2.png").unlink()
    with pytest.raises(DataError, match=r"found.2.png"):
        score("semantic", tmp_path / "truth", tmp_path / "found")


def label_maps(root: Path, truth: np.ndarray, found: np.ndarray, classes: Any) -> list[Path]:
    for folder, labels in (("truth", truth), ("found", found)):
        (root / folder).mkdir(exist_ok=True)
        Image.fromarray(labels.astype(np.uint8)).save(root / folder / "1.png")
    (root / "classes.json").write_text(json.dumps({"classes": classes}))
    return [root / "truth", root / "found"]


def test_labels_are_the_ids_of_the_classes(tmp_path: Path) -> None:
    truth, found = np.array([[0, 0, 7, 9], [255, 0, 7, 7]]), np.array([[0, 7, 7, 0], [7, 0, 7, 7]])
    classes = [{"id": 7, "name": "road"}, {"id": 0, "name": "ground"}]
    folders = label_maps(tmp_path, truth, found, classes)
    with pytest.raises(DataError, match=r"truth.1.png: has the label 9, .* see .*--ignore"):
        score("semantic", *folders)
    numbers = score("semantic", *folders, ignore=[9])
    assert numbers["IoU/ground"] == pytest.approx(2 / 3)
    assert numbers["IoU/road"] == pytest.approx(3 / 4)
    only = score("semantic", *folders, ignore=[9, 0])
    assert only["Acc/road"] == 1 and "Acc/ground" not in only
    with pytest.raises(ValueError, match="^ignore: -1 is no label"):
        score("semantic", *folders, ignore=[-1])
    label_maps(tmp_path, truth, found, [{"name": "road", "color": "#000001"}, *classes[1:]])
    with pytest.raises(DataError, match="some classes have an `id`, some have none"):
        score("semantic", *folders)


def test_labels_of_classes_without_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth, found = np.array([[0, 0, 1, 255]]), np.array([[0, 1, 1, 1]])
    folders = label_maps(tmp_path, truth, found, ["ground", "road"])
    with pytest.raises(DataError, match=r"found.1.png: has the label 0, .* see .*--first-label"):
        score("semantic", *folders)
    call = ["score", "--kind", "semantic", "--truth", str(folders[0]), "--predictions"]
    out = tmp_path / "out.json"
    assert main([*call, str(folders[1]), "--first-label", "0", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["mIoU"] == pytest.approx(0.5)


def test_masks(tmp_path: Path) -> None:
    truth, found = np.array([[0, 0, 255, 255]]), np.array([[0, 1, 1, 1]])
    folders = label_maps(tmp_path, truth, found, ["ground", "road"])
    with pytest.raises(DataError, match="label maps hold 0 and 255 alone: give --binary"):
        score("semantic", *folders, first_label=0)
    numbers = score("semantic", *folders, binary=True)
    assert numbers["IoU/ground"] == 0.5 and numbers["IoU/road"] == pytest.approx(2 / 3)


def coco_truth(path: Path) -> dict[str, Any]:
    truth = {
        "images": [{"id": 1, "height": 20, "width": 30}],
        "categories": [{"id": 4, "name": "a"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 4, "bbox": [1, 1, 8, 8], "area": 64}
        ],
    }
    path.write_text(json.dumps(truth))
    return truth


def test_unknown_categories_are_left_out_and_unknown_images_are_faults(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    truth, found = tmp_path / "truth.json", tmp_path / "found.json"
    coco_truth(truth)
    good = {"image_id": 1, "category_id": 4, "bbox": [1, 1, 8, 8], "score": 0.5}
    found.write_text(json.dumps([good, {**good, "category_id": 5, "score": 0.9}]))
    numbers = score("bbox", truth, found)
    assert numbers["AP"] == pytest.approx(1) and math.isnan(numbers["APl"])
    assert "1 of 2 detections are of categories" in caplog.text
    capped = score("bbox", truth, found, max_detections=300)
    assert capped["AR300"] == pytest.approx(1)
    with pytest.raises(ValueError, match="^max_detections: must be above 10"):
        score("bbox", truth, found, max_detections=10)
    found.write_text(json.dumps([{**good, "image_id": 2}]))
    with pytest.raises(DataError, match="found.json: a detection is of image 2, which .*truth"):
        score("bbox", truth, found)
    found.write_text("[]")
    assert score("bbox", truth, found)["AP"] == 0


def test_images_by_the_names_of_their_files(tmp_path: Path) -> None:
    """As `predict` calls those of a folder without an annotation file; twins are not guessed."""
    truth, found = tmp_path / "truth.json", tmp_path / "found.json"
    names = ["photos/cam1/0007.jpg", "photos/cam2/0007.jpg", "photos/8.jpg"]
    box = {"category_id": 1, "bbox": [1, 1, 8, 8]}
    content = {
        "categories": [{"id": 1, "name": "cat"}],
        "images": [{"id": k, "file_name": name} for k, name in enumerate(names)],
        "annotations": [{**box, "id": k, "image_id": k, "area": 64} for k in range(3)],
    }
    truth.write_text(json.dumps(content))
    called = ("cam1/0007", "cam2/0007.jpg", "8")
    results = [{**box, "image_id": name, "score": 1} for name in called]
    found.write_text(json.dumps(results))
    assert score("bbox", truth, found)["AP"] == pytest.approx(1)
    found.write_text(json.dumps([{**results[0], "image_id": "0007"}]))
    with pytest.raises(DataError, match="a detection is of image '0007', which"):
        score("bbox", truth, found)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_what_predict_writes_scores_as_in_training(kind: str, tmp_path: Path) -> None:
    """From the data set through the metric, and from the same files through `score`."""
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val").mkdir()
    truth: dict[str, Any] = {
        "images": [
            {"id": 9 - i, "file_name": f"{i}.png", "height": 40, "width": 60} for i in range(5)
        ],
        "categories": [{"id": 4, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [],
    }
    for image in truth["images"]:
        Image.new("RGB", (60, 40)).save(tmp_path / "val" / image["file_name"])
        for number in range(4):
            x, y, w, h = torch.randint(1, 20, (4,), generator=generator).tolist()
            entry = {"id": len(truth["annotations"]) + 1, "image_id": image["id"]}
            entry |= {"category_id": 2 + 2 * (number % 2), "iscrowd": int(number == 3)}
            entry |= {"bbox": [x, y, w, h], "area": w * h}
            entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            truth["annotations"].append(entry)
    path = tmp_path / "annotations/instances_val.json"
    path.write_text(json.dumps(truth))
    data = CocoDataset(tmp_path, "val", masks=kind == "segm")
    metric = CocoMetric(data.classes, iou_type=kind)  # type: ignore[arg-type]
    results = []
    for sample in (data[index] for index in range(len(data))):
        noise = torch.randn(4, 4, generator=generator)
        scores = torch.rand(4, generator=generator).clamp(min=0.01).sort(descending=True)[0]
        masks = None if sample.target.masks is None else sample.target.masks.roll(1, 2)
        prediction = Prediction(scores, sample.target.labels, sample.target.boxes + noise, masks)
        frame = Frame(sample.original, sample.original, sample.original)
        batch = Batch(
            sample.image[None], [sample.target], [frame], [sample.image_id], [sample.path]
        )
        metric.update([prediction], batch)
        results += coco_results(prediction, sample.image_id, data.category_ids)
    found = tmp_path / "predictions.json"
    found.write_text(json.dumps(results))
    numbers = metric.compute()
    assert score(kind, path, found) == pytest.approx(numbers, abs=0, nan_ok=True)  # type: ignore[arg-type]
    assert 0.02 < numbers["AP"] < 0.98


@pytest.mark.parametrize(
    ("segmentation", "fault"),
    [
        (None, "missing or empty"),
        ([], "missing or empty"),
        ({"size": [30, 20], "counts": "0"}, r"size \[30, 20\] is not its image's \[20, 30\]"),
        ({"counts": "0"}, "is wrong"),
        ({"size": [20, 30], "counts": "5"}, "RLE number 0 does not cover"),
    ],
)
def test_wrong_masks_are_named(tmp_path: Path, segmentation: Any, fault: str) -> None:
    truth, found = tmp_path / "truth.json", tmp_path / "found.json"
    content = coco_truth(truth)
    content["annotations"][0]["segmentation"] = [[1, 1, 9, 1, 9, 9, 1, 9]]
    truth.write_text(json.dumps(content))
    entry = {"image_id": 1, "category_id": 4, "segmentation": segmentation, "score": 0.5}
    found.write_text(json.dumps([entry]))
    with pytest.raises(DataError, match=rf"found.json: .*{fault}"):
        score("segm", truth, found)


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


GOOD = {"image_id": 1, "category_id": 4, "bbox": [1, 1, 8, 8], "score": 0.5}
RLE = {"size": [20, 30], "counts": [0, 600]}


@pytest.mark.parametrize(
    ("kind", "change", "fault"),
    [
        ("bbox", {"score": math.nan}, "of image 1 has the score nan, not a finite number"),
        ("bbox", {"score": None}, "of image 1 has the score None, not a finite number"),
        ("bbox", {"score": "0.5"}, "of image 1 has the score '0.5', not a finite number"),
        ("bbox", {"bbox": None}, r"of image 1 has the bbox None, not \[x, y, width, height\]"),
        ("bbox", {"bbox": [1, 1, math.inf, 8]}, r"has the bbox \[1, 1, inf, 8\], not \[x, y, "),
        ("bbox", {"bbox": [1, 1, 8]}, r"has the bbox \[1, 1, 8\], not .*, four finite numbers"),
        ("bbox", {"bbox": [1, 1, 8, 8, 8, 8, 8, 8]}, "has the bbox .* four finite numbers"),
        ("bbox", {"category_id": None}, "a detection of image 1 has the category_id None; give"),
        ("bbox", {"image_id": [1]}, r"a detection is of image \[1\], which"),
        ("bbox", {"image_id": "1"}, "a detection is of image '1', which"),
        ("segm", {"segmentation": [[1, 1, 9, 1, 9, 1e9]]}, "image 1 .* pixels away"),
        ("segm", {"segmentation": ["text"]}, "image 1 .* must be a flat list of numbers"),
        ("segm", {"segmentation": {**RLE, "counts": [-1, 601]}}, "image 1 has a segmentation"),
        ("segm", {"segmentation": {**RLE, "counts": [0, 599]}}, "image 1 .* does not cover"),
        ("segm", {"segmentation": {**RLE, "counts": 10**15}}, "`counts` must be a text or a list"),
        ("segm", {"segmentation": {**RLE, "size": 600}}, "image 1 has a segmentation"),
    ],
)
def test_wrong_results_are_named(tmp_path: Path, kind: Any, change: Any, fault: str) -> None:
    content = coco_truth(tmp_path / "truth.json")
    content["annotations"][0]["segmentation"] = [[1, 1, 9, 1, 9, 9, 1, 9]]
    truth = write(tmp_path / "truth.json", content)
    found = write(tmp_path / "found.json", [{**GOOD, **change}] * 4)
    with pytest.raises(DataError, match=rf"^{tmp_path}/found.json: .*{fault}"):
        score(kind, truth, found)


@pytest.mark.parametrize(
    ("place", "change", "fault"),
    [
        ("images", {"id": 1}, "two entries of `images` have the id 1; ids must be unique"),
        ("categories", {"id": 4}, "two entries of `categories` have the id 4"),
        ("images", {"id": "a"}, "each entry of `images` needs an `id`; all must be numbers"),
        ("categories", {"id": None}, "each entry of `categories` needs an `id`"),
        ("annotations", {"image_id": 2}, "annotation 7 has the image_id 2, which the file does"),
        ("annotations", {"category_id": 5}, "annotation 7 has the category_id 5, which the file"),
        ("annotations", {"bbox": [0, 0, math.nan, 1]}, r"image 1 \(id 7\) has the bbox"),
        ("annotations", {"area": "large"}, r"image 1 \(id 7\) has the area 'large', not a fin"),
    ],
)
def test_wrong_truth_is_named(tmp_path: Path, place: str, change: Any, fault: str) -> None:
    content = coco_truth(tmp_path / "truth.json")
    content[place].append({**content[place][0], "id": 7, **change})
    truth, found = write(tmp_path / "truth.json", content), write(tmp_path / "found.json", [GOOD])
    with pytest.raises(DataError, match=rf"^{tmp_path}/truth.json: .*{fault}"):
        score("bbox", truth, found)


def test_truth_with_nothing_to_score(tmp_path: Path) -> None:
    content = coco_truth(tmp_path / "truth.json")
    found = write(tmp_path / "found.json", [GOOD])
    for key in ("images", "categories"):
        empty = write(tmp_path / "empty.json", {**content, key: []})
        with pytest.raises(DataError, match=f"empty.json: `{key}` is empty; there is nothing"):
            score("bbox", empty, found)
    with pytest.raises(DataError, match="found.json: holds a list, not COCO's mapping"):
        score("bbox", found, tmp_path / "truth.json")


def test_boxes_of_results_that_have_masks_alone(tmp_path: Path) -> None:
    """As pycocotools makes them: tight boxes, with the areas of the masks."""
    from pycocotools import mask
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    content = coco_truth(tmp_path / "truth.json")
    content["annotations"][0]["iscrowd"] = 0
    truth = write(tmp_path / "truth.json", content)
    thin = {"image_id": 1, "category_id": 4, "score": 0.4, "segmentation": [[0, 0, 29, 0, 0, 19]]}
    results = [{**thin, "score": 0.9, "segmentation": [[1, 1, 9, 1, 9, 9, 1, 9]]}, thin]
    for result in results:
        rle = mask.merge(mask.frPyObjects(result["segmentation"], 20, 30))
        result["segmentation"] = {**rle, "counts": rle["counts"].decode()}
    found = write(tmp_path / "found.json", results)
    numbers = score("bbox", truth, found)
    with contextlib.redirect_stdout(io.StringIO()):
        index = COCO(str(truth))
        theirs = COCOeval(index, index.loadRes(str(found)), "bbox")
        theirs.evaluate()
        theirs.accumulate()
        theirs.summarize()
    expected = [math.nan if value == -1 else value for value in theirs.stats.tolist()]
    ours = [value for name, value in numbers.items() if "/" not in name]
    assert ours == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert numbers["AP"] > 0.5


def test_annotated_boxes_without_a_mask(tmp_path: Path) -> None:
    """One of them is an empty mask, as to the data set; all of them are a file of boxes."""
    content = coco_truth(tmp_path / "truth.json")
    (only,) = content["annotations"]
    content["annotations"].append({**only, "id": 2, "segmentation": []})
    only["segmentation"] = [[1, 1, 9, 1, 9, 9, 1, 9]]
    truth = write(tmp_path / "truth.json", content)
    found = write(tmp_path / "found.json", [{**GOOD, "segmentation": only["segmentation"]}])
    assert score("segm", truth, found)["AR1"] == 0.5
    content["annotations"] = [{**only, "segmentation": []}]
    write(truth, content)
    with pytest.raises(DataError, match="truth.json: has boxes alone, every segmentation is empty"):
        score("segm", truth, found)


@pytest.mark.parametrize(
    ("kind", "option"),
    [("bbox", {"iou": 0.75}), ("panoptic", {"backend": "pycocotools"}), ("lvis", {"binary": True}),
     ("semantic", {"max_detections": 300}), ("voc", {"ignore": [3]}), ("segm", {"split": "val"})],
)  # fmt: skip
def test_options_of_other_kinds_are_refused(kind: Any, option: Any, tmp_path: Path) -> None:
    (name,) = option
    with pytest.raises(ValueError, match=rf"^{name}: is for --kind .*, not for {kind}"):
        score(kind, tmp_path / "truth.json", tmp_path / "found.json", **option)


def test_the_command_reports_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["score", "--kind", "bbox", "--truth", str(tmp_path / "no.json"), "--predictions", "x"]
    assert main(call) == 1
    assert "no.json: cannot be read" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["score", "--kind", "segn", "--truth", "x", "--predictions", "y"])
    assert "--kind has no choice 'segn'. Did you mean 'segm'?" in capsys.readouterr().err


def test_masks_are_decoded_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once, those of 5,000 images would take 8 GB."""
    masks = torch.rand(9, 20, 30) > torch.linspace(0, 0.9, 9)[:, None, None]
    texts = encode(masks).strings()
    entries = [
        {"image_id": 1, "category_id": 4, "score": 0.5, "segmentation": rle}
        for rle in ({"size": [20, 30], "counts": text} for text in texts)
    ]
    coco_truth(tmp_path / "truth.json")
    truth = coco_files.read_truth(tmp_path / "truth.json", "bbox")
    decoded: list[int] = []

    def decode(strings: list[str], sizes: list[Size]) -> RunLengths:
        decoded.append(len(strings))
        return from_strings(strings, sizes)

    monkeypatch.setattr(coco_files, "from_strings", decode)
    monkeypatch.setattr(coco_files, "MOST_LETTERS", 2 * max(map(len, texts)))
    found = coco_files.results_of(entries, tmp_path / "found.json", truth, "segm")
    assert found.masks is not None and found.masks.strings() == texts
    assert sum(decoded) == 9 and max(decoded) < 9
    entries[7] |= {"id": 77, "segmentation": {"size": [20, 30], "counts": "5"}}
    with pytest.raises(DataError, match=r"found.json: an object of image 1 \(id 77\) has"):
        coco_files.results_of(entries, tmp_path / "found.json", truth, "segm")
