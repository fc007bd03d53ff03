"""Backbones of transformers as options of our `timm` backbone.

`plan` gives the `backbone` mapping of a config, and `fill` renames the weights. Each kind
(`KINDS`) has two functions of transformers' config: one for the options, one for the names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vitdense.convert import preparation, vit
from vitdense.convert.names import Rules, Weights
from vitdense.convert.source import ConversionError, Source, require

Config = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of backbone: its options for `timm`, and the rules for its names."""

    options: Callable[[Config], Config]
    rules: Callable[[Config], Rules]


def plan(source: Source) -> Config:
    """The `backbone` mapping of a source of transformers.

    Raises:
        ConversionError: the backbone is unknown, or has options that timm's has not.
    """
    options = _kind(source).options(config_of(source))
    return {"name": "timm", **options, **preparation.statistics(source)}


def fill(source: Source, weights: Weights, within: str, into: str = "backbone.") -> None:
    """Rename the backbone's weights, whose names begin with `within` in the source."""
    weights.drop(r"\.swin\.layernorm\.", "is for classification alone")
    weights.rename(_kind(source).rules(config_of(source)), within, into)


def config_of(source: Source) -> Config:
    """The backbone's own config; old configs name a model of timm instead."""
    config = source.config.get("backbone_config")
    if config:
        return config
    return {"model_type": "timm_backbone", "backbone": source.config.get("backbone") or "resnet50"}


def _kind(source: Source) -> Kind:
    name = config_of(source).get("model_type")
    if name not in KINDS:
        known = ", ".join(KINDS)
        raise ConversionError(f"{source.name}: its backbone is {name!r}; known are {known}")
    return KINDS[name]


def stages(config: Config) -> list[int]:
    """The numbers of the stages whose maps are used, from 1."""
    names = config.get("out_features") or []
    if names and all(name.startswith("stage") for name in names):
        return [int(name.removeprefix("stage")) for name in names]
    return list(config.get("out_indices") or [len(config.get("depths") or [1] * 4)])


def _require(config: Config, **usual: Any) -> None:
    require(config, "backbone_config", **usual)


def _timm_options(config: Config) -> Config:
    _require(config, output_stride=None)
    name = config["backbone"]
    wanted = config.get("out_indices") or [1, 2, 3, 4]
    resnet = {"frozen_norms": True} if name.startswith("res") else {}
    return {"model": name, "out_indices": list(wanted), "level_norm": False, **resnet}


def _timm_rules(config: Config) -> Rules:
    # timm's wrapper for features writes the dots of flattened modules as underscores
    return [(r"^(stages|layers|blocks)_(\d+)\.", r"\1.\2."), (r"^", "model.")]


RESNETS = {
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
    ("bottleneck", (3, 8, 36, 3)): "resnet152",
}


