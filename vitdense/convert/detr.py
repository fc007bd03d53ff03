"""transformers' DETR."""

from __future__ import annotations

from typing import Any

from vitdense.convert import backbones, preparation
from vitdense.convert.classes import from_labels
from vitdense.convert.family import Family, Plan
from vitdense.convert.names import Rules, Weights
from vitdense.convert.source import ConversionError, Source, require

LAYERS: list[tuple[str, str]] = [
    (r"^(encoder.*)\.self_attn\.", r"\1.attention."),
    (r"^(encoder.*)\.self_attn_layer_norm", r"\1.norm"),
    (r"\.self_attn\.", ".self_attention."),
    (r"\.self_attn_layer_norm", ".self_norm"),
    (r"\.encoder_attn\.", ".cross_attention."),
    (r"\.encoder_attn_layer_norm", ".cross_norm"),
    (r"\.q_proj", ".query"),
    (r"\.k_proj", ".key"),
    (r"\.(v|value)_proj", ".value"),
    (r"\.(o|out|output)_proj", ".output"),
    (r"\.(mlp\.)?fc1", ".feed_forward.expand"),
    (r"\.(mlp\.)?fc2", ".feed_forward.reduce"),
    (r"\.final_layer_norm", ".feed_forward.norm"),
]
"""Layers of transformers' DETRs, in the names of its memory and those of its files."""

NAMES: Rules = [
    (r"^model\.", ""),
    (r"^input_projection", "input"),
    (r"^query_position_embeddings", "queries"),
    (r"coder\.layers\.", "coder."),
    (r"^decoder\.layernorm", "norm"),
    *LAYERS,
    (r"^class_labels_classifier", "classes"),
    (r"^bbox_predictor", "boxes"),
]
"""Of the head."""


USUAL = {"activation_function": "relu", "position_embedding_type": "sine", "dilation": False}
"""What the options of DETR and its first descendants must be."""


class Detr(Family):
    """`DetrForObjectDetection`."""

    title = "transformers' DETR"

    def recognises(self, source: Source) -> bool:
        return source.model_type == "detr"

    def plan(self, source: Source) -> Plan:
        config = source.config
        require(config, source.name, **USUAL)
        return plan(
            source, width=config.get("d_model", 256), queries=config.get("num_queries", 100)
        )

    def fill(self, source: Source, weights: Weights) -> None:
        fill_backbone(source, weights)
        weights.rename(NAMES, into="head.")


def plan(source: Source, **options: Any) -> Plan:
    """A plan for the head `detr`; `options` are those that differ between its variants."""
    config = source.config
    head = {
        "name": "detr",
        "heads": attention_heads(source),
        "ffn": feed_forward(source, 2048),
        "encoder_layers": config.get("encoder_layers", 6),
        "decoder_layers": config.get("decoder_layers", 6),
        "dropout": config.get("dropout", 0.1),
        **options,
    }
    model = {"backbone": backbones.plan(source), "neck": "none", "head": head}
    return Plan(model, from_labels(config), preparation.detection(source))


def attention_heads(source: Source) -> int:
    """Heads of attention; raises ConversionError if encoder and decoder differ."""
    return same(source, "encoder_attention_heads", "decoder_attention_heads", 8)


def feed_forward(source: Source, usual: int) -> int:
    """Hidden width; raises ConversionError if encoder and decoder differ."""
    return same(source, "encoder_ffn_dim", "decoder_ffn_dim", usual)


def fill_backbone(source: Source, weights: Weights) -> None:
    """The backbone, by its name in memory or in older files."""
    for within in ("model.backbone.conv_encoder.model.", "model.backbone.model."):
        backbones.fill(source, weights, within)


def same(source: Source, key: str, other: str, usual: int) -> int:
    """The value of two options that our head has as one; raises ConversionError if they differ."""
    ours, theirs = source.config.get(key, usual), source.config.get(other, usual)
    if ours != theirs:
        raise ConversionError(
            f"{source.name}: {key} is {ours} and {other} {theirs}; only equal ones can be converted"
        )
    return ours
