"""`rtdetr` equals transformers' RT-DETR and RT-DETRv2 on converted weights, and learns."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
)

from vitdense.convert import rename
from vitdense.convert.rtdetr import head_rules
from vitdense.heads.detection.rtdetr import RTDetrHead
from vitdense.ops.boxes import xyxy_to_relative
from vitdense.structures import Level
from vitdense.testing import check_head

LEVELS = [Level(6, 4), Level(8, 8), Level(12, 16), Level(16, 32)]
CANVAS = (64, 96)
SMALL = dict(
    width=32, heads=4, encoder_width=16, encoder_ffn=24, ffn=48, decoder_layers=3, queries=10,
    points=3, denoising=12, norm="batch", class_loss="varifocal",
)  # fmt: skip
KINDS = {
    "rt_detr": (RTDetrConfig, RTDetrForObjectDetection),
    "rt_detr_v2": (RTDetrV2Config, RTDetrV2ForObjectDetection),
}


class FixedFeatures(nn.Module):
    """Stands where transformers has its backbone, so that both heads read the same maps."""

    def __init__(self, features):
        super().__init__()
        self.features = features

    def forward(self, images, mask):
        return [(x, torch.ones(len(x), *x.shape[-2:], dtype=torch.bool)) for x in self.features]


def randomize(module):
    """Random weights and running statistics; variances stay positive."""
    for name, value in module.state_dict().items():
        if name.endswith("running_var"):
            nn.init.uniform_(value, 0.5, 1.5)
        elif value.is_floating_point() and "points_scale" not in name:
            nn.init.normal_(value, std=0.2)
    for layer in module.model.decoder.layers:  # points stay near their boxes
        layer.encoder_attn.sampling_offsets.weight.data *= 0.3


def reference(kind, features, **changes):
    config, model = KINDS[kind]
    backbone = RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 12, 16], depths=[1] * 4, layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    options = dict(
        backbone_config=backbone, d_model=32, encoder_hidden_dim=16, encoder_ffn_dim=24,
        encoder_in_channels=[8, 12, 16], decoder_in_channels=[16] * 3, decoder_ffn_dim=48,
        encoder_attention_heads=4, decoder_attention_heads=4, decoder_layers=3, num_queries=10,
        decoder_n_points=3, num_denoising=12, num_labels=5, tie_word_embeddings=False,
        attn_implementation="eager",
    )  # fmt: skip
    theirs = model(config(**options | changes))
    theirs.model.backbone = FixedFeatures(features[1:])
    randomize(theirs)
    return theirs.double().eval()


def make_features(batch=2):
    torch.manual_seed(0)
    return [
        torch.randn(batch, level.channels, CANVAS[0] // level.stride, CANVAS[1] // level.stride)
        for level in LEVELS
    ]


@pytest.fixture
def features():
    return [x.double() for x in make_features()]


def head_like(theirs, **options):
    """Ours with the weights of theirs."""
    ours = RTDetrHead(LEVELS, 5, **(SMALL | options)).double().eval()
    # RT-DETRv2 has unused copies of the predictors beside its `model`
    state = theirs.model.state_dict()
    kept = {k: v for k, v in state.items() if "n_points_scale" not in k}
    ours.load_state_dict(rename(kept, head_rules(fine=False)))
    return ours


CASES = [
    ("rt_detr", {}, {}),
    ("rt_detr_v2", {}, {}),
    ("rt_detr_v2", dict(decoder_offset_scale=0.3), dict(offset_scale=0.3)),
    ("rt_detr_v2", dict(num_denoising=0), dict(denoising=0)),
    ("rt_detr_v2", dict(hidden_expansion=0.5, encoder_layers=2),
     dict(expansion=0.5, encoder_layers=2)),
]  # fmt: skip


@pytest.fixture(params=CASES, ids=str)
def pair(request, features):
    kind, changes, options = request.param
    theirs = reference(kind, features, **changes)
    return head_like(theirs, **options), theirs


def run(theirs, labels=None):
    return theirs(torch.zeros(2, 3, *CANVAS).double(), labels=labels)


def test_outputs_of_all_layers_equal_transformers(pair, features):
    ours, theirs = pair
    with torch.no_grad():
        outputs, expected = ours(features), run(theirs)
    torch.testing.assert_close(
        outputs.logits.transpose(0, 1), expected.intermediate_logits, atol=1e-8, rtol=0
    )
    torch.testing.assert_close(
        outputs.boxes.transpose(0, 1), expected.intermediate_reference_points, atol=1e-8, rtol=0
    )
    encoder = outputs.others["_encoder"]
    torch.testing.assert_close(encoder.logits[0], expected.enc_topk_logits, atol=1e-8, rtol=0)
    torch.testing.assert_close(encoder.boxes[0], expected.enc_topk_bboxes, atol=1e-8, rtol=0)


def test_outputs_equal_transformers_in_single_precision(features):
    theirs = reference("rt_detr_v2", features)
    ours = head_like(theirs).float()
    theirs.float().model.backbone = FixedFeatures([x.float() for x in features[1:]])
    with torch.no_grad():
        outputs = ours([x.float() for x in features])
        expected = theirs(torch.zeros(2, 3, *CANVAS))
    torch.testing.assert_close(outputs.logits[-1], expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(outputs.boxes[-1], expected.pred_boxes, atol=1e-4, rtol=0)


def as_labels(targets):
    return [
        {"class_labels": t.labels, "boxes": xyxy_to_relative(t.boxes.double(), CANVAS)}
        for t in targets
    ]


NAMES = {"class": "loss_vfl", "box": "loss_bbox", "giou": "loss_giou"}


def expected_terms(terms, layers=3):
    """transformers' terms under our names; it counts the proposals among the earlier layers."""
    expected = {}
    for ours, theirs in NAMES.items():
        expected[ours] = terms[theirs]
        expected[f"{ours}_aux"] = sum(terms[f"{theirs}_aux_{i}"] for i in range(layers - 1))
        expected[f"{ours}_encoder"] = terms[f"{theirs}_aux_{layers - 1}"]
        if f"{theirs}_dn_0" in terms:
            noisy = [terms[f"{theirs}_dn_{i}"] for i in range(layers)]
            expected[f"{ours}_denoising"] = noisy[-1]
            expected[f"{ours}_denoising_aux"] = sum(noisy[:-1])
    return expected


