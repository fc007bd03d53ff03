"""COCO's format: what is read, from which layouts."""

from __future__ import annotations

import gc
import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from vitdense.data.base import DataError
from vitdense.data.coco import CocoDataset
from vitdense.data.coco_file import CocoFile


def test_reads_boxes_classes_and_ids(coco):
    coco.content["annotations"].append(
        {"id": 3, "image_id": 5, "category_id": 3, "bbox": [1, 2, 3, 4], "area": 9, "iscrowd": 1}
    )
    dataset = CocoDataset(coco.write(), "train")
    assert dataset.classes == ["cat", "dog"]
    assert dataset.category_ids == [3, 7]
    assert len(dataset) == 2
    empty, full = dataset[0], dataset[1]
    assert (empty.image_id, full.image_id) == (11, 5)
    assert empty.target.boxes.shape == (0, 4) and empty.target.labels.shape == (0,)
    assert full.image.shape == (3, 30, 40) and full.image.dtype == torch.uint8
    assert full.original == (30, 40)
    assert full.target.labels.tolist() == [1, 0, 0]
    assert full.target.boxes.tolist() == [[10, 5, 30, 15], [0, 0, 8, 8], [1, 2, 4, 6]]
    assert full.target.crowd.tolist() == [False, False, True]
    assert full.target.area.tolist() == [200, 64, 9]
    assert full.target.masks is None


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("annotations/instances_train.json", "images/train"),
        ("annotations/instances_train.json", "train"),
        ("train/_annotations.coco.json", "train"),
    ],
)
def test_layouts_are_found(coco, annotations, images):
    coco.file, coco.folder = coco.root / annotations, coco.root / images
    assert len(CocoDataset(coco.write(), "train")) == 2


def test_other_names_through_options(coco):
    coco.file, coco.folder = coco.root / "truth-train.json", coco.root / "photos"
    root = coco.write()
    dataset = CocoDataset(root, "train", annotations="truth-{split}.json", images="photos")
    assert dataset[1].path == root / "photos/b.png"


def test_masks_from_polygons_and_both_kinds_of_rle(coco):
    square = [[10.0, 5.0, 30.0, 5.0, 30.0, 15.0, 10.0, 15.0]]
    runs = {"size": [30, 40], "counts": [30 * 10 + 5, 10, 30 * 30 - 15]}
    for entry, segmentation in zip(coco.content["annotations"], [square, runs], strict=True):
        entry["segmentation"] = segmentation
    masks = CocoDataset(coco.write(), "train", masks=True)[1].target.masks
    assert masks.dtype == torch.bool and masks.shape == (2, 30, 40)
    assert masks[0].sum() == 200 and masks[0, 5:15, 10:30].all()
    assert masks[1].sum() == 10 and masks[1, 5:15, 10].all()


def test_sizes_missing_in_the_file_are_read_from_the_images(coco):
    for entry in coco.content["images"]:
        del entry["width"], entry["height"]
    assert CocoDataset(coco.write(), "train")[0].original == (30, 40)


def test_a_turned_photo_is_turned_only_if_its_truth_was(coco):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((30, 40, 3), dtype=np.uint8)
    pixels[0, :, 0] = 255
    for turned in (False, True):
        image = {"id": 5, "file_name": "t.png", "width": 40, "height": 30}
        if turned:
            image |= {"width": 30, "height": 40}
        coco.content |= {"images": [image], "annotations": []}
        root = coco.write()
        Image.fromarray(pixels).save(root / "images/train/t.png", exif=exif)
        found = CocoDataset(root, "train")[0].image
        assert tuple(found.shape[1:]) == (image["height"], image["width"])
        edge = found[0, :, -1] if turned else found[0, 0]
        assert (edge == 255).all()


def test_boxes_are_cut_or_left_out_with_a_count(coco, caplog):
    coco.content["annotations"] = [
        {"id": i, "image_id": 5, "category_id": 3, "bbox": bbox, "area": 50}
        for i, bbox in enumerate(
            [[30, 20, 20, 20], [5, 5, 0, 9], [5, 5, 9, -1], [50, 0, 9, 9], [1, 1, 5, 5]]
        )
    ]
    with caplog.at_level(logging.WARNING):
        target = CocoDataset(coco.write(), "train")[1].target
    assert target.boxes.tolist() == [[30, 20, 40, 30], [1, 1, 6, 6]]
    text = caplog.text
    assert "2 of 5 boxes without area left out" in text
    assert "1 of 5 boxes wholly outside their images left out" in text
    assert "1 of 5 boxes cut at the edges of their images" in text


def test_annotations_in_any_order_go_to_their_images(coco):
    first, second = coco.content["annotations"]
    second["image_id"] = 11
    coco.content["annotations"] = [first, second]
    dataset = CocoDataset(coco.write(), "train")
    assert dataset[0].target.labels.tolist() == [0]
    assert dataset[1].target.labels.tolist() == [1]


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of pycocotools
@pytest.mark.parametrize(
    ("name", "split", "counts"),
    [
        ("bccd", "train", (205, 2804)),
        ("bccd", "val", (87, 1137)),
        ("coco_open", "train", (80, 770)),
        ("coco_open", "val", (29, 286)),
    ],
)
def test_real_sets_equal_pycocotools(shared: Path, name, split, counts):
    masks = name == "coco_open"
    dataset = CocoDataset(shared / name, split, masks=masks)
    peer = COCO(str(dataset.annotations))
    for index in range(len(dataset)):
        sample = dataset[index]
        truth = peer.imgToAnns[sample.image_id]
        boxes = torch.tensor([entry["bbox"] for entry in truth], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        torch.testing.assert_close(sample.target.boxes, boxes, atol=1e-3, rtol=0)
        if masks:
            for ours, entry in zip(sample.target.masks.numpy(), truth, strict=True):
                assert (ours == peer.annToMask(entry)).all()
    assert (len(dataset), len(peer.anns)) == counts
    ids = [entry["id"] for entry in json.loads(dataset.annotations.read_text())["categories"]]
    assert dataset.category_ids == sorted(ids)


def test_segmentations_are_kept_as_they_are_written(coco):
    """Also by a worker that is spawned, to which the data set is pickled."""
    polygons = [[0.1, 5, 30.123456789, 5.0, 30, 15], [1e-3, 2.5, 7, 8, 9.75, 2]]
    text = {"size": [30, 40], "counts": "abc"}
    for entry, segmentation in zip(coco.content["annotations"], (polygons, text), strict=True):
        entry["segmentation"] = segmentation
    coco.write()
    file = pickle.loads(pickle.dumps(CocoFile(coco.file, coco.folder, segmentations=True)))
    kept = {int(key): file.segmentation(place) for place, key in enumerate(file.ids)}
    assert kept == {entry["id"]: entry["segmentation"] for entry in coco.content["annotations"]}


def test_reading_leaves_the_garbage_collector_as_it_was(coco, monkeypatch):
    """It stands still meanwhile, because it would go through all entries again and again."""
    runs, loads = [], json.loads
    monkeypatch.setattr(json, "loads", lambda text: runs.append(gc.isenabled()) or loads(text))
    CocoDataset(coco.write(), "train")
    assert runs == [False] and gc.isenabled()
    coco.content["annotations"][0]["bbox"] = "here"
    with pytest.raises(DataError, match="has the bbox 'here'"):
        CocoDataset(coco.write(), "train")
    assert gc.isenabled()
    gc.disable()
    try:
        with pytest.raises(DataError):
            CocoDataset(coco.root, "train")
        assert not gc.isenabled()
    finally:
        gc.enable()
