"""`detr` with conditional and with DAB queries equals transformers' models, and learns."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    DabDetrConfig,
    DabDetrForObjectDetection,
    ResNetConfig,
)
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss

from vitdense.convert.conditional_detr import CONDITIONAL, DAB
from vitdense.convert.names import rename
from vitdense.heads.detection.detr import DetrHead
from vitdense.ops.boxes import xyxy_to_relative
from vitdense.structures import Frame, Level
from vitdense.testing import check_head

LEVELS = [Level(8, 8), Level(12, 16)]
CANVAS = (64, 96)
KINDS = ["conditional", "dab"]
SMALL = dict(width=32, heads=4, ffn=48, encoder_layers=2, decoder_layers=3, queries=12)


def convert(weights: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """transformers' names -> ours, without the backbone."""
    head = {name: value for name, value in weights.items() if "backbone" not in name}
    return rename(head, {"conditional": CONDITIONAL, "dab": DAB}[kind])


class FixedFeatures(nn.Module):
    """Stands where transformers has its backbone, so that both heads read the same map."""

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__()
        self.features = features

    def forward(self, images, mask):
        ones = torch.ones(len(images), *self.features.shape[-2:], dtype=torch.bool)
        return [(self.features, ones)]


def reference(kind: str, features: torch.Tensor) -> nn.Module:
    backbone = ResNetConfig(hidden_sizes=[8, 8, 8, 12], depths=[1] * 4, out_features=["stage4"])
    config = dict(
        backbone_config=backbone,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_queries=12,
        num_labels=5,
    )
    if kind == "dab":
        model = DabDetrForObjectDetection(DabDetrConfig(**config, hidden_size=32))
        model.model.backbone.conv_encoder = FixedFeatures(features)
    else:
        model = ConditionalDetrForObjectDetection(ConditionalDetrConfig(**config, d_model=32))
        model.model.backbone = FixedFeatures(features)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


@pytest.fixture
def features(monkeypatch):
    torch.manual_seed(0)
    # transformers embeds places, makes queries and takes softmax in float32, whatever the type of
    # the model: here that is double as well, so that equal means equal
    monkeypatch.setattr(torch, "float32", torch.float64)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield [torch.randn(2, 8, 8, 12), torch.randn(2, 12, 4, 6)]
    torch.set_default_dtype(before)


@pytest.fixture(params=KINDS)
def pair(request, features):
    theirs = reference(request.param, features[1])
    ours = DetrHead(LEVELS, 5, query_kind=request.param, **SMALL).double().eval()
    ours.load_state_dict(convert(theirs.state_dict(), request.param))
    return ours, theirs


def test_outputs_equal_transformers(pair, features):
    ours, theirs = pair
    with torch.no_grad():
        outputs = ours(features)
        expected = theirs(torch.zeros(2, 3, *CANVAS))
    torch.testing.assert_close(outputs.logits[-1], expected.logits, atol=1e-10, rtol=0)
    torch.testing.assert_close(outputs.boxes[-1], expected.pred_boxes, atol=1e-10, rtol=0)
    assert outputs.canvas == CANVAS


@pytest.mark.parametrize("layers", [1, 2])
def test_earlier_layers_equal_a_shorter_decoder(pair, features, layers):
    # with auxiliary_loss transformers' Conditional DETR is another network, as its DETR: it feeds
    # the normalised output of each layer to the next
    ours, theirs = pair
    decoder = theirs.model.decoder
    decoder.layers, decoder.num_layers = decoder.layers[:layers], layers
    with torch.no_grad():
        outputs = ours(features)
        expected = theirs(torch.zeros(2, 3, *CANVAS))
    torch.testing.assert_close(outputs.logits[layers - 1], expected.logits, atol=1e-10, rtol=0)
    torch.testing.assert_close(outputs.boxes[layers - 1], expected.pred_boxes, atol=1e-10, rtol=0)


@pytest.mark.parametrize("pair", ["dab"], indirect=True)
def test_auxiliary_outputs_and_gradients_equal_transformers(pair, features, monkeypatch):
    ours, theirs = pair
    caught = {}

    def catch(logits, labels, device, boxes, config, all_logits, all_boxes):
        caught.update(logits=all_logits, boxes=all_boxes)
        return None, None, None

    monkeypatch.setattr(type(theirs), "loss_function", staticmethod(catch))
    theirs.config.auxiliary_loss = True
    outputs = ours(features)
    theirs(torch.zeros(2, 3, *CANVAS), labels=[])
    torch.testing.assert_close(outputs.logits, caught["logits"], atol=1e-10, rtol=0)
    torch.testing.assert_close(outputs.boxes, caught["boxes"], atol=1e-10, rtol=0)
    # which boxes train which layers does not show in the outputs
    weights = torch.rand_like(outputs.boxes)
    (outputs.boxes * weights).sum().backward()
    (caught["boxes"] * weights).sum().backward()
    assert_equal_gradients(ours, theirs)


def test_gradients_of_the_last_layer_equal_transformers(pair, features):
    ours, theirs = pair
    outputs, expected = ours(features), theirs(torch.zeros(2, 3, *CANVAS))
    weights = torch.rand_like(expected.pred_boxes)
    ((outputs.boxes[-1] * weights).sum() + outputs.logits[-1].square().sum()).backward()
    ((expected.pred_boxes * weights).sum() + expected.logits.square().sum()).backward()
    assert_equal_gradients(ours, theirs)


