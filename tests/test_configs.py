"""Every config that ships loads, builds, and says how it is run."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch

from vitdense import config as configs
from vitdense.engine.evaluate import check_inference
from vitdense.engine.optim import parameter_groups

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
TASKS = {
    "detection": "detection",
    "segmentation": "semantic",
    "instance": "instance",
    "panoptic": "panoptic",
}


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def load(file: Path, *overrides: str) -> configs.Config:
    """The config without downloads: layers on the meta device have no weights anyway."""
    config = configs.load(file, overrides)
    if config.model.options["backbone"].options.get("pretrained"):
        config = configs.load(file, [*overrides, "model.backbone.pretrained=false"])
    return config


def build(config: configs.Config) -> torch.nn.Module:
    """The model for 7 classes, and 2 labels of whole images if it answers with such."""
    return config.model(7, *[2] * (config.data.image_labels is not None))


def tensors_of(outputs: object) -> list[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    assert is_dataclass(outputs)
    values = [getattr(outputs, field.name) for field in fields(outputs)]
    return [value for value in values if isinstance(value, torch.Tensor)]


def test_there_are_configs():
    folders = {file.relative_to(ROOT / "configs").parts[0] for file in FILES}
    assert {"demo", "finetune", "detection", "segmentation"} <= folders


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_header_has_the_command(file):
    text = file.read_text(encoding="utf-8")
    header = text[: re.search(r"^[^#]", text, re.M).start()]
    assert len(header.splitlines()) >= 2, f"{name_of(file)}: say what it is, and its command"
    assert f"tools/train.py {name_of(file)}" in header
    assert re.search(r"minute|hour|[Cc]ost|measured", header), f"{name_of(file)}: say its cost"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_model_builds_and_answers_the_right_task(file):
    config = load(file)
    with torch.device("meta"):
        model = build(config)
    check_inference(config.inference, model)
    rates = config.optimizer
    names = (rates.weight_decay, rates.backbone_scale, rates.layer_decay, rates.scales)
    assert parameter_groups(model, *names), "a rate by name finds its parameters"
    assert model.num_classes == 7
    assert model.divisor > 0
    kind = next(kind for kind in (*TASKS, "") if kind in name_of(file))
    assert model.task == TASKS[kind]


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_forward_runs_on_the_canvas_of_its_transforms(file):
    config = load(file)
    policy = config.data.transforms()
    with torch.device("meta"):
        model = build(config).eval()
    side = max(policy.canvas or (320, 320))
    side = -(-side // model.divisor) * model.divisor
    images = torch.zeros(1, model.in_chans, side, side, dtype=torch.uint8, device="meta")
    assert tensors_of(model(images)), "no outputs"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_backbones_inherit_no_options_of_others(file):
    options = configs.load(file).model.options["backbone"].options
    if "swin" in options["model"]:
        assert options["patch_size"] is None and options["img_size"] is None
        assert options["level_norm"] and not options["windows"]
    elif "vit_" in options["model"]:
        assert not options["level_norm"] and options["drop_path"] < 0.3


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_resolved_config_is_the_same_config(file):
    config = configs.load(file)
    again = configs.loads(configs.dump(config), "resolved")
    assert configs.dump(again) == configs.dump(config)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_output_follows_the_name(file):
    name = file.relative_to(ROOT / "configs").with_suffix("").as_posix()
    assert configs.load(file).output == Path("runs") / name
