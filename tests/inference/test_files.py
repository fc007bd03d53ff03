"""Which images are meant, and what they are called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vitdense.data.base import DataError
from vitdense.data.images import list_images
from vitdense.inference.files import find_images, unique_names


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("a.jpg", "b.PNG", "notes.txt", "sub/a.jpg", "sub/deep/c.webp"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "photos"


def test_a_folder_with_its_subfolders(folder):
    assert [file.name for file in find_images([folder])] == ["a", "b", "sub/a", "sub/deep/c"]
    assert [file.image_id for file in find_images([folder])] == ["a", "b", "sub/a", "c"]


def test_hidden_files_are_no_images(folder):
    """Copies that notebooks and other systems' archives leave behind."""
    (folder / "._a.jpg").touch()
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "a.jpg").touch()
    assert [file.name for file in find_images([folder])] == ["a", "b", "sub/a", "sub/deep/c"]
    assert list_images(folder) == ["a.jpg", "b.PNG"]


def test_two_images_never_share_an_id(folder):
    """Of one stem in two folders, or with two suffixes."""
    (folder / "b.jpg").touch()
    ids = [file.image_id for file in find_images([folder])]
    assert len(ids) == len(set(ids)) == 5


def test_a_file_and_a_pattern(folder):
    assert [file.name for file in find_images([folder / "b.PNG"])] == ["b"]
    assert [file.name for file in find_images([str(folder / "*.jpg")])] == ["a"]
    every = find_images([str(folder / "**" / "a.jpg")])
    assert [file.name for file in every] == ["a", "sub/a"]


def test_each_file_once_and_each_name_once(folder):
    files = find_images([folder / "a.jpg", folder, folder / "sub" / "a.jpg"])
    assert len({file.path for file in files}) == len(files) == 4
    assert len({file.name for file in files}) == 4


def test_unique_names():
    given = [Path("a.jpg"), Path("a.png"), Path("a.jpg"), Path("x/a.jpg")]
    assert unique_names(given) == ["a", "a.png", "a.jpg", "x/a"]
    assert unique_names([Path("a.jpg")] * 4) == ["a", "a.jpg", "a.jpg_2", "a.jpg_3"]


@pytest.mark.parametrize(
    "places",
    [
        ("val", "val/_annotations.coco.json"),
        ("images/val", "annotations/instances_val.json"),
        ("val2017", "annotations/instances_val2017.json"),
    ],
)
def test_ids_of_a_coco_file(tmp_path, places):
    images, annotations = (tmp_path / place for place in places)
    images.mkdir(parents=True)
    annotations.parent.mkdir(parents=True, exist_ok=True)
    (images / "x.jpg").touch()
    (images / "new.jpg").touch()
    annotations.write_text(json.dumps({"images": [{"id": 42, "file_name": "x.jpg"}]}))
    ids = {file.path.name: file.image_id for file in find_images([images])}
    assert ids == {"x.jpg": 42, "new.jpg": "new"}


def test_ids_of_images_that_only_one_of_two_files_lists(tmp_path):
    images, annotations = tmp_path / "images/val", tmp_path / "annotations"
    images.mkdir(parents=True)
    annotations.mkdir()
    for kind, keys in (("instances", (1, 2)), ("panoptic", (2, 3))):
        entries = [{"id": key, "file_name": f"{' abc'[key]}.jpg"} for key in keys]
        (annotations / f"{kind}_val.json").write_text(json.dumps({"images": entries}))
    for name in "abc":
        (images / f"{name}.jpg").touch()
    assert [file.image_id for file in find_images([images])] == [1, 2, 3]


@pytest.mark.parametrize("given", ["images/val", "images", "images/val/cam1", "images/val/*/1.jpg"])
def test_ids_of_images_in_subfolders(tmp_path, given):
    """By their path below the folder of the split, whichever folder is asked for."""
    images, file = tmp_path / "images/val", tmp_path / "annotations/instances_val.json"
    names = ["cam1/1.jpg", "cam2/1.jpg", "./cam2/2.jpg"]
    for name in names:
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).touch()
    file.parent.mkdir()
    listed = [{"id": 7 + place, "file_name": name} for place, name in enumerate(names)]
    file.write_text(json.dumps({"images": listed}))
    found = find_images([tmp_path / given])
    ids = {file.path.relative_to(images).as_posix(): file.image_id for file in found}
    known = {"cam1/1.jpg": 7, "cam2/1.jpg": 8, "cam2/2.jpg": 9}
    assert ids and ids.items() <= known.items()


def test_a_name_that_a_coco_file_has_twice_is_no_id(tmp_path):
    listed = [{"id": k, "file_name": f"{k}/x.jpg"} for k in (1, 2)]
    (tmp_path / "_annotations.coco.json").write_text(json.dumps({"images": listed}))
    (tmp_path / "x.jpg").touch()
    assert [file.image_id for file in find_images([tmp_path])] == ["x"]


def test_ids_of_cityscapes_are_those_of_its_panoptic_file(tmp_path):
    path = tmp_path / "ulm/ulm_000000_000019_leftImg8bit.png"
    path.parent.mkdir()
    path.touch()
    (file,) = find_images([tmp_path])
    assert (file.image_id, file.name) == ("ulm_000000_000019", f"ulm/{path.stem}")


def test_a_broken_coco_file_is_named(tmp_path):
    (tmp_path / "x.jpg").touch()
    (tmp_path / "_annotations.coco.json").write_text("[]")
    with pytest.raises(DataError, match="_annotations.coco.json: is no annotation file"):
        find_images([tmp_path])


def test_nothing_found(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no images found"):
        find_images([folder, tmp_path / "empty"])
    with pytest.raises(DataError, match="none: no such file or folder"):
        find_images([tmp_path / "none"])
    with pytest.raises(DataError, match=r"\*.gif: no images found"):
        find_images([str(folder / "*.gif")])
