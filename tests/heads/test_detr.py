"""`detr` equals transformers' DETR on converted weights, and learns."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

from vitdense.convert.detr import NAMES
from vitdense.convert.names import rename
from vitdense.heads.detection.detr import DetrHead
from vitdense.losses.set_criterion import SetCriterion
from vitdense.ops.boxes import xyxy_to_relative
from vitdense.structures import Frame, Level
from vitdense.testing import check_head

LEVELS = [Level(8, 8), Level(12, 16)]
CANVAS = (64, 96)
SMALL = dict(width=32, heads=4, ffn=48, encoder_layers=2, decoder_layers=3, queries=12)


def convert(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' names -> ours, without the backbone."""
    return rename({name: x for name, x in weights.items() if "backbone" not in name}, NAMES)


class FixedFeatures(nn.Module):
    """Stands where transformers has its backbone, so that both heads read the same map."""

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__()
        self.features = features

    def forward(self, images, mask):
        size = self.features.shape[-2:]
        return [(self.features, torch.ones(len(images), *size, dtype=torch.bool))]


def reference(features: torch.Tensor, **changes) -> DetrForObjectDetection:
    backbone = ResNetConfig(hidden_sizes=[8, 8, 8, 12], depths=[1] * 4, out_features=["stage4"])
    config = DetrConfig(
        backbone_config=backbone,
        d_model=32,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_queries=12,
        num_labels=5,
        **changes,
    )
    model = DetrForObjectDetection(config)
    model.model.backbone = FixedFeatures(features)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


@pytest.fixture
def features():
    torch.manual_seed(0)
    return [torch.randn(2, 8, 8, 12).double(), torch.randn(2, 12, 4, 6).double()]


@pytest.fixture
def pair(features):
    theirs = reference(features[1])
    ours = DetrHead(LEVELS, 5, **SMALL).double().eval()
    ours.load_state_dict(convert(theirs.state_dict()))
    return ours, theirs


def test_outputs_equal_transformers(pair, features):
    ours, theirs = pair
    with torch.no_grad():
        outputs = ours(features)
        expected = theirs(torch.zeros(2, 3, *CANVAS).double())
    torch.testing.assert_close(outputs.logits[-1], expected.logits, atol=1e-10, rtol=0)
    torch.testing.assert_close(outputs.boxes[-1], expected.pred_boxes, atol=1e-10, rtol=0)
    assert outputs.canvas == CANVAS


@pytest.mark.parametrize("layers", [1, 2])
def test_earlier_layers_equal_a_shorter_decoder(pair, features, layers):
    # transformers' own intermediate outputs are those of another network: with auxiliary_loss it
    # feeds the normalised output of each layer to the next
    ours, theirs = pair
    theirs.model.decoder.layers = theirs.model.decoder.layers[:layers]
    with torch.no_grad():
        outputs = ours(features)
        expected = theirs(torch.zeros(2, 3, *CANVAS).double())
    torch.testing.assert_close(outputs.logits[layers - 1], expected.logits, atol=1e-10, rtol=0)
    torch.testing.assert_close(outputs.boxes[layers - 1], expected.pred_boxes, atol=1e-10, rtol=0)


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (1, 0)])
def test_losses_equal_transformers(pair, features, counts, make_targets):
    ours, theirs = pair
    # transformers weighs classes in float32 whatever the model's type
    outputs = ours.float()([x.float() for x in features])
    targets = make_targets(*counts)
    losses = ours.loss(outputs, targets)
    labels = [
        {"class_labels": t.labels, "boxes": xyxy_to_relative(t.boxes, CANVAS)} for t in targets
    ]
    theirs.config.auxiliary_loss = True
    logits, boxes = outputs.logits, outputs.boxes
    total, terms, _ = ForObjectDetectionLoss(
        logits[-1], labels, "cpu", boxes[-1], theirs.config, logits, boxes
    )
    names = {"class": ("loss_ce", 1), "box": ("loss_bbox", 5), "giou": ("loss_giou", 2)}
    for ours_name, (name, weight) in names.items():
        torch.testing.assert_close(losses[ours_name], weight * terms[name], atol=1e-5, rtol=1e-5)
        earlier = weight * (terms[name + "_0"] + terms[name + "_1"])
        torch.testing.assert_close(losses[ours_name + "_aux"], earlier, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sum(losses.values()), total, atol=1e-5, rtol=1e-5)


def test_conforms():
    check_head(DetrHead, **SMALL)
    check_head(DetrHead, **(SMALL | dict(level=0, aux_loss=False, encoder_layers=0)))


def test_reads_the_level_it_is_told(features):
    torch.manual_seed(0)
    head = DetrHead(LEVELS, 5, level=0, **SMALL).double().eval()
    before = head(features).logits
    features[1] += 1
    torch.testing.assert_close(head(features).logits, before)
    features[0] += 1
    assert not torch.allclose(head(features).logits, before)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"level": 2}, "level: the pyramid has 2 levels"),
        ({"heads": 5}, "heads: 5 does not divide the width 32"),
        ({"width": 30, "heads": 3}, "width: must be a multiple of 4"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DetrHead(LEVELS, 5, **(SMALL | options))


def test_answers_each_query_once_in_original_pixels(features):
    head = DetrHead(LEVELS, 5, **SMALL).double()
    outputs = head(features)
    frames = [Frame(CANVAS, (64, 80), (128, 160)), Frame(CANVAS, CANVAS, CANVAS)]
    answers = head.predict(outputs, frames)
    probabilities = outputs.logits[-1].softmax(-1)[..., :-1]
    for i, answer in enumerate(answers):
        scores, order = probabilities[i].amax(-1).sort(descending=True)
        torch.testing.assert_close(answer.scores, scores.float())
        torch.testing.assert_close(answer.labels, probabilities[i].argmax(-1)[order])
        assert len(answer.boxes) == 12
    cx, cy, w, h = outputs.boxes[-1][0, probabilities[0].amax(-1).argmax()].tolist()
    box = [(cx - w / 2) * 192, (cy - h / 2) * 128, (cx + w / 2) * 192, (cy + h / 2) * 128]
    expected = torch.tensor(box).clamp(min=0).minimum(torch.tensor([160.0, 128, 160, 128]))
    torch.testing.assert_close(answers[0].boxes[0], expected, atol=1e-3, rtol=1e-4)


def test_uses_the_costs_of_the_paper():
    criterion: SetCriterion = DetrHead(LEVELS, 5, **SMALL).criterion
    matcher = criterion.matcher
    assert (matcher.class_weight, matcher.box_weight, matcher.giou_weight) == (1, 5, 2)
    assert criterion.weights == {"class": 1, "box": 5, "giou": 2}
