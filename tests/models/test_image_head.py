"""Labels of whole images beside pixels: what the head computes, and what it leaves alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vitdense.backbones.timm import TimmBackbone
from vitdense.heads.image import ImageHead
from vitdense.models.base import Model
from vitdense.models.eomt import EomtModel
from vitdense.models.pyramid import PyramidModel
from vitdense.registry import HEADS, NECKS
from vitdense.structures import Frame, Target
from vitdense.testing import check_model

VIT = partial(
    TimmBackbone, model="vit_tiny_patch16_224", img_size=64, options={"depth": 2, "embed_dim": 24}
)
CONV = partial(TimmBackbone, model="test_resnet", in_chans=1)
NECK = partial(NECKS.get("simple_feature_pyramid"), channels=16)
QUERIES = {"width": 16, "heads": 2, "ffn": 16, "queries": 5, "encoder_layers": 1,
           "decoder_layers": 1}  # fmt: skip
DETR = partial(HEADS.get("detr"), **QUERIES)


def build(pooling: str | None = "mean", backbone: Any = VIT, **options: Any) -> PyramidModel:
    torch.manual_seed(0)
    options = {"neck": NECK, "head": HEADS.get("linear")} | options
    return PyramidModel(3, 2, backbone=backbone, image_head=pooling, **options)  # type: ignore[arg-type]


def images_of(model: Model, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    size = (count, model.in_chans, 64, 64)
    return torch.randint(256, size, dtype=torch.uint8, generator=generator)


def target(labels: list[bool] | None) -> Target:
    known = None if labels is None else torch.tensor(labels)
    return Target(semantic=torch.zeros(64, 64, dtype=torch.uint8), image_labels=known)


@pytest.mark.parametrize(
    ("pooling", "backbone", "head"),
    [
        ("mean", VIT, HEADS.get("linear")),
        ("attention", VIT, HEADS.get("linear")),
        ("token", VIT, HEADS.get("linear")),
        ("token", partial(VIT, class_token="add"), HEADS.get("linear")),
        ("mean", CONV, DETR),
        ("attention", CONV, HEADS.get("linear")),
    ],
)
def test_conformance(pooling: str, backbone: Any, head: Any) -> None:
    options = {"neck": NECK} if backbone is not CONV else {}
    check_model(
        PyramidModel, image_classes=3, backbone=backbone, head=head, image_head=pooling, **options
    )


@pytest.mark.parametrize("pooling", ["mean", "attention", "token"])
def test_pixels_are_answered_as_without(pooling: str) -> None:
    with_head, without = build(pooling).eval(), build(None).eval()
    assert without.image_classes == 0
    without.load_state_dict(
        {k: v for k, v in with_head.state_dict().items() if not k.startswith("image_head.")}
    )
    images, targets = images_of(without), [target([True, False])] * 2
    outputs, plain = with_head(images), without(images)
    torch.testing.assert_close(outputs.pixels.logits, plain.logits)
    torch.testing.assert_close(with_head.semantic_logits(outputs), without.semantic_logits(plain))
    losses, others = with_head.loss(outputs, targets), without.loss(plain, targets)
    torch.testing.assert_close({k: v for k, v in losses.items() if k != "image"}, others)
    frames = [Frame((64, 64), (64, 64), (30, 40))] * 2
    for ours, theirs in zip(
        with_head.predict(outputs, frames), without.predict(plain, frames), strict=True
    ):
        assert torch.equal(ours.semantic, theirs.semantic)
        assert theirs.image_scores is None and ours.image_scores.shape == (2,)


def test_token_and_mean_are_timms() -> None:
    for pooling, timms in (("token", "token"), ("mean", "avg")):
        model = build(pooling).eval()
        images = images_of(model)
        vit = model.backbone.model
        features = vit.forward_features(model.normalize(images))
        from timm.layers import global_pool_nlc

        pooled = global_pool_nlc(features, timms, num_prefix_tokens=vit.num_prefix_tokens)
        expected = model.image_head.classifier(model.image_head.norm(pooled))
        torch.testing.assert_close(model.image_logits(model(images)), expected)


def test_attention_weighs_cells_for_each_label() -> None:
    torch.manual_seed(0)
    head, map_ = ImageHead(24, 3, "attention"), torch.randn(2, 24, 4, 5)
    cells = F.layer_norm(map_.flatten(2).mT, [24])
    torch.testing.assert_close(head(map_), head.classifier(cells).mean(1))
    torch.nn.init.normal_(head.attention.weight)
    for label in range(3):
        scores = cells @ head.attention.weight[label] / 24**0.5
        pooled = (scores.softmax(1)[..., None] * cells).sum(1)
        expected = pooled @ head.classifier.weight[label] + head.classifier.bias[label]
        torch.testing.assert_close(head(map_)[:, label], expected)


EOMT = {"backbone": partial(VIT, patch_size=8), "queries": 5, "blocks": 1, "mask_points": 64}


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
@pytest.mark.parametrize("pooling", ["mean", "attention", "token"])
def test_eomt_conforms(pooling: str, task: str) -> None:
    check_model(EomtModel, image_classes=3, image_head=pooling, task=task, **EOMT)


@pytest.mark.parametrize("pooling", ["mean", "token"])
def test_eomt_reads_patches_or_class_token_behind_its_queries(pooling: str) -> None:
    torch.manual_seed(0)
    model = EomtModel(3, 2, image_head=pooling, task="semantic", **EOMT).eval()  # type: ignore[arg-type]
    images = images_of(model)
    vit, queries = model.backbone.model, model.head.queries.weight
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(model.normalize(images))))
    tokens = torch.cat([queries.expand(2, -1, -1), vit.blocks[0](tokens)], 1)
    tokens = vit.norm(vit.blocks[1](tokens))
    pooled = tokens[:, 5] if pooling == "token" else tokens[:, 6:].mean(1)
    outputs = model(images)
    expected = model.image_head.classifier(model.image_head.norm(pooled))
    torch.testing.assert_close(model.image_logits(outputs), expected)
    frames = [Frame((64, 64), (64, 64), (30, 40))] * 2
    for answer, logits in zip(model.predict(outputs, frames), expected, strict=True):
        torch.testing.assert_close(answer.image_scores, logits.sigmoid())
        assert answer.semantic.shape == (30, 40)


def test_the_loss_is_binary_cross_entropy_over_images_that_have_labels() -> None:
    model = build(image_weight=0.5)
    outputs = model(images_of(model, 3))
    targets = [target([True, False]), target(None), target([True, True])]
    truth = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    probability = outputs.image[[0, 2]].sigmoid()
    expected = -(truth * probability.log() + (1 - truth) * (1 - probability).log()).mean()
    torch.testing.assert_close(model.loss(outputs, targets)["image"], 0.5 * expected)
    all_known = [target([True, False])] * 3
    logits, flat = outputs.image, torch.tensor([[1.0, 0.0]] * 3)
    torch.testing.assert_close(
        ImageHead.loss(logits, all_known), F.binary_cross_entropy_with_logits(logits, flat)
    )


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^image_head: the data has no labels .*image_labels"):
        PyramidModel(3, backbone=VIT, head=HEADS.get("linear"), image_head="mean")
    with pytest.raises(ValueError, match=r"^image_head: the data has no labels .*image_labels"):
        EomtModel(3, image_head="mean", **EOMT)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^image_head: test_resnet has no class token.*mean or"):
        build("token", CONV, neck=None)
    with pytest.raises(ValueError, match=r"^image_head: .* take mean or attention"):
        build("token", partial(VIT, windows=2))
