"""Counts of classes from the truth alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.data.trees import columns, make_folders, make_panoptic, make_voc, save_map
from vitdense.data import images
from vitdense.data.coco_panoptic import CocoPanopticDataset
from vitdense.data.folders import FoldersDataset
from vitdense.data.frequency import count_pixels, images_with_class, pixels_per_image
from vitdense.data.shapes import ShapesDataset
from vitdense.data.voc import VocDataset


def test_counts_of_label_maps(tmp_path, monkeypatch):
    root = make_folders(tmp_path, columns(0, 1, 1, 255))
    save_map(root / "labels/train/b.png", columns(0, 2))
    (root / "classes.txt").write_text("sky\nroad\ntree\ncar\n")
    dataset = FoldersDataset(root, "train")
    monkeypatch.setattr(images, "_decode", None)  # no image is read
    counts = count_pixels(dataset)
    assert counts.dtype == torch.int64 and counts.tolist() == [192 + 384, 384, 384, 0]
    assert pixels_per_image(dataset).tolist() == [[192, 384, 0, 0], [384, 0, 384, 0]]
    expected = [[True, True, False, False], [True, False, True, False]]
    assert images_with_class(dataset).tolist() == expected


def test_equals_numpy_on_generated_maps(shapes_root):
    dataset = ShapesDataset(shapes_root, "val", task="semantic", images=24, size=96)
    maps = [dataset[index].target.semantic.numpy() for index in range(len(dataset))]
    assert count_pixels(dataset).tolist() == np.bincount(np.ravel(maps), minlength=6).tolist()


def test_presence_among_objects(tmp_path):
    panoptic = CocoPanopticDataset(make_panoptic(tmp_path / "coco"), "train")
    assert images_with_class(panoptic).tolist() == [[True, True, False]] * 2
    boxes = VocDataset(make_voc(tmp_path / "voc"), "train", task="detection")
    present = images_with_class(boxes)
    assert present.shape == (2, 20) and present.sum(1).tolist() == [1, 1]  # no difficult person
    with pytest.raises(ValueError, match="this data set has none"):
        count_pixels(panoptic)
