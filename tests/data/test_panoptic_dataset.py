"""COCO's panoptic format: things, stuff, crowds and void; truth scores 1 against itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.trees import make_panoptic
from vitdense.data.base import DataError
from vitdense.data.coco_panoptic import CocoPanopticDataset
from vitdense.data.collate import collate
from vitdense.data.shapes import ShapesDataset
from vitdense.data.transforms import SegmentationPolicy
from vitdense.metrics.panoptic import PanopticQuality
from vitdense.metrics.panoptic_files import read_panoptic
from vitdense.ops.masks import masks_to_boxes
from vitdense.structures import Prediction
from vitdense.testing import check_dataset


def numbers(target) -> torch.Tensor:
    places = torch.arange(1, len(target.masks) + 1)[:, None, None]
    return (target.masks * places).sum(0)


def score(dataset) -> dict[str, float]:
    """Of predictions that are the truth."""
    pairs = zip(dataset.classes, dataset.things, strict=True)
    metric = PanopticQuality(dataset.classes, things=[name for name, thing in pairs if thing])
    for index in range(len(dataset)):
        (batch,) = collate([dataset[index]], training=False)
        target = batch.targets[0]
        metric.update([Prediction(panoptic=numbers(target), labels=target.labels)], batch)
    return metric.compute()


def edit(root: Path, change) -> None:
    file = root / "annotations/panoptic_train.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_segments_of_things_and_stuff(tmp_path):
    dataset = CocoPanopticDataset(make_panoptic(tmp_path), "train")
    assert dataset.classes == ["sky", "person", "grass"]
    assert dataset.category_ids == [3, 7, 90] and dataset.things == [False, True, False]
    sample = dataset[1]
    target = sample.target
    assert (sample.image_id, sample.original, sample.path.name) == (41, (24, 32), "b.png")
    assert target.labels.tolist() == [1, 1, 1, 0]  # in the order of the segments' ids
    assert target.crowd.tolist() == [False, True, False, False]
    assert target.boxes[:, [0, 2]].tolist() == [[8, 16], [20, 28], [16, 20], [0, 8]]
    assert target.area.tolist() == [192, 192, 96, 192]
    assert not target.masks[:, :, 28:].any()


def test_semantic_from_the_same_files(tmp_path):
    dataset = CocoPanopticDataset(make_panoptic(tmp_path), "train", task="semantic")
    assert dataset.target(0).semantic[0, ::4].tolist() == [0, 0, 1, 1, 1, 1, 1, 255]
    assert dataset.things is None and dataset.target(0).masks is None


@pytest.mark.parametrize(
    ("file", "images", "split"),
    [
        ("annotations/panoptic_train2017.json", "train2017", "train2017"),
        ("ade20k_panoptic_train.json", "images/training", "train"),
    ],
)
def test_layouts_of_coco_and_ade20k(tmp_path, file, images, split):
    (tmp_path / "annotations").mkdir()
    assert len(CocoPanopticDataset(make_panoptic(tmp_path, file, images), split)) == 2


@pytest.mark.parametrize("task", ["panoptic", "semantic"])
def test_keeps_the_contract(tmp_path, task):
    check_dataset(CocoPanopticDataset, make_panoptic(tmp_path), "train", task=task)


def test_truth_scores_one(tmp_path, shapes_root):
    assert score(CocoPanopticDataset(make_panoptic(tmp_path), "train"))["PQ"] == 1
    dataset = ShapesDataset(shapes_root, "val", task="panoptic", images=24, size=96)
    assert dataset.things == [False] + [True] * 5
    found = score(dataset)
    assert found["PQ"] == found["PQth"] == found["PQst"] == 1


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_data(shared, split):
    dataset = CocoPanopticDataset(shared / "coco_open", split)
    assert len(dataset) == {"train": 26, "val": 14}[split] and len(dataset.classes) == 133
    assert sum(dataset.things) == 80
    assert score(dataset)["PQ"] == 1
    entries = read_panoptic(shared / f"coco_open/annotations/panoptic_{split}.json").annotations
    for index in range(len(dataset)):
        target = dataset.target(index)
        infos = entries[dataset.image_id(index)]["segments_info"]
        infos = sorted(infos, key=lambda it: it["id"])
        assert target.area.tolist() == [it["area"] for it in infos]
        found = [dataset.category_ids[label] for label in target.labels]
        assert found == [it["category_id"] for it in infos]
        assert torch.equal(target.boxes, masks_to_boxes(target.masks))


def test_semantic_equals_the_label_maps_made_of_it(shared):
    """coco_scene is the same truth, by another's hand, at another size."""
    dataset = CocoPanopticDataset(shared / "coco_open", "val", task="semantic")
    for index in range(len(dataset)):
        stem = Path(str(dataset.names[index])).stem
        expected = np.array(Image.open(shared / f"coco_scene/annotations/validation/{stem}.png"))
        found = dataset.target(index).semantic.numpy()
        rows, columns = (
            ((np.arange(new) + 0.5) * old / new).astype(int)
            for new, old in zip(expected.shape, found.shape, strict=True)
        )
        # 0 is unlabelled there, and k + 1 is class k
        same = found[rows[:, None], columns] + np.uint8(1) == expected
        assert same.mean() > 0.99


def test_stuff_does_not_vanish_in_training_crops(tmp_path):
    dataset = CocoPanopticDataset(make_panoptic(tmp_path), "train")
    policy = SegmentationPolicy(size=96, crop=24, scale=(1.0, 1.0), photometric=0)
    covered = []
    for seed in range(20):
        torch.manual_seed(seed)
        target = policy.train(dataset[0]).target
        assert target.masks.flatten(1).any(1).all() and target.masks.sum(0).max() <= 1
        covered.append(target.masks.any(0).float().mean().item())
    assert sum(part == 1 for part in covered) > 5  # all but windows with crowd or void


FAULTS = [
    (lambda c: c["annotations"].pop(), r"the image b\.png has no entry in `annotations` \(1 of 2"),
    (lambda c: c["categories"][0].pop("isthing"), r"category 'person' has no `isthing`"),
    (lambda c: c["annotations"][0].pop("segments_info"), r"of image 40 needs `file_name` and"),
    (lambda c: c["annotations"][0].update(file_name="x.png"), r"panoptic_train/x\.png: no such"),
    (lambda c: c["annotations"][0].update(image_id=1), r"belongs to image 1, which `images`"),
    (lambda c: c["annotations"][0].update(file_name="../../x.png"), "leads out of"),
    (lambda c: c["annotations"][0]["segments_info"][0].update(category_id=4), "has category_id 4"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_faults_at_the_start(tmp_path, change, message):
    make_panoptic(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(DataError, match=message):
        CocoPanopticDataset(tmp_path, "train")


def test_a_segment_that_the_file_does_not_list(tmp_path):
    make_panoptic(tmp_path)
    edit(tmp_path, lambda c: c["annotations"][0]["segments_info"].pop(0))
    with pytest.raises(DataError, match=r"a\.png: has segment 70000, which .*panoptic_train\.json"):
        CocoPanopticDataset(tmp_path, "train")[0]


def test_a_missing_split_names_the_others(tmp_path):
    with pytest.raises(DataError, match=r"no split 'val'.*there are the splits train"):
        CocoPanopticDataset(make_panoptic(tmp_path), "val")
