"""`deformable_detr` equals transformers' Deformable DETR on converted weights, and learns."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig
from transformers.loss.loss_deformable_detr import (
    DeformableDetrForObjectDetectionLoss,
    DeformableDetrHungarianMatcher,
    DeformableDetrImageLoss,
)

from vitdense.convert.deformable_detr import names
from vitdense.convert.names import rename
from vitdense.heads.detection.deformable_detr import DeformableDetrHead, choose_levels
from vitdense.ops.boxes import xyxy_to_relative
from vitdense.structures import Frame, Level
from vitdense.testing import check_head

LEVELS = [Level(6, 4), Level(8, 8), Level(12, 16)]
CANVAS = (64, 96)
SMALL = dict(
    width=32, heads=4, points=3, ffn=48, encoder_layers=2, decoder_layers=3, queries=10,
    num_levels=3,
)  # fmt: skip


def convert(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' names -> ours, without the backbone."""
    found = rename({name: x for name, x in weights.items() if "backbone" not in name}, names(3))
    # proposals are told apart by class 0 alone
    first = "first_stage.predictor.classes"
    return {name: x[:1] if name.startswith(first) else x for name, x in found.items()}


class FixedFeatures(nn.Module):
    """Stands where transformers has its backbone, so that both heads read the same maps."""

    def __init__(self, features: list[torch.Tensor]) -> None:
        super().__init__()
        self.features = features

    def forward(self, images, mask):
        return [(x, torch.ones(len(x), *x.shape[-2:], dtype=torch.bool)) for x in self.features]


def reference(features: list[torch.Tensor], **changes) -> DeformableDetrForObjectDetection:
    backbone = ResNetConfig(
        hidden_sizes=[8, 8, 8, 12], depths=[1] * 4, out_features=["stage3", "stage4"]
    )
    config = DeformableDetrConfig(
        backbone_config=backbone,
        d_model=32,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_n_points=3,
        decoder_n_points=3,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_queries=10,
        two_stage_num_proposals=10,
        num_feature_levels=3,
        num_labels=5,
        tie_word_embeddings=False,
        class_cost=2,
        auxiliary_loss=True,
        **changes,
    )
    model = DeformableDetrForObjectDetection(config)
    model.model.backbone = FixedFeatures(features[1:])
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    if config.with_box_refine:
        model.model.decoder.bbox_embed = model.bbox_embed
        model.model.decoder.class_embed = model.class_embed
    else:
        model.bbox_embed = nn.ModuleList([model.bbox_embed[0]] * 3)
        model.class_embed = nn.ModuleList([model.class_embed[0]] * 3)
    return model.double().eval()


@pytest.fixture
def features():
    torch.manual_seed(0)
    sizes = [(6, 16, 24), (8, 8, 12), (12, 4, 6)]
    return [torch.randn(2, *size).double() for size in sizes]


VARIANTS = {
    "two_stage": dict(two_stage=True, box_refinement=True),
    "refined": dict(two_stage=False, box_refinement=True),
    "plain": dict(two_stage=False, box_refinement=False),
}


@pytest.fixture(params=list(VARIANTS))
def pair(request, features):
    options = VARIANTS[request.param]
    theirs = reference(
        features, two_stage=options["two_stage"], with_box_refine=options["box_refinement"]
    )
    ours = DeformableDetrHead(LEVELS, 5, **SMALL, **options).double().eval()
    weights = convert(theirs.state_dict())
    if not options["box_refinement"]:
        weights = {
            k: v for k, v in weights.items() if not re.match(r"decoder\.predictors\.[12]", k)
        }
    ours.load_state_dict(weights)
    return ours, theirs


