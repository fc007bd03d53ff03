"""Cityscapes: 19 classes from labels, 8 things from instances, groups as crowds."""

from __future__ import annotations

import numpy as np
import pytest

from tests.data.trees import columns, make_cityscapes, save_map
from vitdense.data.base import DataError
from vitdense.data.cityscapes import CityscapesDataset
from vitdense.testing import check_dataset


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_keeps_the_contract(tmp_path, task):
    check_dataset(CityscapesDataset, make_cityscapes(tmp_path), "train", task=task)


def test_semantic(tmp_path):
    dataset = CityscapesDataset(make_cityscapes(tmp_path), "train")
    assert len(dataset) == 2 and len(dataset.classes) == 19
    assert dataset.category_ids == [7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]
    sample = dataset[1]
    # labels that are no class, and void, are ignored
    assert sample.target.semantic[0, ::4].tolist() == [0, 13, 13, 13, 255, 255, 10, 255]
    assert sample.image_id == "ulm_000000_000019" and sample.path.parent.name == "ulm"


def test_instances_and_their_groups(tmp_path):
    dataset = CityscapesDataset(make_cityscapes(tmp_path), "train", task="instance")
    assert dataset.classes[2] == "car" and len(dataset.classes) == 8
    assert dataset.category_ids == [24, 25, 26, 27, 28, 31, 32, 33]
    target = dataset[0].target
    assert target.labels.tolist() == [2, 2, 2]
    assert target.crowd.tolist() == [True, False, False]
    assert target.boxes[:, 0].tolist() == [12, 4, 8]


def test_panoptic(tmp_path):
    dataset = CityscapesDataset(make_cityscapes(tmp_path), "train", task="panoptic")
    assert sum(dataset.things) == 8 and dataset.things[:11] == [False] * 11
    target = dataset[0].target
    names = [dataset.classes[label] for label in target.labels]
    assert names == ["road", "sky", "car", "car", "car"]
    assert target.crowd.tolist() == [False, False, True, False, False]
    assert target.masks.sum((1, 2)).tolist() == [96] * 5


def test_coarse_truth(tmp_path):
    root = make_cityscapes(tmp_path, "gtCoarse")
    assert len(CityscapesDataset(root, "train", truth="gtCoarse")) == 2
    with pytest.raises(DataError, match=r"looked for leftImg8bit/train/ with gtFine/train/"):
        CityscapesDataset(root, "train")


def test_faults(tmp_path):
    root = make_cityscapes(tmp_path)
    path = root / "gtFine/train/ulm/ulm_000000_000019_gtFine_labelIds.png"
    save_map(path, columns(7, 34))
    with pytest.raises(DataError, match=r"labelIds\.png: has the label 34, but those of Citysc"):
        CityscapesDataset(root, "train")[1]
    path.unlink()
    with pytest.raises(DataError, match=r"labelIds\.png: no label map for the image ulm_000000"):
        CityscapesDataset(root, "train")
    assert len(CityscapesDataset(root, "train", task="instance")) == 2
    image = root / "leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png"
    other = np.zeros((10, 10), dtype=np.uint8)
    save_map(image, other)
    with pytest.raises(DataError, match="is 10 x 10 pixels, but its annotation was made for 32 x"):
        CityscapesDataset(root, "train", task="instance")[1]
