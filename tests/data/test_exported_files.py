"""What label tools write beside COCO's own way: refused with the remedy, or read for what it is."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from PIL import Image

from tests.data.trees import XML, make_voc
from vitdense.data.base import DataError
from vitdense.data.coco import CocoDataset
from vitdense.data.voc import VocDataset
from vitdense.metrics.coco_files import read_truth


def refused(coco, masks: bool = False) -> str:
    root = coco.write()
    with pytest.raises(DataError) as caught:
        CocoDataset(root, "train", masks=masks)
    return str(caught.value)


def of_all(coco, key: str, name: str, value) -> None:
    for entry in coco.content[key]:
        entry[name] = value(entry.get(name))


@pytest.mark.parametrize("key", ["image_id", "category_id"])
def test_ids_that_are_texts_on_one_side(coco, key):
    of_all(coco, "annotations", key, str)
    text = refused(coco)
    assert (
        f"annotation 1 {'belongs to image' if key == 'image_id' else 'has category_id'} '" in text
    )
    assert text.endswith("one is a text and the other a number: write both as numbers")


def test_ids_that_are_no_whole_numbers(coco):
    of_all(coco, "images", "id", float)
    assert "must all be whole numbers, or all texts, not float" in refused(coco)
    of_all(coco, "images", "id", int)
    for odd in (7.5, "7", None, "dog"):
        coco.content["categories"][0]["id"] = odd
        assert f"one has the id {odd!r} and the name 'dog'" in refused(coco)
    coco.content["categories"][0]["id"] = 7.0
    assert CocoDataset(coco.write(), "train").category_ids == [3, 7]


@pytest.mark.parametrize("flag", ["0", "false", 2, []])
def test_flags_of_crowds_that_may_mean_either(coco, flag):
    coco.content["annotations"][0]["iscrowd"] = flag
    assert f"annotation 1 has the iscrowd {flag!r}; it must be 0 or 1" in refused(coco)
    with pytest.raises(DataError, match="iscrowd .*; it must be 0 or 1"):
        read_truth(coco.file, "bbox")


def test_areas(coco):
    of_all(coco, "annotations", "area", lambda _: None)
    assert CocoDataset(coco.write(), "train").target(1).area.tolist() == [200, 64]
    for odd in ("big", float("nan"), [3]):
        coco.content["annotations"][1]["area"] = odd
        assert f"annotation 2 has the area {odd!r}; it must be a finite number" in refused(coco)


@pytest.mark.parametrize("bbox", ["1234", ["1", "2", "3", "4"], {"x": 1}])
def test_boxes_of_texts(coco, bbox):
    coco.content["annotations"][0]["bbox"] = bbox
    assert f"annotation 1 has the bbox {bbox!r}; it must be [x, y, width, height]" in refused(coco)


def test_boxes_in_fractions_of_the_image(coco):
    of_all(coco, "annotations", "bbox", lambda _: [0.1, 0.2, 0.5, 0.25])
    assert "so they are fractions of the images; multiply them by `width`" in refused(coco)


def test_files_of_which_nothing_would_be_learnt(coco, caplog):
    of_all(coco, "annotations", "iscrowd", lambda _: 1)
    CocoDataset(coco.write(), "train")
    assert "2 of 2 annotations are crowds (iscrowd: 1): training drops them" in caplog.text
    of_all(coco, "annotations", "bbox", lambda box: [1000 + box[0], *box[1:]])
    assert "no bbox is left; they must be [x, y, width, height]" in refused(coco)


def test_ids_of_images_beyond_64_bits(coco):
    coco.content["images"][0]["id"] = 2**100
    assert CocoDataset(coco.write(), "train")[0].image_id == 2**100


def test_two_categories_of_one_name(coco):
    """The group of all classes, which Roboflow lists as a category, has no objects."""
    coco.content["categories"].append({"id": 0, "name": "cat", "supercategory": "none"})
    assert CocoDataset(coco.write(), "train").classes == ["cat", "cat", "dog"]
    coco.content["annotations"][0]["category_id"] = 0
    assert "categories 0 and 3 are both called 'cat' and have objects" in refused(coco)


@pytest.mark.parametrize(
    ("listed", "there"),
    [
        ("images\\b.png", "b.png"),
        ("..\\images\\b.png", "b.png"),
        ("images/train/b.png", "b.png"),
        ("https://example.org/b.png", "b.png"),
        ("my%20photo.png", "my photo.png"),
        ("B.PNG", "b.png"),
        ("sub\\b.png", "sub/b.png"),
    ],
)
def test_names_of_images_that_are_written_otherwise(coco, listed, there):
    coco.content["images"][1]["file_name"] = listed
    coco.write()
    (coco.folder / "sub").mkdir()
    (coco.folder / "b.png").rename(coco.folder / there)
    with pytest.raises(DataError) as caught:
        CocoDataset(coco.root, "train")
    assert f"there is {there!r}, not {listed!r}: correct `file_name`, or name" in str(caught.value)


def test_accents_of_other_code_points(coco):
    composed = "café.png"
    coco.content["images"][1]["file_name"] = composed
    coco.write()
    (coco.folder / "b.png").rename(coco.folder / unicodedata.normalize("NFD", composed))
    with pytest.raises(DataError, match=r"there is 'cafe\\u0301.png', not 'caf\\xe9.png'"):
        CocoDataset(coco.root, "train")


def test_masks_that_cover_nothing_or_are_missing_show_at_the_start(coco):
    of_all(coco, "annotations", "segmentation", lambda _: [[1, 2, 3, 4]])
    assert "the segmentation of every annotation is empty" in refused(coco, masks=True)
    of_all(coco, "annotations", "segmentation", lambda _: [[1, 2, 9, 2, 9, 9]])
    del coco.content["annotations"][1]["segmentation"]
    text = refused(coco, masks=True)
    assert "annotation 2: segmentation is missing: give a list of polygons" in text
    assert "1 of 2 have none" in text


def test_voc_tells_the_size_that_its_boxes_are_for(tmp_path):
    root = make_voc(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 24, 3), dtype=np.uint8)
    on_its_side = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    on_its_side.save(root / "JPEGImages/a.jpg", exif=exif)
    on_its_side.save(root / "JPEGImages/c.jpg")
    dataset = VocDataset(root, "train", task="detection")
    assert dataset[0].image.shape[1:] == dataset[0].original == (24, 32)
    assert dataset.target(0).boxes.tolist() == dataset[0].target.boxes.tolist()
    with pytest.raises(DataError, match=r"c\.jpg: is 24 x 32 pixels, .* made for 32 x 24"):
        dataset[1]
    unknown = XML.replace("<width>32</width>", "<width>0</width>")
    (root / "Annotations/c.xml").write_text(unknown)
    assert dataset[1].original == (32, 24)
