"""Each fault of a data set is one message that names the file, the fault and the remedy."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitdense.data.ade20k import Ade20kDataset
from vitdense.data.base import DataError
from vitdense.data.coco import CocoDataset


def message(function) -> str:
    with pytest.raises(DataError) as caught:
        function()
    text = str(caught.value)
    assert "\n" not in text
    return text


def coco_message(coco, masks: bool = False) -> str:
    """Whatever is wrong in the file, or in reading image b."""
    root = coco.root if coco.file.exists() else coco.write()
    return message(lambda: CocoDataset(root, "train", masks=masks)[1])


def test_missing_image(coco):
    (coco.write() / "images/train/b.png").unlink()
    assert re.search(
        r"images/train/b\.png: no such image, though .*instances_train\.json lists it "
        r"\(1 of 2 images are missing\); add them or correct `file_name`",
        coco_message(coco),
    )


@pytest.mark.parametrize("name", ["b.jpg", "b.png"])
def test_truncated_image(coco, name):
    coco.content["images"][1]["file_name"] = name
    path = coco.write() / "images/train" / name
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-300])
    text = coco_message(coco)
    assert re.search(rf"{name}: cannot be decoded \(.*truncated.*\); replace the file", text)


def test_not_an_image(coco):
    (coco.write() / "images/train/b.png").write_text("<html>not found</html>")
    assert "b.png: not an image that Pillow can read; replace it" in coco_message(coco)


def test_unknown_category(coco):
    coco.content["annotations"][0]["category_id"] = 9
    assert (
        "instances_train.json: annotation 1 has category_id 9, but `categories` lists 3, 7; "
        "add the category or correct the annotation" in coco_message(coco)
    )


@pytest.mark.parametrize("bbox", [[1, 2, float("nan"), 4], [1, 2, 3], None, ["a", 1, 2, 3]])
def test_boxes_that_are_no_four_finite_numbers(coco, bbox):
    coco.content["annotations"][1]["bbox"] = bbox
    text = coco_message(coco)
    assert "instances_train.json: annotation 2 has the bbox" in text
    assert "it must be [x, y, width, height], four finite numbers of pixels" in text


def test_empty_annotation_file(coco):
    (coco.write() / "annotations/instances_train.json").write_text(" \n")
    text = coco_message(coco)
    assert "instances_train.json: the file is empty; export the annotations again" in text


def test_invalid_json_with_line_and_column(coco):
    (coco.write() / "annotations/instances_train.json").write_text('{"images": [\n  {"id": 1,}\n]}')
    text = coco_message(coco)
    assert re.search(r"instances_train\.json: is not valid JSON at line 2, column \d+", text)


def test_json_of_another_kind(coco):
    (coco.write() / "annotations/instances_train.json").write_text("[1, 2]")
    assert "holds a list, not COCO's mapping of `images`" in coco_message(coco)


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_missing_lists(coco, key):
    del coco.content[key]
    assert f"`{key}` must be a list of mappings, as in COCO's format" in coco_message(coco)


@pytest.mark.parametrize("key", ["images", "categories"])
def test_empty_lists(coco, key):
    coco.content[key] = []
    assert f"instances_train.json: `{key}` is empty" in coco_message(coco)


def test_duplicate_image_ids(coco):
    coco.content["images"][0]["id"] = 5
    assert "two images have the id 5; ids must be unique" in coco_message(coco)


def test_annotation_of_an_unknown_image(coco):
    coco.content["annotations"][0]["image_id"] = 99
    assert (
        "annotation 1 belongs to image 99, which `images` does not list; "
        "add the image or remove the annotation" in coco_message(coco)
    )


def test_image_of_another_size_than_the_annotation_says(coco):
    coco.content["images"][1]["width"] = 50
    assert "b.png: is 40 x 30 pixels, but its annotation was made for 50 x 30" in coco_message(coco)


def test_mask_of_another_size(coco):
    for entry in coco.content["annotations"]:
        entry["segmentation"] = {"size": [15, 20], "counts": [0, 300]}
    text = coco_message(coco, masks=True)
    assert "annotation 1: an RLE of size [15, 20] does not fit an image of [30, 40]" in text


def test_masks_wanted_but_not_there(coco):
    assert re.search("annotation 1: segmentation is missing: give a list", coco_message(coco, True))


def test_masks_that_are_all_empty(coco, caplog):
    for entry in coco.content["annotations"]:
        entry["segmentation"] = []
    assert re.search("instances_train.json: .* boxes alone; leave out", coco_message(coco, True))
    coco.content["annotations"][0]["segmentation"] = [[1, 1, 9, 1, 9, 9]]
    CocoDataset(coco.write(), "train", masks=True)
    assert "annotations have boxes but no mask" in caplog.text


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "deep/../../val/x.png"])
def test_paths_that_leave_the_root(coco, name):
    coco.content["images"][1]["file_name"] = name
    text = coco_message(coco)
    assert f"instances_train.json: the image '{name}' leads out of" in text
    assert "file names must be relative and stay inside it, links too" in text


def test_links_that_leave_the_root(coco, tmp_path):
    (tmp_path / "secret.png").write_bytes((coco.write() / "images/train/a.png").read_bytes())
    (coco.folder / "b.png").unlink()
    (coco.folder / "b.png").symlink_to(tmp_path / "secret.png")
    assert "the image 'b.png' leads out of" in coco_message(coco)


def test_an_image_of_a_billion_pixels(coco):
    coco.content["images"][1] |= {"width": 40_000, "height": 30_000}
    path: Path = coco.write() / "images/train/b.png"
    header = b"IHDR" + struct.pack(">IIBBBBB", 40_000, 30_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
    path.write_bytes(data + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IDAT")
    text = coco_message(coco)
    assert re.search(r"b\.png: more than \d+ million pixels, .*; cut it into tiles", text)


def test_label_above_the_class_count(ade):
    labels = np.full((30, 40), 2, dtype=np.uint8)
    labels[3, 4] = 7
    path = ade.write_labels("b", labels)
    text = message(lambda: Ade20kDataset(ade.root, "training")[1])
    assert text.startswith(f"{path}: has the label 7, but 3 classes are labels 1 to 3")
    assert "`ignore_label`" in text and "`reduce_zero_label`" in text


def test_label_map_of_another_size(ade):
    ade.write_labels("a", np.ones((15, 20), dtype=np.uint8))
    text = message(lambda: Ade20kDataset(ade.root, "training")[0])
    assert "a.jpg: is 40 x 30 pixels, but its annotation was made for 20 x 15" in text


def test_missing_label_map(ade):
    (ade.labels / "b.png").unlink()
    text = message(lambda: Ade20kDataset(ade.root, "training"))
    assert re.search(r"training/b\.png: no label map for the image b\.jpg \(1 of 2 are", text)


def test_a_truncated_label_map(ade):
    path = ade.write_labels("b", np.random.default_rng(0).integers(1, 4, (30, 40), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:-150])
    text = message(lambda: Ade20kDataset(ade.root, "training")[1])
    assert "b.png: cannot be decoded" in text


def test_missing_root_and_unknown_split(coco, tmp_path):
    text = message(lambda: CocoDataset(tmp_path / "nowhere", "train"))
    assert text.endswith("nowhere: no such folder; set data.root to the data set's folder")
    text = message(lambda: CocoDataset(coco.write(), "valid"))
    assert (
        "no split 'valid': looked for annotations/instances_valid.json with images/valid/" in text
    )
    assert text.endswith("there are the splits train: name them by data.train and data.val")
    coco.folder.rename(tmp_path / "photos")
    for split in ("train", "val"):
        text = message(lambda split=split: CocoDataset(coco.root, split))
        assert "instances_train.json is there: name its split by data.train" in text
        assert text.endswith("and the folder of its images by data.dataset.images")


def test_the_users_files_stay_as_they_are(coco):
    root = coco.write()
    before = {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
    dataset = CocoDataset(root, "train")
    assert all(dataset[index].image.any() for index in range(2))
    assert before == {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
