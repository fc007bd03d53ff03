"""transformers' UPerNet on Swin and ConvNeXt from its saved folders."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import ConvNextConfig, SwinConfig, UperNetConfig, UperNetForSemanticSegmentation

from vitdense.cli import main
from vitdense.convert.conversion import convert as convert_file
from vitdense.engine.checkpoint import load_model, read_meta
from vitdense.models.base import Model
from vitdense.structures import IGNORE, Target

STAGES = ["stage1", "stage2", "stage3", "stage4"]
SIZES = [(160, 224), (192, 128)]
"""In pixels: maps of 40 x 56 to 5 x 7 and of 48 x 32 to 6 x 4 cells; windows have 3 a side."""


def swin(**changes: Any) -> SwinConfig:
    sizes = dict(embed_dim=8, depths=[2, 2, 2, 2], num_heads=[1, 2, 2, 4], window_size=3)
    return SwinConfig(**(sizes | dict(out_features=STAGES, drop_path_rate=0.0) | changes))


def convnext(**changes: Any) -> ConvNextConfig:
    sizes = dict(hidden_sizes=[8, 12, 16, 24], depths=[1, 2, 1, 1], out_features=STAGES)
    return ConvNextConfig(**(sizes | changes))


def make(backbone: Any, **changes: Any) -> UperNetForSemanticSegmentation:
    options = dict(backbone_config=backbone, hidden_size=16, auxiliary_channels=8)
    options |= {} if "id2label" in changes else dict(num_labels=5)
    return UperNetForSemanticSegmentation(UperNetConfig(**(options | changes))).eval()


def pixels(size: tuple[int, int]) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def labels(size: tuple[int, int]) -> Tensor:
    found = torch.randint(5, (2, *size), generator=torch.Generator().manual_seed(2))
    found[:, :, : size[1] // 4] = IGNORE
    return found


def outputs(model: Any, images: Tensor) -> Any:
    """Of a model of ours for normalised pixels."""
    return model.head(model.backbone(images))


def check(ours: Model, theirs: nn.Module, size: tuple[int, int]) -> None:
    """Logits at full size and the whole loss, in float32 and in float64."""
    truth = labels(size)
    targets = [Target(semantic=one.to(torch.uint8)) for one in truth]
    for dtype, atol in ((torch.float32, 1e-4), (torch.float64, 1e-8)):
        mine, other = copy.deepcopy(ours).to(dtype).eval(), copy.deepcopy(theirs).to(dtype).eval()
        with torch.no_grad():
            found = outputs(mine, pixels(size).to(dtype))
            expected = other(pixels(size).to(dtype), labels=truth)
        logits = F.interpolate(found.logits, size, mode="bilinear", align_corners=False)
        assert expected.logits.std() > 0.01
        torch.testing.assert_close(logits, expected.logits, atol=atol, rtol=0)
        loss = sum(mine.loss(found, targets).values())
        torch.testing.assert_close(loss, expected.loss, atol=atol, rtol=0)


BACKBONES = {"swin": swin, "convnext": convnext}


@pytest.mark.parametrize("name", BACKBONES)
def test_logits_and_loss(name: str, convert: Any, scatter: Any) -> None:
    theirs = make(BACKBONES[name]())
    scatter(theirs)
    ours = convert(theirs)
    for size in SIZES:
        check(ours, theirs, size)


def older(name: str) -> str:
    """A name of transformers 5's memory as the public files of UPerNet on Swin have it."""
    for new, old in (
        ("backbone.swin.", "backbone."),
        ("attention.q_proj", "attention.self.query"),
        ("attention.k_proj", "attention.self.key"),
        ("attention.v_proj", "attention.self.value"),
        ("attention.relative_position_bias.relative", "attention.self.relative"),
        ("attention.o_proj", "attention.output.dense"),
        ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    ):
        name = name.replace(new, old)
    return name


@pytest.mark.parametrize("names", ["older", "newer"])
def test_names_of_files_and_of_memory(names: str, convert: Any, tmp_path: Path) -> None:
    theirs = make(swin())
    ours = convert(theirs).state_dict()
    state = {name: value.contiguous() for name, value in theirs.state_dict().items()}
    if names == "older":
        state = {
            older(name): value for name, value in state.items() if "swin.layernorm" not in name
        }
        assert "backbone.encoder.layers.0.blocks.0.attention.self.query.weight" in state
    save_file(state, tmp_path / "theirs" / "model.safetensors", {"format": "pt"})
    convert_file(str(tmp_path / "theirs"), tmp_path / "again.safetensors")
    again = load_model(tmp_path / "again.safetensors")[0].state_dict()
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[name], ours[name]) for name in ours)


