"""Counts of classes from the truth alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.data.trees import columns, make_folders, make_panoptic, make_voc, save_map
from vitdense.data import images
from vitdense.data.base import DataError, shown_labels
from vitdense.data.coco import CocoDataset
from vitdense.data.coco_panoptic import CocoPanopticDataset
from vitdense.data.folders import FoldersDataset
from vitdense.data.frequency import (
    class_frequencies,
    images_with_class,
    pixels_per_image,
    repeat_factors,
)
from vitdense.data.shapes import ShapesDataset
from vitdense.data.voc import VocDataset


def test_counts_of_label_maps(tmp_path, monkeypatch):
    root = make_folders(tmp_path, columns(0, 1, 1, 255))
    save_map(root / "labels/train/b.png", columns(0, 2))
    (root / "classes.txt").write_text("sky\nroad\ntree\ncar\n")
    dataset = FoldersDataset(root, "train")
    monkeypatch.setattr(images, "_decode", None)  # no image is read
    counts, shared = class_frequencies(dataset)
    assert counts.dtype == torch.int64 and counts.tolist() == [192 + 384, 384, 384, 0]
    assert shared.tolist() == [576 + 768, 576, 768, 0]
    assert pixels_per_image(dataset).tolist() == [[192, 384, 0, 0], [384, 0, 384, 0]]
    expected = [[True, True, False, False], [True, False, True, False]]
    assert images_with_class(dataset).tolist() == expected


def test_maps_that_cannot_be_read_are_left_out_if_told(tmp_path):
    root = make_folders(tmp_path, columns(0, 1, 2, 255))
    (root / "classes.txt").write_text("sky\nroad\ntree\n")
    dataset = FoldersDataset(root, "train")
    whole, _ = class_frequencies(dataset)
    (root / "labels/train/b.png").write_text("no image")
    for count in (class_frequencies, images_with_class):
        with pytest.raises(DataError, match=r"b\.png: not an image"):
            count(dataset)
    assert class_frequencies(dataset, skip=True)[0].tolist() == (whole // 2).tolist()
    assert images_with_class(dataset, skip=True).tolist() == [[True] * 3, [False] * 3]
    (root / "labels/train/a.png").write_text("no image")
    with pytest.raises(DataError, match=r"a\.png: not an image"):
        class_frequencies(dataset, skip=True)


def test_equals_numpy_on_generated_maps(shapes_root):
    dataset = ShapesDataset(shapes_root, "val", task="semantic", images=24, size=96)
    maps = [dataset[index].target.semantic.numpy() for index in range(len(dataset))]
    expected = np.bincount(np.ravel(maps), minlength=6)
    assert pixels_per_image(dataset).sum(0).tolist() == expected.tolist()


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_classes_that_the_json_tells_are_those_of_the_masks(shapes_root, monkeypatch, task):
    dataset = ShapesDataset(shapes_root, "val", task=task, images=24, size=96)
    expected = [shown_labels(dataset.target(index)).tolist() for index in range(len(dataset))]
    for kind in (CocoDataset, CocoPanopticDataset):
        monkeypatch.setattr(kind, "target", None)  # no mask is decoded
    found = [dataset.labels(index) for index in range(len(dataset))]
    assert [labels.tolist() for labels in found] == expected
    assert all(labels.dtype == torch.int64 for labels in found)
    rows = [row.nonzero().flatten().tolist() for row in images_with_class(dataset)]
    assert rows == expected


def test_label_maps_show_crowds_and_objects_do_not(tmp_path):
    root = make_panoptic(tmp_path)
    content = json.loads((root / "annotations/panoptic_train.json").read_text())
    for annotation in content["annotations"]:  # all persons are crowds
        for segment in annotation["segments_info"]:
            segment["iscrowd"] = int(segment["category_id"] == 7)
    (root / "annotations/panoptic_train.json").write_text(json.dumps(content))
    for task, expected in (("panoptic", [0]), ("semantic", [0, 1])):
        dataset = CocoPanopticDataset(root, "train", task=task)
        assert dataset.labels(0).tolist() == expected
        assert shown_labels(dataset.target(0)).tolist() == expected


def test_presence_among_objects(tmp_path):
    panoptic = CocoPanopticDataset(make_panoptic(tmp_path / "coco"), "train")
    assert images_with_class(panoptic).tolist() == [[True, True, False]] * 2
    boxes = VocDataset(make_voc(tmp_path / "voc"), "train", task="detection")
    present = images_with_class(boxes)
    assert present.shape == (2, 20) and present.sum(1).tolist() == [1, 1]  # no difficult person
    with pytest.raises(ValueError, match="this data set has none"):
        class_frequencies(panoptic)


def test_repeat_factors_are_those_of_the_rarest_class_that_is_shown():
    shown = torch.rand(400, 30) < torch.rand(30).square()
    shown[:5], shown[:, 7] = False, False  # images of nothing, a class of no image
    part = shown.double().mean(0)
    factors = (0.3 / part.clamp(min=1e-12)).sqrt().clamp(min=1)
    expected = torch.where(shown, factors, 1.0).amax(1)
    found = repeat_factors(shown, 0.3)
    assert torch.equal(found, expected) and found.dtype == torch.float64
    assert (found[:5] == 1).all() and found.max() > 1
    assert repeat_factors(torch.zeros(3, 2, dtype=torch.bool), 0.3).tolist() == [1, 1, 1]


def test_rows_are_those_of_the_images_that_were_asked_for(shapes_root):
    dataset = ShapesDataset(shapes_root, "train", task="semantic", images=24, size=32)
    everything = pixels_per_image(dataset)
    images = [23, *range(0, 24, 2), 3, 5, 7, 9, 11, 3]  # more than a thread takes at a time
    assert torch.equal(pixels_per_image(dataset, images=images), everything[images])
    assert pixels_per_image(dataset, images=[]).shape == (0, 6)
