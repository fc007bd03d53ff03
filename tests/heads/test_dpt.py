"""DPT equals transformers' neck and heads on random weights."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from vitdense.heads.segmentation.dpt import DPTHead
from vitdense.structures import IGNORE, Level, Target
from vitdense.testing import check_head

WIDTHS = [6, 8, 10, 12]


def reference(readout: str, normed: bool, widths: list[int]) -> nn.Module:
    from transformers import DPTConfig, DPTForSemanticSegmentation

    torch.manual_seed(0)
    config = DPTConfig(
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=64,
        readout_type=readout,
        backbone_out_indices=list(range(len(widths))),
        reassemble_factors=[4, 2, 1, 0.5][: len(widths)],
        neck_hidden_sizes=widths,
        fusion_hidden_size=16,
        use_batch_norm_in_fusion_residual=normed,
        num_labels=5,
    )
    model = DPTForSemanticSegmentation(config).double()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not name.startswith("dpt."):
                tensor.uniform_(0.5, 1.5) if "var" in name else tensor.normal_(0, 0.2)
    return model


def converted(model: nn.Module, readout: str, normed: bool, widths: list[int]) -> DPTHead:
    level = Level(48 if readout == "project" else 24, 16)
    norm = "batch" if normed else "none"
    head = DPTHead([level] * len(widths), 5, channels=16, widths=widths, readout=readout, norm=norm)
    head = head.double()
    places = {
        "convolution1": 1,
        "batch_norm1": 2,
        "convolution2": 4 - (not normed),
        "batch_norm2": 5,
    }
    last = len(widths) - 1
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("dpt.") or "layers.0.residual_layer1" in name:
            continue  # the coarsest map has none to be merged with
        for pattern, new in (
            (r"neck\.reassemble_stage\.readout_projects\.", "readouts."),
            (r"neck\.reassemble_stage\.layers\.(\d)\.projection", r"reassemble.\1.0"),
            (r"neck\.reassemble_stage\.layers\.(\d)\.resize", r"reassemble.\1.1"),
            (r"neck\.convs", "convs"),
            (r"neck\.fusion_stage\.layers\.(\d)", lambda m: f"fusions.{last - int(m[1])}"),
            (r"projection", "project"),
            (r"residual_layer1", "merge.layers"),
            (r"residual_layer2", "refine.layers"),
            (r"(convolution\d|batch_norm\d)", lambda m: str(places[m[1]])),
            (r"auxiliary_head\.head", "aux"),
            (r"head\.head", "classifier"),
        ):
            name = re.sub(pattern, new, name)
        state[name] = tensor[..., None, None] if re.match(r"readouts.*weight", name) else tensor
    head.load_state_dict(state)
    return head


@pytest.mark.parametrize("widths", [WIDTHS, WIDTHS[:3], WIDTHS[:2]])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("readout", ["ignore", "project"])
def test_outputs_and_loss_equal_transformers(readout: str, normed: bool, widths: list[int]) -> None:
    model = reference(readout, normed, widths).eval()
    head = converted(model, readout, normed, widths).eval()
    height, width = 4, 6
    tokens = [torch.randn(2, 1 + height * width, 24, dtype=torch.float64) for _ in widths]
    fused = model.neck(tokens, height, width)
    logits, aux = model.head(fused), model.auxiliary_head(fused[-1])
    maps = [to_map(token, height, width, readout) for token in tokens]
    outputs = head(maps)
    assert logits.std() > 0.01
    torch.testing.assert_close(outputs.logits, logits, atol=1e-10, rtol=0)
    torch.testing.assert_close(outputs.aux, aux, atol=1e-10, rtol=0)

    labels = torch.randint(5, (2, 16 * height, 16 * width))
    labels[:, :20] = IGNORE
    terms = head.loss(outputs, [Target(semantic=one) for one in labels])

    def loss_of(maps: Tensor) -> Tensor:
        size = (labels.shape[-2], labels.shape[-1])
        maps = nn.functional.interpolate(maps, size, mode="bilinear", align_corners=False)
        return nn.functional.cross_entropy(maps, labels, ignore_index=IGNORE)

    expected = loss_of(logits) + 0.4 * loss_of(aux)
    torch.testing.assert_close(sum(terms.values()), expected, atol=1e-10, rtol=0)


def to_map(tokens: Tensor, height: int, width: int, readout: str) -> Tensor:
    """The map of a backbone, with `class_token: concat` for the readout `project`."""
    patches = tokens[:, 1:].transpose(1, 2).unflatten(2, (height, width))
    if readout == "ignore":
        return patches
    return torch.cat([patches, tokens[:, 0, :, None, None].expand_as(patches)], dim=1)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize("patch", [8, 14, 16])
def test_any_patches_and_numbers_of_levels(patch: int, count: int) -> None:
    head = DPTHead([Level(16, patch)] * count, 3, channels=8)
    outputs = head([torch.randn(2, 16, 5, 7)] * count)
    assert outputs.logits.shape == (2, 3, 80, 112)
    assert outputs.aux is not None and outputs.aux.shape == (2, 3, 40, 56)


def test_fused_maps_stay_in_place_on_odd_grids() -> None:
    """A map of 5 cells is reassembled to 3, and comes back to 5, not to 6."""
    head = DPTHead([Level(16, 16)] * 4, 3, channels=8)
    sizes = []
    for fusion in head.fusions:
        fusion.register_forward_hook(lambda module, given, out: sizes.append(out.shape[-1]))
    head([torch.randn(2, 16, 5, 5)] * 4)
    assert sizes == [5, 10, 20, 40]


def test_pyramids_keep_their_strides_and_widths() -> None:
    levels = [Level(8 * 2**step, 4 * 2**step) for step in range(4)]
    head = DPTHead(levels, 3, channels=8)
    assert all(len(layers) == 1 for layers in head.reassemble)
    assert [conv.in_channels for conv in head.convs] == [8, 16, 32, 64]


def test_usual_widths_are_those_of_the_base_model() -> None:
    head = DPTHead([Level(768, 16)] * 4, 3, channels=8)
    assert [conv.in_channels for conv in head.convs] == [96, 192, 384, 768]


def test_without_auxiliary_classifier() -> None:
    check_head(DPTHead, levels=[Level(16, 16)] * 2, channels=8, aux_weight=0.0, norm="group")


@pytest.mark.parametrize(
    ("levels", "options", "match"),
    [
        ([Level(8, 16)], {}, "^levels: DPT fuses at least two"),
        ([Level(8, 4), Level(8, 6)], {}, r"^levels: DPT cannot make each of \[4, 6\]"),
        ([Level(8, 16)] * 3, {"widths": [8, 8]}, "^widths: there are 2 of them for 3 levels"),
        ([Level(9, 16)] * 3, {"readout": "project"}, "^readout: `project` needs backbone.class"),
    ],
)
def test_what_does_not_fit_is_refused(levels, options, match) -> None:
    with pytest.raises(ValueError, match=match):
        DPTHead(levels, 3, **options)