def test_known_sizes_are_timms_models(tmp_path: Path) -> None:
    from vitdense.convert import backbones
    from vitdense.convert.source import Source

    def model(**config: Any) -> str:
        return backbones.plan(Source("x", {}, {"backbone_config": config}))["model"]

    tiny, base = [96, 192, 384, 768], [128, 256, 512, 1024]
    assert model(model_type="convnext", hidden_sizes=tiny) == "convnext_tiny"
    assert model(model_type="convnext", hidden_sizes=base, depths=[3, 3, 27, 3]) == "convnext_base"
    assert model(model_type="swin") == "swin_tiny_patch4_window7_224"


def test_config_beside_it_says_what_the_file_says(convert: Any, tmp_path: Path) -> None:
    theirs = make(
        swin(), id2label={0: "wall", 1: "bed ", 2: "background"}, auxiliary_loss_weight=0.0
    )
    folder = tmp_path / "theirs"
    folder.mkdir()
    preprocessor = {"size": 64, "do_reduce_labels": True, "image_mean": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    ours = convert(theirs)
    meta = read_meta(tmp_path / "ours" / "model.safetensors")
    assert (meta.classes, meta.category_ids) == (["wall", "bed", "background"], [1, 2, 3])
    assert ours.task == "semantic" and ours.head.aux is None
    assert ours.backbone.mean == (0.5, 0.5, 0.5)
    text = (tmp_path / "ours" / "model.yaml").read_text()
    for line in ("reduce_zero_label: true", "evaluation: stretch", "size: 64", "name: ade20k"):
        assert line in text


@pytest.mark.parametrize(
    "said, wanted",
    [
        ({}, {"size": 512, "crop": 512}),
        ({"size": {"shortest_edge": 600}}, {"size": 600, "crop": 600}),
        (
            {"size": {"height": 480, "width": 640}},
            {"size": 480, "crop": [480, 640], "evaluation": "stretch"},
        ),
        (
            {"size": {"height": 480, "width": 480}, "keep_aspect_ratio": True},
            {"size": 480, "crop": 480},
        ),
        ({"do_resize": False}, {"size": 512, "crop": 512, "evaluation": "keep"}),
    ],
)
def test_preparation(said: dict[str, Any], wanted: dict[str, Any]) -> None:
    from vitdense.convert.preparation import segmentation
    from vitdense.convert.source import Source

    assert segmentation(Source("x", {}, {}, said), 512) == {"name": "segmentation"} | wanted


def test_what_cannot_be_converted_is_named(tmp_path: Path, capsys: Any) -> None:
    make(swin(), auxiliary_num_convs=2).save_pretrained(tmp_path / "theirs")
    code = main(["convert", str(tmp_path / "theirs"), "--out", str(tmp_path / "m.safetensors")])
    assert code and "auxiliary_num_convs is 2" in capsys.readouterr().err


DUBAI = Path(__file__).parents[3] / "shared" / "data" / "aerial_dubai"


@pytest.mark.skipif(not DUBAI.is_dir(), reason="the data is not here")
def test_fine_tuning_keeps_the_classes_that_it_knows(
    convert: Any, tmp_path: Path, capsys: Any
) -> None:
    from vitdense import config as configs
    from vitdense.engine.train import train

    names = {0: "wall", 1: "building", 2: "Road", 3: "water", 4: "background"}
    before = convert(make(convnext(), id2label=names)).state_dict()
    settings = {
        "data.root": DUBAI, "data.dataset.reduce_zero_label": "true", "data.workers": 0,
        "output": tmp_path / "run", "device": "cpu",
        "data.transforms.size": 64, "data.transforms.crop": 64, "train.steps": 1,
        "train.batch_size": 2, "train.evaluations": 1, "train.pictures": 0, "optimizer.lr": 1e-12,
    }  # fmt: skip
    overrides = [f"{key}={value}" for key, value in settings.items()]
    train(configs.load(tmp_path / "ours" / "model.yaml", overrides))
    text = "".join(capsys.readouterr())
    assert "kept 3 of 5 classes by name (case apart): building, road, water" in text
    model, meta = load_model(tmp_path / "run" / "model.safetensors")
    after = model.state_dict()
    for layer in ("classifier.1", "aux.1.1"):
        for kind in ("weight", "bias"):
            old, new = before[f"head.{layer}.{kind}"], after[f"head.{layer}.{kind}"]
            for row, name in ((1, "building"), (2, "road"), (3, "water")):
                place = meta.classes.index(name)
                torch.testing.assert_close(new[place], old[row], atol=1e-9, rtol=0)
    out = tmp_path / "answers"
    photo = str(next((DUBAI / "images" / "validation").glob("*.jpg")))
    file = str(tmp_path / "ours" / "model.safetensors")
    assert main(["predict", file, photo, "--out", str(out)]) == 0
    assert list((out / "labels").glob("*.png"))
