"""ADE20K's instances: class in red, instance in green."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.data.trees import columns, make_ade_instance, save_map
from vitdense.data.ade20k_instance import OBJECTS, Ade20kInstanceDataset
from vitdense.data.base import DataError
from vitdense.testing import check_dataset


def test_objects_and_names(tmp_path):
    dataset = Ade20kInstanceDataset(make_ade_instance(tmp_path), "training")
    assert len(OBJECTS) == len(dataset.classes) == 100
    # facts of the benchmark: bed is label 8 of the 150, flag is 150
    assert (dataset.classes[0], dataset.classes[99]) == ("name 8", "name 150")
    assert dataset.category_ids == list(range(1, 101))
    target = dataset[0].target
    assert target.labels.tolist() == [0, 0, 99]
    assert target.boxes.tolist() == [[0, 0, 8, 24], [8, 0, 16, 24], [16, 0, 24, 24]]
    assert target.area.tolist() == [192] * 3 and not target.crowd.any()
    assert not target.masks[:, :, 24:].any()


def test_keeps_the_contract_and_takes_the_short_split(tmp_path):
    check_dataset(Ade20kInstanceDataset, make_ade_instance(tmp_path), "train")


def test_names_from_the_file_of_categories(tmp_path):
    make_ade_instance(tmp_path)
    pairs = [{"id": k, "name": f"object {k}"} for k in range(1, 101)]
    (tmp_path / "imgCatIds.json").write_text(json.dumps({"images": [], "categories": pairs}))
    dataset = Ade20kInstanceDataset(tmp_path, "training")
    assert dataset.classes[:2] == ["object 1", "object 2"]


def test_instances_that_begin_anew_in_each_class(tmp_path):
    make_ade_instance(tmp_path)
    red, green = columns(4, 4, 9, 9), columns(1, 2, 1, 1)
    path = tmp_path / "annotations_instance/training/a.png"
    save_map(path, np.stack([red, green, red], 2))
    assert Ade20kInstanceDataset(tmp_path, "training")[0].target.labels.tolist() == [3, 3, 8]


def test_an_image_without_objects(tmp_path):
    make_ade_instance(tmp_path)
    empty = np.zeros((24, 32, 3), dtype=np.uint8)
    save_map(tmp_path / "annotations_instance/training/a.png", empty)
    target = Ade20kInstanceDataset(tmp_path, "training")[0].target
    assert target.labels.shape == (0,) and target.masks.shape == (0, 24, 32)
    assert target.boxes.shape == (0, 4)


def test_faults(tmp_path):
    make_ade_instance(tmp_path)
    red = columns(101, 0, 0, 0)
    path = tmp_path / "annotations_instance/training/a.png"
    save_map(path, np.stack([red, red, red], 2))
    with pytest.raises(DataError, match=r"a\.png: has the class 101 in red; classes are 1 to 100"):
        Ade20kInstanceDataset(tmp_path, "training")[0]
    path.unlink()
    with pytest.raises(DataError, match=r"a\.png: no label map for the image a\.jpg \(1 of 2"):
        Ade20kInstanceDataset(tmp_path, "training")
    (tmp_path / "objectInfo150.txt").unlink()
    path.touch()
    with pytest.raises(DataError, match=r"no names .* put ADE20K's objectInfo150\.txt"):
        Ade20kInstanceDataset(tmp_path, "training")
