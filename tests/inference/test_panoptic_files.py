"""Panoptic predictions in files: COCO's format, with the numbers of the evaluation in training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitdense import config as configs
from vitdense.engine.checkpoint import Meta, save_model
from vitdense.inference import tools
from vitdense.inference.files import ImageFile
from vitdense.inference.outputs import PanopticMaps
from vitdense.inference.score import score
from vitdense.metrics.panoptic_files import read_panoptic
from vitdense.structures import Prediction

ROOT = Path(__file__).parents[2]
SIZES = [(40, 60), (64, 48), (33, 71)]
CATEGORIES = [
    {"id": 2, "name": "sky", "isthing": 0},
    {"id": 300, "name": "cat", "isthing": 1},
    {"id": 301, "name": "dog", "isthing": 1},
]
IDS = [2, 300, 301]

CONFIG = """
imports: [examples.conv_stages]
model:
  backbone: {{name: conv_stages, width: 8, depth: 1}}
  head:
    name: mask2former
    task: panoptic
    width: 16
    heads: 2
    queries: 12
    encoder_layers: 1
    decoder_layers: 2
    score_threshold: 0.0
    overlap_threshold: 0.1
data:
  dataset: coco_panoptic
  root: {root}
  transforms: {{name: detection, size: 64}}
  workers: 0
train: {{steps: 1, batch_size: 1, precision: fp32}}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Images with a panoptic file that knows them, but not yet their segments."""
    root = tmp_path_factory.mktemp("panoptic")
    generator = np.random.default_rng(0)
    images = []
    for index, (height, width) in enumerate(SIZES):
        for split in ("train", "val"):
            folder = root / "images" / split
            folder.mkdir(parents=True, exist_ok=True)
            cells = generator.integers(0, 256, (3, 4, 3), dtype=np.uint8)
            picture = Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)
            picture.save(folder / f"photo_{index}.png")
        images.append({"id": 50 + index, "file_name": f"photo_{index}.png",
                       "height": height, "width": width})  # fmt: skip
    content = {"images": images, "annotations": [], "categories": CATEGORIES}
    (root / "annotations").mkdir()
    for split in ("train", "val"):
        (root / "annotations" / f"panoptic_{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def model(root, tmp_path_factory) -> Path:
    config = configs.loads(CONFIG.format(root=root), str(ROOT / "test.yaml"))
    torch.manual_seed(0)
    model = config.model(len(CATEGORIES))
    model.set_things([False, True, True])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "classes" in name and parameter.ndim == 2:
                parameter.mul_(20)  # of no object, too, some queries are to be sure
    meta = Meta(config=configs.dump(config), classes=["sky", "cat", "dog"], category_ids=IDS,
                task=model.task, step=1, metrics={}, version="0")  # fmt: skip
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(path, model, meta)
    return path


def write_truth(root: Path, predictions: Path) -> Path:
    """The predictions moved a little, with void and with one segment that is a crowd."""
    path = root / "annotations" / "panoptic_val.json"
    content = json.loads(path.read_text())
    content["annotations"] = json.loads((predictions / "panoptic.json").read_text())["annotations"]
    path.with_suffix("").mkdir(exist_ok=True)
    for number, entry in enumerate(content["annotations"]):
        colors = np.array(Image.open(predictions / "panoptic" / entry["file_name"]))
        colors = np.roll(colors, 2, axis=1)
        colors[:5] = 0
        there = set(colors[..., 0].ravel().tolist())
        entry["segments_info"] = [it for it in entry["segments_info"] if it["id"] in there]
        if number == 0:
            entry["segments_info"][-1]["iscrowd"] = 1
        Image.fromarray(colors).save(path.with_suffix("") / entry["file_name"])
    path.write_text(json.dumps(content))
    return path


def test_score_of_the_files_is_the_evaluation(root, model, tmp_path, capsys):
    tools.predict(model, [root / "images" / "val"], tmp_path, batch_size=2)
    assert sorted(file.name for file in tmp_path.iterdir() if file.is_file()) == [
        "panoptic.json", "photo_0.jpg", "photo_1.jpg", "photo_2.jpg",
    ]  # fmt: skip
    truth = write_truth(root, tmp_path)
    from_files = score("panoptic", truth, tmp_path / "panoptic.json")
    evaluated = tools.evaluate(model)
    assert 0.2 < evaluated["PQ"] < 0.95
    assert from_files == pytest.approx(evaluated, abs=1e-12)
    assert {"PQth", "PQst"} <= set(from_files)


def numbers_of(image):
    """The whole map of segments, and what is said of them."""
    size = image.colors.shape[:2]
    return image.numbers(torch.arange(size.numel())).view(size), image.infos


def test_maps_and_entries_are_cocos(tmp_path):
    panoptic = torch.zeros(6, 300, dtype=torch.long)
    panoptic[1:3, :] = torch.arange(300)
    labels = torch.arange(299) % 3
    labels = torch.cat([labels, torch.tensor([1])])  # the last has no pixel
    scores = torch.linspace(1, 0, 300)
    writer = PanopticMaps(tmp_path, IDS)
    writer.add(
        ImageFile(Path("x.jpg"), "night/x", "x"),
        Prediction(panoptic=panoptic, labels=labels, scores=scores),
    )
    path = writer.close()
    found = read_panoptic(path)
    map_, infos = numbers_of(found.image("x"))
    assert torch.equal(map_, panoptic)
    assert len(infos) == 299
    first, second = infos[0], infos[1]
    assert first == {"id": 1, "category_id": 2, "area": 2, "bbox": [1, 1, 1, 2], "iscrowd": 0,
                     "score": 1.0}  # fmt: skip
    assert second["category_id"] == 300
    colors = np.array(Image.open(tmp_path / "panoptic" / "night" / "x.png"))
    assert colors[1, 257].tolist() == [1, 1, 0]


def test_an_image_without_segments(tmp_path):
    nothing = Prediction(
        panoptic=torch.zeros(4, 5, dtype=torch.long),
        labels=torch.zeros(0, dtype=torch.long),
        scores=torch.zeros(0),
    )
    writer = PanopticMaps(tmp_path, IDS)
    writer.add(ImageFile(Path("x.jpg"), "x", 7), nothing)
    map_, infos = numbers_of(read_panoptic(writer.close()).image(7))
    assert infos == [] and not map_.any()
