"""mmsegmentation's own checkpoints of UPerNet on Swin."""

from __future__ import annotations

import math
import re
from typing import Any

from torch import Tensor

from vitdense.convert import preparation, upernet
from vitdense.convert.backbones import swin_options
from vitdense.convert.classes import of_pixels
from vitdense.convert.family import Family, Plan
from vitdense.convert.names import Rules, Weights
from vitdense.convert.source import ConversionError, Source

BACKBONE: Rules = [
    (r"^patch_embed\.projection", "model.patch_embed.proj"),
    (r"^patch_embed\.norm", "model.patch_embed.norm"),
    (r"^norm(\d)", r"level_norms.\1"),
    (r"^stages\.(\d+)\.downsample", lambda m: f"model.layers.{int(m[1]) + 1}.downsample"),
    (r"^stages\.", "model.layers."),
    (r"\.attn\.w_msa\.", ".attn."),
    (r"\.ffn\.layers\.0\.0", ".mlp.fc1"),
    (r"\.ffn\.layers\.1", ".mlp.fc2"),
]

HEAD: Rules = [(r"\.conv_seg\.", ".classifier."), *upernet.HEAD]


class MmsegUPerNet(Family):
    """A `.pth` of mmsegmentation, 0.x or 1.x; all sizes are read off its weights."""

    title = "mmsegmentation's UPerNet on Swin"

    def recognises(self, source: Source) -> bool:
        names = {"decode_head.fpn_bottleneck.conv.weight", "backbone.patch_embed.projection.weight"}
        return names <= source.weights.keys() and any(".w_msa." in name for name in source.weights)

    def plan(self, source: Source) -> Plan:
        weights = source.weights
        aux = weights.get("auxiliary_head.convs.0.conv.weight")
        pools = {name for name in weights if re.search(r"psp_modules\.\d+\.1\.conv", name)}
        head = {
            "name": "upernet",
            "channels": len(weights["decode_head.fpn_bottleneck.conv.weight"]),
            "aux_weight": 0.0 if aux is None else 0.4,
            "aux_channels": 256 if aux is None else len(aux),
            "aux_level": 2,
        }
        if len(pools) != 4:
            raise ConversionError(f"{source.name}: pools {len(pools)} times; usual are 1, 2, 3, 6")
        count = len(weights["decode_head.conv_seg.weight"])
        labelled = {"id2label": dict(enumerate(class_names(source, count)))}
        first = preparation.first_label(Source(source.name, {}, labelled))
        return Plan(
            {"backbone": backbone(weights), "neck": "none", "head": head},
            of_pixels(labelled, first),
            preparation.segmentation(source, 512),
            dataset={"name": "ade20k", "reduce_zero_label": bool(first)},
            recipe=upernet.FINE_TUNING,
        )

    def fill(self, source: Source, weights: Weights) -> None:
        weights.rename(BACKBONE, within="backbone.", into="backbone.")
        weights.change(r"downsample\.(norm|reduction)\.", merge_order)
        weights.rename(HEAD, into="head.")


def merge_order(tensor: Tensor) -> Tensor:
    """From the order of `nn.Unfold` to that in which Swin joins the four patches it merges.

    Args:
        tensor: [..., C * 4], the patch changes fastest, row by row.

    Returns:
        [..., 4 * C], the channel changes fastest, column by column.
    """
    patches = tensor.unflatten(-1, (-1, 2, 2))
    return patches.movedim(-3, -1).transpose(-3, -2).flatten(-3)


def class_names(source: Source, count: int) -> list[str]:
    """What the file calls its classes, else numbers."""
    said = source.config.get("dataset_meta") or {}
    names = said.get("classes") or said.get("CLASSES") or source.config.get("CLASSES") or ()
    return list(names) if len(names) == count else [f"class {row}" for row in range(count)]


def backbone(weights: dict[str, Tensor]) -> dict[str, Any]:
    """The `backbone` mapping for Swin's weights."""
    width = len(weights["backbone.patch_embed.projection.weight"])
    tables = {
        (int(match[1]), int(match[2])): tensor.shape
        for name, tensor in weights.items()
        if (match := re.search(r"stages\.(\d+)\.blocks\.(\d+)\..*bias_table$", name))
    }
    stages = sorted({stage for stage, _ in tables})
    depths = [sum(stage == other for other, _ in tables) for stage in stages]
    window = (math.isqrt(tables[0, 0][0]) + 1) // 2
    config = {
        "embed_dim": width,
        "depths": depths,
        "num_heads": [tables[stage, 0][1] for stage in stages],
        "window_size": window,
        "out_indices": [stage + 1 for stage in stages],
    }
    drop_path = {"drop_path": 0.3}  # in all published configs
    return {"name": "timm", **swin_options(config), **drop_path, **preparation.IMAGENET}
