"""Parameter groups of AdamW."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vitdense.engine.optim import build_optimizer, clip_gradients, parameter_groups, set_lr
from vitdense.models.base import Model


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
    with pytest.raises(ValueError, match="^layer_decay: TinyBackbone knows no depth of 'pos"):
        parameter_groups(tiny_model, 0.05, layer_decay=0.9)


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
