"""One real batch through all that a config says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vitdense import config
from vitdense.config import ConfigError
from vitdense.data.base import DataError
from vitdense.engine.check import check, shapes

CONFIG = """\
model:
  backbone: {name: vit_tiny_patch16_224, img_size: 64, out_indices: [1], options: {depth: 2}}
  head: linear
data:
  dataset: {name: shapes, task: semantic, images: 6, size: 64}
  root: shapes
  transforms: {name: segmentation, size: 64, crop: 64}
  workers: 4
train: {steps: 10, batch_size: 4}
output: runs/never
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_segmenter() -> None:
    text = check(config.loads(CONFIG))
    assert "6 images in train" in text
    assert "1 images in val" in text
    assert "images uint8 [2, 3, 64, 64], truth: semantic" in text
    assert "channels at stride of its levels: 192 at 16" in text
    assert "LinearHead" in text
    assert "tensors; none for" not in text
    assert "int64 [64, 64]" in text
    assert "MeanIoU, the best model by mIoU" in text
    assert "all is well" in text.splitlines()[-1]
    assert not Path("runs").exists()


def test_a_detector_says_its_losses_and_frozen_parameters() -> None:
    head = "model.head={name: detr, queries: 5, encoder_layers: 1, decoder_layers: 1}"
    changes = [head, "model.backbone.frozen=true", "data.transforms={name: detection, size: 64}"]
    changes += ["data.dataset.task=detection"]
    text = check(config.loads(CONFIG, overrides=changes))
    assert "M parameters, 0.00 M of them trainable" in text
    assert "objects, truth: labels, boxes" in text
    assert "loss/class" in text
    assert "float32 [5, 4]" in text


def test_missing_data_and_refused_options_are_errors_of_the_user() -> None:
    with pytest.raises(ConfigError, match=r"^config:5: data.dataset.size: 16 is too small"):
        check(config.loads(CONFIG.replace("images: 6, size: 64", "images: 6, size: 16")))
    with pytest.raises(DataError, match="nowhere"):
        check(config.loads(CONFIG, overrides=["data.dataset=coco", "data.root=nowhere"]))


def test_shapes_of_nested_values() -> None:
    ones = torch.ones(2, 3)
    assert shapes(ones) == "float32 [2, 3]"
    assert shapes([ones, ones]) == "2 x float32 [2, 3]"
    assert shapes([ones, ones.long()]) == "float32 [2, 3], int64 [2, 3]"
    assert shapes({"a": ones, "b": None}) == "a float32 [2, 3]"
    assert shapes(()) == ""
