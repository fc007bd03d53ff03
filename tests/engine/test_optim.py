"""The optimizer and its parameter groups."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch

from vitdense.engine.optim import build_optimizer, clip_gradients, parameter_groups, set_lr
from vitdense.models.base import Model
from vitdense.registry import BACKBONES, HEADS, MODELS


def settings(model: Model, **options: Any) -> dict[str, tuple[float, float]]:
    """(learning rate scale, weight decay) of each trainable parameter by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 0.05, **options)
    pairs = [
        (names[id(parameter)], (group["lr_scale"], group["weight_decay"]))
        for group in groups
        for parameter in group["params"]
    ]
    assert len(pairs) == len(dict(pairs))
    return dict(pairs)


def test_every_parameter_is_in_one_group(tiny_model: Model) -> None:
    assert settings(tiny_model).keys() == dict(tiny_model.named_parameters()).keys()


def test_only_kernels_decay(tiny_model: Model) -> None:
    decaying = {name for name, (_, decay) in settings(tiny_model).items() if decay}
    assert decaying == {
        "backbone.stem.weight",
        "backbone.blocks.0.weight",
        "backbone.blocks.1.weight",
        "head.weight",
    }


def test_embeddings_do_not_decay(tiny_model: Model) -> None:
    """As in Mask2Former; DETR's own recipe has a decay too small to tell."""
    tiny_model.queries = torch.nn.Embedding(5, 8)
    assert settings(tiny_model)["queries.weight"] == (1.0, 0.0)


def test_frozen_parameters_are_left_out(tiny_model: Model) -> None:
    tiny_model.backbone.requires_grad_(False)
    assert settings(tiny_model).keys() == {
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
    }


def test_layer_decay_by_depth(tiny_model: Model) -> None:
    found = settings(tiny_model, backbone_scale=0.5, layer_decay=0.8)
    expected = {"stem.weight": 0, "blocks.0.bias": 1, "blocks.1.weight": 2, "norm.bias": 3}
    for name, depth in expected.items():
        assert found[f"backbone.{name}"][0] == pytest.approx(0.5 * 0.8 ** (4 - depth))
    assert found["head.weight"][0] == 1


def test_layer_decay_needs_an_order(tiny_model: Model) -> None:
    tiny_model.backbone.layer_depths = dict  # type: ignore[method-assign, assignment]
    with pytest.raises(
        ValueError, match="^optimizer.layer_decay: TinyBackbone knows no depth of 'pos"
    ):
        parameter_groups(tiny_model, 0.05, layer_decay=0.9)


def test_scales_by_parts_of_names(tiny_model: Model) -> None:
    scales = {"head": 0.1, "backbone.blocks": 0.5, "0": 2.0}
    found = settings(tiny_model, backbone_scale=0.2, scales=scales)
    assert found["head.weight"] == (pytest.approx(0.1), 0.05)
    assert found["head.bias"] == (pytest.approx(0.1), 0.0)
    assert found["backbone.blocks.0.weight"][0] == pytest.approx(0.2 * 0.5 * 2)
    assert found["backbone.blocks.1.weight"][0] == pytest.approx(0.2 * 0.5)
    assert found["backbone.stem.weight"][0] == pytest.approx(0.2)
    assert found["norm.weight"][0] == 1


@pytest.mark.parametrize("part", ["hea", "heads", "blocks.weight", ""])
def test_a_scale_of_nothing_is_an_error(tiny_model: Model, part: str) -> None:
    with pytest.raises(ValueError, match=f"^optimizer.scales: no parameter is called '{part}'"):
        parameter_groups(tiny_model, 0.05, scales={part: 0.1})
    with pytest.raises(ValueError, match=r"Did you mean 'head'\? Parts are backbone, "):
        parameter_groups(tiny_model, 0.05, scales={"haed": 0.1})


def test_sampling_offsets_learn_slower_as_in_deformable_detr(tiny_model: Model) -> None:
    from vitdense.layers.deformable_attention import DeformableAttention

    attention = tiny_model.cross_attention = DeformableAttention(16, 2, 1, 2)
    optimizer = build_optimizer(tiny_model, 1e-4, 1e-4, scales={"offsets": 0.1})
    slow = {
        id(parameter)
        for group in optimizer.param_groups
        if group["lr"] == pytest.approx(1e-5)
        for parameter in group["params"]
    }
    assert slow == {id(p) for p in attention.offsets.parameters()}


