"""Tiny data sets and saved models with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitdense import config as configs
from vitdense.engine.checkpoint import Meta, save_model

ROOT = Path(__file__).parents[2]
SIZES = [(40, 60), (64, 48), (50, 50), (33, 71)]
IDS = [3, 7]
"""The files' ids of the detection classes, with a gap."""


def write_images(folder: Path) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    names = []
    for index, (height, width) in enumerate(SIZES):
        pixels = generator.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        names.append(f"photo_{index}.png")
        Image.fromarray(pixels).resize((width, height)).save(folder / names[-1])
    return names


@pytest.fixture(scope="session")
def coco_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("coco")
    names = write_images(root / "images" / "val")
    images = [
        {"id": 100 + i, "file_name": name, "height": SIZES[i][0], "width": SIZES[i][1]}
        for i, name in enumerate(names)
    ]
    annotations = [
        {"id": 1 + i, "image_id": 100 + i, "category_id": IDS[i % 2], "iscrowd": 0,
         "bbox": [4, 4, 20, 16], "area": 320}
        for i in range(len(names))
    ]  # fmt: skip
    categories = [{"id": IDS[0], "name": "cat"}, {"id": IDS[1], "name": "dog"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    folder = root / "annotations"
    folder.mkdir()
    for split in ("train", "val"):
        (folder / f"instances_{split}.json").write_text(json.dumps(content))
    (root / "images" / "train").symlink_to(root / "images" / "val")
    return root


@pytest.fixture(scope="session")
def label_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("labels")
    generator = np.random.default_rng(1)
    for split in ("training", "validation"):
        for index, name in enumerate(write_images(root / "images" / split)):
            path = root / "annotations" / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            labels = generator.integers(0, 4, SIZES[index], dtype=np.uint8)
            Image.fromarray(labels).save(path)
    (root / "classes.txt").write_text("sky\nroad\ntree\n")
    return root


DETECTION = """
imports: [examples.conv_stages]
model:
  backbone: {{name: conv_stages, width: 8, depth: 1}}
  head:
    name: deformable_detr
    width: 16
    heads: 2
    queries: 20
    encoder_layers: 1
    decoder_layers: 1
data:
  dataset: coco
  root: {root}
  transforms: {{name: detection, size: 96}}
  workers: 0
train: {{steps: 1, batch_size: 1, precision: fp32}}
"""

SEGMENTATION = """
imports: [examples.conv_stages, examples.wide_linear]
model:
  backbone: {{name: conv_stages, width: 8, depth: 1}}
  head: {{name: wide_linear, width: 16}}
data:
  dataset: ade20k
  root: {root}
  train: training
  val: validation
  transforms: {{name: segmentation, size: 48, crop: 48}}
  workers: 0
train: {{steps: 1, batch_size: 1, precision: fp32}}
"""


def save(path: Path, text: str, classes: list[str], category_ids: list[int]) -> Path:
    """A model of this config with random, but fixed, weights."""
    config = configs.loads(text, str(ROOT / "test.yaml"))
    torch.manual_seed(0)
    model = config.model(len(classes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    meta = Meta(
        config=configs.dump(config),
        classes=classes,
        category_ids=category_ids,
        task=model.task,
        step=1,
        metrics={},
        version="0",
    )
    save_model(path, model, meta)
    return path


@pytest.fixture(scope="session")
def detector(tmp_path_factory, coco_root) -> Path:
    path = tmp_path_factory.mktemp("detector") / "model.safetensors"
    return save(path, DETECTION.format(root=coco_root), ["cat", "dog"], IDS)


@pytest.fixture(scope="session")
def segmenter(tmp_path_factory, label_root) -> Path:
    path = tmp_path_factory.mktemp("segmenter") / "model.safetensors"
    return save(path, SEGMENTATION.format(root=label_root), ["sky", "road", "tree"], [1, 2, 3])