def test_outputs_of_all_layers_equal_transformers(pair, features, monkeypatch):
    ours, theirs = pair
    caught = {}

    def catch(logits, labels, device, boxes, config, all_logits, all_boxes):
        caught.update(logits=all_logits, boxes=all_boxes)
        return None, None, None

    monkeypatch.setattr(type(theirs), "loss_function", staticmethod(catch))
    with torch.no_grad():
        outputs = ours(features)
        expected = theirs(torch.zeros(2, 3, *CANVAS).double(), labels=[])
    # transformers embeds proposals in float32 whatever the model's type
    atol = 1e-7 if ours.two_stage else 1e-10
    torch.testing.assert_close(outputs.logits, caught["logits"], atol=atol, rtol=0)
    torch.testing.assert_close(outputs.boxes, caught["boxes"], atol=atol, rtol=0)
    torch.testing.assert_close(outputs.logits[-1], expected.logits, atol=atol, rtol=0)
    if ours.two_stage:
        logits, boxes = expected.enc_outputs_class, expected.enc_outputs_coord_logits
        torch.testing.assert_close(
            outputs.others["_encoder"].logits[0], logits[..., :1], atol=1e-10, rtol=0
        )
        torch.testing.assert_close(
            outputs.others["_encoder"].boxes[0], boxes.sigmoid(), atol=1e-10, rtol=0
        )


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (1, 0)])
def test_losses_equal_transformers(pair, features, counts, make_targets):
    ours, theirs = pair
    outputs = ours(features)
    targets = make_targets(*counts)
    losses = ours.loss(outputs, targets)
    labels = [
        {"class_labels": t.labels, "boxes": xyxy_to_relative(t.boxes.double(), CANVAS)}
        for t in targets
    ]
    logits, boxes = outputs.logits, outputs.boxes
    _, terms, _ = DeformableDetrForObjectDetectionLoss(
        logits[-1], labels, "cpu", boxes[-1], theirs.config, logits, boxes
    )
    # transformers weighs the class by 1, the authors by 2
    names = {"class": ("loss_ce", 2), "box": ("loss_bbox", 5), "giou": ("loss_giou", 2)}
    for ours_name, (name, weight) in names.items():
        torch.testing.assert_close(losses[ours_name], weight * terms[name], atol=1e-6, rtol=1e-6)
        earlier = weight * (terms[name + "_0"] + terms[name + "_1"])
        torch.testing.assert_close(losses[ours_name + "_aux"], earlier, atol=1e-6, rtol=1e-6)
    assert set(losses) == {
        name + suffix
        for name in names
        for suffix in (["", "_aux", "_encoder"] if ours.two_stage else ["", "_aux"])
    }


@pytest.mark.parametrize("aware", [False, True])
def test_encoder_losses_equal_transformers_criterion(features, aware, make_targets):
    # transformers leaves the first stage untrained, so its criterion is called for it here
    head = DeformableDetrHead(LEVELS, 5, class_aware_proposals=aware, **SMALL).double()
    outputs = head(features)
    targets = make_targets(3, 2)
    losses = head.loss(outputs, targets)
    matcher = DeformableDetrHungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
    criterion = DeformableDetrImageLoss(matcher, 5 if aware else 1, 0.25, ["labels", "boxes"])
    terms = criterion(
        {
            "logits": outputs.others["_encoder"].logits[0],
            "pred_boxes": outputs.others["_encoder"].boxes[0],
        },
        [
            {
                "class_labels": t.labels if aware else torch.zeros_like(t.labels),
                "boxes": xyxy_to_relative(t.boxes.double(), CANVAS),
            }
            for t in targets
        ],
    )
    names = {"class": ("loss_ce", 2), "box": ("loss_bbox", 5), "giou": ("loss_giou", 2)}
    for ours_name, (name, weight) in names.items():
        expected = weight * terms[name]
        torch.testing.assert_close(losses[ours_name + "_encoder"], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        dict(two_stage=True),
        dict(two_stage=False),
        dict(two_stage=True, box_refinement=False, class_aware_proposals=True),
        dict(two_stage=False, box_refinement=False, aux_loss=False),
    ],
)
def test_conforms(options):
    check_head(DeformableDetrHead, **SMALL, **options)


@pytest.mark.parametrize(
    "strides, expected",
    [
        ([4, 8, 16, 32], [1, 2, 3]),
        ([3.5, 7, 14, 28], [1, 2, 3]),
        ([8, 16, 32, 64], [0, 1, 2]),
        ([4], [0]),
    ],
)
def test_reads_levels_from_stride_8(strides, expected):
    assert choose_levels([Level(8, stride) for stride in strides], None, 3) == expected


def test_makes_missing_levels_by_halving_the_last(features):
    head = DeformableDetrHead(LEVELS, 5, **(SMALL | dict(num_levels=5))).double()
    maps = head.inputs([features[i] for i in head.input_levels])
    assert [tuple(x.shape[-2:]) for x in maps] == [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]