def test_layer_decay_is_vitdets() -> None:
    """detectron2's get_vit_lr_decay_rate: positions and patches at 0, block i at i + 1."""
    backbone = BACKBONES.get("timm")(
        model="vit_tiny_patch16_224", options={"depth": 3, "embed_dim": 16, "num_heads": 2}
    )
    model = torch.nn.Module()
    model.backbone = backbone
    found = settings(model, layer_decay=0.7)  # type: ignore[arg-type]
    for name, (scale, decay) in found.items():
        block = re.search(r"blocks\.(\d+)\.", name)
        layer = int(block[1]) + 1 if block else 0
        if "model.norm" not in name:
            assert scale == pytest.approx(0.7 ** (3 + 1 - layer)), name
        if "pos_embed" in name or "token" in name or "norm" in name or name.endswith("bias"):
            assert decay == 0, name
        if name.endswith(("qkv.weight", "fc1.weight", "patch_embed.proj.weight")):
            assert decay == 0.05, name


def test_shared_parameters_count_once(tiny_model: Model) -> None:
    tiny_model.again = tiny_model.head
    assert "head.weight" in settings(tiny_model)


def test_groups_do_not_change_the_step(tiny_model: Model) -> None:
    """One group per parameter by hand = ours."""
    import copy

    other = copy.deepcopy(tiny_model)
    ours = build_optimizer(tiny_model, 1e-2, 0.05, layer_decay=0.8)
    by_name = settings(other, layer_decay=0.8)
    theirs = torch.optim.AdamW(
        [
            {"params": [parameter], "lr": 1e-2 * by_name[name][0], "weight_decay": by_name[name][1]}
            for name, parameter in other.named_parameters()
        ]
    )
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    for model, optimizer in ((tiny_model, ours), (other, theirs)):
        model(images).square().mean().backward()
        optimizer.step()
    for ours_, theirs_ in zip(tiny_model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-6, atol=1e-7)


def test_set_lr_keeps_the_scales(tiny_model: Model) -> None:
    optimizer = build_optimizer(tiny_model, 1e-3, 0.0, backbone_scale=0.1)
    set_lr(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5, 0.05}


def test_clip_returns_the_norm_before(tiny_model: Model) -> None:
    tiny_model(torch.full((2, 3, 8, 8), 200, dtype=torch.uint8)).square().sum().backward()
    before = torch.cat([p.grad.flatten() for p in tiny_model.parameters()]).norm()  # type: ignore[union-attr]
    norm = clip_gradients(tiny_model, 0.1)
    torch.testing.assert_close(norm, before)
    after = torch.cat([p.grad.flatten() for p in tiny_model.parameters()]).norm()  # type: ignore[union-attr]
    assert after.item() == pytest.approx(0.1, rel=1e-3)


def test_what_does_not_learn_is_frozen(tiny_model: Model) -> None:
    optimizer = build_optimizer(tiny_model, 1e-3, 0.05, backbone_scale=0, scales={"head.bias": 0})
    frozen = {name for name, p in tiny_model.named_parameters() if not p.requires_grad}
    inside = {name for name, _ in tiny_model.named_parameters() if name.startswith("backbone.")}
    assert frozen == inside | {"head.bias"}
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(trained) == len(list(tiny_model.parameters())) - len(frozen)


def test_a_frozen_backbone_computes_no_gradients_and_keeps_its_statistics() -> None:
    model = MODELS.get("pyramid")(
        3,
        backbone=partial(
            BACKBONES.get("timm"), model="resnet10t", options={"layers": (1, 1, 1, 1)}
        ),
        head=HEADS.get("linear"),
    )
    optimizer = build_optimizer(model, 1e-2, 0.05, backbone_scale=0)
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    outputs = model.train()(images)
    assert not any(map_.requires_grad for map_ in model.backbone(images / 255))
    outputs.logits.square().mean().backward()
    optimizer.step()
    assert all(torch.equal(before[name], t) for name, t in model.backbone.state_dict().items())
    assert all(p.grad is not None for p in model.head.parameters())


def test_sgd_is_torchs(tiny_model: Model) -> None:
    optimizer = build_optimizer(tiny_model, 0.1, 0.01, name="sgd", momentum=0.8)
    assert isinstance(optimizer, torch.optim.SGD)
    weight, bias = tiny_model.head.weight, tiny_model.head.bias
    before = weight.detach().clone(), bias.detach().clone()
    for parameter in tiny_model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.allclose(weight, before[0] - 0.1 * (1 + 0.01 * before[0]))
    assert torch.allclose(bias, before[1] - 0.1)  # does not decay
    assert {group["momentum"] for group in optimizer.param_groups} == {0.8}
