"""Windows, flips and scales from the command line and in training, and what memory they take."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vitdense
from vitdense import cli
from vitdense import config as configs
from vitdense.config import ConfigError
from vitdense.engine.check import check
from vitdense.engine.train import train
from vitdense.inference.score import score
from vitdense.inference.tools import evaluate, predict
from vitdense.ops import rows

LOOKS = ["inference.window=32", "inference.blend=gaussian", "inference.flip=true",
         "inference.scales=[1.0, 1.5]"]  # fmt: skip

TRAINING = """
imports: [examples.conv_stages]
model:
  backbone: {{name: conv_stages, width: 8, depth: 1}}
  head: {{name: linear}}
data:
  dataset: ade20k
  root: {root}
  train: training
  val: validation
  transforms: {{name: segmentation, size: 48, crop: 48, evaluation: {evaluation}}}
  workers: 0
train: {{steps: 2, batch_size: 3, precision: fp32, evaluations: 1}}
output: {out}
device: cpu
"""


@pytest.mark.parametrize(
    ("evaluation", "looks"),
    [("short_side", LOOKS), ("keep", ["inference.window=[64, 32]", "inference.overlap=0.5"])],
)
def test_training_eval_and_predict_give_the_same_numbers(evaluation, looks, label_root, tmp_path):
    text = TRAINING.format(root=label_root, evaluation=evaluation, out=tmp_path / "run")
    trained = train(configs.loads(text, str(Path(__file__).parents[2] / "test.yaml"), looks))
    model = tmp_path / "run" / "model.safetensors"
    names = ("aAcc", "mIoU", "IoU/sky", "IoU/road", "IoU/tree")
    measured = evaluate(model)
    assert [measured[name] for name in names] == [trained[name] for name in names]
    predict(model, [label_root / "images" / "validation"], tmp_path / "out", device="cpu")
    truth = label_root / "annotations" / "validation"
    scored = score("semantic", truth, tmp_path / "out" / "labels")
    assert [scored[name] for name in names] == [trained[name] for name in names]
    plain = evaluate(model, overrides=["inference={window: null, flip: false, scales: [1.0]}"])
    assert plain["aAcc"] != measured["aAcc"]


def test_check_tries_windows(label_root, tmp_path):
    text = TRAINING.format(root=label_root, evaluation="keep", out=tmp_path / "run")
    place = str(Path(__file__).parents[2] / "test.yaml")
    assert "semantic" in check(configs.loads(text, place, LOOKS))
    with pytest.raises(ValueError, match="inference.window: 33 is no multiple of 32"):
        check(configs.loads(text, place, ["inference.window=33"]))


def test_overrides_of_a_loaded_model(segmenter, label_root):
    """What `load` is told holds for every image, of any size."""
    predictor = vitdense.load(segmenter, "cpu", ["inference.window=32", "inference.flip=true"])
    assert (predictor.inference.window, predictor.inference.flip) == (32, True)
    paths = sorted((label_root / "images" / "validation").iterdir())
    together = predictor(paths, batch_size=4)
    for path, prediction in zip(paths, together, strict=True):
        with Image.open(path) as image:
            assert prediction.semantic.shape == (image.height, image.width)
        same = prediction.semantic == predictor(path).semantic
        assert same.float().mean() > 0.999
    whole = vitdense.load(segmenter, "cpu")(paths)
    assert any(
        not torch.equal(a.semantic, b.semantic) for a, b in zip(together, whole, strict=True)
    )
    with pytest.raises(ConfigError, match=r"inference has no key 'windows'.*Did you mean 'window'"):
        vitdense.load(segmenter, "cpu", ["inference.windows=32"])


def test_the_command_predict(segmenter, detector, label_root, tmp_path, capsys):
    photos = str(label_root / "images" / "validation")
    out = ["--out", str(tmp_path), "--device", "cpu"]
    words = ["predict", str(segmenter), photos, "inference.window=32", *out]
    assert cli.main([*words, "inference.blend=center"]) == 0
    options = ["inference.window=32", "inference.blend=center"]
    expected = vitdense.load(segmenter, "cpu", options)(Path(photos) / "photo_3.png")
    labels = np.array(Image.open(tmp_path / "labels" / "photo_3.png"))
    assert np.array_equal(labels, expected.semantic.numpy() + 1)
    capsys.readouterr()
    for model, option, message in (
        (detector, "inference.flip=true", "inference.flip: is for semantic models"),
        (segmenter, "inference.window=40", "inference.window: 40 is no multiple of 32"),
        (segmenter, "inference.blend=round", "inference.blend: expected 'flat', 'gaussian' or"),
        (segmenter, "inference.overlap=0.5", "inference.overlap: is for windows; set inference.w"),
        (segmenter, "inference.batch_size=2", "inference.batch_size: is for windows"),
    ):
        assert cli.main(["predict", str(model), photos, option, *out]) == 2
        assert message in capsys.readouterr().err


def test_the_command_eval(segmenter, tmp_path):
    file = tmp_path / "numbers.json"
    words = ["eval", str(segmenter), "inference.window=32", "device=cpu", "--json", str(file)]
    assert cli.main(words) == 0
    numbers = json.loads(file.read_text())
    assert numbers == evaluate(segmenter, overrides=["inference.window=32", "device=cpu"])


class Largest(TorchDispatchMode):
    """Notes the most numbers that a tensor of floats had."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            self.numbers = max(self.numbers, result.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("evaluation", ["keep", "short_side"])
@pytest.mark.parametrize("blend", ["flat", "center"])
def test_no_map_of_a_large_image_is_ever_whole(segmenter, evaluation, blend, monkeypatch):
    """Neither at the stride of the scores nor at original size."""
    monkeypatch.setitem(rows.CHUNK, "cpu", 2**15)
    options = [f"data.transforms.evaluation={evaluation}", "data.transforms.size=160"]
    looks = ["inference.window=64", f"inference.blend={blend}", "inference.batch_size=2"]
    predictor = vitdense.load(segmenter, "cpu", [*options, *looks])
    image = torch.randint(0, 256, (3, 900, 320), dtype=torch.uint8)
    sample = predictor.sample(image)
    height, width = sample.image.shape[1:]
    with Largest() as largest:
        (prediction,) = predictor.answer([sample])
    assert prediction.semantic.shape == (900, 320)
    with Largest() as whole:
        vitdense.load(segmenter, "cpu", options).answer([sample])
    assert whole.numbers >= 3 * height * width
    # two windows, and what is resized at once
    assert largest.numbers < min(whole.numbers / 2, 2 * 64 * 64 * 16)