def _resnet_options(config: Config) -> Config:
    _require(config, hidden_act="relu", downsample_in_bottleneck=False, embedding_size=64)
    _require(config, downsample_in_first_stage=False)
    kind, depths = config.get("layer_type", "bottleneck"), tuple(config.get("depths", (3, 4, 6, 3)))
    expansion = 4 if kind == "bottleneck" else 1
    widths = config.get("hidden_sizes") or [256, 512, 1024, 2048]
    channels = [width // expansion for width in widths]
    name = RESNETS.get((kind, depths))
    extra: Config = {} if channels == [64, 128, 256, 512] else {"channels": channels}
    if name is None:
        name = "resnet50" if kind == "bottleneck" else "resnet18"
        extra["layers"] = list(depths)
    options = {"model": name, "out_indices": stages(config), "frozen_norms": True}
    return options | ({"options": extra} if extra else {})


def _resnet_rules(config: Config) -> Rules:
    return [
        (r"^(resnet\.)?embedder\.embedder\.convolution", "conv1"),
        (r"^(resnet\.)?embedder\.embedder\.normalization", "bn1"),
        *RESIDUAL,
        (r"\.shortcut\.convolution", ".downsample.0"),
        (r"\.shortcut\.normalization", ".downsample.1"),
        (r"^", "model."),
    ]


RESIDUAL: Rules = [
    (r"^(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.", lambda m: f"layer{int(m[1]) + 1}."),
    (r"\.layer\.(\d+)\.convolution", lambda m: f".conv{int(m[1]) + 1}"),
    (r"\.layer\.(\d+)\.normalization", lambda m: f".bn{int(m[1]) + 1}"),
]
"""The residual layers of transformers' ResNets but for their shortcuts."""


def _rt_detr_resnet_options(config: Config) -> Config:
    """timm's ResNet-D; the smaller ones of RT-DETR differ from it in the first shortcut."""
    options = _resnet_options(config)
    options["model"] += "d"
    return options | ({"name": "presnet"} if config.get("layer_type") == "basic" else {})


def _rt_detr_resnet_rules(config: Config) -> Rules:
    stem = {
        "0.convolution": "conv1.0", "0.normalization": "conv1.1", "1.convolution": "conv1.3",
        "1.normalization": "conv1.4", "2.convolution": "conv1.6", "2.normalization": "bn1",
    }  # fmt: skip
    return [
        *((rf"^embedder\.embedder\.{re.escape(old)}", new) for old, new in stem.items()),
        *RESIDUAL,
        (r"\.shortcut\.(1\.)?convolution", ".downsample.1"),
        (r"\.shortcut\.(1\.)?normalization", ".downsample.2"),
        (r"^", "model."),
    ]


SWINS = {
    (96, (2, 2, 6, 2), 7): "swin_tiny_patch4_window7_224",
    (96, (2, 2, 18, 2), 7): "swin_small_patch4_window7_224",
    (128, (2, 2, 18, 2), 7): "swin_base_patch4_window7_224",
    (128, (2, 2, 18, 2), 12): "swin_base_patch4_window12_384",
    (192, (2, 2, 18, 2), 7): "swin_large_patch4_window7_224",
    (192, (2, 2, 18, 2), 12): "swin_large_patch4_window12_384",
}


def swin_options(config: Config) -> Config:
    """Options of timm's Swin for a config of transformers, with a norm on each map."""
    _require(config, use_absolute_embeddings=False, hidden_act="gelu", patch_size=4)
    _require(config, mlp_ratio=4.0, qkv_bias=True)
    width, window = config.get("embed_dim", 96), config.get("window_size", 7)
    depths = config.get("depths", [2, 2, 6, 2])
    name = SWINS.get((width, tuple(depths), window))
    options = {
        "out_indices": [n - 1 for n in stages(config)],
        "level_norm": True,
        "drop_path": config.get("drop_path_rate", 0.1),
    }
    if name is not None:
        return {"model": name, **options}
    heads = config.get("num_heads", [3, 6, 12, 24])
    extra = {"embed_dim": width, "depths": depths, "num_heads": heads, "window_size": window}
    return {"model": "swin_tiny_patch4_window7_224", **options, "options": extra}


def _swin_rules(config: Config) -> Rules:
    return [
        (r"^(swin\.)?embeddings\.patch_embeddings\.projection", "model.patch_embed.proj"),
        (r"^(swin\.)?embeddings\.norm", "model.patch_embed.norm"),
        # transformers merges patches at the end of a stage, timm at the start of the next
        (
            r"^(?:swin\.)?encoder\.layers\.(\d+)\.downsample",
            lambda m: f"model.layers.{int(m[1]) + 1}.downsample",
        ),
        (r"^(swin\.)?encoder\.", "model."),
        _level_norms(config),
        (r"attention\.(self|relative_position_bias)\.(relative_position_bias_table)", r"attn.\2"),
        *vit.ATTENTION,
        (r"layernorm_before", "norm1"),
        (r"layernorm_after", "norm2"),
        (r"\.intermediate\.dense", ".mlp.fc1"),
        (r"\.output\.dense", ".mlp.fc2"),
    ]


CONVNEXTS = {
    ((96, 192, 384, 768), (3, 3, 9, 3)): "convnext_tiny",
    ((96, 192, 384, 768), (3, 3, 27, 3)): "convnext_small",
    ((128, 256, 512, 1024), (3, 3, 27, 3)): "convnext_base",
    ((192, 384, 768, 1536), (3, 3, 27, 3)): "convnext_large",
    ((256, 512, 1024, 2048), (3, 3, 27, 3)): "convnext_xlarge",
}


def _convnext_options(config: Config) -> Config:
    _require(config, hidden_act="gelu", patch_size=4, num_stages=4)
    widths = tuple(config.get("hidden_sizes") or (96, 192, 384, 768))
    depths = tuple(config.get("depths") or (3, 3, 9, 3))
    options: Config = {
        "out_indices": [n - 1 for n in stages(config)],
        "level_norm": True,
        "drop_path": config.get("drop_path_rate", 0.0),
    }
    if name := CONVNEXTS.get((widths, depths)):
        return {"model": name, **options}
    extra = {"dims": list(widths), "depths": list(depths)}
    return {"model": "convnext_tiny", **options, "options": extra}


def _convnext_rules(config: Config) -> Rules:
    return [
        (r"^(convnext\.)?embeddings\.patch_embeddings", "model.stem.0"),
        (r"^(convnext\.)?embeddings\.layernorm", "model.stem.1"),
        (r"^(convnext\.)?encoder\.", "model."),
        (r"\.downsampling_layer\.", ".downsample."),
        (r"\.layers\.(\d+)\.", r".blocks.\1."),
        (r"\.dwconv", ".conv_dw"),
        (r"\.layernorm", ".norm"),
        (r"\.pwconv(\d)", r".mlp.fc\1"),
        (r"\.layer_scale_parameter", ".gamma"),
        _level_norms(config),
    ]


def _level_norms(config: Config) -> tuple[str, Callable[[re.Match[str]], str]]:
    """The norms of the maps; transformers numbers them by stage, we by place."""
    places = {number: place for place, number in enumerate(stages(config))}
    return r"^hidden_states_norms\.stage(\d+)", lambda m: f"level_norms.{places[int(m[1])]}"


DINOV2_NAMES = {
    (384, 12, 6): "vit_small_patch14_dinov2",
    (768, 12, 12): "vit_base_patch14_dinov2",
    (1024, 24, 16): "vit_large_patch14_dinov2",
}


def _dinov2_options(config: Config) -> Config:
    _require(config, use_swiglu_ffn=False, hidden_act="gelu", qkv_bias=True, apply_layernorm=True)
    _require(config, mlp_ratio=4)
    options = {
        "out_indices": [number - 1 for number in stages(config)],
        "img_size": config.get("image_size", 224),
        "norm": "all",
        **vit.size_options(config, DINOV2_NAMES),
    }
    patch = config.get("patch_size", 14)
    return options if patch == 14 else options | {"patch_size": patch}


def _dinov2_rules(config: Config) -> Rules:
    return [*vit.DINOV2, (r"^", "model.")]


def _hgnet_options(config: Config) -> Config:
    from timm.models.hgnet import model_cfgs

    _require(config, hidden_act="relu")
    keys = (
        "in_channels", "mid_channels", "out_channels", "num_blocks", "downsample", "light_block",
        "kernel_size", "numb_of_layers",
    )  # fmt: skip
    usual = HGNET | config
    wanted: Config = {"stem_type": "v2", "stem_chs": list(usual["stem_channels"][1:])}
    for i in range(4):
        wanted[f"stage{i + 1}"] = [usual[f"stage_{key}"][i] for key in keys]
    name = next((name for name, known in model_cfgs.items() if known == wanted), None)
    if name is None:
        raise ConversionError("backbone_config: timm has no HGNetV2 with these stages")
    _require(usual, use_learnable_affine_block=name <= "hgnetv2_b3")
    out_indices = [number - 1 for number in stages(config)]
    return {"model": name, "out_indices": out_indices, "frozen_norms": True}


def _hgnet_rules(config: Config) -> Rules:
    return [
        (r"^embedder\.", "stem."),
        (r"^encoder\.", ""),
        (r"\.convolution", ".conv"),
        (r"\.normalization", ".bn"),
        (r"^", "model."),
    ]


HGNET: Config = {
    "stem_channels": [3, 32, 48],
    "stage_in_channels": [48, 128, 512, 1024],
    "stage_mid_channels": [48, 96, 192, 384],
    "stage_out_channels": [128, 512, 1024, 2048],
    "stage_num_blocks": [1, 1, 3, 1],
    "stage_downsample": [False, True, True, True],
    "stage_light_block": [False, False, True, True],
    "stage_kernel_size": [3, 3, 5, 5],
    "stage_numb_of_layers": [6, 6, 6, 6],
    "use_learnable_affine_block": False,
}
"""What a config of transformers leaves out."""

KINDS = {
    "timm_backbone": Kind(_timm_options, _timm_rules),
    "resnet": Kind(_resnet_options, _resnet_rules),
    "rt_detr_resnet": Kind(_rt_detr_resnet_options, _rt_detr_resnet_rules),
    "hgnet_v2": Kind(_hgnet_options, _hgnet_rules),
    "swin": Kind(swin_options, _swin_rules),
    "convnext": Kind(_convnext_options, _convnext_rules),
    "dinov2": Kind(_dinov2_options, _dinov2_rules),
}
"""By transformers' `model_type`."""
