"""Every decoder equals segmentation_models_pytorch's own model, and reads what smp cannot."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

from vitdense.heads.segmentation.smp import DESIGNS, SmpHead
from vitdense.layers.norm import BatchNorm
from vitdense.registry import BACKBONES, HEADS, MODELS
from vitdense.structures import Level
from vitdense.testing import check_head

SWIN = "tu-swin_tiny_patch4_window7_224"
TINY_SWIN = {"depths": (1, 1, 1, 1), "embed_dim": 8, "num_heads": (1, 1, 1, 1), "window_size": 4}
PYRAMID = [Level(8 * 2**step, 4 * 2**step) for step in range(4)]
BLOCKS = [24, 16, 12, 8, 8]
SMALL: dict[str, Any] = {
    "unet": BLOCKS, "unetplusplus": BLOCKS, "manet": BLOCKS, "fpn": 32,
}  # fmt: skip
OWN = {"unet": "decoder_channels", "unetplusplus": "decoder_channels", "manet": "decoder_channels",
       "fpn": "decoder_segmentation_channels", "pspnet": "psp_out_channels",
       "segformer": "decoder_segmentation_channels", "pan": "decoder_channels",
       "deeplabv3": "decoder_channels", "deeplabv3plus": "decoder_channels",
       "upernet": "decoder_channels"}  # fmt: skip


def channels_of(decoder: str) -> Any:
    return None if decoder == "linknet" else SMALL.get(decoder, 16)


def reference(decoder: str, encoder: str, **options: Any) -> Any:
    """smp's model with weights and statistics that a wrong copy would not have."""
    torch.manual_seed(0)
    if decoder in OWN:
        options[OWN[decoder]] = channels_of(decoder)
    if encoder == SWIN:
        options |= TINY_SWIN | {"strict_img_size": False}
    model = smp.create_model(decoder, encoder, encoder_weights=None, classes=5, **options)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm):
                for tensor in module.state_dict().values():
                    if tensor.is_floating_point():
                        tensor.uniform_(0.5, 1.5)
    return model.eval()


def copied(decoder: str, model: Any, levels: list[Level], **options: Any) -> SmpHead:
    head = SmpHead(levels, 5, decoder=decoder, channels=channels_of(decoder), **options)
    head.decoder.load_state_dict(model.decoder.state_dict())
    head.classifier.load_state_dict(model.segmentation_head.state_dict())
    return head.eval()


