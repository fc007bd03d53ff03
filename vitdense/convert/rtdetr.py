"""transformers' RT-DETR, RT-DETRv2 and D-FINE into the `rtdetr` head."""

from __future__ import annotations

from typing import Any

from vitdense.convert import backbones, preparation
from vitdense.convert.classes import from_labels
from vitdense.convert.detr import LAYERS, attention_heads, fill_backbone
from vitdense.convert.family import Family, Plan
from vitdense.convert.names import Rules, Weights
from vitdense.convert.source import ConversionError, Source, require

CSP: list[tuple[str, str]] = [
    (r"\.conv1\.(?=conv|norm)", ".through."),
    (r"\.conv2\.(?=conv|norm)", ".around."),
    (r"\.conv3\.(?=conv|norm)", ".out."),
]
"""A merging block of RT-DETR; one of D-FINE has two of them."""

ENCODER: Rules = [
    (r"\blateral_convs\b", "laterals"),
    (r"\bfpn_blocks\b", "top_down"),
    (r"\bdownsample_convs\b", "halvings"),
    (r"\bpan_blocks\b", "bottom_up"),
    (r"^(encoder\.)?(encoder|aifi)\.(\d+)\.layers\.", r"\1attention.\3."),
    (r"\battention\.(\d+\.\d+)\.self_attn\.", r"attention.\1.attention."),
    (r"\battention\.(\d+\.\d+)\.self_attn_layer_norm", r"attention.\1.norm"),
    (r"\.mlp\.layers\.0", ".fc1"),
    (r"\.mlp\.layers\.1", ".fc2"),
    (r"bottlenecks\.(\d+)\.conv1", r"blocks.\1.wide"),
    (r"bottlenecks\.(\d+)\.conv2", r"blocks.\1.point"),
    # D-FINE's
    (r"halvings\.(\d+)\.conv1", r"halvings.\1.0"),
    (r"halvings\.(\d+)\.conv2", r"halvings.\1.1"),
]
"""Both encoders but for their merging blocks, in the names of memory and of files."""

ELAN: list[tuple[str, str]] = [
    (r"((top_down|bottom_up)\.\d+)\.conv1", r"\1.enter"),
    (r"((top_down|bottom_up)\.\d+)\.conv2", r"\1.stages.0.1"),
    (r"((top_down|bottom_up)\.\d+)\.conv3", r"\1.stages.1.1"),
    (r"((top_down|bottom_up)\.\d+)\.conv4", r"\1.leave"),
    (r"csp_rep1", "stages.0.0"),
    (r"csp_rep2", "stages.1.0"),
]
"""The merging blocks of D-FINE."""

PLACES: list[tuple[str, str]] = [
    (r"^model\.", ""),
    (r"^(class|bbox)_embed", r"decoder.\1_embed"),
]
"""Files may hold the predictors a second time, outside of the decoder."""

HEAD: list[tuple[str, str]] = [
    (r"^encoder_input_proj\.(\d+)\.0", r"inputs.\1.conv"),
    (r"^encoder_input_proj\.(\d+)\.1", r"inputs.\1.norm"),
    (r"^decoder_input_proj\.(\d+)\.0", r"memory.\1.conv"),
    (r"^decoder_input_proj\.(\d+)\.1", r"memory.\1.norm"),
    (r"^denoising_class_embed", "denoising.classes"),
    (r"^weight_embedding", "contents"),
    (r"^enc_output\.", "first_stage.project."),
    (r"^enc_score_head", "first_stage.predictor.classes"),
    (r"^enc_bbox_head", "first_stage.predictor.boxes"),
    (r"^decoder\.query_pos_head", "decoder.place"),
    (r"^decoder\.class_embed\.(\d+)", r"decoder.predictors.\1.classes"),
    (r"^decoder\.bbox_embed\.(\d+)", r"decoder.predictors.\1.boxes"),
    (r"\.sampling_offsets", ".offsets"),
    (r"\.attention_weights", ".weights"),
]


DISTRIBUTION: list[tuple[str, str]] = [
    (r"^decoder\.bbox_embed\.(\d+)", r"decoder.predictors.\1.edges"),
    (r"^decoder\.lqe_layers\.(\d+)\.reg_conf", r"decoder.predictors.\1.trust"),
    (r"^decoder\.pre_bbox_head", "decoder.first"),
    (r"\.gateway\.gate", ".gates"),
    (r"\.gateway\.norm", ".cross_norm"),
]
"""What D-FINE's decoder has."""


def encoder_rules(elan: bool) -> Rules:
    """Of the hybrid encoder."""
    return [*ENCODER, *(ELAN if elan else []), *CSP, *LAYERS]


def head_rules(fine: bool) -> Rules:
    """Of the whole head, D-FINE's or RT-DETR's."""
    return [*PLACES, *(DISTRIBUTION if fine else []), *HEAD, *encoder_rules(fine)]


