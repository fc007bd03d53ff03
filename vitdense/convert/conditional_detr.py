"""transformers' Conditional DETR and DAB-DETR: `detr` with other queries."""

from __future__ import annotations

import math
from typing import Any

from vitdense.convert.detr import LAYERS, USUAL, fill_backbone, plan
from vitdense.convert.family import Family, Plan
from vitdense.convert.names import Rules, Weights
from vitdense.convert.source import Source, require

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

DAB_USUAL: dict[str, Any] = {
    "activation_function": "prelu",
    "dilation": False,
    "temperature_height": 20,
    "temperature_width": 20,
    "keep_query_pos": False,
    "num_patterns": 0,
    "normalize_before": False,
}
"""What the options of DAB-DETR must be."""


class ConditionalDetr(Family):
    """`ConditionalDetrForObjectDetection`."""

    title = "transformers' Conditional DETR"

    def recognises(self, source: Source) -> bool:
        return source.model_type == "conditional_detr"

    def plan(self, source: Source) -> Plan:
        config = source.config
        require(config, source.name, **USUAL)
        width, queries = config.get("d_model", 256), config.get("num_queries", 300)
        return plan(source, query_kind="conditional", width=width, queries=queries)

    def fill(self, source: Source, weights: Weights) -> None:
        fill_backbone(source, weights)
        weights.rename(CONDITIONAL, into="head.")


class DabDetr(Family):
    """`DabDetrForObjectDetection`, without patterns."""

    title = "transformers' DAB-DETR"

    def recognises(self, source: Source) -> bool:
        return source.model_type == "dab-detr"

    def plan(self, source: Source) -> Plan:
        require(source.config, source.name, **DAB_USUAL)
        if source.config.get("sine_position_embedding_scale") is not None:  # null means 2 pi
            require(source.config, source.name, sine_position_embedding_scale=2 * math.pi)
        config = source.config
        width, queries = config.get("hidden_size", 256), config.get("num_queries", 300)
        return plan(source, query_kind="dab", width=width, queries=queries)

    def fill(self, source: Source, weights: Weights) -> None:
        fill_backbone(source, weights)
        weights.rename(DAB, into="head.")
