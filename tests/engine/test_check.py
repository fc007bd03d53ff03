"""One real batch through all that a config says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from vitdense import config
from vitdense.config import ConfigError
from vitdense.data.base import DataError, Dataset
from vitdense.data.frequency import class_frequencies
from vitdense.engine.check import check, shapes, values

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
    assert re.search(r"TimmBackbone, (\d+\.\d\d M) parameters, \1 of them frozen", text)
    assert "objects, truth: labels, boxes" in text
    assert "loss/class" in text
    assert "float32 [5, 4]" in text


def test_missing_data_and_refused_options_are_errors_of_the_user() -> None:
    with pytest.raises(ConfigError, match=r"^config:5: data.dataset.size: 16 is too small"):
        check(config.loads(CONFIG.replace("images: 6, size: 64", "images: 6, size: 16")))
    with pytest.raises(DataError, match="nowhere"):
        check(config.loads(CONFIG, overrides=["data.dataset=coco", "data.root=nowhere"]))


@pytest.mark.parametrize(
    ("truth", "task", "message"),
    [
        ("instance", "panoptic", "does not tell things from stuff, and the model's task is panop"),
        ("panoptic", "instance", "is panoptic, its stuff is no object, and the model's task is in"),
    ],
)
def test_a_truth_of_another_task_is_an_error_of_the_user(
    truth: str, task: str, message: str
) -> None:
    head = f"model.head={{name: mask2former, task: {task}, width: 16, heads: 2, queries: 4}}"
    changes = [head, f"data.dataset.task={truth}"]
    with pytest.raises(ValueError, match=f"^data.dataset: the truth in shapes {message}"):
        check(config.loads(CONFIG, overrides=changes))


@pytest.mark.parametrize(
    ("truth", "head", "message"),
    [
        ("detection", "linear", "has no `semantic`, from which the task of the model, semantic, "),
        ("semantic", "{name: detr, queries: 4}", "has no `labels`, from which the task of the "),
        ("detection", "{name: mask2former, task: instance, width: 16}", "has no `masks`, from"),
    ],
)
def test_a_truth_that_lacks_what_the_task_is_learnt_from(
    truth: str, head: str, message: str
) -> None:
    changes = [f"model.head={head}", f"data.dataset.task={truth}", "data.transforms=none"]
    with pytest.raises(ValueError, match=f"^data.dataset: the truth in shapes {message}"):
        check(config.loads(CONFIG, overrides=changes))


def test_one_class_of_pixels_is_an_error_of_the_user() -> None:
    for folder in ("images", "annotations"):
        for split in ("train", "val"):
            path = Path(f"set/{folder}/{split}/a.png")
            path.parent.mkdir(parents=True)
            Image.new("L", (64, 64), 1).save(path)
    Path("set/classes.txt").write_text("crack\n")
    changes = ["data.dataset=ade20k", "data.root=set"]
    with pytest.raises(ValueError, match="^data.dataset: set has the one class 'crack', so it is"):
        check(config.loads(CONFIG, overrides=changes))
    Path("set/classes.txt").write_text("wall\ncrack\n")
    changes[0] = "data.dataset={name: ade20k, reduce_zero_label: false}"
    assert "2 classes: wall, crack" in check(config.loads(CONFIG, overrides=changes))


def test_deep_images_show_their_values() -> None:
    assert values(torch.zeros(2, 1, 4, 4, dtype=torch.uint8)) == ""
    found = values(torch.linspace(0, 15.9375, 32).view(2, 1, 4, 4))
    assert found == " with values from 0 to 15.94 of 0..255"


def test_shapes_of_nested_values() -> None:
    ones = torch.ones(2, 3)
    assert shapes(ones) == "float32 [2, 3]"
    assert shapes([ones, ones]) == "2 x float32 [2, 3]"
    assert shapes([ones, ones.long()]) == "float32 [2, 3], int64 [2, 3]"
    assert shapes({"a": ones, "b": None}) == "a float32 [2, 3]"
    assert shapes(()) == ""


def test_the_classes_of_all_images_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large data set that would take longer than all else together."""
    looked_at: list[list[int]] = []

    def count(dataset: Dataset, skip: bool, images: range) -> tuple[Tensor, Tensor]:
        looked_at.append(list(images))
        return class_frequencies(dataset, skip, images)

    monkeypatch.setattr("vitdense.engine.check.LOOKED_AT", 3)
    monkeypatch.setattr("vitdense.engine.build.class_frequencies", count)
    monkeypatch.setattr("vitdense.engine.build.images_with_class", None)
    changes = ["model.head={name: linear, class_weights: inverse}", "data.rare=0.5"]
    assert "all is well" in check(config.loads(CONFIG, overrides=changes))
    assert looked_at == [[0, 2, 4]]
