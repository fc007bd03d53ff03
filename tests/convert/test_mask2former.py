"""transformers' Mask2Former from its saved folder: the same logits and masks."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    ResNetConfig,
    SwinConfig,
)

from vitdense.convert.classes import COCO
from vitdense.convert.eomt import COCO_PANOPTIC
from vitdense.convert.mask2former import Mask2Former, things_of
from vitdense.convert.source import ConversionError, Source
from vitdense.models.base import Model

STAGES = ["stage1", "stage2", "stage3", "stage4"]
SMALL: dict[str, Any] = dict(
    feature_size=32, mask_feature_size=32, hidden_dim=32, num_attention_heads=4, encoder_layers=1,
    encoder_feedforward_dim=48, dim_feedforward=40, decoder_layers=5, num_queries=7, num_labels=5,
)  # fmt: skip
BACKBONES = {
    "swin": SwinConfig(
        embed_dim=8, depths=[2, 2, 2, 2], num_heads=[1, 2, 2, 4], window_size=3,
        drop_path_rate=0.0, out_features=STAGES,
    ),
    "resnet": ResNetConfig(
        hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], layer_type="basic", out_features=STAGES
    ),
}  # fmt: skip
"""Windows of three cells: no size below divides by them, and pads all levels of the other."""


def shake(model: Any) -> None:
    """Off its initial values, which tell not every parameter apart; masks stay of all sizes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def outputs_of(model: Any, pixels: Tensor) -> Any:
    """Of all layers, but with the norms of evaluation, for normalised pixels."""
    model.eval().head.training = True
    return model.head(model.backbone(pixels))


def check_parity(ours: Model, theirs: Any, sizes: list[tuple[int, int]]) -> None:
    theirs.eval()
    for dtype, atol in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        mine, other = copy.deepcopy(ours).to(dtype), copy.deepcopy(theirs).to(dtype)
        for size in sizes:
            generator = torch.Generator().manual_seed(1)
            pixels = torch.randn(2, 3, *size, generator=generator, dtype=dtype)
            with torch.no_grad():
                found = outputs_of(mine, pixels)
                expected = other(pixels, output_auxiliary_logits=True)
            every = [*expected.auxiliary_logits, expected]
            assert len(found.masks) == len(found.logits) == len(every) == 5
            assert found.canvas == size
            assert found.logits.std() > 0.1 and found.masks[-1].std() > 0.1
            inside = torch.stack(found.masks).flatten(3) > 0
            assert inside.any(-1).all() and not inside.all(-1).any()
            close = {"atol": atol, "rtol": 0}
            for logits, masks, layer in zip(found.logits, found.masks, every, strict=True):
                torch.testing.assert_close(logits, layer["class_queries_logits"], **close)
                torch.testing.assert_close(masks, layer["masks_queries_logits"], **close)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_equals_transformers(backbone: str, convert: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Mask2FormerConfig(backbone_config=BACKBONES[backbone], **SMALL)
    theirs = Mask2FormerForUniversalSegmentation(config)
    shake(theirs)
    ours = convert(theirs)
    check_parity(ours, theirs, [(128, 160), (224, 128)])
    assert ours.task == "instance"
    assert "name: mask2former" in (tmp_path / "ours" / "model.yaml").read_text()


def source(name: str = "theirs", **config: Any) -> Source:
    known = Mask2FormerConfig(**config).to_dict()
    return Source(name=name, weights={}, config=json.loads(json.dumps(known)))


@pytest.mark.parametrize(
    ("name", "classes", "task", "dataset"),
    [
        ("facebook/mask2former-swin-tiny-coco-instance", 80, "instance", "coco"),
        ("facebook/mask2former-swin-tiny-coco-panoptic", 133, "panoptic", "coco_panoptic"),
        ("facebook/mask2former-swin-tiny-ade-semantic", 150, "semantic", "ade20k"),
        ("facebook/mask2former-swin-large-ade-panoptic", 150, "panoptic", "coco_panoptic"),
        ("facebook/mask2former-swin-tiny-cityscapes-semantic", 19, "semantic", "ade20k"),
        ("folder", 133, "panoptic", "coco_panoptic"),
        ("folder", 150, "semantic", "ade20k"),
        ("folder", 3, "instance", "coco"),
    ],
)
def test_the_name_or_the_classes_tell_the_task(
    name: str, classes: int, task: str, dataset: str
) -> None:
    plan = Mask2Former().plan(source(name, num_labels=classes))
    assert plan.model["head"]["task"] == task
    assert plan.dataset["name"] == dataset
    assert len(plan.classes.names) == classes


@pytest.mark.parametrize("categories", [COCO, COCO_PANOPTIC], ids=["instance", "panoptic"])
def test_classes_of_coco_get_its_ids(categories: dict[int, str]) -> None:
    plan = Mask2Former().plan(source(id2label=dict(enumerate(categories.values()))))
    assert plan.classes.category_ids == list(categories)


@pytest.mark.parametrize(
    ("first", "classes", "things"),
    [("person", 133, 80), ("wall", 150, 100), ("road", 19, 8), ("road", 20, None)],
)
def test_things_of_the_known_sets_are_known(first: str, classes: int, things: int | None) -> None:
    names = {0: first} | {number: f"other {number}" for number in range(1, classes)}
    found = things_of(source(id2label=names))
    assert (None if found is None else found.sum()) == things


def test_sizes_and_weights_of_losses_are_kept() -> None:
    plan = Mask2Former().plan(source(num_queries=200, no_object_weight=0.2, train_num_points=99))
    head = plan.model["head"]
    assert (head["queries"], head["background"], head["mask_points"]) == (200, 0.2, 99)
    assert (head["encoder_layers"], head["decoder_layers"]) == (6, 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pre_norm": True}, "theirs: pre_norm is True; only False can be converted"),
        ({"mask_feature_size": 128}, "theirs: mask_feature_size is 128; only 256"),
        ({"backbone_config": SwinConfig(out_features=STAGES[1:])}, "theirs: its backbone gives 3"),
    ],
)
def test_what_our_head_has_not_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=f"^{message}"):
        Mask2Former().plan(source(**options))
