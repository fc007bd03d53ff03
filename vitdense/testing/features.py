"""Checks of the parts that make feature maps: backbones and necks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitdense.backbones.base import Backbone
from vitdense.necks.base import Neck
from vitdense.structures import Level, Size
from vitdense.testing import probes
from vitdense.testing.probes import require


def check_backbone(
    cls: Callable[..., Backbone],
    *,
    sizes: Sequence[Size] = ((64, 96), (70, 50)),
    **options: Any,
) -> None:
    """Assert what every backbone must keep.

    Declared levels equal real maps at each of `sizes`, odd ones included; finite gradients on
    every parameter that trains; an image alone = the same in a batch; bfloat16 autocast; copies;
    names for the optimizer that exist.

    Args:
        cls: the class, or a function that builds the part.
        sizes: (height, width) of the images it is tried on.
        options: what a config would set.

    Raises:
        AssertionError: says what is broken and how to mend it.
    """
    name = _name(cls)
    with probes.seeded():
        backbone = cls(**options)
        probes.check_contract("backbone", backbone)
        probes.check_state(name, backbone)
        probes.check_levels(name, backbone.levels)
        _check_constants(name, backbone)
        for size in sizes:
            images = torch.randn(2, backbone.in_chans, *size)
            _check_maps_of(name, backbone, backbone.levels, images, size)
        images = torch.randn(2, backbone.in_chans, *sizes[0])
        _check_copies_of(name, backbone, lambda: cls(**options), images)


def check_neck(
    cls: Callable[..., Neck],
    *,
    levels: Sequence[Level] = probes.PYRAMID,
    size: Size = (64, 96),
    **options: Any,
) -> None:
    """Assert what every neck must keep.

    Declared levels equal real maps; finite gradients on every parameter that trains; an image
    alone = the same in a batch; bfloat16 autocast; copies; the features that come in stay as
    they are.

    Args:
        cls: the class, or a function that builds the part.
        levels: the incoming levels; pass four of stride 16 for a neck of plain ViTs.
        size: (height, width) of the image under the maps.
        options: what a config would set.

    Raises:
        AssertionError: says what is broken and how to mend it.
    """
    name = _name(cls)
    with probes.seeded():
        neck = cls(list(levels), **options)
        probes.check_contract("neck", neck)
        probes.check_state(name, neck)
        probes.check_levels(name, neck.levels)
        features = [item.detach() for item in probes.make_maps(levels, size, 2)]
        before = [item.clone() for item in features]
        _check_maps_of(name, neck, neck.levels, features, size)
        require(
            all(torch.equal(a, b) for a, b in zip(features, before, strict=True)),
            f"{name}.forward changes the features that come in; work on new tensors",
        )
        _check_copies_of(name, neck, lambda: cls(list(levels), **options), features)


def _check_maps_of(
    name: str, module: Any, levels: list[Level], inputs: Tensor | list[Tensor], size: Size
) -> None:
    probes.shake(module)
    for mode in (False, True):
        with probes.noting(f"{name}: forward for an image of {size}"):
            maps = module.train(mode)(inputs)
        probes.check_maps(name, maps, levels, size)
    _check_backward(name, module, maps, "in float32")
    with torch.autocast("cpu", torch.bfloat16):
        maps = module(inputs)
    _check_backward(name, module, maps, "under bfloat16 autocast")


def _check_backward(name: str, module: nn.Module, maps: list[Tensor], situation: str) -> None:
    require(
        all(bool(item.isfinite().all()) for item in maps),
        f"{name}: a map holds values that are not finite {situation}. "
        "Look for overflow, or a division by zero",
    )
    loss = torch.stack([item.float().square().mean() for item in maps]).sum()
    if any(p.requires_grad for p in module.parameters()):
        loss.backward()
    probes.check_gradients(name, module, situation)


def _check_copies_of(
    name: str, module: nn.Module, build: Callable[[], nn.Module], inputs: Tensor | list[Tensor]
) -> None:
    module.eval()
    maps = _run(module, inputs)

    def same(other: nn.Module) -> bool:
        return all(_close(a, b) for a, b in zip(maps, _run(other, inputs), strict=True))

    probes.check_copies(name, module, build, same)
    alone = _run(module, inputs[:1] if isinstance(inputs, Tensor) else [x[:1] for x in inputs])
    require(
        all(_close(a[:1], b) for a, b in zip(maps, alone, strict=True)),
        f"{name}: an image alone gives other maps than the same image in a batch. "
        "Nothing may be shared between images in evaluation",
    )


def _check_constants(name: str, backbone: Backbone) -> None:
    names = {key for key, _ in backbone.named_parameters()}
    for key, told in (
        ("layer_depths", set(backbone.layer_depths())),
        ("no_weight_decay", backbone.no_weight_decay()),
    ):
        unknown = sorted(told - names)
        require(
            not unknown,
            f"{name}.{key}() names {unknown[:3]}, which are no parameters; "
            "use the names of named_parameters()",
        )
    depths = backbone.layer_depths()
    missing = sorted(names - set(depths)) if depths else []
    require(not missing, f"{name}.layer_depths() leaves out {missing[:3]}: give every depth")


def _run(module: nn.Module, inputs: Tensor | list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        maps: list[Tensor] = module(inputs)
    return maps


def _close(first: Tensor, second: Tensor) -> bool:
    return torch.allclose(first, second, rtol=1e-3, atol=1e-4)


def _name(cls: Any) -> str:
    return getattr(cls, "__name__", type(cls).__name__)