def levels_and_maps(model: Any, images: Tensor) -> tuple[list[Level], list[Tensor]]:
    """What our backbones give of smp's features: no image, and no map without channels."""
    pairs = list(zip(model.encoder.out_channels, model.encoder(images), strict=True))[1:]
    pairs = [(width, map_) for width, map_ in pairs if width]
    levels = [Level(width, images.shape[-1] // map_.shape[-1]) for width, map_ in pairs]
    return levels, [map_ for _, map_ in pairs]


CONVOLUTIONAL = {name: {} for name in DESIGNS} | {"pspnet": {"encoder_depth": 3}}


@pytest.mark.parametrize("decoder", CONVOLUTIONAL)
def test_equals_smp_on_a_convolutional_net(decoder: str) -> None:
    model = reference(decoder, "tu-resnet10t", **CONVOLUTIONAL[decoder])
    images = torch.randn(2, 3, 256, 128)
    if decoder == "pan":  # smp's needs 8 cells a side
        images = torch.randn(2, 3, 256, 384)
    with torch.no_grad():
        expected = model(images)
        levels, maps = levels_and_maps(model, images)
        head = copied(decoder, model, levels[1:] if decoder == "pan" else levels)
        outputs = head(maps[1:] if decoder == "pan" else maps)
    assert expected.std() > 1e-3
    torch.testing.assert_close(outputs.logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "decoder", [name for name in DESIGNS if not name.startswith(("deeplab", "pan", "psp"))]
)
def test_equals_smp_on_swin(decoder: str) -> None:
    model = reference(decoder, SWIN)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = model(images)
        levels, maps = levels_and_maps(model, images)
        outputs = copied(decoder, model, levels)(maps)
    assert [level.stride for level in levels] == [4, 8, 16, 32] and expected.std() > 1e-3
    torch.testing.assert_close(outputs.logits, expected, atol=1e-5, rtol=1e-5)


def test_a_whole_model_equals_smps() -> None:
    theirs = reference("unet", "tu-resnet10t")
    backbone = partial(BACKBONES.get("timm"), model="resnet10t", out_indices=[0, 1, 2, 3, 4])
    head = partial(HEADS.get("smp"), decoder="unet", channels=BLOCKS)
    ours = MODELS.get("pyramid")(5, backbone=backbone, head=head).eval()
    ours.backbone.model.load_state_dict(theirs.encoder.model.state_dict())
    ours.head.decoder.load_state_dict(theirs.decoder.state_dict())
    ours.head.classifier.load_state_dict(theirs.segmentation_head.state_dict())
    images = torch.randint(256, (1, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        expected = theirs(ours.normalize(images))
        torch.testing.assert_close(ours(images).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("decoder", DESIGNS)
def test_reads_the_pyramid_of_a_plain_vit(decoder: str) -> None:
    """Patches of 14, which make fractional strides, too."""
    levels = [Level(16, stride) for stride in (3.5, 7, 14, 28)]
    head = SmpHead(levels, 3, decoder=decoder, channels=channels_of(decoder)).eval()
    maps = [torch.randn(1, 16, int(56 / lv.stride), int(84 / lv.stride)) for lv in levels]
    assert head(maps).logits.shape == (1, 3, 64, 96)


@pytest.mark.parametrize("decoder", DESIGNS)
def test_conforms_with_one_image_a_batch(decoder: str) -> None:
    check_head(SmpHead, decoder=decoder, channels=channels_of(decoder), norm="group")


@pytest.mark.parametrize("decoder", ["unet", "manet", "linknet", "upernet", "segformer", "pspnet"])
def test_one_level_is_enough(decoder: str) -> None:
    channels = BLOCKS[:4] if isinstance(channels_of(decoder), list) else channels_of(decoder)
    head = SmpHead([Level(16, 16)], 3, decoder=decoder, channels=channels)
    logits = head([torch.randn(2, 16, 4, 6)]).logits
    assert logits.shape[0:2] == (2, 3) and logits.shape[-2] * 6 == logits.shape[-1] * 4


def test_fewer_blocks_stop_at_a_coarser_stride() -> None:
    maps = [torch.randn(2, lv.channels, 64 // lv.stride, 96 // lv.stride) for lv in PYRAMID]
    for count, stride in ((5, 1), (4, 2), (3, 4)):
        head = SmpHead(PYRAMID, 3, decoder="unet", channels=BLOCKS[:count])
        assert head(maps).logits.shape == (2, 3, 64 // stride, 96 // stride)


def test_every_batch_norm_is_replaced() -> None:
    for decoder in DESIGNS:
        head = SmpHead(PYRAMID, 3, decoder=decoder, channels=channels_of(decoder))
        norms = [m for m in head.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(isinstance(norm, BatchNorm) for norm in norms)
        head = SmpHead(PYRAMID, 3, decoder=decoder, channels=channels_of(decoder), norm="layer")
        kept = [m.num_features for m in head.modules() if isinstance(m, nn.BatchNorm2d)]
        assert set(kept) <= {1}


def test_usual_channels_are_smps() -> None:
    models = {"unet": smp.Unet, "linknet": smp.Linknet, "unetplusplus": smp.UnetPlusPlus,
              "manet": smp.MAnet, "fpn": smp.FPN, "pspnet": smp.PSPNet, "pan": smp.PAN,
              "deeplabv3": smp.DeepLabV3, "deeplabv3plus": smp.DeepLabV3Plus,
              "upernet": smp.UPerNet, "segformer": smp.Segformer}  # fmt: skip
    assert models.keys() == DESIGNS.keys()
    for name, own in OWN.items():
        default = inspect.signature(models[name].__init__).parameters[own].default
        assert DESIGNS[name].channels == default


def test_options_reach_the_decoder() -> None:
    head = SmpHead(PYRAMID, 3, decoder="unet", options={"attention_type": "scse"})
    assert any("SCSE" in type(module).__name__ for module in head.modules())
    head = SmpHead(PYRAMID, 3, decoder="fpn", options={"merge_policy": "cat", "dropout": 0.5})
    assert head.classifier[0].in_channels == 4 * 128 and head.decoder.dropout.p == 0.5
    head = SmpHead(PYRAMID, 3, decoder="deeplabv3", options={"atrous_rates": (2, 4, 6)})
    assert [conv[0].dilation[0] for conv in list(head.decoder.aspp.convs)[1:4]] == [2, 4, 6]


@pytest.mark.parametrize(
    ("levels", "options", "match"),
    [
        (PYRAMID, {"options": {"attention": 1}}, "^options: unet has no 'attention'. Did you mean"),
        (PYRAMID, {"options": {"use_norm": True}}, "^options: unet has no 'use_norm'"),
        (PYRAMID, {"channels": 64}, "^channels: unet has one width per block: give 5"),
        (PYRAMID, {"channels": [8] * 6}, "^channels: unet has at most 5 blocks .*, not 6"),
        (PYRAMID, {"decoder": "unetplusplus", "channels": [8] * 3}, "^channels: .* has 5 blocks"),
        (PYRAMID, {"decoder": "fpn", "channels": [8]}, r"^channels: fpn has one width, not \[8\]"),
        (PYRAMID[1:], {"decoder": "fpn"}, "^decoder: fpn reads 4 to 5 levels, there are 3"),
        (PYRAMID[1:], {"decoder": "unetplusplus"}, "^decoder: .* level of stride 4 or finer"),
        ([Level(8, 16)] * 4, {}, r"^decoder: unet needs strides that double, not \[16, 16"),
    ],
)
def test_what_does_not_fit_is_refused(levels, options, match) -> None:
    with pytest.raises(ValueError, match=match):
        SmpHead(levels, 3, **options)
