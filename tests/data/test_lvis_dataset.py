"""LVIS's files: where images lie, what is known of which image, how frequent classes are."""

from __future__ import annotations

import json

import pytest

from tests.data import trees
from vitdense.data.base import DataError
from vitdense.data.geometry import select
from vitdense.data.lvis import LvisDataset


def test_reads_what_is_known_of_each_image(tmp_path):
    dataset = LvisDataset(trees.make_lvis(tmp_path), "train", masks=True)
    assert dataset.classes == ["cat", "dog", "bird"] and dataset.category_ids == [5, 8, 11]
    assert dataset.frequencies == ["r", "c", "f"]
    assert [dataset.image_path(i).parent.name for i in (0, 1)] == ["train2017", "val2017"]
    first, second = dataset.target(0), dataset.target(1)
    assert first.judged.tolist() == [True, True, False] and not first.partial.any()
    assert second.judged.tolist() == second.partial.tolist() == [False, False, True]
    assert dataset[0].image.shape == (3, *trees.SIZE) and first.masks.sum() == 200
    assert select(second, second.crowd).judged.tolist() == second.judged.tolist()


def test_images_may_lie_under_the_root(tmp_path):
    root = trees.make_lvis(tmp_path)
    for folder in ("train2017", "val2017"):
        (root / "images" / folder).rename(root / folder)
    (root / "images").rmdir()
    assert len(LvisDataset(root, "train")) == 2


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("images", "coco_url", None, "image 4 has no `coco_url`"),
        ("images", "neg_category_ids", [99], "`neg_category_ids` is missing or names no category"),
        ("images", "not_exhaustive_category_ids", None, "`not_exhaustive_category_ids` is missing"),
        ("categories", "frequency", "often", "category 11 has the frequency often"),
    ],
)
def test_wrong_files_are_named(tmp_path, part, key, value, message):
    root = trees.make_lvis(tmp_path)
    path = root / "annotations" / "lvis_v1_train.json"
    content = json.loads(path.read_text())
    content[part][0][key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as error:
        LvisDataset(root, "train")
    assert str(path) in str(error.value)
