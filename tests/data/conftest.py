"""Small data sets on disk, made for each test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


class CocoMaker:
    """A set in COCO's format of two images, 40 x 30 pixels; tests change it, then write it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.file = root / "annotations/instances_train.json"
        self.folder = root / "images/train"
        self.content: dict[str, Any] = {
            "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
            "images": [
                {"id": 11, "file_name": "a.png", "width": 40, "height": 30},
                {"id": 5, "file_name": "b.png", "width": 40, "height": 30},
            ],
            "annotations": [box(1, 5, 7, [10, 5, 20, 10]), box(2, 5, 3, [0, 0, 8, 8])],
        }

    def write(self) -> Path:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.content))
        for name in ("a.png", "b.png"):
            pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(self.folder / name)
        return self.root


class AdeMaker:
    """A set in ADE20K's layout of two images, 40 x 30 pixels, with three classes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images, self.labels = root / "images/training", root / "annotations/training"
        self.images.mkdir(parents=True)
        self.labels.mkdir(parents=True)
        (root / "classes.txt").write_text("sky\ngrass\nhouse\n")
        for name in ("a", "b"):
            Image.fromarray(np.zeros((30, 40, 3), dtype=np.uint8)).save(self.images / f"{name}.jpg")
            self.write_labels(name, np.tile(np.arange(4, dtype=np.uint8).repeat(10), (30, 1)))

    def write_labels(self, name: str, labels: np.ndarray) -> Path:
        path = self.labels / f"{name}.png"
        Image.fromarray(labels).save(path)
        return path


def box(key: int, image: int, category: int, bbox: list[float], **more: Any) -> dict[str, Any]:
    area = bbox[2] * bbox[3]
    return {
        "id": key,
        "image_id": image,
        "category_id": category,
        "bbox": bbox,
        "area": area,
    } | more


@pytest.fixture
def coco(tmp_path: Path) -> CocoMaker:
    return CocoMaker(tmp_path / "set")


@pytest.fixture
def ade(tmp_path: Path) -> AdeMaker:
    return AdeMaker(tmp_path / "set")


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where 24 + 4 pictures of shapes, 96 pixels wide, are made once."""
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data beside the repository."""
    folder = Path(__file__).resolve().parents[3] / "shared/data"
    if not folder.is_dir():
        pytest.skip("no real data beside the repository")
    return folder
