"""The shared decoder: what is refined, who learns from whom, and who sees whom."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_convert
from transformers.models.grounding_dino.modeling_grounding_dino import (
    encode_sinusoidal_position_embedding as grounding_dino_embedding,
)
from transformers.models.lw_detr.modeling_lw_detr import (
    encode_sinusoidal_position_embedding as lw_detr_embedding,
)

from vitdense.heads.detection.decoder import Decoder, SinePlace
from vitdense.heads.detection.deformable_transformer import (
    DeformableDecoderLayer,
    Predictor,
    ScaledPredictor,
)

WIDTH, CLASSES, LAYERS, QUERIES = 16, 3, 3, 6
SHAPES = [(4, 6), (2, 3)]


def make_decoder(predictor: type[Predictor] = Predictor, shared: bool = False, **options):
    torch.manual_seed(0)
    decoder = Decoder(
        [DeformableDecoderLayer(WIDTH, 2, 24, 0.0, 2, 3) for _ in range(LAYERS)],
        [predictor(WIDTH, CLASSES) for _ in range(1 if shared else LAYERS)],
        **{"place": SinePlace(WIDTH), **options},
    )
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return decoder.double()


def run(decoder: Decoder, *inputs, **options):
    decoded = decoder(*inputs, **options)
    return decoded.logits, decoded.boxes


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    queries = torch.randn(2, QUERIES, WIDTH).double()
    references = (0.2 + 0.6 * torch.rand(2, QUERIES, 4)).double()
    memory = torch.randn(2, 4 * 6 + 2 * 3, WIDTH).double()
    return queries, references, memory, SHAPES


def teachers(decoder: Decoder, inputs) -> list[set[int]]:
    """For each layer, whose box regressors the loss of its boxes trains."""
    _, boxes = run(decoder, *inputs)
    found = []
    for i in range(LAYERS):
        weights = [predictor.boxes.layers[-1].bias for predictor in decoder.predictors]
        gradients = torch.autograd.grad(boxes[i].sum(), weights, retain_graph=True)
        found.append({j for j, gradient in enumerate(gradients) if gradient.any()})
    return found


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("twice", [False, True])
def test_looking_twice_trains_the_box_of_one_layer_before(inputs, norm, twice):
    decoder = make_decoder(norm=nn.LayerNorm(WIDTH) if norm else None, look_twice=twice)
    expected = [{0}, {0, 1}, {1, 2}] if twice else [{0}, {1}, {2}]
    assert teachers(decoder, inputs) == expected


def test_looking_twice_changes_gradients_alone(inputs):
    once, twice = (make_decoder(look_twice=flag) for flag in (False, True))
    for a, b in zip(run(once, *inputs), run(twice, *inputs), strict=True):
        assert torch.equal(a, b)


def test_references_have_no_gradient_through_later_layers(inputs):
    queries, references, memory, shapes = inputs
    references.requires_grad_()
    _, boxes = run(make_decoder(look_twice=True), queries, references, memory, shapes)
    (gradient,) = torch.autograd.grad(boxes[0].sum(), references, retain_graph=True)
    assert gradient.abs().sum() > 0  # the caller detaches them


class Recorder(nn.Module):
    """A layer that keeps what it was asked to look at."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.looked_at, self.places = layer, [], []

    def forward(self, queries, places, references, *rest):
        self.looked_at.append(references)
        self.places.append(places)
        return self.layer(queries, places, references, *rest)


def record(decoder: Decoder):
    recorders = [Recorder(layer) for layer in decoder.layers]
    decoder.layers = nn.ModuleList(recorders)
    return recorders


@pytest.mark.parametrize("predictor", [Predictor, ScaledPredictor])
def test_refined_layers_look_at_the_boxes_before(inputs, predictor):
    decoder = make_decoder(predictor)
    recorders = record(decoder)
    _, boxes = run(decoder, *inputs)
    assert torch.equal(recorders[0].looked_at[0], inputs[1])
    for i in (1, 2):
        torch.testing.assert_close(recorders[i].looked_at[0], boxes[i - 1])
        assert torch.equal(recorders[i].places[0], decoder.place(recorders[i].looked_at[0]))


@pytest.mark.parametrize("predictor", [Predictor, ScaledPredictor])
def test_unrefined_layers_look_at_the_first_references(inputs, predictor):
    decoder = make_decoder(predictor, shared=True, refine=False, norm=nn.LayerNorm(WIDTH))
    recorders = record(decoder)
    logits, boxes = run(decoder, *inputs)
    for recorder in recorders:
        assert torch.equal(recorder.looked_at[0], inputs[1])
        assert recorder.places[0] is recorders[0].places[0]  # made once
    # every layer corrects the first references by its own queries
    queries = inputs[0]
    for i, recorder in enumerate(recorders):
        queries = recorder.layer(queries, recorder.places[0], inputs[1], *inputs[2:])
        expected = decoder.predictors[0](decoder.norm(queries), inputs[1])
        torch.testing.assert_close((logits[i], boxes[i]), expected)