def test_fewer_cells_than_queries_become_fewer_queries(features):
    head = DeformableDetrHead(LEVELS, 5, **(SMALL | dict(queries=500))).double()
    cells = 8 * 12 + 4 * 6 + 2 * 3
    assert head(features).logits.shape == (3, 2, cells, 5)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(input_levels=[0, 3]), "input_levels: must be rising numbers below 3"),
        (dict(input_levels=[2, 1]), "input_levels: must be rising numbers below 3"),
        (dict(input_levels=[0, 1, 2], num_levels=2), "num_levels: must be at least the 3"),
        (dict(heads=5), "heads: 5 does not divide the width 32"),
        (dict(width=30, heads=3), "width: must be a multiple of 4"),
        (dict(aux_loss=False), "aux_loss: box_refinement trains"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DeformableDetrHead(LEVELS, 5, **(SMALL | options))


def test_answers_are_the_best_pairs_of_query_and_class_in_original_pixels(features):
    head = DeformableDetrHead(LEVELS, 5, max_detections=7, **SMALL).double()
    outputs = head(features)
    outputs.logits = torch.randn_like(outputs.logits)
    frames = [Frame(CANVAS, (64, 80), (32, 40)), Frame(CANVAS, CANVAS, CANVAS)]
    for i, answer in enumerate(head.predict(outputs, frames)):
        scores = outputs.logits[-1, i].float().sigmoid()
        expected = sorted(
            ((scores[q, c].item(), q, c) for q in range(10) for c in range(5)), reverse=True
        )[:7]
        torch.testing.assert_close(answer.scores, torch.tensor([e[0] for e in expected]))
        assert answer.labels.tolist() == [e[2] for e in expected]
        scale, limit = ([48, 32], [40, 32]) if i == 0 else ([96, 64], [96, 64])
        for box, (_, q, _) in zip(answer.boxes, expected, strict=True):
            centre, size = outputs.boxes[-1, i, q].float().view(2, 2)
            corners = torch.cat((centre - size / 2, centre + size / 2)) * torch.tensor(scale * 2)
            corners = corners.clamp(min=0).minimum(torch.tensor(limit * 2))
            torch.testing.assert_close(box, corners)


def test_equal_scores_keep_the_order_of_queries(features):
    head = DeformableDetrHead(LEVELS, 5, max_detections=12, **SMALL).double()
    outputs = head(features)
    outputs.logits = torch.zeros_like(outputs.logits)
    (answer, _) = head.predict(outputs, [Frame(CANVAS, CANVAS, CANVAS)] * 2)
    assert answer.labels.tolist() == [0, 1, 2, 3, 4] * 2 + [0, 1]


def test_suppression_drops_the_lesser_of_two_boxes_of_a_class_alone(features):
    head = DeformableDetrHead(LEVELS, 2, nms=0.5, max_detections=3, **SMALL).double()
    outputs = head(features)
    outputs.logits = torch.full_like(outputs.logits[..., :2], -9.0)
    outputs.boxes[-1, :, :] = torch.tensor([0.5, 0.5, 0.4, 0.4])  # every query at one place
    outputs.boxes[-1, :, 3] = torch.tensor([0.2, 0.2, 0.1, 0.1])  # but one
    outputs.logits[-1, :, 0, 0], outputs.logits[-1, :, 1, 0] = 3.0, 2.0
    outputs.logits[-1, :, 2, 1], outputs.logits[-1, :, 3, 0] = 1.0, 0.0
    for answer in head.predict(outputs, [Frame(CANVAS, CANVAS, CANVAS)] * 2):
        assert answer.labels.tolist() == [0, 1, 0]
        expected = torch.tensor([3.0, 1.0, 0.0]).sigmoid()
        torch.testing.assert_close(answer.scores, expected)


def test_uses_the_costs_and_constants_of_the_paper():
    head = DeformableDetrHead(LEVELS, 5, **SMALL)
    matcher = head.criterion.matcher
    assert (matcher.class_weight, matcher.box_weight, matcher.giou_weight) == (2, 5, 2)
    assert head.criterion.weights == {"class": 2, "box": 5, "giou": 2}
    for predictor in [*head.decoder.predictors, head.first_stage.predictor]:
        torch.testing.assert_close(
            predictor.classes.bias.sigmoid(), torch.full_like(predictor.classes.bias, 0.01)
        )
