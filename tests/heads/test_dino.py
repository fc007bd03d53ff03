"""`dino` equals DINO put together from the layers of transformers' Deformable DETR."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DeformableDetrConfig
from transformers.models.deformable_detr import modeling_deformable_detr as theirs

from vitdense.heads.detection.dino import DinoHead
from vitdense.structures import Level
from vitdense.testing import check_head

LEVELS = [Level(6, 4), Level(8, 8), Level(12, 16)]
CLASSES, WIDTH, LAYERS, QUERIES = 5, 32, 3, 10
SMALL = dict(
    width=WIDTH, heads=4, points=3, ffn=48, encoder_layers=2, decoder_layers=LAYERS,
    queries=QUERIES, num_levels=3, denoising=6,
)  # fmt: skip


def mlp(*widths: int) -> nn.Module:
    return theirs.DeformableDetrMLPPredictionHead(widths[0], widths[1], widths[-1], len(widths) - 1)


class Reference(nn.Module):
    """DINO as in its paper and its authors' code, on layers of transformers' Deformable DETR."""

    def __init__(self) -> None:
        super().__init__()
        config = DeformableDetrConfig(
            d_model=WIDTH,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_n_points=3,
            decoder_n_points=3,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_feature_levels=3,
            dropout=0.0,
            attn_implementation="eager",
        )
        halving = nn.Conv2d(12, WIDTH, 3, stride=2, padding=1)
        convs = [nn.Conv2d(8, WIDTH, 1), nn.Conv2d(12, WIDTH, 1), halving]
        self.input_proj = nn.ModuleList(nn.Sequential(c, nn.GroupNorm(32, WIDTH)) for c in convs)
        self.level_embed = nn.Parameter(torch.empty(3, WIDTH))
        self.encoder = nn.ModuleList(theirs.DeformableDetrEncoderLayer(config) for _ in range(2))
        self.enc_output, self.enc_output_norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.enc_out_class_embed = nn.Linear(WIDTH, CLASSES)
        self.enc_out_bbox_embed = mlp(WIDTH, WIDTH, WIDTH, 4)
        self.tgt_embed = nn.Embedding(QUERIES, WIDTH)
        self.decoder = nn.ModuleList(
            theirs.DeformableDetrDecoderLayer(config) for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.ref_point_head = mlp(2 * WIDTH, WIDTH, WIDTH)
        self.class_embed = nn.ModuleList(nn.Linear(WIDTH, CLASSES) for _ in range(LAYERS))
        self.bbox_embed = nn.ModuleList(mlp(WIDTH, WIDTH, WIDTH, 4) for _ in range(LAYERS))

    def cells(self, features):
        maps = [f(x) for f, x in zip(self.input_proj, [*features[1:], features[-1]], strict=True)]
        shapes = [tuple(x.shape[-2:]) for x in maps]
        return torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1), shapes

    def encode(self, cells, shapes):
        sines = torch.cat([sine(*s) + e for s, e in zip(shapes, self.level_embed, strict=True)])
        centres = torch.cat([grid(*shape) for shape in shapes])
        rest = self.looking(shapes)
        for layer in self.encoder:
            points = centres[None, :, None].expand(len(cells), -1, 3, -1)
            cells = layer(cells, None, sines[None], points, **rest)
        return cells

    def propose(self, memory, shapes):
        """Logits and boxes of the best cells; those at the border propose the corner."""
        anchors = torch.cat(
            [F.pad(grid(*s), (0, 2), value=0.05 * 2**i) for i, s in enumerate(shapes)]
        )
        valid = ((anchors > 0.01) & (anchors < 0.99)).all(-1, keepdim=True)
        logits = torch.log(anchors / (1 - anchors)).masked_fill(~valid, math.inf)
        cells = self.enc_output_norm(self.enc_output(memory * valid))
        scores, boxes = self.enc_out_class_embed(cells), self.enc_out_bbox_embed(cells) + logits
        best = scores.max(-1).values.topk(QUERIES, 1).indices[..., None]
        scores = scores.gather(1, best.expand(-1, -1, CLASSES))
        return scores, boxes.gather(1, best.expand(-1, -1, 4)).sigmoid()

    def decode(self, memory, shapes, references):
        output = self.tgt_embed.weight[None].expand(len(memory), -1, -1)
        outputs, looked_at = [], [references]
        for layer, boxes in zip(self.decoder, self.bbox_embed, strict=True):
            output = layer(
                output,
                self.ref_point_head(sine_of_boxes(references)),
                references[:, :, None].expand(-1, -1, 3, -1),
                encoder_hidden_states=memory,
                **self.looking(shapes),
            )
            # the next layer looks around what the queries before the norm say
            attached = (boxes(output) + inverse_sigmoid(references)).sigmoid()
            references = attached.detach()
            outputs.append(self.norm(output))
            looked_at.append(attached)
        logits = [f(x) for f, x in zip(self.class_embed, outputs, strict=True)]
        boxes = [
            (f(x) + inverse_sigmoid(reference)).sigmoid()
            for f, x, reference in zip(self.bbox_embed, outputs, looked_at[:-1], strict=True)
        ]
        return torch.stack(logits), torch.stack(boxes)

    def forward(self, features):
        cells, shapes = self.cells(features)
        memory = self.encode(cells, shapes)
        scores, proposals = self.propose(memory, shapes)
        return scores, proposals, *self.decode(memory, shapes, proposals.detach())

    def looking(self, shapes):
        return {"spatial_shapes": torch.tensor(shapes), "spatial_shapes_list": shapes}


def inverse_sigmoid(x):
    """That of the authors' code, with its constant."""
    return torch.log(x.clamp(min=1e-3) / (1 - x).clamp(min=1e-3))


