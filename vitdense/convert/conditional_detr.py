"""transformers' Conditional DETR and DAB-DETR: `detr` with other queries."""

from __future__ import annotations

import math
from typing import Any

from vitdense.convert import backbones, preparation
from vitdense.convert.classes import from_labels
from vitdense.convert.detr import LAYERS, attention_heads, check, feed_forward, fill_backbone
from vitdense.convert.family import Family, Plan
from vitdense.convert.names import Rules, Weights
from vitdense.convert.source import ConversionError, Source

NAMES: list[tuple[str, str]] = [
    (r"^model\.", ""),
    (r"^input_projection", "input"),
    (r"^query_(position|refpoint)_embeddings", "queries"),
    (r"^encoder\.query_scale", "scale"),
    (r"^decoder\.query_scale", "queries.scale"),
    (r"^decoder\.ref_anchor_head", "queries.size"),
    (r"coder\.layers\.", "coder."),
    (r"^decoder\.layernorm", "norm"),
    # self and cross attention: in files of Conditional DETR, then in DAB-DETR
    (r"\.sa_", ".self_attn."),
    (r"\.ca_", ".encoder_attn."),
    (r"\.self_attn\.self_attn_layer_norm", ".self_attn_layer_norm"),
    (r"\.self_attn\.self_attn[._]", ".self_attn."),
    (r"\.cross_attn\.cross_attn_layer_norm", ".encoder_attn_layer_norm"),
    (r"\.cross_attn\.cross_attn[._]", ".encoder_attn."),
    # what they project: in files, in memory, in DAB-DETR
    (r"\.q(uery)?_?pos_sine_proj", ".query_spatial"),
    (r"\.q(uery)?_?pos_proj", ".query_place"),
    (r"\.k(ey)?_?pos_proj", ".key_place"),
    (r"\.q(uery)?_?content_proj", ".query"),
    (r"\.k(ey)?_?content_proj", ".key"),
    (r"(\.mlp)?\.activation_fn", ".feed_forward.activation"),
    (r"\.mlp\.final_layer_norm", ".final_layer_norm"),
    *LAYERS,
    (r"^(class_labels_classifier|class_embed)", "classes"),
    (r"^(bbox_predictor|decoder\.bbox_embed)", "boxes"),  # DAB-DETR's decoder shares it
]
"""Of the head, but for what makes of each query a point or a place."""

CONDITIONAL: Rules = [*NAMES, (r"^decoder\.ref_point_head", "queries.point")]
DAB: Rules = [*NAMES, (r"^decoder\.ref_point_head", "queries.place")]

USUAL: dict[str, tuple[Any, ...]] = {
    "activation_function": ("prelu",),
    "dilation": (False,),
    "temperature_height": (20,),
    "temperature_width": (20,),
    "sine_position_embedding_scale": (None, 2 * math.pi),
    "keep_query_pos": (False,),
    "num_patterns": (0,),
    "normalize_before": (False,),
}
"""What the options of DAB-DETR must be, the default first."""


class ConditionalDetr(Family):
    """`ConditionalDetrForObjectDetection`."""

    title = "transformers' Conditional DETR"

    def recognises(self, source: Source) -> bool:
        return source.model_type == "conditional_detr"

    def plan(self, source: Source) -> Plan:
        check(source)
        return _plan(source, "conditional", source.config.get("d_model", 256))

    def fill(self, source: Source, weights: Weights) -> None:
        fill_backbone(source, weights)
        weights.rename(CONDITIONAL, into="head.")


class DabDetr(Family):
    """`DabDetrForObjectDetection`, without patterns."""

    title = "transformers' DAB-DETR"

    def recognises(self, source: Source) -> bool:
        return source.model_type == "dab-detr"

    def plan(self, source: Source) -> Plan:
        for key, allowed in USUAL.items():
            value = source.config.get(key, allowed[0])
            if value not in allowed:
                raise ConversionError(
                    f"{source.name}: {key} is {value!r}; only {allowed[0]!r} can be converted"
                )
        return _plan(source, "dab", source.config.get("hidden_size", 256))

    def fill(self, source: Source, weights: Weights) -> None:
        fill_backbone(source, weights)
        weights.rename(DAB, into="head.")


def _plan(source: Source, kind: str, width: int) -> Plan:
    config = source.config
    head = {
        "name": "detr",
        "query_kind": kind,
        "width": width,
        "heads": attention_heads(source),
        "ffn": feed_forward(source, 2048),
        "encoder_layers": config.get("encoder_layers", 6),
        "decoder_layers": config.get("decoder_layers", 6),
        "queries": config.get("num_queries", 300),
        "dropout": config.get("dropout", 0.1),
    }
    model = {"backbone": backbones.plan(source), "neck": "none", "head": head}
    size = {"shortest_edge": 800, "longest_edge": 1333}
    return Plan(model, from_labels(config), preparation.detection(source, size))
