"""Label images of any kind: numbers, palettes, colors, masks; folders and lists."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from tests.data.trees import columns, make_folders, picture, save_map
from vitdense.data.ade20k import Ade20kDataset
from vitdense.data.base import DataError
from vitdense.data.folders import FoldersDataset
from vitdense.testing import check_dataset

ROAD, TREE, GREY = (110, 193, 228), (254, 221, 58), (155, 155, 155)


def row(dataset, index: int = 0) -> list[int]:
    return dataset[index].target.semantic[0, ::8].tolist()


def painted(*colors: tuple[int, int, int]) -> np.ndarray:
    return np.array(colors, dtype=np.uint8)[columns(*range(len(colors)))]


def write_classes(root, *entries) -> None:
    (root / "classes.json").write_text(json.dumps({"classes": list(entries)}))


@pytest.mark.parametrize("palette", [False, True])
def test_numbers_from_zero(tmp_path, palette):
    root = make_folders(tmp_path, columns(0, 1, 2, 255), palette)
    (root / "classes.txt").write_text("sky\nroad\ntree\n")
    dataset = FoldersDataset(root, "train")
    assert dataset.classes == ["sky", "road", "tree"] and dataset.category_ids == [0, 1, 2]
    assert row(dataset) == [0, 1, 2, 255] and dataset[1].image_id == "b"
    check_dataset(FoldersDataset, root, "train")


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_numbers_with_gaps(tmp_path, kind):
    high = 4000 if kind is np.uint16 else 200
    root = make_folders(tmp_path, columns(high, 7, 7, 9, kind=kind))
    write_classes(root, {"id": high, "name": "sky"}, {"id": 7, "name": "road"})
    dataset = FoldersDataset(root, "train", ignore=[9])
    assert row(dataset) == [0, 1, 1, 255] and dataset.category_ids == [high, 7]
    message = r"a\.png: has the label 9, but the classes are labels \d+, 7; name its class in .*js"
    with pytest.raises(DataError, match=message):
        FoldersDataset(root, "train")[0]


def test_text_in_another_encoding(tmp_path):
    root = make_folders(tmp_path, columns(0, 1))
    (root / "classes.txt").write_bytes("Straße\nHaus\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"classes\.txt: is not UTF-8 text; save it as UTF-8"):
        FoldersDataset(root, "train")
    (root / "train.txt").write_bytes("Straße\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"train\.txt: is not UTF-8 text; save it as UTF-8"):
        FoldersDataset(root, "train", annotations="labels/train", images="images/train")


def test_labels_below_zero(tmp_path):
    root = make_folders(tmp_path, columns(0, 1))
    (root / "classes.txt").write_text("rest\nroad\n")
    for name in ("a", "b"):
        np.save(root / f"labels/train/{name}.npy", columns(0, -1, kind=np.int16))
    with pytest.raises(DataError, match=r"a\.npy: has the label -1, but labels begin with 0; save"):
        FoldersDataset(root, "train", label_suffix=".npy")[0]


def test_a_class_can_be_ignored_by_label_or_color(tmp_path):
    root = make_folders(tmp_path, columns(0, 1, 2, 255))
    (root / "classes.txt").write_text("rest\nroad\ntree\n")
    assert row(FoldersDataset(root, "train", ignore=[0])) == [255, 1, 2, 255]
    root = make_folders(tmp_path / "painted", painted(ROAD, TREE, GREY, ROAD))
    colors = {"road": "#6ec1e4", "tree": "#fedd3a", "rest": "#9b9b9b"}
    dataset = FoldersDataset(root, "train", colors=colors, ignore=["#9b9b9b"])
    assert row(dataset) == [0, 1, 255, 0]


@pytest.mark.parametrize("source", ["json", "list", "csv", "option"])
def test_colors(tmp_path, source):
    root = make_folders(tmp_path, painted(ROAD, TREE, GREY, ROAD))
    options = {"ignore": ["#9b9b9b"]}
    if source == "csv":
        (root / "class_dict.csv").write_text("name,r,g,b\nroad,110,193,228\ntree,254, 221, 58\n")
    elif source == "option":
        options["colors"] = {"road": "#6ec1e4", "tree": "#FEDD3A"}
    else:
        road = "#6EC1E4" if source == "json" else list(ROAD)
        write_classes(root, {"name": "road", "color": road}, {"name": "tree", "color": list(TREE)})
    dataset = FoldersDataset(root, "train", **options)
    assert dataset.classes == ["road", "tree"] and dataset.category_ids == [0, 1]
    assert row(dataset) == [0, 1, 255, 0]
    del options["ignore"]
    message = r"a\.png: has 1 colors of no class, as #9b9b9b in 192 pixels; name its class in"
    with pytest.raises(DataError, match=message):
        FoldersDataset(root, "train", **options)[0]


def test_colors_of_palettes_and_of_classes_with_both(tmp_path):
    root = make_folders(tmp_path, columns(0, 1, 0, 1), palette=True)
    first, second = [0, 37, 74], [111, 148, 185]  # of the palette
    write_classes(root, {"name": "road", "color": second}, {"name": "tree", "color": first})
    assert row(FoldersDataset(root, "train")) == [1, 0, 1, 0]
    write_classes(root, {"name": "road", "color": second, "id": 0}, {"name": "tree", "id": 1})
    assert row(FoldersDataset(root, "train")) == [0, 1, 0, 1]
    save_map(root / "labels/train/a.png", painted((111, 148, 185), (111, 148, 185)))
    assert row(FoldersDataset(root, "train")) == [0, 0, 0, 0]


@pytest.mark.parametrize("high", [1, 255, 65535])
@pytest.mark.parametrize("names", ["crack\n", "wall\ncrack\n"])
def test_binary_masks(tmp_path, high, names):
    kind = np.uint16 if high > 255 else np.uint8
    root = make_folders(tmp_path, columns(0, high, 0, high, kind=kind))
    (root / "classes.txt").write_text(names)
    dataset = FoldersDataset(root, "train", binary=True)
    assert dataset.classes == (["background", "crack"] if names == "crack\n" else ["wall", "crack"])
    assert row(dataset) == [0, 1, 0, 1]


def test_binary_masks_in_color_and_with_loss(tmp_path):
    root = make_folders(tmp_path, painted((0, 0, 0), (255, 255, 255)))
    (root / "classes.txt").write_text("crack\n")
    mask = Image.open(root / "labels/train/b.png").convert("L")
    mask.save(root / "labels/train/b.jpg", quality=60)
    for suffix in (".png", ".jpg"):
        if suffix == ".jpg":
            Image.open(root / "labels/train/a.png").save(root / "labels/train/a.jpg", quality=60)
        dataset = FoldersDataset(root, "train", binary=True, label_suffix=suffix)
        assert row(dataset, 0) == row(dataset, 1) == [0, 0, 1, 1]


def test_binary_masks_are_read_file_by_file_by_one_rule(tmp_path):
    root = make_folders(tmp_path, columns(0, 100))  # b.png is like that too
    (root / "classes.txt").write_text("crack\n")
    save_map(root / "labels/train/b.png", columns(0, 3000, kind=np.uint16))
    dataset = FoldersDataset(root, "train", binary=True)
    assert row(dataset, 0) == row(dataset, 1) == [0, 0, 1, 1]
    for name, high in (("a", 1), ("b", 255)):  # an empty mask has noise of 1
        Image.fromarray(columns(0, high)).save(root / f"labels/train/{name}.jpg", quality=95)
    dataset = FoldersDataset(root, "train", binary=True, label_suffix=".jpg")
    assert row(dataset, 0) == [0, 0, 0, 0] and row(dataset, 1) == [0, 0, 1, 1]


def test_masks_that_would_pass_for_ignored_pixels_are_refused(tmp_path):
    root = make_folders(tmp_path, columns(0, 255))
    (root / "classes.txt").write_text("background\ncrack\n")
    with pytest.raises(DataError, match="hold 0 and 255 alone: set binary: true"):
        FoldersDataset(root, "train")
    write_classes(root, {"id": 0, "name": "wall"}, {"id": 255, "name": "crack"})
    assert row(FoldersDataset(root, "train")) == [0, 0, 1, 1]


@pytest.mark.parametrize("dataset", [FoldersDataset, Ade20kDataset])
def test_maps_without_a_class_are_told(tmp_path, dataset, caplog):
    root = make_folders(tmp_path, columns(255, 255))
    (root / "classes.txt").write_text("sky\nroad\ntree\n")
    dataset(root, "train")
    assert "label maps hold 255 alone, which is no class: nothing is learnt" in caplog.text
    caplog.clear()
    dataset(make_folders(tmp_path, columns(2, 255)), "train")
    assert not caplog.text


def test_suffixes_and_one_folder_for_all(tmp_path):
    for name in ("a", "b"):
        picture(tmp_path / f"train/{name}_sat.jpg")
        save_map(tmp_path / f"train/{name}_mask.png", columns(0, 1))
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    places = {"images": "{split}", "annotations": "{split}"}
    dataset = FoldersDataset(
        tmp_path, "train", image_suffix="_sat.jpg", label_suffix="_mask.png", **places
    )
    assert [dataset[k].image_id for k in range(2)] == ["a", "b"] and row(dataset) == [0, 0, 1, 1]
    with pytest.raises(DataError, match=r"a\.png: no label map .* for a_mask\.png set label_suff"):
        FoldersDataset(tmp_path, "train", image_suffix="_sat.jpg", **places)
    with pytest.raises(DataError, match=r"no images that end in '\.webp'"):
        FoldersDataset(tmp_path, "train", image_suffix=".webp", **places)


def test_what_is_said_of_label_images_that_are_called_otherwise(tmp_path):
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    for name in ("1", "10"):
        picture(tmp_path / f"images/train/{name}.tif")
        save_map(tmp_path / f"masks/train/{name}.tif", columns(0, 1))
    with pytest.raises(DataError, match=r"2 are missing\); for 1\.tif set label_suffix: \.tif$"):
        FoldersDataset(tmp_path, "train")
    assert row(FoldersDataset(tmp_path, "train", label_suffix=".tif")) == [0, 0, 1, 1]
    save_map(tmp_path / "masks/train/10.png", columns(0, 1))
    (tmp_path / "masks/train/1.tif").unlink()
    with pytest.raises(DataError, match=r"the image 1\.tif \(1 of 2 are missing\)$"):
        FoldersDataset(tmp_path, "train")
    save_map(tmp_path / "masks/train/1.png", columns(0, 1))
    picture(tmp_path / "images/train/1.jpg")
    with pytest.raises(DataError, match=r"1\.png: is the label map of 1\.jpg and of 1\.tif; take"):
        FoldersDataset(tmp_path, "train")


@pytest.mark.parametrize("dataset", [FoldersDataset, Ade20kDataset])
def test_images_in_folders_below(tmp_path, dataset):
    for folder in ("images", "labels"):
        picture(tmp_path / folder / "train/north/a.png")
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    with pytest.raises(DataError, match=r"train: no images .*; it has the folder 'north', but im"):
        dataset(tmp_path, "train")


def test_splits_by_lists(tmp_path):
    for name in ("a", "b", "c"):
        picture(tmp_path / f"images/{name}.jpg")
        save_map(tmp_path / f"masks/{name}.png", columns(0, 1))
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    (tmp_path / "train.txt").write_text("c\na.jpg\n\n")
    dataset = FoldersDataset(tmp_path, "train")
    assert [dataset[k].image_id for k in range(len(dataset))] == ["c", "a"]
    picture(tmp_path / "images/two words.jpg")
    save_map(tmp_path / "masks/two words.png", columns(1, 0))
    (tmp_path / "test.txt").write_text("two words.jpg \nb\n")
    dataset = FoldersDataset(tmp_path, "test")
    assert [dataset[k].image_id for k in range(len(dataset))] == ["two words", "b"]
    (tmp_path / "val.txt").write_text("d\n")
    with pytest.raises(DataError, match=r"val\.txt: lists 'd', which is no image in .*images"):
        FoldersDataset(tmp_path, "val")


def test_faults_of_classes_and_options(tmp_path):
    root = make_folders(tmp_path, columns(0, 3))
    with pytest.raises(DataError, match=r"no file of class names.*hold the labels 0, 3"):
        FoldersDataset(root, "train")
    write_classes(root, {"id": 0, "name": "sky"}, {"name": "road", "color": "#ffffff"})
    with pytest.raises(DataError, match="some classes have an `id`, some have none"):
        FoldersDataset(root, "train")
    write_classes(root, {"id": 3, "name": "sky"}, {"id": 3, "name": "road"})
    with pytest.raises(DataError, match="gives the label 3 to two classes"):
        FoldersDataset(root, "train")
    with pytest.raises(ValueError, match=r"^colors: 'red' is no color"):
        FoldersDataset(root, "train", colors={"sky": "red"})
    with pytest.raises(ValueError, match="^binary: masks have no colors"):
        FoldersDataset(root, "train", colors={"sky": "#ff0000"}, binary=True)
    with pytest.raises(ValueError, match="^binary: masks have no labels to `ignore`; leave out"):
        FoldersDataset(root, "train", ignore=[7], binary=True)
    (root / "classes.json").write_text(json.dumps(["a", "b", "c"]))
    with pytest.raises(DataError, match="names 3 classes; binary masks have one or two"):
        FoldersDataset(root, "train", binary=True)
    with pytest.raises(DataError, match=r"a\.png: has the label 3, but the classes are labels 0"):
        FoldersDataset(root, "train")[0]


def test_the_same_as_ade20k_on_real_data(shared):
    root = shared / "aerial_dubai"
    first = Ade20kDataset(root, "validation")
    second = FoldersDataset(root, "validation", ignore=[0])
    assert first.classes == second.classes and first.category_ids == second.category_ids
    assert len(first) == len(second)
    for index in range(len(first)):
        assert (first.target(index).semantic == second.target(index).semantic).all()
