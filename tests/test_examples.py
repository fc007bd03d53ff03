"""The custom parts of the documentation: they conform, train, and are shown as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from examples.conv_stages import ConvStages
from examples.resized_pyramid import ResizedPyramid
from examples.wide_linear import WideLinearHead
from examples.yolo_boxes import YoloBoxes
from vitdense import BACKBONES, DATASETS, HEADS, NECKS
from vitdense import config as configs
from vitdense.data.base import DataError
from vitdense.engine.train import train
from vitdense.structures import Level, Target
from vitdense.testing import check_backbone, check_dataset, check_head, check_neck

ROOT = Path(__file__).parents[1]
PAGES = {
    "head": "wide_linear",
    "neck": "resized_pyramid",
    "backbone": "conv_stages",
    "dataset": "yolo_boxes",
}


@pytest.fixture
def yolo_root(tmp_path) -> Path:
    from PIL import Image

    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True)
        (tmp_path / "labels" / split).mkdir(parents=True)
        for name, size in (("a", (60, 40)), ("b", (48, 64)), ("empty", (32, 32))):
            Image.new("RGB", size, (90, 120, 30)).save(tmp_path / "images" / split / f"{name}.png")
        (tmp_path / "labels" / split / "a.txt").write_text("1 0.5 0.5 0.5 0.25\n0 0 0 1 1\n")
        (tmp_path / "labels" / split / "b.txt").write_text("0 0.25 0.75 0.5 0.5\n")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    return tmp_path


@pytest.mark.parametrize(("page", "module"), PAGES.items())
def test_pages_show_the_file(page, module):
    text = (ROOT / "docs" / "custom" / f"{page}.md").read_text(encoding="utf-8")
    code = (ROOT / "examples" / f"{module}.py").read_text(encoding="utf-8")
    assert f"```python\n{code}```" in text
    assert re.search(rf"^imports: \[examples\.{module}\]$", text, re.M)


def test_every_example_has_a_page():
    assert {file.stem for file in (ROOT / "examples").glob("*.py")} == set(PAGES.values())


def test_head():
    check_head(WideLinearHead, width=32)
    assert HEADS.get("wide_linear") is WideLinearHead


@pytest.mark.parametrize("stride", [14, 16])
def test_neck(stride):
    levels = [Level(192, stride)] * 4
    check_neck(ResizedPyramid, levels=levels, channels=32, size=(4 * stride, 6 * stride))
    strides = [level.stride for level in ResizedPyramid(levels).levels]
    assert strides == [stride / 4, stride / 2, stride, stride * 2]
    assert NECKS.get("resized_pyramid") is ResizedPyramid


@pytest.mark.parametrize("in_chans", [1, 3])
def test_backbone(in_chans):
    check_backbone(ConvStages, width=8, depth=1, in_chans=in_chans)
    assert BACKBONES.get("conv_stages") is ConvStages
    assert set(ConvStages(width=8, depth=1).layer_depths().values()) == {0, 1, 2, 3}


def test_dataset(yolo_root):
    check_dataset(YoloBoxes, yolo_root, "train")
    dataset = DATASETS.get("yolo_boxes")(yolo_root, "train")
    a, b, empty = (dataset[index].target for index in range(3))
    assert a.labels.tolist() == [1, 0]
    assert a.boxes.tolist() == [[15, 15, 45, 25], [0, 0, 30, 20]]
    assert b.boxes.tolist() == [[0, 32, 24, 64]]
    assert empty.boxes.shape == (0, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [("5 0.5 0.5 1 1", "a.txt: class 5, but 2 names"), ("1 2 3", "a.txt: give five numbers")],
)
def test_dataset_says_what_is_wrong(yolo_root, text, message):
    (yolo_root / "labels" / "train" / "a.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        _ = YoloBoxes(yolo_root, "train")[0]
    with pytest.raises(DataError, match="no images"):
        YoloBoxes(yolo_root, "test")


DETECTION = """
imports: [examples.conv_stages, examples.yolo_boxes]
model:
  backbone: {{name: conv_stages, width: 8, depth: 1}}
  head:
    name: deformable_detr
    width: 32
    heads: 4
    queries: 10
    encoder_layers: 1
    decoder_layers: 1
data:
  dataset: yolo_boxes
  root: {root}
  transforms: {{name: detection, size: 96}}
  workers: 0
"""

SEGMENTATION = """
imports: [examples.resized_pyramid, examples.wide_linear]
model:
  backbone: {{name: vit_tiny_patch16_224, img_size: 64, options: {{depth: 4, embed_dim: 48}}}}
  neck: {{name: resized_pyramid, channels: 16}}
  head: {{name: wide_linear, width: 16}}
data:
  dataset: {{name: shapes, task: semantic, images: 12, size: 64}}
  root: {root}
  transforms: {{name: segmentation, size: 64, crop: 64}}
  workers: 0
"""

SHORT = """
train: {{steps: 2, batch_size: 2, precision: fp32, evaluations: 1, pictures: 0}}
output: {output}
device: cpu
"""


@pytest.mark.parametrize(("text", "key"), [(DETECTION, "AP"), (SEGMENTATION, "mIoU")])
def test_examples_train_together_from_a_config(text, key, yolo_root, tmp_path):
    text = (text + SHORT).format(root=yolo_root, output=tmp_path / "run")
    results = train(configs.loads(text, str(ROOT / "example.yaml")))
    assert 0 <= results[key] <= 1
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_the_head_learns():
    """Two images by heart: what the page calls a head is one."""
    torch.manual_seed(0)
    head = WideLinearHead([Level(8, 4), Level(8, 8)], 2, width=16, dropout=0.0)
    features = [torch.randn(2, 8, 8, 8), torch.randn(2, 8, 4, 4)]
    truth = [Target(semantic=(f[0] > 0).long().repeat_interleave(4, 0).repeat_interleave(4, 1))
             for f in features[0]]  # fmt: skip
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = head.loss(head(features), truth)["ce"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 < 0.5 < losses[0]
