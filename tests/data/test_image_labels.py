"""Labels of whole images: the files that hold them, and the data sets that they lie beside."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data import trees
from vitdense.data.ade20k import Ade20kDataset
from vitdense.data.base import DataError, Dataset
from vitdense.data.image_labels import LabelledDataset, check_splits, read_image_labels
from vitdense.data.mixing import concatenate
from vitdense.data.shapes import ShapesDataset
from vitdense.data.transforms import NoPolicy
from vitdense.structures import Sample, Target
from vitdense.testing import check_dataset, check_policy


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Images a and b in each split, all different."""
    for split in ("train", "val"):
        for name in ("a", "b"):
            trees.picture(tmp_path / f"images/{split}/{split}_{name}.png")
            trees.save_map(tmp_path / f"labels/{split}/{split}_{name}.png", trees.columns(0, 1))
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    return tmp_path


def write(root: Path, text: str, name: str = "labels.csv") -> Path:
    path = root / name
    path.write_text(text, encoding="utf-8")
    return path


def files(root: Path, split: str = "train") -> Dataset:
    return Ade20kDataset(root, split, reduce_zero_label=False)


ROWS = "image,label\ntrain_a.png,cat\ntrain_b,dog; cat\nval/val_a.png,dog\nval_b.png,\n"


def test_every_split_has_the_labels_of_the_whole_file(root: Path) -> None:
    path = write(root, ROWS)
    train, val = (LabelledDataset(files(root, split), path) for split in ("train", "val"))
    assert train.image_classes == val.image_classes == ["cat", "dog"]
    assert train.classes == ["sky", "road"]
    truths = [data.target(i).image_labels for data in (train, val) for i in range(2)]
    assert torch.stack(truths).tolist() == [[1, 0], [1, 1], [0, 1], [0, 0]]
    assert train[0].target.semantic is not None
    check_splits(train, val)


def test_what_the_data_set_knows_of_its_classes_stays_known(root: Path) -> None:
    dataset = files(root)
    dataset.things, dataset.frequencies = [False, True], ["f", "r"]
    labelled = LabelledDataset(dataset, write(root, ROWS))
    assert (labelled.things, labelled.frequencies) == ([False, True], ["f", "r"])


def test_the_order_of_a_model_that_knows_more(root: Path) -> None:
    path = write(root, ROWS)
    data = LabelledDataset(files(root), path, ["dog", "horse", "cat"])
    assert data.target(1).image_labels.tolist() == [True, False, True]
    with pytest.raises(DataError, match="label 'dog', which the model does not know.*are cat"):
        LabelledDataset(files(root), path, ["cat"])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.csv", "age,Label,image\n3,cat,a\n\n3,dog,a\n5,,b.png\n7,big cat,x/c\n"),
        ("quoted.csv", '\ufeffimage,label\n"a","cat;dog"\n"b.png",""\nx\\c,"big cat"\n'),
        ("tabs.tsv", "image\tlabel\na\tcat;dog\nb.png\n./x/c\tbig cat\n"),
        ("excel.csv", 'image;label\na;"cat;dog"\nb.png;\nx/c;big cat\n'),
        ("sceneCategories.txt", "a cat\na dog\nb.png\nx/c   big cat\n"),
    ],
)
def test_the_same_from_every_kind_of_file(tmp_path: Path, name: str, text: str) -> None:
    rows = read_image_labels(write(tmp_path, text, name))
    assert rows == {"a": {"cat", "dog"}, "b.png": set(), "x/c": {"big cat"}}