class RTDetr(Family):
    """`RTDetrForObjectDetection` and `RTDetrV2ForObjectDetection`."""

    title = "transformers' RT-DETR and RT-DETRv2"

    def recognises(self, source: Source) -> bool:
        return source.model_type in {"rt_detr", "rt_detr_v2"}

    def plan(self, source: Source) -> Plan:
        return plan(source, plan_head(source))

    def fill(self, source: Source, weights: Weights) -> None:
        fill(source, weights, fine=False)


class DFine(Family):
    """`DFineForObjectDetection`."""

    title = "transformers' D-FINE"

    def recognises(self, source: Source) -> bool:
        return source.model_type == "d_fine"

    def plan(self, source: Source) -> Plan:
        config = source.config
        layers = config.get("decoder_layers", 6)
        usual = {"top_prob_values": 4, "lqe_hidden_dim": 64, "lqe_layers": 2, "up": 0.5}
        require(config, source.name, **usual, layer_scale=1)
        if config.get("eval_idx", -1) not in (-1, layers - 1):
            raise ConversionError(
                f"{source.name}: eval_idx is {config['eval_idx']}; only models that answer with "
                "their last layer can be converted"
            )
        head = plan_head(source) | {
            "fusion": "elan",
            "blocks": round(3 * config.get("depth_mult", 1.0)),
            "project_memory": config.get("d_model", 256)
            != config.get("decoder_in_channels", [256])[-1],
            "distribution": True,
            "bins": config.get("max_num_bins", 32),
            "bin_scale": config.get("reg_scale", 4.0),
        }
        return plan(source, head)

    def fill(self, source: Source, weights: Weights) -> None:
        fill(source, weights, fine=True)


def plan(source: Source, head: dict[str, Any]) -> Plan:
    """A plan with this head. Pixels are not normalised unless the preprocessor says so."""
    backbone = backbones.plan(source) | preparation.statistics(source, preparation.RAW)
    head["input_levels"] = list(range(len(backbone["out_indices"])))
    model = {"backbone": backbone, "neck": "none", "head": head}
    return Plan(model, from_labels(source.config), preparation.detection(source, 640))


def plan_head(source: Source) -> dict[str, Any]:
    """The options that all of them share."""
    config = source.config
    require(config, source.name, **USUAL)
    check_levels(source)
    width, inner = config.get("d_model", 256), config.get("encoder_hidden_dim", 256)
    return {
        "name": "rtdetr",
        "num_levels": config.get("num_feature_levels", 3),
        "width": width,
        "heads": attention_heads(source)
        if config.get("encoder_layers", 1)
        else config.get("decoder_attention_heads", 8),
        "encoder_width": inner,
        "encoder_layers": config.get("encoder_layers", 1),
        "encoder_ffn": config.get("encoder_ffn_dim", 1024),
        "attended_levels": list(config.get("encode_proj_layers", [2])),
        "expansion": config.get("hidden_expansion", 1.0),
        "norm": "batch",
        "queries": config.get("num_queries", 300),
        "learned_content": config.get("learn_initial_query", False),
        "decoder_layers": config.get("decoder_layers", 6),
        "ffn": config.get("decoder_ffn_dim", 1024),
        "points": config.get("decoder_n_points", 4),
        "offset_scale": config.get("decoder_offset_scale", 0.5),
        "dropout": config.get("dropout", 0.0),
        "denoising": config.get("num_denoising", 100),
        "label_noise": config.get("label_noise_ratio", 0.5),
        "box_noise": config.get("box_noise_scale", 1.0),
        "class_loss": "varifocal",
        "max_detections": config.get("num_queries", 300),
    }


USUAL = {
    "normalize_before": False,
    "encoder_activation_function": "gelu",
    "activation_function": "silu",
    "decoder_activation_function": "relu",
    "decoder_method": "default",
    "positional_encoding_temperature": 10000,
    "eval_size": None,
    "with_box_refine": True,
    "layer_norm_eps": 1e-5,
    "batch_norm_eps": 1e-5,
}


def check_levels(source: Source) -> None:
    """Raise ConversionError if levels are made behind the encoder; ours are made before it."""
    levels = source.config.get("num_feature_levels", 3)
    if levels != len(source.config.get("decoder_in_channels", [256] * 3)):
        raise ConversionError(
            f"{source.name}: num_feature_levels is {levels}, which is not the number of "
            "decoder_in_channels; our levels are made before the encoder, not behind it"
        )


def fill(source: Source, weights: Weights, fine: bool) -> None:
    """Rename everything."""
    weights.drop(r"n(um)?_points_scale$|^model\.(anchors|valid_mask)$", "is computed")
    weights.drop(r"^model\.decoder\.(up|reg_scale)$", "is an option")
    fill_backbone(source, weights)
    weights.rename(head_rules(fine), into="head.")
