"""transformers' BEiT with a pyramid and UPerNet's head."""

from __future__ import annotations

from typing import Any

from vitdense.convert import preparation, upernet, vit
from vitdense.convert.family import Family, Plan
from vitdense.convert.names import Rules, Weights
from vitdense.convert.source import Source, require

BACKBONE: Rules = [
    (r"^embeddings\.cls_token", "cls_token"),
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^(encoder\.layer|layers)\.", "blocks."),
    (r"(attention\.attention\.)?relative_position_bias\.(relative)", r"attn.\2"),
    (r"attention\.(attention\.query|q_proj)\.bias", "attn.q_bias"),
    (r"attention\.(attention\.value|v_proj)\.bias", "attn.v_bias"),
    *vit.ATTENTION,
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"\.(intermediate\.dense|mlp\.fc1)", ".mlp.fc1"),
    (r"\.(output\.dense|mlp\.fc2)", ".mlp.fc2"),
    (r"lambda_(\d)", r"gamma_\1"),
]
"""From `beit.` on, in both layouts of names."""

NECK: Rules = [
    (r"^fpn\.fpn1\.conv_transpose1", "fpn1.0"),
    (r"^fpn\.fpn1\.normalization", "fpn1.1"),
    (r"^fpn\.fpn1\.conv_transpose2", "fpn1.3"),
    (r"^fpn\.fpn2", "fpn2.0"),
    (r"^fpn1", "stages.0"),
    (r"^fpn2", "stages.1"),
]

SHAPES = {
    (768, 12, 12): "beit_base_patch16_224",
    (1024, 24, 16): "beit_large_patch16_224",
}


class Beit(Family):
    """`BeitForSemanticSegmentation`.

    The maps are those that transformers reads. It counts the embeddings as the first map, so that
    its map 3 comes after two blocks; BEiT's own code means the fourth block by 3.
    """

    title = "transformers' BEiT with UPerNet"

    def recognises(self, source: Source) -> bool:
        return source.model_type == "beit" and any("decode_head" in name for name in source.weights)

    def plan(self, source: Source) -> Plan:
        model = {
            "backbone": backbone(source),
            "neck": "feature2pyramid",
            "head": upernet.plan_head(source, width=768),
        }
        return upernet.plan(source, model, preparation.sides(source.config.get("image_size", 640)))

    def fill(self, source: Source, weights: Weights) -> None:
        weights.drop(r"^beit\.(layernorm|pooler)\.", "is for classification alone")
        for number in range(blocks(source)[-1] + 1, source.config.get("num_hidden_layers", 12)):
            weights.drop(rf"^beit\.(encoder\.layer|layers)\.{number}\.", "is behind the last map")
        weights.rename(BACKBONE, within="beit.", into="backbone.model.")
        for within in ("fpn.", "fpn1.", "fpn2."):
            weights.rename([(r"^", within), *NECK], within, into="neck.")
        upernet.fill_head(source, weights)


def blocks(source: Source) -> list[int]:
    """The blocks, from 0, behind which transformers reads its maps."""
    said = source.config.get("out_indices") or source.config.get("segmentation_indices")
    return [index - 2 for index in said or (3, 5, 7, 11)]


def backbone(source: Source) -> dict[str, Any]:
    """The `backbone` mapping."""
    config = source.config
    require(
        config,
        source.name,
        use_relative_position_bias=True,
        use_absolute_position_embeddings=False,
        use_shared_relative_position_bias=False,
        hidden_act="gelu",
    )
    options: dict[str, Any] = {
        "name": "timm",
        **vit.size_options(config, SHAPES),
        "img_size": config.get("image_size", 224),
        "out_indices": blocks(source),
        "drop_path": config.get("drop_path_rate", 0.0),
        "norm": False,
        **preparation.statistics(source, preparation.HALF),
    }
    if config.get("patch_size", 16) != 16:
        options["patch_size"] = config["patch_size"]
    return options
