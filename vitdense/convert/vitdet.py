"""detectron2's ViTDet backbones and pyramids under our names."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from vitdense.convert import preparation
from vitdense.convert.classes import from_count
from vitdense.convert.family import Family, Plan
from vitdense.convert.names import Rules, Weights
from vitdense.convert.source import Source
from vitdense.convert.vit import resample
from vitdense.structures import Size

RESAMPLING = {2: 4, 3: 1, 4: 0, 5: 1}
"""Modules before the 1x1 convolution in `simfp_n`: the same as in our stage n - 2."""


def _pyramid(match: re.Match[str]) -> str:
    """detectron2 keeps a norm within its convolution, ours follows it."""
    level, index = int(match[1]), int(match[2])
    behind = index - RESAMPLING[level]
    if behind >= 0:
        index += behind + bool(match[3])
    return f"neck.stages.{level - 2}.{index}."


VITDET: Rules = [
    (r"^backbone\.net\.", "backbone.model."),
    (r"^backbone\.simfp_([2-5])\.(\d)\.(norm\.)?", _pyramid),
]
"""`net` is timm's SAM encoder, `simfp_*` are the stages of our pyramid."""


def positions(table: Tensor, grid: Size | None) -> Tensor:
    """[1, side * side, C], perhaps with a class token's before it -> [1, rows, columns, C]."""
    side = int(table.shape[1] ** 0.5)
    prefix = table.shape[1] - side * side
    rows, columns = grid or (side, side)
    cells = resample(table, (rows, columns), prefix)[:, prefix:]
    return cells.unflatten(1, (rows, columns))


def trained_grid(tensors: dict[str, Tensor]) -> Size | None:
    """(rows, columns) of patches of the images it was trained on, None if that is not known.

    A block over n patches has 2 n - 1 relative positions; global blocks have the most.
    """
    rows, columns = (
        max((len(value) for name, value in tensors.items() if name.endswith(axis)), default=0)
        for axis in ("rel_pos_h", "rel_pos_w")
    )
    return ((rows + 1) // 2, (columns + 1) // 2) if rows and columns else None


class VitDet(Family):
    """ViTDet's backbone and pyramid, under a new detection head: its own is an R-CNN."""

    title = "detectron2's ViTDet"

    def recognises(self, source: Source) -> bool:
        return "backbone.net.pos_embed" in source.weights

    def plan(self, source: Source) -> Plan:
        size = [16 * side for side in trained_grid(source.weights) or (64, 64)]
        options, depth = describe(source.weights)
        backbone = {
            "name": "timm",
            "model": "samvit_base_patch16",
            "img_size": size,
            "out_indices": [depth - 1],
            "options": options,
            **preparation.IMAGENET,
        }
        model = {"backbone": backbone, "neck": "simple_feature_pyramid", "head": "rtdetr"}
        transforms = {"name": "detection", "size": size, "resize": "keep_ratio"}
        fresh = {r"^head\.": "ViTDet has another, an R-CNN"}
        return Plan(model, from_count(80), transforms, fresh)

    def fill(self, source: Source, weights: Weights) -> None:
        weights.drop(r"^(roi_heads|proposal_generator)\.", "belongs to its R-CNN")
        weights.drop(r"^pixel_(mean|std)$", "is in the config")
        weights.rename(VITDET)
        grid = trained_grid(source.weights)
        weights.change(r"^backbone\.model\.pos_embed$", lambda table: positions(table, grid))


def describe(tensors: dict[str, Tensor]) -> tuple[dict[str, Any], int]:
    """Arguments of timm's SAM encoder, and its number of blocks, from the shapes of a ViTDet."""
    found = {
        int(match[1]): tensor
        for name, tensor in tensors.items()
        if (match := re.fullmatch(r"backbone\.net\.blocks\.(\d+)\.attn\.rel_pos_h", name))
    }
    if not found:
        raise ValueError("has no relative positions, which ViTDet's attention needs")
    width = tensors["backbone.net.pos_embed"].shape[-1]
    reach = min(len(table) for table in found.values())
    options = {
        "embed_dim": width,
        "depth": len(found),
        "num_heads": width // found[0].shape[1],
        "window_size": (reach + 1) // 2,
        "global_attn_indexes": [i for i, table in sorted(found.items()) if len(table) > reach],
    }
    return options, len(found)
