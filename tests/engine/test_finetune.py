"""Runs that start from the model of another: what they keep, say, and refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vitdense.config import Config, ConfigError, loads
from vitdense.engine import build, checkpoint, runtime
from vitdense.engine.check import check
from vitdense.engine.checkpoint import CheckpointError, Meta
from vitdense.engine.run import Run
from vitdense.engine.train import train

HEADS = {
    "detection": "{name: detr, width: 16, heads: 2, ffn: 16, queries: 5, encoder_layers: 1, "
    "decoder_layers: 1}",
    "semantic": "linear",
}
TRANSFORMS = {
    "detection": "{name: detection, size: 32}",
    "semantic": "{name: segmentation, size: 32, crop: 32}",
}
CONFIG = """\
model:
  backbone: {name: timm, model: test_resnet}
  head: HEAD
data:
  dataset: {name: shapes, task: TASK, images: 6, size: 32}
  root: shapes
  transforms: TRANSFORMS
  workers: 0
train: {steps: 1, batch_size: 2, evaluations: 1, pictures: 0, ema: 0.9}
optimizer: {lr: 1e-9}
device: cpu
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(task: str, *overrides: str) -> Config:
    text = CONFIG.replace("HEAD", HEADS[task]).replace("TASK", task)
    return loads(text.replace("TRANSFORMS", TRANSFORMS[task]), "test.yaml", overrides)


def earlier(task: str) -> tuple[nn.Module, list[str]]:
    """Write `earlier.safetensors`: of a model whose classes are ours backwards, one renamed."""
    config = make(task)
    data = build.build_data(config)
    model = build.build_model(config, data)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    classes = [name.upper() for name in data.train.classes[::-1]]
    classes[0] = "something else"
    meta = Meta("{}", classes, list(range(len(classes))), task, 1, {}, "0")
    checkpoint.save_model(Path("earlier.safetensors"), model, meta)
    return model, data.train.classes


@pytest.mark.parametrize("task", HEADS)
def test_a_run_starts_from_it(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    old, classes = earlier(task)
    config = make(task, "train.init=earlier.safetensors", "output=run")
    train(config)
    text = capsys.readouterr().err
    assert f"kept {len(classes) - 1} of {len(classes)} classes by name" in text
    assert f"new: {classes[-1]}" in text
    model, _ = checkpoint.load_model("run/model.safetensors")
    name = next(n for n, p in model.named_parameters() if p.ndim > 1 and ".class" in n)
    ours, theirs = dict(model.named_parameters())[name], dict(old.named_parameters())[name]
    count = len(classes)
    torch.testing.assert_close(
        ours[: count - 1], theirs[:count].flip(0)[: count - 1], atol=1e-6, rtol=0
    )
    torch.testing.assert_close(ours[count:], theirs[count:], atol=1e-6, rtol=0)


def test_the_average_starts_from_it_too() -> None:
    earlier("semantic")
    run = Run(make("semantic", "train.init=earlier.safetensors"), runtime.start("cpu"))
    assert run.ema is not None
    for ours, theirs in zip(run.ema.model.parameters(), run.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_resumed_run_goes_on_from_its_own_weights(capsys: pytest.CaptureFixture[str]) -> None:
    earlier("semantic")
    settings = ("train.init=earlier.safetensors", "output=run")
    train(make("semantic", *settings))
    Path("earlier.safetensors").unlink()
    capsys.readouterr()
    train(make("semantic", *settings, "train.steps=2"), resume=True)
    assert "start from" not in capsys.readouterr().err


def test_weights_of_the_backbone_are_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    earlier("semantic")
    config = make("semantic", "train.init=earlier.safetensors", "model.backbone.pretrained=true")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("fetched")

    train(make("semantic", "output=resumed"))
    monkeypatch.setattr("timm.models._builder.load_pretrained", fail)
    Run(config, runtime.start("cpu"))
    longer = make("semantic", "output=resumed", "model.backbone.pretrained=true", "train.steps=2")
    assert train(longer, resume=True)["steps"] == 2


def test_weights_of_classes_in_the_loss_are_no_matter() -> None:
    _, classes = earlier("semantic")
    head = f"model.head={{name: linear, class_weights: {[1.0] * len(classes)}}}"
    Run(make("semantic", "train.init=earlier.safetensors", head), runtime.start("cpu"))


def test_check_says_it() -> None:
    _, classes = earlier("detection")
    text = check(make("detection", "train.init=earlier.safetensors"))
    assert f"kept {len(classes) - 1} of {len(classes)}" in text


def test_another_head_needs_a_word() -> None:
    earlier("detection")
    settings = ("train.init=earlier.safetensors", "output=run")
    with pytest.raises(CheckpointError, match="train.new_head=true"):
        train(make("semantic", *settings))
    train(make("semantic", *settings, "train.new_head=true"))


def test_a_new_head_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="new_head: without train.init all is new"):
        make("semantic", "train.new_head=true")


def test_what_is_no_model_of_ours_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors: not found"):
        train(make("semantic", "train.init=nothing.safetensors", "output=run"))
    assert not Path("run").exists()


def test_settings_are_in_the_written_config() -> None:
    earlier("semantic")
    train(make("semantic", "train.init=earlier.safetensors", "output=run"))
    meta = checkpoint.read_meta("run/model.safetensors")
    assert "init: earlier.safetensors" in meta.config
    assert replace(meta, config="").task == "semantic"
