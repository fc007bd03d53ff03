"""UPerNet equals transformers' and smp's on converted weights, and trains in hard places."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vitdense.heads.segmentation.base import SemanticOutputs, classify
from vitdense.heads.segmentation.blocks import ConvNormReLU, pool
from vitdense.heads.segmentation.upernet import UPerNetHead
from vitdense.layers.norm import make_norm
from vitdense.ops import rows
from vitdense.structures import IGNORE, Frame, Level, Target

WIDTHS = [8, 16, 24, 32]
LEVELS = [Level(width, 4 * 2**index) for index, width in enumerate(WIDTHS)]
SMALL = {"channels": 16, "aux_channels": 8}


def feature_maps(height: int = 64, width: int = 96, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(height * width)
    return [
        torch.randn(
            batch,
            level.channels,
            int(height // level.stride),
            int(width // level.stride),
            generator=generator,
            dtype=torch.float64,
        )
        for level in LEVELS
    ]


def label_maps(height: int = 64, width: int = 96, batch: int = 2, classes: int = 5) -> Tensor:
    labels = torch.randint(classes, (batch, height, width))
    labels[:, :, : width // 4] = IGNORE
    return labels


def semantic_targets(labels: Tensor) -> list[Target]:
    return [Target(semantic=image.to(torch.uint8)) for image in labels]


def shake_statistics(module: nn.Module) -> None:
    """Give norms weights and running statistics that a wrong conversion would not have."""
    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d | nn.LayerNorm):
                for tensor in norm.state_dict().values():
                    if tensor.is_floating_point():
                        tensor.uniform_(0.5, 1.5)


def renamed(state: dict[str, Tensor], names: list[tuple[str, str]]) -> dict[str, Tensor]:
    result = {}
    for key, value in state.items():
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        result[key] = value
    return result


@pytest.fixture
def reference() -> nn.Module:
    from transformers import SwinConfig, UperNetConfig, UperNetForSemanticSegmentation

    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = UperNetConfig(
        backbone_config=backbone,
        hidden_size=16,
        auxiliary_in_channels=32,
        auxiliary_channels=8,
        num_labels=5,
        use_auxiliary_head=True,
    )
    model = UperNetForSemanticSegmentation(config).double()
    shake_statistics(model)
    return model


TRANSFORMERS_NAMES = [
    (r"^decode_head\.", ""),
    (r"^auxiliary_head\.", "aux."),
    (r"^psp_modules\.(\d)\.1\.", r"pools.\1."),
    (r"^bottleneck\.", "context."),
    (r"^lateral_convs\.", "laterals."),
    (r"^fpn_convs\.", "smooths."),
    (r"^fpn_bottleneck\.", "fuse."),
    (r"^aux\.convs\.0\.", "aux.0."),
    (r"^aux\.classifier\.", "aux.1.1."),
    (r"^classifier\.", "classifier.1."),
    (r"\.conv\.", ".0."),
    (r"\.batch_norm\.", ".1."),
]


def converted(reference: nn.Module) -> UPerNetHead:
    levels = [Level(width, 4 * 2**index) for index, width in enumerate([8, 16, 32, 64])]
    head = UPerNetHead(levels, 5, dropout=0.0, **SMALL).double()
    state = reference.state_dict()
    heads = {key: value for key, value in state.items() if not key.startswith("backbone.")}
    head.load_state_dict(renamed(heads, TRANSFORMERS_NAMES))
    return head


@pytest.mark.parametrize("training", [False, True])
def test_outputs_loss_and_gradients_equal_transformers(
    reference: nn.Module, training: bool
) -> None:
    head = converted(reference).train(training)
    reference.train(training)
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    labels = label_maps()

    expected = reference(images, labels=labels)
    expected.loss.backward()
    reference.eval()  # the backbone has dropped paths, the heads see the same maps
    with torch.no_grad():
        features = list(reference.backbone(images).feature_maps)
    reference.decode_head.train(training)
    reference.auxiliary_head.train(training)
    logits = reference.decode_head(features)
    aux = reference.auxiliary_head(features)

    outputs = head(features)
    assert torch.allclose(outputs.logits, logits, atol=1e-10)
    assert torch.allclose(outputs.aux, aux, atol=1e-10)
    terms = head.loss(outputs, semantic_targets(labels))
    assert set(terms) == {"cross_entropy", "aux_cross_entropy"}

    def full_size(maps: Tensor) -> Tensor:
        return F.interpolate(maps, (64, 96), mode="bilinear", align_corners=False)

    criterion = nn.CrossEntropyLoss(ignore_index=IGNORE)
    loss = criterion(full_size(logits), labels) + 0.4 * criterion(full_size(aux), labels)
    assert torch.allclose(sum(terms.values()), loss, atol=1e-10)
    if not training:
        assert torch.allclose(loss, expected.loss, atol=1e-10)

    reference.zero_grad()
    loss.backward()
    sum(terms.values()).backward()
    grads = {key: p.grad for key, p in reference.named_parameters() if p.grad is not None}
    grads = {key: value for key, value in grads.items() if not key.startswith("backbone.")}
    for key, grad in renamed(grads, TRANSFORMERS_NAMES).items():
        assert torch.allclose(head.get_parameter(key).grad, grad, atol=1e-10), key


SMP_NAMES = [
    (r"^psp\.blocks\.(\d)\.1\.", r"pools.\1."),
    (r"^psp\.out_conv\.", "context."),
    # From the coarsest to the finest there.
    (
        r"^fpn_lateral_blocks\.(\d)\.conv_norm_relu\.",
        lambda match: f"laterals.{2 - int(match[1])}.",
    ),
    (r"^fpn_conv_blocks\.(\d)\.", lambda match: f"smooths.{2 - int(match[1])}."),
    (r"^fusion_block\.", "fuse."),
]


def test_fused_map_equals_smp() -> None:
    from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

    torch.manual_seed(0)
    decoder = UPerNetDecoder([3, 0, *WIDTHS], encoder_depth=5, decoder_channels=16).double()
    shake_statistics(decoder)
    head = UPerNetHead(LEVELS, 5, channels=16, aux_weight=0.0).double()
    state = {k: v for k, v in decoder.state_dict().items() if not k.startswith("feature_norms.")}
    missing, unexpected = head.load_state_dict(renamed(state, SMP_NAMES), strict=False)
    assert missing == ["classifier.1.weight", "classifier.1.bias"]
    assert not unexpected
    maps = feature_maps()
    expected = decoder.eval()([None, None, *maps])
    normed = [norm(map_) for norm, map_ in zip(decoder.feature_norms, maps, strict=True)]
    outputs = head.eval()(normed)
    assert torch.allclose(outputs.logits, head.classifier(expected), atol=1e-12)
    assert outputs.aux is None


@pytest.mark.parametrize("norm", ["auto", "batch", "sync", "group", "layer"])
def test_one_image_of_one_coarse_pixel_trains(norm: str) -> None:
    head = UPerNetHead(LEVELS, 5, norm=norm, **SMALL).double()
    maps = feature_maps(32, 32, batch=1)
    outputs = head(maps)
    assert isinstance(outputs, SemanticOutputs)
    sum(head.loss(outputs, semantic_targets(label_maps(32, 32, 1))).values()).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    again = head.eval()(maps)
    assert isinstance(again, SemanticOutputs)
    assert again.logits.shape == outputs.logits.shape == (1, 5, 8, 8)
    assert again.logits.isfinite().all()


@pytest.mark.parametrize("kind", ["batch", "sync"])
def test_batch_norms_are_torchs_where_torch_can(kind: str) -> None:
    ours, theirs = make_norm(kind, 6).double(), nn.BatchNorm2d(6).double()
    maps = torch.randn(2, 6, 3, 3, dtype=torch.float64)
    assert torch.allclose(ours(maps), theirs(maps))
    assert torch.allclose(ours.running_var, theirs.running_var)
    single = torch.randn(1, 6, 1, 1, dtype=torch.float64)
    before = ours.running_mean.clone()
    assert torch.allclose(ours(single), theirs.eval()(single))
    assert torch.equal(ours.running_mean, before)


def test_group_norm_has_at_most_32_groups_of_at_least_8_channels() -> None:
    groups = {width: make_norm("group", width).num_groups for width in (4, 16, 60, 256, 768, 1024)}
    assert groups == {4: 1, 16: 2, 60: 6, 256: 32, 768: 32, 1024: 32}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 20), st.integers(1, 20))
def test_pool_equals_adaptive_average(size: int, height: int, width: int) -> None:
    maps = torch.randn(2, 3, height, width, dtype=torch.float64)
    assert torch.allclose(pool(maps, size), F.adaptive_avg_pool2d(maps, size), atol=1e-12)


def test_exports_with_sizes_known_at_run_time() -> None:
    class Logits(nn.Module):
        def __init__(self, head: UPerNetHead) -> None:
            super().__init__()
            self.head = head

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.head([a, b]).logits

    model = Logits(UPerNetHead(LEVELS[2:], 5, **SMALL)).double().eval()
    height, width = torch.export.Dim("height", min=2, max=64), torch.export.Dim("width", min=2)
    shapes = ({2: 2 * height, 3: 2 * width}, {2: height, 3: width})
    program = torch.export.export(
        model, tuple(feature_maps(256, 320, 1)[2:]), dynamic_shapes=shapes
    )
    maps = feature_maps(128, 416, 1)[2:]
    assert torch.allclose(program.module()(*maps), model(*maps))


def test_auxiliary_level_is_the_one_nearest_to_stride_16() -> None:
    def width_read(levels: list[Level], **options: int) -> int:
        aux = UPerNetHead(levels, 5, **SMALL, **options).aux
        assert aux is not None and isinstance(aux[0], ConvNormReLU)
        return aux[0][0].in_channels

    assert width_read(LEVELS) == 24
    assert width_read(LEVELS[:2]) == 16
    assert width_read([Level(8, 3.5), Level(16, 7), Level(24, 14), Level(32, 28)]) == 24
    assert width_read(LEVELS, aux_level=3) == 32
    with pytest.raises(ValueError, match=r"^aux_level: is 4, levels are 0\.\.3"):
        width_read(LEVELS, aux_level=4)


def test_works_on_one_level_and_with_other_pool_scales() -> None:
    head = UPerNetHead(LEVELS[3:], 5, pool_scales=(1, 4), **SMALL).double()
    assert head(feature_maps()[3:]).logits.shape == (2, 5, 2, 3)


@pytest.mark.parametrize("chunk", [1, 3 * 90 * 70, 10**9])
@pytest.mark.parametrize("canvas", [(64, 96), (90, 70)])
def test_answers_are_the_best_class_of_resized_logits(
    chunk: int, canvas: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(rows.CHUNK, "cpu", chunk)
    frame = Frame(canvas, (60, 70), (90, 67))
    logits = torch.randn(10, 16, 24)
    answer = classify(logits, frame)
    assert answer.dtype == torch.int64
    assert torch.equal(answer, frame.restore_map(logits).argmax(0))


def test_prediction_has_the_original_size_of_each_image() -> None:
    head = UPerNetHead(LEVELS, 5, **SMALL).double().eval()
    frames = [Frame((64, 96), (64, 80), (30, 37)), Frame((64, 96), (64, 96), (128, 192))]
    answers = head.predict(head(feature_maps()), frames)
    assert [tuple(answer.semantic.shape) for answer in answers] == [(30, 37), (128, 192)]


def test_targets_without_semantic_maps_are_refused() -> None:
    head = UPerNetHead(LEVELS, 5, **SMALL).double()
    with pytest.raises(ValueError, match="targets have no semantic maps"):
        head.loss(head(feature_maps()), [Target(), Target()])