def assert_equal_gradients(ours: DetrHead, theirs: nn.Module) -> None:
    shared = theirs.named_parameters(remove_duplicate=False)
    expected = convert({k: p.grad for k, p in shared if p.grad is not None}, ours.query_kind)
    gradients = {k: p.grad for k, p in ours.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_equal_transformers_in_float32(kind):
    torch.manual_seed(0)
    features = [torch.randn(2, 8, 8, 12), torch.randn(2, 12, 4, 6)]
    theirs = reference(kind, features[1]).float()
    ours = DetrHead(LEVELS, 5, query_kind=kind, **SMALL).eval()
    ours.load_state_dict(convert(theirs.state_dict(), kind))
    with torch.no_grad():
        outputs, expected = ours(features), theirs(torch.zeros(2, 3, *CANVAS))
    torch.testing.assert_close(outputs.logits[-1], expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(outputs.boxes[-1], expected.pred_boxes, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (0, 0)])
def test_losses_equal_transformers(kind, counts, make_targets):
    torch.manual_seed(0)
    features = [torch.randn(2, 8, 8, 12), torch.randn(2, 12, 4, 6)]
    config = reference(kind, features[1]).config
    config.auxiliary_loss = True
    head = DetrHead(LEVELS, 5, query_kind=kind, **SMALL).eval()
    nn.init.normal_(head.boxes.layers[-1].weight, std=0.5)  # boxes that differ
    outputs, targets = head(features), make_targets(*counts)
    losses = head.loss(outputs, targets)
    labels = [
        {"class_labels": t.labels, "boxes": xyxy_to_relative(t.boxes, CANVAS)} for t in targets
    ]
    logits, boxes = outputs.logits, outputs.boxes
    _, terms, _ = DeformableDetrForObjectDetectionLoss(
        logits[-1], labels, "cpu", boxes[-1], config, logits, boxes
    )
    # transformers leaves the class loss of both unweighted; the authors of Conditional DETR
    # weigh it 2, those of DAB-DETR 1
    weight = {"conditional": 2, "dab": 1}[kind]
    names = {"class": ("loss_ce", weight), "box": ("loss_bbox", 5), "giou": ("loss_giou", 2)}
    for ours_name, (name, weight) in names.items():
        torch.testing.assert_close(losses[ours_name], weight * terms[name], atol=1e-5, rtol=1e-5)
        earlier = weight * (terms[name + "_0"] + terms[name + "_1"])
        torch.testing.assert_close(losses[ours_name + "_aux"], earlier, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_conforms(kind):
    check_head(DetrHead, query_kind=kind, **SMALL)
    check_head(DetrHead, query_kind=kind, **SMALL | dict(encoder_layers=0, decoder_layers=1))


def test_last_layer_alone():
    check_head(DetrHead, query_kind="conditional", aux_loss=False, **SMALL)
    with pytest.raises(ValueError, match="aux_loss: dab queries"):
        DetrHead(LEVELS, 5, query_kind="dab", aux_loss=False, **SMALL)


def test_wrong_kind_is_named():
    with pytest.raises(ValueError, match="query_kind: is 'anchor'"):
        DetrHead(LEVELS, 5, query_kind="anchor", **SMALL)


@pytest.mark.parametrize("kind", KINDS)
def test_uses_the_costs_of_the_paper(kind):
    criterion = DetrHead(LEVELS, 5, query_kind=kind, **SMALL).criterion
    matcher = criterion.matcher
    assert (matcher.class_weight, matcher.box_weight, matcher.giou_weight) == (2, 5, 2)
    assert criterion.weights == {"class": 1 if kind == "dab" else 2, "box": 5, "giou": 2}


@pytest.mark.parametrize("kind", KINDS)
def test_begins_unsure_and_at_its_references(kind):
    torch.manual_seed(0)
    head = DetrHead(LEVELS, 5, query_kind=kind, **SMALL).eval()
    outputs = head([torch.randn(2, 8, 8, 12), torch.randn(2, 12, 4, 6)])
    torch.testing.assert_close(
        head.classes.bias.sigmoid(), torch.full((5,), 0.01), atol=1e-6, rtol=0
    )
    expected = head.queries.references().sigmoid().expand_as(outputs.boxes)
    torch.testing.assert_close(outputs.boxes, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_query_answers_for_every_class(kind):
    torch.manual_seed(0)
    head = DetrHead(LEVELS, 5, query_kind=kind, **SMALL).eval()
    outputs = head([torch.randn(2, 8, 8, 12), torch.randn(2, 12, 4, 6)])
    answers = head.predict(outputs, [Frame(CANVAS, CANVAS, CANVAS)] * 2)
    for answer, logits in zip(answers, outputs.logits[-1], strict=True):
        assert len(answer.scores) == 12 * 5
        expected = logits.sigmoid().flatten().sort(descending=True).values
        torch.testing.assert_close(answer.scores, expected)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, None])
@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_references_stay_finite(kind, precision, make_targets):
    torch.manual_seed(0)
    features = [torch.randn(2, 8, 8, 12), torch.randn(2, 12, 4, 6)]
    head = DetrHead(LEVELS, 5, query_kind=kind, **SMALL)
    with torch.no_grad():
        head.queries.weight.copy_(torch.tensor([-300.0, 300]).repeat(6)[:, None])
        for parameter in head.boxes.layers[-1].parameters():
            parameter.normal_(std=5)
    with torch.autocast("cpu", precision, enabled=precision is not None):
        outputs = head(features)
    losses = head.loss(outputs, make_targets(3, 0))
    sum(losses.values()).backward()
    assert all(term.isfinite() for term in losses.values())
    assert all(p.grad.isfinite().all() for p in head.parameters())