@pytest.fixture
def double():
    """New tensors are double, so that both draw the same noise."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (14, 1)])
def test_losses_and_gradients_equal_transformers(pair, features, counts, double, make_targets):
    ours, theirs = (model.train() for model in pair)
    # transformers cuts the graph between layers where the authors look forward twice
    ours.decoder.look_twice = False
    targets = make_targets(*counts)
    torch.manual_seed(1)
    losses = ours.loss(ours(features, targets), targets)
    torch.manual_seed(1)
    expected = run(theirs, as_labels(targets))
    terms = expected_terms(expected.loss_dict)
    assert set(losses) == set(terms)
    for name, term in terms.items():
        torch.testing.assert_close(losses[name], term, atol=1e-8, rtol=1e-6, msg=name)
    torch.testing.assert_close(sum(losses.values()), expected.loss, atol=1e-7, rtol=1e-6)
    sum(losses.values()).backward()
    expected.loss.backward()
    gradients = rename(
        {k: p.grad for k, p in theirs.named_parameters() if p.grad is not None},
        head_rules(fine=False),
    )
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert set(found) == set(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_losses_in_evaluation_have_no_denoising(features, make_targets):
    theirs = reference("rt_detr", features)
    ours = head_like(theirs)
    targets = make_targets(2, 3)
    losses = ours.loss(ours(features, targets), targets)
    terms = expected_terms(run(theirs, as_labels(targets)).loss_dict)
    assert set(losses) == set(terms)
    for name, term in terms.items():
        torch.testing.assert_close(losses[name], term, atol=1e-8, rtol=1e-6)


def test_looking_twice_changes_gradients_and_not_losses(features, make_targets):
    head = head_like(reference("rt_detr", features))
    targets = make_targets(3, 2)
    results = []
    for head.decoder.look_twice in (True, False):
        losses = head.loss(head(features, targets), targets)
        (gradient,) = torch.autograd.grad(
            losses["box"], head.decoder.predictors[1].boxes.layers[0].weight, allow_unused=True
        )
        results.append((losses["box"], gradient))
    (twice, reached), (once, cut) = results
    torch.testing.assert_close(twice, once)
    assert reached is not None and not torch.equal(reached, cut)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(norm="group", class_loss="matchability", points=[2, 1, 3]),
        dict(num_levels=1, encoder_width=None, project_memory=False, class_loss="focal"),
        dict(num_levels=5, attended_levels=[3, 4], learned_content=True, fusion="elan"),
        dict(encoder_layers=0, denoising=0, norm="layer"),
        dict(two_stage=False, box_refinement=False),
    ],
)
def test_conforms(options):
    check_head(RTDetrHead, **(SMALL | options))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_reads_any_number_of_levels_and_makes_the_missing_ones(features, count):
    head = RTDetrHead(LEVELS[-count:], 5, **(SMALL | dict(num_levels=4))).double().eval()
    assert len(head.inputs) == 4 and head.encoder.attended == [3]
    outputs = head(features[-count:])
    assert outputs.logits.shape == (3, 2, 10, 5) and outputs.canvas == CANVAS


def test_fewer_cells_than_queries_become_fewer_queries(features, make_targets):
    head = RTDetrHead(LEVELS, 5, **(SMALL | dict(queries=500, learned_content=True))).double()
    cells = 8 * 12 + 4 * 6 + 2 * 3
    targets = make_targets(1, 2)
    outputs = head(features, targets)
    assert outputs.logits.shape == (3, 2, cells, 5)
    assert outputs.others["_denoising"].logits.shape == (3, 2, 24, 5)


def test_only_chosen_cells_train_the_first_stage(features):
    head = head_like(reference("rt_detr", features))
    encoder = head(features).others["_encoder"]
    assert encoder.logits.shape == (1, 2, 10, 5)
    (gradient,) = torch.autograd.grad(encoder.logits.sum(), head.first_stage.predictor.classes.bias)
    assert gradient.tolist() == [20.0] * 5


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(encoder_width=18, heads=2), "encoder_width: must be a multiple of 4"),
        (dict(project_memory=False), "project_memory: is needed from 16 channels to width 32"),
        (dict(attended_levels=[3]), "attended_levels: must be among the 3 num_levels"),
        (dict(input_levels=[0, 1, 2, 3]), "num_levels: must be at least the 4 input_levels"),
        (dict(points=[1, 2]), r"points: \[1, 2\] must be one number or 3"),
        (dict(heads=3), "heads: 3 does not divide the width"),
        (dict(distribution=True, box_refinement=False), "distribution: is what layers refine"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        RTDetrHead(LEVELS, 5, **(SMALL | options))


def test_strides_of_the_levels_must_be_multiples():
    with pytest.raises(ValueError, match="input_levels: strides"):
        RTDetrHead([Level(8, 8), Level(8, 12)], 5, **SMALL)
