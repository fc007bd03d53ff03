"""The built-in data set: the same everywhere, and all its truths say the same."""

from __future__ import annotations

import hashlib
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitdense.data.ade20k import Ade20kDataset
from vitdense.data.base import DataError
from vitdense.data.coco import CocoDataset
from vitdense.data.shape_images import CLASSES, make_scene
from vitdense.data.shapes import ShapesDataset, make_shapes
from vitdense.ops.masks import masks_to_boxes

SMALL = {"images": 24, "size": 96}


def digest(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return found.hexdigest()


def make(root: Path) -> None:
    make_shapes(root, 8, 48, 0)


def test_the_same_for_the_same_options(tmp_path):
    for name in "ab":
        make(tmp_path / name)
    make_shapes(tmp_path / "a", 8, 48, seed=1)
    first, other = sorted((tmp_path / "a").iterdir())
    assert digest(first) == digest(tmp_path / "b" / first.name)
    assert digest(first) != digest(other)


def test_a_picture_depends_on_its_own_number_alone(tmp_path):
    short, long = (make_shapes(tmp_path, count, 48, 0) for count in (6, 12))
    for path in (short / "images/train").iterdir():
        assert path.read_bytes() == (long / "images/train" / path.name).read_bytes()


def test_made_once_and_nothing_is_left_over(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        make(tmp_path)
        make(tmp_path)
    assert caplog.text.count("making the data set shapes") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["8x48px-seed0-v3"]


def test_makers_at_once_agree(tmp_path):
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(make, [tmp_path / "both"] * 3))
    make(tmp_path / "alone")
    (folder,) = (tmp_path / "both").iterdir()
    assert digest(folder) == digest(tmp_path / "alone" / folder.name)


def test_all_truths_agree(shapes_root):
    instances = ShapesDataset(shapes_root, "train", task="instance", **SMALL)
    semantic = ShapesDataset(shapes_root, "train", task="semantic", **SMALL)
    assert instances.classes == list(CLASSES)
    assert semantic.classes == ["background", *CLASSES]
    assert len(instances) == len(semantic) == 24
    panoptic = json.loads((instances.folder / "annotations/panoptic_train.json").read_text())
    for index, entry in enumerate(panoptic["annotations"]):
        objects, labels = instances[index].target, semantic[index].target.semantic
        assert torch.equal(objects.boxes, masks_to_boxes(objects.masks))
        assert torch.equal(objects.area, objects.masks.flatten(1).sum(1).float())
        assert (objects.area >= 20).all()
        assert not (objects.masks.sum(0) > 1).any()
        painted = torch.zeros_like(labels)
        for mask, label in zip(objects.masks, objects.labels, strict=True):
            painted[mask] = label + 1
        assert torch.equal(painted, labels)
        png = np.array(
            Image.open(instances.folder / "annotations/panoptic_train" / entry["file_name"])
        )
        ids = png.astype(int) @ [1, 256, 65536]
        assert set(np.unique(ids)) == {segment["id"] for segment in entry["segments_info"]}
        for segment in entry["segments_info"]:
            found = labels.numpy()[ids == segment["id"]]
            assert (found == segment["category_id"]).all()
            assert len(found) == segment["area"]


def test_its_files_are_read_by_coco_and_ade20k_too(shapes_root):
    folder = ShapesDataset(shapes_root, "val", **SMALL).folder
    assert CocoDataset(folder, "val", masks=True)[0].target.masks is not None
    assert Ade20kDataset(folder, "val", reduce_zero_label=False).classes[0] == "background"


def test_pictures_are_varied():
    scenes = [make_scene(64, np.random.default_rng(index)) for index in range(60)]
    counts = np.array([len(scene.labels) for scene in scenes])
    assert counts.min() == 0 and counts.max() >= 5
    labels = np.concatenate([scene.labels for scene in scenes])
    assert np.bincount(labels.astype(int), minlength=5).min() > 0.1 * len(labels)
    areas = np.concatenate([np.bincount(scene.layers.ravel())[1:] for scene in scenes])
    assert areas.max() > 8 * areas.min()


def test_channels_reach_the_files(shapes_root):
    dataset = ShapesDataset(shapes_root, "val", **SMALL)
    dataset.channels = 1
    assert dataset[0].image.shape == (1, 96, 96)


def test_wrong_options_and_splits(shapes_root, tmp_path):
    with pytest.raises(ValueError, match="size: 8 is too small"):
        ShapesDataset(shapes_root, "train", size=8)
    with pytest.raises(DataError, match="has the splits train and val, not 'test'"):
        ShapesDataset(shapes_root, "test", **SMALL)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written .*; set data.root"):
        ShapesDataset(tmp_path / "file", "train", **SMALL)
