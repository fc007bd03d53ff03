"""`rtdetr` with distributions equals transformers' D-FINE, and so do its losses."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import DFineConfig, DFineForObjectDetection, HGNetV2Config
from transformers.loss.loss_d_fine import DFineLoss, weighting_function

from vitdense.convert import rename
from vitdense.convert.rtdetr import head_rules
from vitdense.heads.detection.distribution import bin_distances, move_edges
from vitdense.heads.detection.rtdetr import RTDetrHead
from vitdense.losses.distribution import edge_distances
from vitdense.losses.matcher import Truths
from vitdense.losses.set_criterion import Queries
from vitdense.ops.boxes import cxcywh_to_xyxy, xyxy_to_relative
from vitdense.structures import Level
from vitdense.testing import check_head

LEVELS = [Level(8, 8), Level(12, 16), Level(16, 32)]
CANVAS = (64, 96)
SMALL = dict(
    width=32, heads=4, encoder_ffn=24, ffn=48, decoder_layers=3, queries=10, points=[3, 2, 1],
    denoising=12, norm="batch", class_loss="varifocal", fusion="elan", blocks=1,
    project_memory=False, distribution=True, bins=8,
)  # fmt: skip


class FixedFeatures(nn.Module):
    """Stands where transformers has its backbone, so that both heads read the same maps."""

    def __init__(self, features):
        super().__init__()
        self.features = features

    def forward(self, images, mask):
        return [(x, torch.ones(len(x), *x.shape[-2:], dtype=torch.bool)) for x in self.features]


def reference(features, **changes):
    backbone = HGNetV2Config(hidden_sizes=[8, 8, 12, 16], out_indices=[2, 3, 4])
    options = dict(
        backbone_config=backbone, d_model=32, encoder_hidden_dim=32, encoder_ffn_dim=24,
        encoder_in_channels=[8, 12, 16], decoder_in_channels=[32] * 3, decoder_ffn_dim=48,
        encoder_attention_heads=4, decoder_attention_heads=4, decoder_layers=3, num_queries=10,
        decoder_n_points=[3, 2, 1], num_denoising=12, num_labels=5, depth_mult=0.34,
        max_num_bins=8, attn_implementation="eager",
    )  # fmt: skip
    theirs = DFineForObjectDetection(DFineConfig(**options | changes))
    theirs.model.backbone = FixedFeatures(features)
    for name, value in theirs.state_dict().items():
        if name.endswith("running_var"):
            nn.init.uniform_(value, 0.5, 1.5)
        elif value.is_floating_point() and not name.endswith(("points_scale", "up", "reg_scale")):
            nn.init.normal_(value, std=0.2)
    return theirs.double().eval()


def head_like(theirs, **options):
    """Ours with the weights of theirs."""
    ours = RTDetrHead(LEVELS, 5, **(SMALL | options)).double().eval()
    computed = ("points_scale", "decoder.up", "decoder.reg_scale")
    kept = {k: v for k, v in theirs.model.state_dict().items() if not k.endswith(computed)}
    ours.load_state_dict(rename(kept, head_rules(fine=True)))
    return ours


@pytest.fixture
def features():
    torch.manual_seed(0)
    return [
        torch.randn(
            2, level.channels, CANVAS[0] // level.stride, CANVAS[1] // level.stride
        ).double()
        for level in LEVELS
    ]


@pytest.fixture(params=[({}, {}), (dict(reg_scale=8.0), dict(bin_scale=8.0))], ids=["4", "8"])
def pair(request, features):
    changes, options = request.param
    theirs = reference(features, **changes)
    return head_like(theirs, **options), theirs


def test_outputs_of_all_layers_equal_transformers(pair, features, monkeypatch):
    ours, theirs = pair
    # in evaluation transformers shows the last layer alone
    monkeypatch.setattr(theirs.model.decoder, "training", True)
    with torch.no_grad():
        outputs, expected = ours(features), theirs(torch.zeros(2, 3, *CANVAS).double())
    pairs = {
        "logits": (outputs.logits, expected.intermediate_logits),
        "boxes": (outputs.boxes, expected.intermediate_reference_points),
        "edges": (
            outputs.details["edges"][1:].flatten(3),
            expected.intermediate_predicted_corners,
        ),
        "origins": (outputs.details["origins"][1:], expected.initial_reference_points),
    }
    for name, (found, theirs) in pairs.items():
        torch.testing.assert_close(found.transpose(0, 1), theirs, atol=1e-8, rtol=0, msg=name)


def local_terms(criterion, part, layer, matches, targets, normalizer):
    """transformers' `loss_local` of one layer, in float32; matches int64 [B, T] of each group."""
    labels = [{"boxes": xyxy_to_relative(t.boxes, CANVAS)} for t in targets]
    indices = []
    for image, target in zip(matches, targets, strict=True):
        pairs = [
            (group * part.logits.shape[2] // part.groups + query, truth)
            for group in range(part.groups)
            for truth, query in enumerate(image[: len(target.labels)].tolist())
            if query >= 0
        ]
        indices.append(tuple(torch.tensor(pairs, dtype=torch.long).view(-1, 2).T))
    outputs = {
        "pred_corners": part.details["edges"][layer].flatten(2),
        "ref_points": part.details["origins"][layer],
        "pred_boxes": part.boxes[layer],
        "teacher_corners": part.details["edges"][-1].flatten(2),
        "teacher_logits": part.logits[-1].detach(),
    }
    outputs = {name: value.float() for name, value in outputs.items()}
    return criterion.loss_local(outputs, labels, indices, normalizer * part.groups)


@pytest.mark.parametrize("counts", [(3, 2), (0, 2), (12, 1)])
@pytest.mark.parametrize("kind", ["", "_denoising"])
def test_losses_of_distributions_equal_transformers(pair, features, counts, kind, make_targets):
    ours, theirs = pair
    ours.train()
    targets = make_targets(*counts)
    outputs = ours(features, targets)
    truths = Truths.from_targets(targets, CANVAS)
    part = (
        outputs.others[kind]
        if kind
        else Queries(outputs.logits, outputs.boxes, details=outputs.details)
    )
    split = part.as_layers()
    matches = ours.criterion._match({kind: split}, truths)[kind]
    terms = ours.criterion.terms(split, truths, matches, torch.tensor(float(sum(counts))))
    terms = {name: term.unflatten(0, (-1, part.groups)).mean(1) for name, term in terms.items()}
    criterion = DFineLoss(theirs.config)
    assert terms["fgl"][0] == terms["ddf"][0] == 0
    for layer in range(1, 4):
        first = matches[layer * part.groups]
        expected = local_terms(criterion, part, layer, first, targets, sum(counts))
        for name in ("fgl", "ddf"):
            torch.testing.assert_close(
                terms[name][layer].float(), expected[f"loss_{name}"], atol=1e-6, rtol=1e-4
            )


def test_terms_are_weighed_and_only_layers_have_distributions(features, make_targets):
    head = RTDetrHead(LEVELS, 5, **SMALL).double()
    losses = head.loss(head(features, targets := make_targets(2, 3)), targets)
    terms = {"class", "box", "giou"}
    expected = {
        f"{name}{part}{layers}"
        for name in terms | {"fgl", "ddf"}
        for part in ("", "_denoising")
        for layers in ("", "_aux")
    } | {f"{name}_encoder" for name in terms}
    assert set(losses) == expected
    assert head.criterion.weights == {
        "class": 1.0, "box": 5.0, "giou": 2.0, "fgl": 0.15, "ddf": 1.5
    }  # fmt: skip
    assert losses["ddf"] == 0 and losses["ddf"].requires_grad  # the last layer is the teacher


@pytest.mark.parametrize("bins, scale", [(32, 4.0), (16, 8.0), (4, 4.0)])
def test_bins_equal_transformers(bins, scale):
    expected = weighting_function(
        bins, torch.tensor([0.5]).double(), torch.tensor([scale]).double()
    )
    torch.testing.assert_close(torch.tensor(bin_distances(bins, scale)).double(), expected)


def test_distances_lead_from_one_box_to_another():
    torch.manual_seed(0)
    first, second = torch.rand(2, 7, 4).double()
    distances = edge_distances(first, cxcywh_to_xyxy(second), 4.0)
    torch.testing.assert_close(move_edges(first, distances, 4.0), second)


@pytest.mark.parametrize(
    "options", [dict(), dict(denoising=0, decoder_layers=1, class_loss="matchability")]
)
def test_conforms(options):
    check_head(RTDetrHead, **(SMALL | options))


@pytest.mark.parametrize("bins", [7, 2])
def test_wrong_bins_are_named(bins):
    with pytest.raises(ValueError, match="bins: must be an even number from 4 on"):
        RTDetrHead(LEVELS, 5, **(SMALL | dict(bins=bins)))