def grid(height, width):
    steps = torch.arange(height).double() + 0.5, torch.arange(width).double() + 0.5
    y, x = torch.meshgrid(*steps, indexing="ij")
    return torch.stack((x / width, y / height), -1).flatten(0, 1)


def sine(height, width):
    """Of the cells: no offset, temperature 20."""
    half = torch.arange(WIDTH // 2)
    frequencies = 20 ** (2 * (half // 2).double() / (WIDTH // 2))
    y = (torch.arange(height).double() + 1) / (height + 1e-6) * 2 * math.pi
    x = (torch.arange(width).double() + 1) / (width + 1e-6) * 2 * math.pi

    def embed(values):
        angles = values[:, None] / frequencies
        return torch.where(half % 2 == 0, angles.sin(), angles.cos())

    rows = embed(y)[:, None].expand(-1, width, -1)
    return torch.cat((rows, embed(x)[None].expand(height, -1, -1)), -1).flatten(0, 1)


def sine_of_boxes(boxes):
    """Temperature 10000, in the order y, x, w, h."""
    half = torch.arange(WIDTH // 2)
    frequencies = 10000 ** (2 * (half // 2).double() / (WIDTH // 2))
    angles = boxes[..., [1, 0, 2, 3], None] * 2 * math.pi / frequencies
    return torch.where(half % 2 == 0, angles.sin(), angles.cos()).flatten(-2)


NAMES = [
    (r"^input_proj", "inputs"),
    (r"^level_embed", "encoder.level_embed"),
    (r"^encoder\.(\d)\.self_attn\.", r"encoder.layers.\1.attention."),
    (r"^encoder\.(\d)\.self_attn_layer_norm", r"encoder.layers.\1.norm"),
    (r"^encoder\.(\d)\.", r"encoder.layers.\1."),
    (r"^decoder\.(\d)\.", r"decoder.layers.\1."),
    (r"^norm\.", "decoder.norm."),
    (r"^ref_point_head", "decoder.place.mlp"),
    (r"^class_embed\.(\d)", r"decoder.predictors.\1.classes"),
    (r"^bbox_embed\.(\d)", r"decoder.predictors.\1.boxes"),
    (r"^enc_output_norm", "first_stage.project.1"),
    (r"^enc_output\.", "first_stage.project.0."),
    (r"^enc_out_class_embed", "first_stage.predictor.classes"),
    (r"^enc_out_bbox_embed", "first_stage.predictor.boxes"),
    (r"^tgt_embed", "contents"),
    (r"\.self_attn\.", ".self_attention."),
    (r"\.self_attn_layer_norm", ".self_norm"),
    (r"\.encoder_attn\.", ".cross_attention."),
    (r"\.encoder_attn_layer_norm", ".cross_norm"),
    (r"\.sampling_offsets", ".offsets"),
    (r"\.attention_weights", ".weights"),
    (r"\.q_proj", ".query"),
    (r"\.k_proj", ".key"),
    (r"\.(v|value)_proj", ".value"),
    (r"\.(o|output)_proj", ".output"),
    (r"\.mlp\.fc1", ".feed_forward.expand"),
    (r"\.mlp\.fc2", ".feed_forward.reduce"),
    (r"\.final_layer_norm", ".feed_forward.norm"),
]


def renamed(name: str) -> str:
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


@pytest.fixture
def features():
    torch.manual_seed(0)
    sizes = [(6, 16, 24), (8, 8, 12), (12, 4, 6)]
    return [torch.randn(2, *size).double() for size in sizes]


@pytest.fixture(params=[0.3, 0.8])
def pair(request):
    torch.manual_seed(1)
    reference = Reference()
    for parameter in reference.parameters():  # large ones drive boxes to the border
        nn.init.normal_(parameter, std=request.param)
    head = DinoHead(LEVELS, CLASSES, **SMALL)
    left = head.load_state_dict(
        {renamed(name): tensor for name, tensor in reference.state_dict().items()}, strict=False
    )
    assert left.unexpected_keys == [] and left.missing_keys == ["denoising.classes.weight"]
    return head.double().eval(), reference.double().eval()


def test_outputs_of_all_layers_equal_the_reference(pair, features):
    ours, reference = pair
    outputs = ours(features)
    scores, proposals, logits, boxes = reference(features)
    encoder = outputs.others["_encoder"]
    for found, expected in (
        (encoder.logits[0], scores),
        (encoder.boxes[0], proposals),
        (outputs.logits, logits),
        (outputs.boxes, boxes),
    ):
        torch.testing.assert_close(found, expected, atol=1e-8, rtol=0)


def test_boxes_reach_the_border_where_the_constant_of_the_logit_counts(features):
    # a box's logit is cut at 1e-3: with another constant the same weights give other boxes
    torch.manual_seed(1)
    head = DinoHead(LEVELS, CLASSES, **SMALL).double().eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.8)
        boxes = head(features).boxes
        near = ((boxes < 1e-3) | (boxes > 1 - 1e-3)).any(-1)
        assert near.any()
        for predictor in head.decoder.predictors:
            predictor.eps = 1e-5
        moved = (head(features).boxes - boxes).abs().amax(-1)
    assert moved.max() > 1e-3


def test_gradients_equal_the_reference(pair, features):
    ours, reference = pair
    outputs, (scores, proposals, logits, boxes) = ours(features), reference(features)
    encoder = outputs.others["_encoder"]
    torch.manual_seed(2)
    weights = [torch.randn_like(x) for x in (scores, proposals, logits, boxes)]
    totals = [
        sum((x * weight).sum() for x, weight in zip(each, weights, strict=True))
        for each in (
            (encoder.logits[0], encoder.boxes[0], outputs.logits, outputs.boxes),
            (scores, proposals, logits, boxes),
        )
    ]
    for total in totals:
        total.backward()
    expected = {renamed(name): p.grad for name, p in reference.named_parameters()}
    for name, parameter in ours.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("twice", [True, False])
def test_looking_twice_reaches_one_layer_back(features, twice):
    torch.manual_seed(0)
    head = DinoHead(LEVELS, CLASSES, look_twice=twice, **SMALL).double().eval()
    boxes = head(features).boxes
    biases = [predictor.boxes.layers[-1].bias for predictor in head.decoder.predictors]
    trained = [
        [bool(g.any()) for g in torch.autograd.grad(boxes[i].sum(), biases, retain_graph=True)]
        for i in range(LAYERS)
    ]
    one = [[i == j for j in range(LAYERS)] for i in range(LAYERS)]
    two = [[i - twice <= j <= i for j in range(LAYERS)] for i in range(LAYERS)]
    assert trained == (two if twice else one)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(share_predictors=True, class_loss="matchability", points=[2, 3, 1]),
        dict(two_stage=False, denoising=0, look_twice=False),
        dict(learned_content=False, encoder_layers=0, class_loss="varifocal"),
        dict(box_refinement=False, num_levels=4),
    ],
)
def test_conforms(options):
    check_head(DinoHead, **(SMALL | options))


def test_loss_has_the_terms_of_every_part(features, make_targets):
    head = DinoHead(LEVELS, CLASSES, **SMALL).double()
    names = [
        name + suffix
        for name in ("class", "box", "giou")
        for suffix in ("", "_aux", "_encoder", "_denoising", "_denoising_aux")
    ]
    for counts in ((2, 3), (0, 1), (0, 0), (30, 0)):
        targets = make_targets(*counts)
        losses = head.loss(head(features, targets), targets)
        assert sorted(losses) == sorted(names)
        assert all(value.isfinite() for value in losses.values())
        gradients = torch.autograd.grad(sum(losses.values()), list(head.parameters()))
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_uses_the_costs_and_constants_of_the_paper():
    head = DinoHead(LEVELS, 80)
    matcher = head.criterion.matcher
    assert (matcher.class_weight, matcher.box_weight, matcher.giou_weight) == (2, 5, 2)
    assert head.criterion.weights == {"class": 1, "box": 5, "giou": 2}
    assert (head.criterion.class_loss.alpha, head.criterion.class_loss.gamma) == (0.25, 2)
    assert (head.encoder.offset, head.encoder.temperature) == (0, 20)
    assert len(head.encoder.layers) == len(head.decoder.layers) == 6
    assert head.contents.weight.shape == (900, 256)
    assert {predictor.eps for predictor in head.decoder.predictors} == {1e-3}


def test_learned_references_need_no_encoder(features, make_targets):
    options = SMALL | dict(two_stage=False, encoder_layers=0, denoising=0)
    head = DinoHead(LEVELS, CLASSES, **options).double()
    outputs = head(features)
    assert outputs.others == {} and outputs.boxes.shape == (LAYERS, 2, QUERIES, 4)
    sum(head.loss(outputs, make_targets(2, 0)).values()).backward()
    assert head.references.logits.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(width=30, heads=3), "width: must be a multiple of 4"),
        (dict(heads=5), "heads: 5 does not divide the width 32"),
        (dict(points=[2, 3]), "points: .* must be one number or 3"),
        (dict(input_levels=[0, 7]), "input_levels: must be rising numbers below 3"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DinoHead(LEVELS, CLASSES, **(SMALL | options))
