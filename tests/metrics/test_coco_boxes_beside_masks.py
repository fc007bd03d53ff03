"""With `boxes_too`, masks and boxes of one run are each judged as pycocotools judges them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vitdense.engine.build import METRIC_OF
from vitdense.inference.report import table
from vitdense.metrics.coco import CocoMetric
from vitdense.ops.masks import mask_to_rle
from vitdense.structures import Batch, Frame, Prediction, Target

pytest.importorskip("pycocotools")

SIZE = (96, 120)
CLASSES = ["ball", "box", "never there"]
NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl"]
NAMES += ["AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


def make_objects(rng: np.random.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes on whole pixels, and ellipses that fill them."""
    start = rng.integers(0, 60, (count, 2))
    end = np.minimum(start + rng.integers(6, 60, (count, 2)), [SIZE[1], SIZE[0]])
    boxes = np.concatenate([start, end], 1).astype(float)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    masks = [
        ((x - (a + c) / 2) / (c - a)) ** 2 + ((y - (b + d) / 2) / (d - b)) ** 2 < 0.25
        for a, b, c, d in boxes
    ]
    stack = np.stack(masks) if masks else np.zeros((0, *SIZE), bool)
    return torch.from_numpy(boxes).float(), torch.from_numpy(stack)


def make_set(seed: int) -> list[tuple[Prediction, Batch]]:
    """Images with detections whose boxes and masks are moved apart; the first one is empty."""
    rng = np.random.default_rng(seed)
    pairs = []
    for image in range(8):
        boxes, masks = make_objects(rng, int(rng.integers(1, 7)) if image else 0)
        labels = torch.from_numpy(rng.integers(0, 2, len(boxes)))
        crowd = torch.from_numpy(rng.random(len(boxes)) < 0.15)
        area = masks.flatten(1).sum(1).float()
        target = Target(labels, boxes, masks, crowd=crowd, area=area)
        moved = boxes + torch.from_numpy(np.round(rng.normal(0, 4, (len(boxes), 4)))).float()
        moved[:, 2:] = moved[:, 2:].maximum(moved[:, :2] + 1)
        shifts = rng.integers(-4, 5, (len(boxes), 2)).tolist()
        rolled = [mask.roll(shift, (0, 1)) for mask, shift in zip(masks, shifts, strict=True)]
        answer = Prediction(
            scores=torch.from_numpy(rng.random(len(boxes))).sort(descending=True).values,
            labels=torch.where(torch.from_numpy(rng.random(len(boxes)) < 0.1), 2, labels),
            boxes=moved,
            masks=torch.stack(rolled) if rolled else masks,
        )
        frame = Frame(SIZE, SIZE, SIZE)
        images = torch.zeros(1, 3, 1, 1, dtype=torch.uint8)
        pairs.append((answer, Batch(images, [target], [frame], [image], [Path("x.jpg")])))
    return pairs


def entry(image: int, number: int, label: int, box: list[float], mask: Any) -> dict[str, Any]:
    left, top, right, bottom = box
    return {
        "id": number, "image_id": image, "category_id": label, "segmentation": mask_to_rle(mask),
        "bbox": [left, top, right - left, bottom - top],
    }  # fmt: skip


def reference(pairs: list[tuple[Prediction, Batch]], folder: Path, iou_type: str) -> list[float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth: dict[str, Any] = {"images": [], "annotations": []}
    truth["categories"] = [{"id": i, "name": name} for i, name in enumerate(CLASSES)]
    results = []
    for answer, batch in pairs:
        (image,), (target,) = batch.image_ids, batch.targets
        truth["images"].append({"id": image, "height": SIZE[0], "width": SIZE[1]})
        for label, box, mask, crowd, area in zip(
            target.labels.tolist(), target.boxes.tolist(), target.masks, target.crowd.tolist(),
            target.area.tolist(), strict=True,
        ):  # fmt: skip
            one = entry(image, len(truth["annotations"]) + 1, label, box, mask)
            truth["annotations"].append({**one, "iscrowd": int(crowd), "area": area})
        for score, label, box, mask in zip(
            answer.scores.tolist(), answer.labels.tolist(), answer.boxes.tolist(), answer.masks,
            strict=True,
        ):  # fmt: skip
            one = {**entry(image, 0, label, box, mask), "score": score}
            # with a box beside the mask, pycocotools takes the area of the box
            one.pop("bbox" if iou_type == "segm" else "segmentation")
            results.append(one)
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "results.json").write_text(json.dumps(results))
    coco = COCO(str(folder / "truth.json"))
    evaluation = COCOeval(coco, coco.loadRes(str(folder / "results.json")), iou_type)
    for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
        step()
    return [math.nan if value == -1 else value for value in evaluation.stats.tolist()]


def measure(pairs: list[tuple[Prediction, Batch]], **options: Any) -> dict[str, float]:
    metric = CocoMetric(CLASSES, iou_type="segm", **options)
    for answer, batch in pairs:
        metric.update([answer], batch)
    return metric.compute()


@pytest.mark.parametrize("seed", range(3))
def test_both_equal_pycocotools(seed: int, tmp_path: Path) -> None:
    pairs = make_set(seed)
    numbers = measure(pairs, boxes_too=True)
    for prefix, iou_type in (("", "segm"), ("box_", "bbox")):
        expected = reference(pairs, tmp_path, iou_type)
        ours = [numbers[prefix + name] for name in NAMES]
        assert ours == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert numbers["AP"] != numbers["box_AP"]


def test_numbers_of_masks_do_not_change() -> None:
    pairs = make_set(7)
    plain, both = measure(pairs), measure(pairs, boxes_too=True)
    assert {name for name in both if name not in plain} == {f"box_{name}" for name in NAMES}
    assert {name: both[name] for name in plain} == pytest.approx(plain, abs=0, nan_ok=True)
    assert "box_AR300" in measure(pairs, boxes_too=True, max_detections=300)


def test_the_table_has_both_and_a_row_for_each_class_of_masks() -> None:
    numbers = measure(make_set(3), boxes_too=True)
    lines = table(numbers).splitlines()
    assert [line.split()[0] for line in lines[:24]] == [*NAMES, *(f"box_{name}" for name in NAMES)]
    row = next(line for line in lines if line.startswith("ball"))
    assert row.split()[1] == f"{numbers['AP/ball']:.4f}"


def test_reset_forgets_the_boxes() -> None:
    metric = CocoMetric(CLASSES, iou_type="segm", boxes_too=True)
    (answer, batch), *_ = make_set(5)[1:]
    metric.update([answer], batch)
    metric.reset()
    assert all(math.isnan(value) for value in metric.compute().values())


def test_it_is_for_masks_alone_and_what_the_task_instance_takes() -> None:
    with pytest.raises(ValueError, match="^boxes_too: is for iou_type segm"):
        CocoMetric(CLASSES, boxes_too=True)
    assert METRIC_OF["instance"] == ("coco", {"iou_type": "segm", "boxes_too": True})
