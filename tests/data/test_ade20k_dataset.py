"""ADE20K's layout: labels, classes, layouts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vitdense.data.ade20k import Ade20kDataset
from vitdense.data.base import DataError
from vitdense.data.images import read_labels


def columns(sample) -> list[int]:
    return sample.target.semantic[0, ::10].tolist()


def test_label_zero_is_ignored(ade):
    dataset = Ade20kDataset(ade.root, "training")
    assert dataset.classes == ["sky", "grass", "house"]
    assert dataset.category_ids == [1, 2, 3]
    sample = dataset[0]
    assert columns(sample) == [255, 0, 1, 2]
    assert sample.target.semantic.dtype == torch.uint8
    assert (sample.image_id, sample.original) == ("a", (30, 40))


def test_label_zero_can_be_a_class(ade):
    (ade.root / "classes.txt").write_text("ground\nsky\ngrass\nhouse\n")
    dataset = Ade20kDataset(ade.root, "training", reduce_zero_label=False)
    assert dataset.category_ids == [0, 1, 2, 3]
    assert columns(dataset[0]) == [0, 1, 2, 3]


def test_ignore_label_and_255(ade):
    ade.write_labels("a", np.tile(np.array([255, 1, 9, 3], dtype=np.uint8).repeat(10), (30, 1)))
    dataset = Ade20kDataset(ade.root, "training", ignore_label=9)
    assert columns(dataset[0]) == [255, 0, 255, 2]


@pytest.mark.parametrize("mode", ["P", "I;16"])
def test_palette_and_16_bit_labels(ade, mode):
    labels = np.tile(np.arange(4).repeat(10), (30, 1))
    if mode == "P":
        image = Image.fromarray(labels.astype(np.uint8)).convert("P")
        image.putpalette([200, 10, 10, 0, 0, 0, 9, 9, 9, 100, 100, 100] + [0] * 756)
        image.putdata(labels.ravel().tolist())
    else:
        image = Image.fromarray(labels.astype(np.uint16))
    image.save(ade.labels / "a.png")
    assert columns(Ade20kDataset(ade.root, "training")[0]) == [255, 0, 1, 2]


def test_16_bit_labels_of_a_tiff_in_either_order(ade):
    for mode, kind in (("I;16", "<u2"), ("I;16B", ">u2")):
        labels = np.tile(np.arange(4).repeat(10), (30, 1)).astype(kind)
        path = ade.labels / f"{mode[-1]}.tif"
        Image.frombytes(mode, (40, 30), labels.tobytes()).save(path)
        assert Image.open(path).mode == mode
        assert (read_labels(path) == labels).all()


def test_labels_that_seem_to_begin_with_0_are_told(ade, caplog):
    Ade20kDataset(ade.root, "training")  # holds 0 to 3 for three classes
    assert not caplog.messages
    for name in ("a", "b"):
        ade.write_labels(name, np.tile(np.array([0, 1, 2, 255], np.uint8).repeat(10), (30, 1)))
    Ade20kDataset(ade.root, "training")
    (message,) = caplog.messages
    assert "hold 0 to 2 and not 3, which would be the last class, house; if" in message
    caplog.clear()
    Ade20kDataset(ade.root, "training", reduce_zero_label=False)
    (ade.root / "classes.txt").unlink()
    entries = [{"id": k, "name": name} for k, name in enumerate(["sky", "grass", "house"], 1)]
    (ade.root / "classes.json").write_text(json.dumps(entries))
    Ade20kDataset(ade.root, "training")  # the file tells the labels
    assert not caplog.messages


def test_two_images_of_one_map_are_an_error(ade):
    Image.open(ade.images / "a.jpg").save(ade.images / "a.png")
    with pytest.raises(DataError, match=r"a\.png: is the label map of a\.jpg and of a\.png; take"):
        Ade20kDataset(ade.root, "training")


def test_masks_of_0_and_255_are_not_ignored_as_a_whole(ade):
    (ade.root / "classes.txt").write_text("crack\n")
    for name in ("a", "b"):
        ade.write_labels(name, np.tile(np.array([0, 255], np.uint8).repeat(20), (30, 1)))
    with pytest.raises(DataError, match="hold 0 and 255 alone; for masks take the data set fold"):
        Ade20kDataset(ade.root, "training")
    (ade.labels / "b.png").write_text("no image")  # is for the loader to tell
    with pytest.raises(DataError, match="hold 0 and 255 alone"):
        Ade20kDataset(ade.root, "training")
    ade.write_labels("b", np.ones((30, 40), np.uint8))
    assert columns(Ade20kDataset(ade.root, "training")[1]) == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes.json", json.dumps(["sky", "grass", "house"])),
        (
            "classes.json",
            '{"classes": [{"id": 2, "name": "grass"}, {"id": 1, "name": "sky"}, '
            '{"id": 3, "name": "house"}]}',
        ),
        ("objectInfo150.txt", "Idx\tRatio\tName\n1\t.5\tsky\n2\t.3\tgrass\n3\t.2\thouse\n"),
        ("objectInfo150.csv", "Idx,Ratio,Name\n1,.5,sky\n2,.3,grass\n3,.2,house\n"),
    ],
)  # fmt: skip
def test_files_of_class_names(ade, name, text):
    (ade.root / "classes.txt").unlink()
    (ade.root / name).write_text(text)
    assert Ade20kDataset(ade.root, "training").classes == ["sky", "grass", "house"]


def test_a_named_file_of_classes_and_other_folders(ade):
    (ade.root / "classes.txt").rename(ade.root / "names")
    ade.images.rename(ade.root / "photos")
    ade.labels.rename(ade.root / "maps-training")
    dataset = Ade20kDataset(
        ade.root, "training", classes="names", images="photos", annotations="maps-{split}"
    )
    assert len(dataset) == 2 and columns(dataset[1]) == [255, 0, 1, 2]


def test_missing_class_names_say_what_to_write(ade):
    (ade.root / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"write classes.txt .* hold the labels 0, 1, 2, 3"):
        Ade20kDataset(ade.root, "training")


def test_class_ids_that_begin_at_zero_name_the_option(ade):
    entries = [{"id": i, "name": f"c{i}"} for i in range(4)]
    (ade.root / "classes.json").write_text(json.dumps({"classes": entries}))
    with pytest.raises(DataError, match="set reduce_zero_label: false"):
        Ade20kDataset(ade.root, "training")


@pytest.mark.parametrize(("name", "classes"), [("aerial_dubai", 5), ("coco_scene", 133)])
@pytest.mark.parametrize("split", ["training", "validation"])
def test_real_sets_load_fully(shared, name, classes, split):
    dataset = Ade20kDataset(shared / name, split)
    assert len(dataset.classes) == classes
    for index in range(len(dataset)):
        sample = dataset[index]
        raw = np.array(Image.open(dataset.annotations / f"{sample.image_id}.png"))
        expected = np.where(raw == 0, 255, raw.astype(int) - 1)
        assert (sample.target.semantic.numpy() == expected).all()
        assert sample.image.shape[1:] == sample.target.semantic.shape
