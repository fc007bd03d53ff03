"""transformers' SegFormer: its MiT is timm's PVT v2 with other widths of MLPs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitdense.convert import preparation, upernet
from vitdense.convert.family import Family, Plan
from vitdense.convert.names import Rules, Weights
from vitdense.convert.source import Source, require

BACKBONE: Rules = [
    # of files before transformers 5
    (r"^encoder\.patch_embeddings\.(\d)", r"stages.\1.patch_embeddings"),
    (r"^encoder\.block\.(\d)", r"stages.\1.blocks"),
    (r"^encoder\.layer_norm\.(\d)", r"stages.\1.layer_norm"),
    (r"attention\.self\.(query|key|value)", r"attention.\1"),
    (r"attention\.self\.sr", "attention.sequence_reduction.sequence_reduction"),
    (r"attention\.self\.layer_norm", "attention.sequence_reduction.layer_norm"),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"mlp\.dense(\d)", r"mlp.fc\1"),
    (r"\.layer_norm_(\d)", r".norm\1"),
    # of all
    (r"^stages\.0\.patch_embeddings", "patch_embed"),
    (r"\.patch_embeddings", ".downsample"),
    (r"attention\.q(_proj|uery)", "attn.q"),
    (r"attention\.k(_proj|ey)", "attn.kv[0]"),
    (r"attention\.v(_proj|alue)", "attn.kv[1]"),
    (r"attention\.o_proj", "attn.proj"),
    (r"attention\.sequence_reduction\.sequence_reduction", "attn.sr"),
    (r"attention\.sequence_reduction\.layer_norm", "attn.norm"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"dwconv\.dwconv", "dwconv"),
    (r"layer_norm", "norm"),
]
"""From `segformer.` on."""

HEAD: Rules = [
    (r"^decode_head\.linear_(projections|c)\.(\d)\.proj", r"inputs.\2"),
    (r"^decode_head\.linear_fuse", "fuse.0"),
    (r"^decode_head\.batch_norm", "fuse.1"),
    (r"^decode_head\.classifier", "classifier.1"),
]

PVTS = {
    (2, 2, 2, 2): "pvt_v2_b1",
    (3, 4, 6, 3): "pvt_v2_b2",
    (3, 4, 18, 3): "pvt_v2_b3",
    (3, 8, 27, 3): "pvt_v2_b4",
    (3, 6, 40, 3): "pvt_v2_b5",
}
"""By depths; B0 is a narrow B1."""


class SegFormer(Family):
    """`SegformerForSemanticSegmentation`."""

    title = "transformers' SegFormer"

    def recognises(self, source: Source) -> bool:
        return (
            source.model_type == "segformer" and "decode_head.linear_fuse.weight" in source.weights
        )

    def plan(self, source: Source) -> Plan:
        config = source.config
        head = {
            "name": "segformer",
            "channels": config.get("decoder_hidden_size", 256),
            "dropout": config.get("classifier_dropout_prob", 0.1),
        }
        model = {"backbone": backbone(source), "neck": "none", "head": head}
        return upernet.plan(source, model, 512)

    def fill(self, source: Source, weights: Weights) -> None:
        weights.rename(BACKBONE, within="segformer.", into="backbone.model.")
        weights.rename(HEAD, into="head.")
        weights.change(r"head\.inputs\.\d\.weight", lambda matrix: matrix[..., None, None])
        count = len(source.config.get("hidden_sizes") or (32, 64, 160, 256))
        weights.change(r"head\.fuse\.0\.weight", lambda matrix: finest_first(matrix, count))


def finest_first(matrix: Tensor, count: int) -> Tensor:
    """[C, count * C, 1, 1], of the coarsest level first, as SegFormer joins them -> the reverse."""
    return torch.cat(matrix.chunk(count, dim=1)[::-1], dim=1)


def backbone(source: Source) -> dict[str, Any]:
    """The `backbone` mapping."""
    config = source.config
    require(
        config,
        source.name,
        hidden_act="gelu",
        num_encoder_blocks=4,
        patch_sizes=[7, 3, 3, 3],
        strides=[4, 2, 2, 2],
        reshape_last_stage=True,
    )
    depths = list(config.get("depths") or (2, 2, 2, 2))
    widths = list(config.get("hidden_sizes") or (32, 64, 160, 256))
    name = "pvt_v2_b0" if widths == [32, 64, 160, 256] else PVTS.get(tuple(depths), "pvt_v2_b2")
    return {
        "name": "timm",
        "model": name,
        "drop_path": config.get("drop_path_rate", 0.1),
        **preparation.statistics(source),
        "options": {
            "depths": depths,
            "embed_dims": widths,
            "num_heads": list(config.get("num_attention_heads") or (1, 2, 5, 8)),
            "sr_ratios": list(config.get("sr_ratios") or (8, 4, 2, 1)),
            "mlp_ratios": list(config.get("mlp_ratios") or (4, 4, 4, 4)),
        },
    }