def test_the_row_that_says_most_of_a_path_wins(root: Path) -> None:
    rows = "image,label\ntrain_a,cat\nimages/train/train_a.png,dog\ntrain_b,cat\n"
    data = LabelledDataset(files(root), write(root, rows))
    assert data.target(0).image_labels.tolist() == [False, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,label\ntrain_a,cat\n", r"labels.csv: has no row for the image .*_b.png \(1 of"),
        ("image,label\ntrain_a,\ntrain_b,\n", "labels.csv: has no label"),
        ("image,label\n,cat\n", "the label 'cat' is of no image"),
        ("name,class\na,cat\n", "labels.csv: its first line must name the columns `image` and"),
        ("", "its first line must name"),
    ],
)
def test_what_is_wrong_is_said(root: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        LabelledDataset(files(root), write(root, text))


def test_a_missing_file(root: Path) -> None:
    with pytest.raises(DataError, match=r"labels.csv: no such file .*data.image_labels"):
        LabelledDataset(files(root), root / "labels.csv")


def test_one_row_for_two_images_is_refused(tmp_path: Path) -> None:
    for split in ("train", "val"):
        trees.picture(tmp_path / f"images/{split}/1.png", seed=len(split))
        trees.save_map(tmp_path / f"labels/{split}/1.png", trees.columns(0, 1))
    write(tmp_path, "sky\nroad\n", "classes.txt")
    path = write(tmp_path, "image,label\n1,cat\n1,dog\n")
    data = [LabelledDataset(files(tmp_path, split), path) for split in ("train", "val")]
    with pytest.raises(DataError, match=r"'1' may be .*train/1.png or .*as in val/1.png"):
        check_splits(*data)
    path = write(tmp_path, "image,label\ntrain/1,cat\nval/1.png,dog\n")
    data = [LabelledDataset(files(tmp_path, split), path) for split in ("train", "val")]
    check_splits(*data)
    assert [it.target(0).image_labels.tolist() for it in data] == [[1, 0], [0, 1]]


def test_splits_of_the_same_files_may_share_rows(root: Path) -> None:
    shutil.rmtree(root / "images/val")
    (root / "images/val").symlink_to(root / "images/train")
    for path in (root / "labels/train").iterdir():
        shutil.copy(path, root / "labels/val")
    path = write(root, "image,label\ntrain_a,cat\ntrain_b,dog\n")
    data = [LabelledDataset(files(root, split), path) for split in ("train", "val")]
    check_splits(*data)
    assert [it.target(0).image_labels.tolist() for it in data] == [[1, 0], [1, 0]]


def test_conformance(root: Path) -> None:
    path = write(root, ROWS)
    check_dataset(lambda folder, split: LabelledDataset(files(folder, split), path), root, "train")


@pytest.mark.parametrize("task", ["detection", "panoptic"])
def test_beside_any_data_set(tmp_path: Path, task: str) -> None:
    def make(root: Path, split: str) -> LabelledDataset:
        data = ShapesDataset(root, split, task=task, images=6, size=32)  # type: ignore[arg-type]
        names = [data.image_path(i).stem for i in range(len(data))]
        rows = [f"{name},{'even' if int(name) % 2 == 0 else 'odd'}" for name in names]
        return LabelledDataset(data, write(root, "\n".join(["image,label", *rows])))

    check_dataset(make, tmp_path, "train")
    data = make(tmp_path, "train")
    assert [data.target(i).image_labels.tolist() for i in (0, 1)] == [[0, 1], [1, 0]]
    assert data.things == data.files.things


def test_a_mixture_has_the_labels_of_all(root: Path) -> None:
    masks = torch.from_numpy(np.zeros((0, 4, 4), dtype=bool))
    first, second = (
        Target(masks=masks, image_labels=torch.tensor(it)) for it in ([True, False], [False, False])
    )
    assert concatenate([first, second]).image_labels.tolist() == [True, False]
    assert concatenate([first, Target(masks=masks)]).image_labels is None


class Forgetful(NoPolicy):
    """Loses what it does not know."""

    def train(self, sample: Sample) -> Sample:
        sample = super().train(sample)
        return replace(sample, target=replace(sample.target, image_labels=None))


def test_policies_that_lose_labels_are_found() -> None:
    check_policy(NoPolicy)
    with pytest.raises(AssertionError, match=r"must keep target.image_labels"):
        check_policy(Forgetful)
