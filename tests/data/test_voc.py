"""Pascal VOC: palettes with a border, objects, boxes that count from 1."""

from __future__ import annotations

import pytest

from tests.data.trees import XML, make_voc
from vitdense.data.base import DataError
from vitdense.data.voc import VocDataset
from vitdense.testing import check_dataset


@pytest.mark.parametrize("task", ["semantic", "instance", "detection"])
def test_keeps_the_contract(tmp_path, task):
    check_dataset(VocDataset, make_voc(tmp_path), "train", task=task)


def test_semantic(tmp_path):
    dataset = VocDataset(make_voc(tmp_path), "train")
    assert len(dataset.classes) == 21 and dataset.classes[12] == "dog"
    assert dataset.category_ids == list(range(21))
    assert [dataset[k].image_id for k in range(len(dataset))] == ["a", "c"]
    assert dataset[0].target.semantic[0, ::4].tolist() == [0, 255, 12, 15, 15, 0, 0, 0]


def test_instances(tmp_path):
    dataset = VocDataset(make_voc(tmp_path), "train", task="instance")
    target = dataset[0].target
    assert [dataset.classes[k] for k in target.labels] == ["dog", "person", "person"]
    assert [dataset.category_ids[k] for k in target.labels] == [12, 15, 15]
    assert target.boxes[:, [0, 2]].tolist() == [[8, 12], [12, 16], [16, 20]]


def test_boxes_count_from_one_and_difficult_ones_are_crowds(tmp_path):
    dataset = VocDataset(make_voc(tmp_path), "train", task="detection")
    target = dataset[1].target
    assert [dataset.classes[k] for k in target.labels] == ["dog", "person"]
    # the part of the dog is none of its own; the second box is cut at the image's edge
    assert target.boxes.tolist() == [[0, 0, 8, 24], [8.5, 2, 32, 3]]
    assert target.crowd.tolist() == [False, True]
    assert target.area.tolist() == [192, 23.5]


def test_boxes_agree_with_masks(tmp_path):
    root = make_voc(tmp_path)
    one = VocDataset(root, "train", task="instance").target(0)
    corners = ("xmin", "ymin", "xmax", "ymax")
    x1, y1, x2, y2 = one.boxes[0].int().tolist()
    values = (x1 + 1, y1 + 1, x2, y2)  # VOC's numbers of the first and the last pixel
    text = "".join(f"<{key}>{value}</{key}>" for key, value in zip(corners, values, strict=True))
    body = f"<annotation><object><name>dog</name><bndbox>{text}</bndbox></object></annotation>"
    (root / "Annotations/a.xml").write_text(body)
    boxes = VocDataset(root, "train", task="detection").target(0).boxes
    assert boxes.tolist() == one.boxes[:1].tolist()


def test_classes_of_ones_own(tmp_path):
    root = make_voc(tmp_path)
    (root / "Annotations/a.xml").write_text(XML.replace("dog", "crack"))
    with pytest.raises(DataError, match=r"a\.xml: has an object 'crack', .* in .*classes\.txt"):
        VocDataset(root, "train", task="detection")[0]
    (root / "classes.txt").write_text("crack\nperson\ndog\n")
    dataset = VocDataset(root, "train", task="detection")
    assert dataset.classes == ["crack", "person", "dog"]
    assert dataset[0].target.labels.tolist() == [0, 1]


def test_faults(tmp_path):
    root = make_voc(tmp_path / "VOCdevkit/VOC2012")
    with pytest.raises(DataError, match=r"no such list of images; set data\.root to .*VOC2012"):
        VocDataset(tmp_path, "train")
    with pytest.raises(DataError, match=r"val\.txt: no such list .* there are the splits train"):
        VocDataset(root, "val")
    with pytest.raises(DataError, match="leads out of"):
        VocDataset(root, "../../../secret")
    lists = root / "ImageSets/Segmentation/train.txt"
    for text, message in (
        ("a\nz\n", r"z\.jpg: no such image, though the split 'train' lists it \(1 of 2"),
        ("a\na\n", "lists 'a' twice"),
        ("../a\n", "must be the name of an image"),
        ("\n", "lists no images"),
    ):
        lists.write_text(text)
        with pytest.raises(DataError, match=message):
            VocDataset(root, "train")
    (root / "Annotations/c.xml").write_text("<annotation><object>")
    with pytest.raises(DataError, match=r"c\.xml: is not valid XML"):
        VocDataset(root, "train", task="detection")[1]
    (root / "Annotations/c.xml").unlink()
    with pytest.raises(DataError, match=r"c\.xml: no label map for the image c"):
        VocDataset(root, "train", task="detection")
