"""The hybrid encoder equals transformers' RT-DETR and D-FINE encoders, and folds what it can."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import DFineConfig, RTDetrConfig, RTDetrV2Config
from transformers.models.d_fine.modeling_d_fine import DFineHybridEncoder
from transformers.models.rt_detr.modeling_rt_detr import RTDetrHybridEncoder
from transformers.models.rt_detr_v2.modeling_rt_detr_v2 import RTDetrV2HybridEncoder

from vitdense.convert import rename
from vitdense.convert.rtdetr import encoder_rules
from vitdense.heads.detection.hybrid_encoder import HybridEncoder, check_steps
from vitdense.layers.conv import ConvNorm, RepBlock, foldable

SIZES = [(12, 20), (6, 10), (3, 5)]
KINDS = {
    "rt_detr": (RTDetrConfig, RTDetrHybridEncoder),
    "rt_detr_v2": (RTDetrV2Config, RTDetrV2HybridEncoder),
    "d_fine": (DFineConfig, DFineHybridEncoder),
}


def make_maps(sizes=SIZES, width=16, batch=2):
    return [torch.randn(batch, width, *size) for size in sizes]


def randomize(module):
    """Random weights and running statistics; variances stay positive."""
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            nn.init.normal_(value, std=0.3)
            if name.endswith("running_var"):
                value.abs_().add_(0.5)


def reference(kind, levels=3, **changes):
    config, encoder = KINDS[kind]
    config = config(
        encoder_hidden_dim=16,
        encoder_in_channels=[16] * levels,
        encoder_ffn_dim=24,
        encoder_attention_heads=4,
        feat_strides=[8 * 2**i for i in range(levels)],
        **changes,
    )
    torch.manual_seed(0)
    theirs = encoder(config)
    randomize(theirs)
    return theirs.double().eval()


def convert(theirs, ours):
    elan = theirs.config.model_type == "d_fine"
    ours.load_state_dict(rename(theirs.state_dict(), encoder_rules(elan)))
    return ours.double().eval()


CASES = [
    ("rt_detr", dict(encode_proj_layers=[2]), {}),
    ("rt_detr_v2", dict(encode_proj_layers=[2], hidden_expansion=0.5), dict(expansion=0.5)),
    (
        "rt_detr",
        dict(encode_proj_layers=[1, 2], encoder_layers=2),
        dict(attended=(1, -1), layers=2),
    ),
    ("rt_detr", dict(levels=2, encode_proj_layers=[1]), dict(steps=[2])),
    ("d_fine", dict(encode_proj_layers=[2], depth_mult=0.67), dict(fusion="elan", blocks=2)),
    (
        "d_fine",
        dict(encode_proj_layers=[2], hidden_expansion=0.5),
        dict(fusion="elan", expansion=0.5),
    ),
]


@pytest.mark.parametrize("kind, changes, options", CASES)
@pytest.mark.parametrize("training", [False, True])
def test_maps_and_gradients_equal_transformers(kind, changes, options, training):
    theirs = reference(kind, **changes).train(training)
    options = dict(steps=[2, 2], heads=4, ffn=24) | options
    ours = convert(theirs, HybridEncoder(16, **options)).train(training)
    maps = [x.double() for x in make_maps(SIZES[: len(options["steps"]) + 1])]
    inputs = [[x.clone().requires_grad_() for x in maps] for _ in range(2)]
    results = ours(inputs[0])
    expected = theirs(list(inputs[1])).last_hidden_state
    torch.testing.assert_close(results, expected, atol=1e-8, rtol=0)
    for outputs in (results, expected):
        sum(x.sin().sum() for x in outputs).backward()
    for a, b in zip(*inputs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-8, rtol=0)


@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
@pytest.mark.parametrize("fusion", ["csp", "elan"])
def test_every_norm_trains_on_maps_of_any_size(norm, fusion):
    torch.manual_seed(0)
    encoder = HybridEncoder(16, [2, 1, 4], heads=4, ffn=24, norm=norm, fusion=fusion)
    maps = make_maps([(11, 7), (6, 4), (6, 4), (2, 1)], batch=1)
    results = encoder(maps)
    assert [x.shape for x in results] == [x.shape for x in maps]
    sum(x.square().mean() for x in results).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_one_level_only_has_attention():
    encoder = HybridEncoder(16, [], heads=4, ffn=24)
    assert {name.split(".")[0] for name, _ in encoder.named_parameters()} == {"attention"}
    (result,) = encoder(make_maps([(4, 6)]))
    assert result.shape == (2, 16, 4, 6)


@pytest.mark.parametrize("stride, depthwise", [(1, False), (2, True), (3, False)])
def test_folded_convolution_equals_convolution_and_norm(stride, depthwise):
    layer = ConvNorm(8, 8, 3, "batch", stride=stride, depthwise=depthwise)
    randomize(layer)
    layer.double().eval()
    x = torch.randn(2, 8, 7, 9).double()
    expected = torch.nn.functional.silu(layer.norm(layer.conv(x)))
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)


def test_folded_block_equals_its_two_branches():
    block = RepBlock(8, "batch")
    randomize(block)
    block.double().eval()
    x = torch.randn(2, 8, 7, 9).double()
    expected = torch.nn.functional.silu(block.wide(x) + block.point(x))
    torch.testing.assert_close(block(x), expected, atol=1e-12, rtol=0)
    assert foldable(block.wide.norm) and not foldable(block.train().wide.norm)
    assert not foldable(RepBlock(8, "group").eval().wide.norm)


def test_strides_must_be_multiples():
    assert check_steps([3.5, 7, 14, 56]) == [2, 2, 4]
    with pytest.raises(ValueError, match="input_levels: strides"):
        check_steps([8, 12])
