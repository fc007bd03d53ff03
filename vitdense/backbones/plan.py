"""How to build a timm model so that it takes the images at hand."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch import nn

from vitdense.backbones.creation import check_name, on_meta, parameters_of
from vitdense.backbones.survey import Survey, round_up, stated_strides, survey
from vitdense.structures import Size


def make_plan(
    name: str,
    size: Size | None,
    patch_size: int | None,
    in_chans: int,
    drop_path: float,
    pad_before_roll: bool,
    options: dict[str, Any],
) -> tuple[dict[str, Any], Survey]:
    """Arguments for timm's constructor, and a survey of the model that they make.

    Args:
        size: (height, width) of the images to build for; None = the model's own.
        options: the user's arguments, which go before all others.

    Raises:
        ValueError: the model cannot serve as a backbone, or has no such option.
    """
    check_name(name)
    asked = {"num_classes": 0, "in_chans": in_chans, **options}
    probe = on_meta(name, asked)
    known = parameters_of(probe)
    asked |= _fitting(name, probe, known, patch_size, drop_path, pad_before_roll) | options
    probe = on_meta(name, asked)
    height, width = probe.pretrained_cfg["input_size"][-2:]  # type: ignore[index]
    native = (height, width)
    if size is not None and "img_size" in known:
        step = math.lcm(*stated_strides(probe))
        asked["img_size"] = native = round_up(size, (step, step))
        probe = on_meta(name, asked)
    return asked, _survey(name, probe, native, size, in_chans, known)


def _fitting(
    name: str,
    probe: nn.Module,
    known: set[str],
    patch_size: int | None,
    drop_path: float,
    pad_before_roll: bool,
) -> dict[str, Any]:
    """Arguments by which this family takes images of any size, other patches, and `drop_path`."""
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    from vitdense.backbones.swin import has_windows

    arguments: dict[str, Any] = {}
    if isinstance(probe, VisionTransformerSAM):
        # as SAM and ViTDet were trained; timm builds their norms with 1e-5
        arguments["norm_layer"] = partial(nn.LayerNorm, eps=1e-6)
    if "strict_img_size" in known:
        arguments["strict_img_size"] = False
    elif "dynamic_img_size" in known:
        arguments["dynamic_img_size"] = True
    if pad_before_roll and has_windows(probe):
        arguments["always_partition"] = True
    if patch_size is not None:
        if "patch_size" not in known:
            raise ValueError(f"patch_size: {name} has no patches to resize")
        arguments["patch_size"] = patch_size
    if "drop_path_rate" in known:
        arguments["drop_path_rate"] = drop_path
    elif drop_path:
        raise ValueError(f"drop_path: {name} has no stochastic depth")
    return arguments


def _survey(
    name: str, probe: nn.Module, native: Size, size: Size | None, in_chans: int, known: set[str]
) -> Survey:
    if not hasattr(probe, "forward_intermediates"):
        raise ValueError(f"model: {name} gives no intermediate maps in this version of timm")
    try:
        found = survey(probe, name, native, in_chans)
    except ValueError as error:
        option = "model" if size is None else "img_size"
        made = "" if size is None else f" built for {size[0]}x{size[1]}"
        raise ValueError(f"{option}: {name}{made} cannot serve as a backbone: {error}") from error
    if found.canvas.fixed and size is not None and "img_size" not in known:
        raise ValueError(
            f"img_size: {name} cannot be built for another size than {native[0]}x{native[1]}"
        )
    return found