def test_references_of_the_next_layer_come_from_queries_before_the_norm(inputs):
    decoder = make_decoder(norm=nn.LayerNorm(WIDTH))
    recorders = record(decoder)
    _, boxes = run(decoder, *inputs)
    first = recorders[0].layer(inputs[0], recorders[0].places[0], *inputs[1:])
    predictor = decoder.predictors[0]
    unnormed, normed = predictor(first, inputs[1])[1], predictor(decoder.norm(first), inputs[1])[1]
    torch.testing.assert_close(recorders[1].looked_at[0], unnormed)
    torch.testing.assert_close(boxes[0], normed)
    assert (unnormed - normed).abs().max() > 0.01


def test_points_become_boxes(inputs):
    queries, references, memory, shapes = inputs
    places = torch.randn_like(queries)
    decoder = make_decoder(place=None)
    _, boxes = run(decoder, queries, references[..., :2], memory, shapes, places=places)
    assert boxes.shape == (LAYERS, 2, QUERIES, 4)
    recorders = record(decoder)
    run(decoder, queries, references[..., :2], memory, shapes, places=places)
    assert [r.looked_at[0].shape[-1] for r in recorders] == [2, 4, 4]


def test_groups_equal_separate_runs(inputs):
    queries, references, memory, shapes = inputs
    decoder = make_decoder()
    logits, boxes = run(decoder, *inputs, groups=3)
    for group in range(3):
        part = slice(2 * group, 2 * group + 2)
        alone = run(decoder, queries[:, part], references[:, part], memory, shapes)
        torch.testing.assert_close((logits[:, :, part], boxes[:, :, part]), alone)


def test_a_mask_hides_queries(inputs):
    queries, references, memory, shapes = inputs
    decoder = make_decoder()
    mask = torch.ones(QUERIES, QUERIES, dtype=torch.bool)
    mask[4:, :4] = False  # the last two see only each other
    logits, boxes = run(decoder, *inputs, mask=mask)
    alone = run(decoder, queries[:, 4:], references[:, 4:], memory, shapes)
    torch.testing.assert_close((logits[:, :, 4:], boxes[:, :, 4:]), alone)
    plain = run(decoder, *inputs)
    assert (logits[:, :, 4:] - plain[0][:, :, 4:]).abs().max() > 1e-3
    everything = run(decoder, *inputs, mask=torch.ones_like(mask))
    torch.testing.assert_close(everything, plain)


def test_a_mask_by_groups_equals_groups(inputs):
    decoder = make_decoder()
    group = torch.arange(QUERIES) // 2
    mask = group[:, None] == group
    torch.testing.assert_close(run(decoder, *inputs, mask=mask), run(decoder, *inputs, groups=3))


@pytest.mark.parametrize("theirs", [grounding_dino_embedding, lw_detr_embedding])
def test_sine_places_equal_transformers(theirs):
    torch.manual_seed(0)
    place = SinePlace(WIDTH)
    boxes = torch.rand(2, 5, 4)
    torch.testing.assert_close(place(boxes), place.mlp(theirs(boxes, WIDTH // 2)))
    assert [layer.in_features for layer in place.mlp.layers] == [2 * WIDTH, WIDTH]


def test_scaled_predictor_moves_boxes_as_r_cnn():
    torch.manual_seed(0)
    predictor = ScaledPredictor(WIDTH, CLASSES).double()
    references = (0.2 + 0.3 * torch.rand(10, 4)).double()
    deltas = torch.randn(10, 4).double() / 2
    corners = box_convert(references, "cxcywh", "xyxy")
    expected = BoxCoder((1.0, 1.0, 1.0, 1.0)).decode_single(deltas, corners)
    moved = predictor.move(references, deltas)
    torch.testing.assert_close(box_convert(moved, "cxcywh", "xyxy"), expected)
    assert torch.equal(predictor.move(references, torch.zeros_like(deltas)), references)


def test_scaled_boxes_may_leave_the_canvas():
    predictor = ScaledPredictor(WIDTH, CLASSES)
    references = torch.tensor([[0.9, 0.5, 0.4, 0.4]])
    moved = predictor.move(references, torch.tensor([[1.0, 0.0, 1.0, 0.0]]))
    torch.testing.assert_close(moved, torch.tensor([[1.3, 0.5, 0.4 * torch.e, 0.4]]))


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_predictor_moves_as_public_code_does_up_to_the_border(eps):
    torch.manual_seed(0)
    predictor = Predictor(WIDTH, CLASSES, eps=eps).double()
    edge = torch.tensor([0, 1e-7, 1e-4, 2e-3, 0.5, 0.998, 0.9999, 1]).double()
    references = torch.cartesian_prod(edge, edge, edge[:2], edge[-2:])
    deltas = torch.randn(len(references), 4).double()
    part, rest = references.clamp(0, 1).clamp(min=eps), (1 - references).clamp(min=eps)
    expected = (deltas + torch.log(part / rest)).sigmoid()
    torch.testing.assert_close(predictor.move(references, deltas), expected, atol=1e-12, rtol=0)


def test_predictors_start_at_their_references():
    predictor = Predictor(WIDTH, CLASSES)
    references = torch.rand(4, 4)
    logits, boxes = predictor(torch.randn(4, WIDTH), references)
    torch.testing.assert_close(boxes, references, atol=2e-5, rtol=0)
    assert logits.shape == (4, CLASSES)
    _, boxes = Predictor(WIDTH, CLASSES, start=-2.0)(torch.randn(4, WIDTH), references[:, :2])
    torch.testing.assert_close(boxes[:, 2:], torch.full((4, 2), -2.0).sigmoid())
