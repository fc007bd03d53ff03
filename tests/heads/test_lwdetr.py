"""`lwdetr` equals transformers' LW-DETR and RF-DETR on the same maps, in training too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LwDetrConfig,
    LwDetrForObjectDetection,
    LwDetrViTConfig,
    RfDetrConfig,
    RfDetrForObjectDetection,
)
from transformers.models.lw_detr import modeling_lw_detr
from transformers.models.rf_detr import modeling_rf_detr

from vitdense.convert.lwdetr import HEAD
from vitdense.convert.names import rename
from vitdense.heads.detection.lwdetr import LwDetrHead
from vitdense.layers.position import box_embedding
from vitdense.ops.boxes import xyxy_to_relative
from vitdense.structures import Frame, Level, Target
from vitdense.testing import check_head

CLASSES, GROUPS, QUERIES, WIDTH = 5, 3, 10, 32
CANVAS = (64, 96)
LEVELS = [Level(WIDTH, 8), Level(WIDTH, 16)]
SMALL = dict(
    width=WIDTH, heads=4, cross_heads=8, ffn=48, decoder_layers=3, queries=QUERIES, groups=GROUPS
)


def convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return rename(weights, HEAD)


class FixedFeatures(nn.Module):
    """Stands where transformers has backbone and projector, so that both read the same maps."""

    def __init__(self, features: list[Tensor], single: bool) -> None:
        super().__init__()
        self.features, self.single = features, single

    def forward(self, images, mask):
        found = [(x, torch.ones(len(x), *x.shape[-2:], dtype=torch.bool)) for x in self.features]
        return found[0] if self.single else found


def reference(kind: str, features: list[Tensor], **changes) -> nn.Module:
    vit = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, out_indices=[1, 2])
    sizes = dict(
        d_model=WIDTH, decoder_self_attention_heads=4, decoder_cross_attention_heads=8,
        decoder_n_points=2, decoder_ffn_dim=48, decoder_layers=3, num_queries=QUERIES,
        group_detr=GROUPS, num_labels=CLASSES, dropout=0.0,
    ) | changes  # fmt: skip
    if kind == "lw_detr":
        model = LwDetrForObjectDetection(
            LwDetrConfig(
                backbone_config=LwDetrViTConfig(**vit), projector_scale_factors=[2.0, 1.0], **sizes
            )
        )
    else:
        vit["model_type"] = "rf_detr_dinov2"
        model = RfDetrForObjectDetection(RfDetrConfig(backbone_config=vit, **sizes))
    model.model.backbone = FixedFeatures(features, kind == "rf_detr")
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model.to(features[0].dtype)


def make_targets(*counts: int, dtype: torch.dtype = torch.float32) -> list[Target]:
    targets = []
    for count in counts:
        start = torch.rand(count, 2, dtype=dtype) * torch.tensor([60.0, 40.0])
        boxes = torch.cat((start, start + 4 + torch.rand(count, 2) * 20), 1)
        targets.append(Target(labels=torch.randint(CLASSES, (count,)), boxes=boxes))
    return targets


def to_labels(targets: list[Target]) -> list[dict[str, Tensor]]:
    return [{"class_labels": t.labels, "boxes": xyxy_to_relative(t.boxes, CANVAS)} for t in targets]


def embed_exactly(boxes: Tensor, num_pos_feats: int) -> Tensor:
    return box_embedding(boxes[..., [1, 0, 2, 3]], num_pos_feats)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def features(request, monkeypatch):
    if request.param == torch.float64:
        # transformers takes the frequencies in float32 whatever the model's type
        for module in (modeling_lw_detr, modeling_rf_detr):
            monkeypatch.setattr(module, "encode_sinusoidal_position_embedding", embed_exactly)
    torch.manual_seed(0)
    return [torch.randn(2, WIDTH, *size).to(request.param) for size in ((8, 12), (4, 6))]


@pytest.fixture(params=["lw_detr", "rf_detr"])
def pair(request, features):
    count = 2 if request.param == "lw_detr" else 1
    theirs = reference(request.param, features)
    ours = LwDetrHead(LEVELS[:count], CLASSES, **SMALL).to(features[0].dtype)
    ours.load_state_dict(convert(theirs.state_dict()))
    return ours, theirs


def tolerance(features: list[Tensor]) -> dict[str, float]:
    return dict(atol=1e-4 if features[0].dtype == torch.float32 else 1e-8, rtol=0)


@pytest.mark.parametrize("training", [False, True])
def test_outputs_of_all_layers_and_groups_equal_transformers(pair, features, training, monkeypatch):
    ours, theirs = (model.train(training) for model in pair)
    caught = {}

    def catch(logits, labels, device, boxes, config, all_logits, all_boxes, *encoder):
        caught.update(logits=all_logits, boxes=all_boxes)
        return None, None, None

    monkeypatch.setattr(type(theirs), "loss_function", staticmethod(catch))
    with torch.no_grad():
        outputs = ours(features)
        expected = theirs(torch.zeros(2, 3, *CANVAS).to(features[0]), labels=[])
    groups = GROUPS if training else 1
    close = tolerance(features)
    assert outputs.groups == groups and outputs.logits.shape[2] == groups * QUERIES
    torch.testing.assert_close(outputs.logits, caught["logits"], **close)
    torch.testing.assert_close(outputs.boxes, caught["boxes"], **close)
    torch.testing.assert_close(outputs.logits[-1], expected.logits, **close)
    encoder = outputs.others["_encoder"]
    torch.testing.assert_close(encoder.logits[0], expected.enc_outputs_class, **close)
    torch.testing.assert_close(encoder.boxes[0], expected.enc_outputs_coord_logits, **close)


TERMS = {"class": ("loss_ce", 1), "box": ("loss_bbox", 5), "giou": ("loss_giou", 2)}


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (1, 0)])
@pytest.mark.parametrize("training", [False, True])
def test_losses_and_gradients_equal_transformers(pair, features, counts, training):
    ours, theirs = (model.train(training) for model in pair)
    if not training:
        # transformers' criterion always believes to be in training and splits the one group there
        theirs.config.group_detr = 1
    dtype = features[0].dtype
    targets = make_targets(*counts, dtype=dtype)
    losses = ours.loss(ours(features, targets), targets)
    images = torch.zeros(2, 3, *CANVAS, dtype=dtype)
    expected = theirs(images, labels=to_labels(targets))
    terms = expected.loss_dict
    close = dict(atol=1e-8, rtol=1e-8) if dtype == torch.float64 else dict(atol=1e-4, rtol=1e-4)
    for name, (key, weight) in TERMS.items():
        torch.testing.assert_close(losses[name], weight * terms[key], **close)
        earlier = weight * (terms[key + "_0"] + terms[key + "_1"])
        torch.testing.assert_close(losses[name + "_aux"], earlier, **close)
        torch.testing.assert_close(losses[name + "_encoder"], weight * terms[key + "_enc"], **close)
    total = torch.stack(list(losses.values())).sum()
    torch.testing.assert_close(total, expected.loss, **close)
    total.backward()
    expected.loss.backward()
    gradients = dict(ours.named_parameters())
    for name, parameter in convert(dict(theirs.named_parameters())).items():
        if parameter.grad is not None:
            torch.testing.assert_close(
                gradients[name].grad, parameter.grad, **close, msg=f"the gradient of {name}"
            )


def test_losses_without_truth_are_transformers_over_the_groups(pair, features):
    # transformers divides by at least 1, then sums over the groups; we take their mean
    ours, theirs = (model.train() for model in pair)
    targets = make_targets(0, 0, dtype=features[0].dtype)
    losses = ours.loss(ours(features, targets), targets)
    terms = theirs(torch.zeros(2, 3, *CANVAS).to(features[0]), labels=to_labels(targets)).loss_dict
    torch.testing.assert_close(losses["class"], terms["loss_ce"] / GROUPS)
    torch.testing.assert_close(losses["class_encoder"], terms["loss_ce_enc"] / GROUPS)
    assert losses["box"] == losses["giou"] == terms["loss_bbox"] == 0


def test_saturated_logits_stay_finite_where_transformers_are_not(pair, features):
    ours, theirs = (model.eval() for model in pair)
    targets = make_targets(2, 1, dtype=features[0].dtype)
    theirs.config.group_detr = 1
    with torch.no_grad():
        for head in (ours.decoder.predictors[0].classes, theirs.class_embed):
            head.bias.fill_(1000.0)
        losses = ours.loss(ours(features), targets)
        loss = theirs(torch.zeros(2, 3, *CANVAS).to(features[0]), labels=to_labels(targets)).loss
    assert all(term.isfinite() for term in losses.values())
    assert not loss.isfinite()


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return [torch.randn(2, WIDTH, *size) for size in ((8, 12), (4, 6))]


def make_head(levels: list[Level] = LEVELS, **changes) -> LwDetrHead:
    head = LwDetrHead(levels, CLASSES, **(SMALL | changes))
    torch.manual_seed(2)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.15)
    return head


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(box_refinement=True, class_loss="focal"),
        dict(aux_loss=False),
        dict(groups=1, dropout=0.1),
    ],
)
def test_conforms(options):
    check_head(LwDetrHead, **(SMALL | options))


def test_groups_neither_see_nor_change_each_other(maps):
    head = make_head()
    with torch.no_grad():
        every, single = head.train()(maps), head.eval()(maps)
        torch.testing.assert_close(every.logits[:, :, :QUERIES], single.logits)
        torch.testing.assert_close(every.boxes[:, :, :QUERIES], single.boxes)
        head.queries.weight[:QUERIES] += 1.0
        other = head.train()(maps).logits
    torch.testing.assert_close(other[:, :, QUERIES:], every.logits[:, :, QUERIES:])
    assert not torch.allclose(other[:, :, :QUERIES], every.logits[:, :, :QUERIES], atol=1e-3)


def test_the_first_group_answers_in_training_too(maps):
    head = make_head()
    frames = [Frame(CANVAS, CANVAS, CANVAS)] * 2
    with torch.no_grad():
        answers = [head.train(mode).predict(head(maps), frames) for mode in (True, False)]
    for training, evaluation in zip(*answers, strict=True):
        assert len(training.scores) == QUERIES * CLASSES
        torch.testing.assert_close(training.scores, evaluation.scores)
        torch.testing.assert_close(training.boxes, evaluation.boxes)


def test_fewer_cells_than_queries_become_fewer_queries_of_each_group(maps):
    head = make_head(queries=500)
    cells = 8 * 12 + 4 * 6
    outputs = head.train()(maps)
    assert outputs.logits.shape == (3, 2, GROUPS * cells, CLASSES)
    torch.testing.assert_close(outputs.logits[:, :, :cells], head.eval()(maps).logits)


def test_cells_near_the_border_are_chosen_last():
    head = make_head([Level(WIDTH, 8)], queries=60)
    anchors = head.eval()([torch.randn(1, WIDTH, 1, 64)]).others["_encoder"].boxes[0, 0]
    near = anchors.eq(0).all(-1)  # the outermost of 64 cells lie at less than 0.01
    assert not near.any()
    head = make_head([Level(WIDTH, 8)], queries=64)
    boxes = head.eval()([torch.randn(1, WIDTH, 1, 64)]).others["_encoder"].boxes[0, 0]
    assert boxes.eq(0).all(-1).nonzero().flatten().tolist() == [62, 63]


def test_other_widths_are_projected_and_few_levels_chosen(maps):
    levels = [Level(8, 4), Level(WIDTH, 8), Level(20, 16)]
    head = make_head(levels)
    assert head.input_levels == [1, 2] and isinstance(head.inputs[0], nn.Identity)
    features = [torch.randn(2, 8, 16, 24), maps[0], torch.randn(2, 20, 4, 6)]
    assert head.eval()(features).logits.shape == (3, 2, QUERIES, CLASSES)
    assert make_head(levels, input_levels=[0]).input_levels == [0]


def test_only_refinement_moves_the_references(maps):
    boxes = [make_head(box_refinement=on).eval()(maps).boxes for on in (False, True)]
    torch.testing.assert_close(boxes[0][0], boxes[1][0])
    assert not torch.allclose(boxes[0][1], boxes[1][1])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(input_levels=[0, 3]), "input_levels: must be rising numbers below 2"),
        (dict(heads=5), "heads: 5 does not divide the width 32"),
        (dict(cross_heads=5), "heads: 5 does not divide the width 32"),
        (dict(width=30, heads=3), "width: must be a multiple of 4"),
        (dict(box_refinement=True, aux_loss=False), "aux_loss: box_refinement trains"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LwDetrHead(LEVELS, CLASSES, **(SMALL | options))


def test_uses_the_constants_of_the_paper():
    head = LwDetrHead(LEVELS, CLASSES, **SMALL)
    matcher = head.criterion.matcher
    assert (matcher.class_weight, matcher.box_weight, matcher.giou_weight) == (2, 5, 2)
    assert head.criterion.weights == {"class": 1, "box": 5, "giou": 2}
    assert not head.offsets.weight.any()
    for predictor in [*head.decoder.predictors, *(s.predictor for s in head.first_stages)]:
        assert not predictor.boxes.layers[-1].weight.any()
        torch.testing.assert_close(
            predictor.classes.bias.sigmoid(), torch.full_like(predictor.classes.bias, 0.01)
        )
