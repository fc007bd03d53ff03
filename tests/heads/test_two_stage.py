"""The first stage: which cells are chosen, what the queries take from them, who learns."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import RTDetrV2Config
from transformers.models.rt_detr_v2.modeling_rt_detr_v2 import RTDetrV2Model

from vitdense.heads.detection.decoder import Decoder, SinePlace
from vitdense.heads.detection.deformable_transformer import DeformableDecoderLayer, Predictor
from vitdense.heads.detection.proposals import FirstStage, best_cells, cell_anchors
from vitdense.heads.detection.two_stage import TwoStageHead
from vitdense.structures import Level

WIDTH, CLASSES, QUERIES = 16, 3, 5
SHAPES, CANVAS = [(4, 6), (2, 3)], (32, 48)
CELLS = 4 * 6 + 2 * 3


def make_head(**options) -> TwoStageHead:
    torch.manual_seed(0)
    decoder = Decoder(
        [DeformableDecoderLayer(WIDTH, 2, 24, 0.0, 2, 3) for _ in range(2)],
        [Predictor(WIDTH, CLASSES) for _ in range(2)],
        place=SinePlace(WIDTH),
    )
    facts = dict(width=WIDTH, queries=QUERIES, decoder=decoder, denoising=None)
    head = TwoStageHead([Level(WIDTH, 8)], CLASSES, 10, None, **(facts | options))
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    return head.double()


@pytest.fixture
def memory():
    torch.manual_seed(1)
    return torch.randn(2, CELLS, WIDTH).double().requires_grad_()


def make_stage(**options) -> FirstStage:
    torch.manual_seed(0)
    stage = FirstStage(WIDTH, Predictor(WIDTH, CLASSES), **options)
    for parameter in stage.parameters():
        nn.init.normal_(parameter, std=0.3)
    return stage.double()


@pytest.mark.parametrize("options", [{}, dict(nowhere=0.0)])
def test_the_best_alone_equal_the_best_of_all(memory, options):
    stage = make_stage(**options)
    anchors, usable = cell_anchors(SHAPES, memory)
    alone = stage.best(memory, anchors, usable, QUERIES)
    of_all = stage(memory, anchors, usable).best(QUERIES)
    torch.testing.assert_close(tuple(alone), tuple(of_all))
    parameters = [memory, *stage.parameters()]
    gradients = [
        torch.autograd.grad(sum((x**2).sum() for x in found), parameters)
        for found in (alone, of_all)
    ]
    torch.testing.assert_close(*gradients)


def test_cells_are_chosen_by_their_best_class_then_by_their_order():
    logits = torch.zeros(2, 6, 2)
    logits[0, 4, 1], logits[0, 1, 0], logits[0, 5] = 3.0, 2.0, -1.0
    assert best_cells(logits, 4).tolist() == [[4, 1, 0, 2], [0, 1, 2, 3]]
    assert best_cells(logits, 9).shape == (2, 6)


@pytest.mark.parametrize("last", [False, True])
def test_equal_cells_are_chosen_in_their_order(memory, last):
    stage = make_stage(unusable_last=last)
    nn.init.zeros_(stage.predictor.classes.weight)
    anchors, usable = cell_anchors(SHAPES, memory)
    assert usable.all()
    found = stage.best(memory, anchors, usable, QUERIES)
    first = (x[:, :QUERIES] for x in stage(memory, anchors, usable))
    torch.testing.assert_close(tuple(found), tuple(first))


def test_unusable_cells_are_chosen_last_or_by_their_score(memory):
    anchors, usable = cell_anchors([(2, 3)], memory, side=0.3)
    usable = usable.clone()
    usable[[0, 3]] = False
    for last in (False, True):
        stage = make_stage(unusable_last=last, nowhere=0.25)
        found = stage.best(memory[:, :6], anchors, usable, 6)
        nowhere = found.boxes.eq(0.25).all(-1)
        assert nowhere.sum(1).tolist() == [2, 2]
        if last:
            assert nowhere[:, -2:].all()
        else:
            assert found.logits.amax(-1).diff(dim=1).le(0).all()


def test_anchors_equal_transformers():
    config = RTDetrV2Config(num_feature_levels=2)
    model = RTDetrV2Model.__new__(RTDetrV2Model)
    nn.Module.__init__(model)
    model.config = config
    theirs, valid = model.generate_anchors(tuple(SHAPES), device="cpu", dtype=torch.float32)
    ours, usable = cell_anchors(SHAPES, torch.zeros(()))
    assert torch.equal(usable, valid[0].bool())
    torch.testing.assert_close(ours[usable[:, 0]], theirs[0].sigmoid()[usable[:, 0]])


def test_queries_start_from_the_best_cells_without_teaching_them(memory):
    head = make_head()
    queries, references, best = head._start(memory, SHAPES)
    expected = head.first_stage(memory, *cell_anchors(SHAPES, memory)).best(QUERIES)
    torch.testing.assert_close(queries, expected.cells)
    torch.testing.assert_close(references, expected.boxes)
    assert not queries.requires_grad and not references.requires_grad
    assert best.logits.requires_grad and best.boxes.requires_grad


def test_the_decoder_does_not_train_the_first_stage_nor_that_the_decoder(memory):
    head = make_head(learned_content=True)
    outputs = head.decode(memory, SHAPES, CANVAS, None)
    first, second = list(head.first_stage.parameters()), list(head.decoder.parameters())
    encoder = outputs.others["_encoder"]
    for total, trained, others in (
        (outputs.boxes.sum() + outputs.logits.sum(), second, first),
        (encoder.boxes.sum() + encoder.logits.sum(), first, second),
    ):
        gradients = torch.autograd.grad(
            total, [*trained, *others], retain_graph=True, allow_unused=True
        )
        assert all(gradient is not None for gradient in gradients[: len(trained)])
        assert all(gradient is None for gradient in gradients[len(trained) :])


def test_learned_contents_are_the_same_for_every_image(memory):
    head = make_head(learned_content=True)
    queries, _, _ = head._start(memory, SHAPES)
    assert torch.equal(queries, head.contents.weight.expand(2, -1, -1))


def test_without_two_stages_references_are_learned_and_lie_inside():
    torch.manual_seed(0)
    head = TwoStageHead(
        [Level(WIDTH, 8)], CLASSES, 10, None, width=WIDTH, queries=50, denoising=None,
        two_stage=False,
        decoder=Decoder([], [], place=SinePlace(WIDTH)),
    )  # fmt: skip
    queries, references, best = head._start(torch.randn(2, CELLS, WIDTH), SHAPES)
    assert best is None and references.shape == (2, 50, 4) and queries.shape == (2, 50, WIDTH)
    torch.testing.assert_close(references[..., 2:], torch.full((2, 50, 2), 0.2))
    centres = references[0, :, :2]
    assert (
        centres.min() < 0.1 and centres.max() > 0.9 and (centres > 0).all() and (centres < 1).all()
    )
    assert references.requires_grad


@pytest.mark.parametrize("learned", [False, True])
def test_fewer_cells_than_queries_become_fewer_queries(memory, learned):
    head = make_head(queries=CELLS + 10, learned_content=learned)
    outputs = head.decode(memory, SHAPES, CANVAS, None)
    assert outputs.boxes.shape == (2, 2, CELLS, 4)


def test_places_stay_exact_under_autocast():
    # bfloat16 tells numbers near 1 apart by 1/256 only: two cells of a large map would be one
    head = make_head().float()
    memory = torch.randn(1, 4 * 512, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        _, references, best = head._start(memory, [(4, 512)])
    assert references.dtype == torch.float32
    with torch.no_grad():
        head.first_stage.predictor.boxes.layers[-1].weight.zero_()
        head.first_stage.predictor.boxes.layers[-1].bias.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        _, references, _ = head._start(memory, [(4, 512)])
    anchors, _ = cell_anchors([(4, 512)], memory)
    distance = (references[0, :, None, 0] - anchors[None, :, 0]).abs().min(1).values
    inside = references[0, :, 0] < 1
    assert distance[inside].max() < 1e-5


def test_all_cells_may_learn_while_the_same_are_chosen(memory):
    chosen, every = make_head(), make_head(train_all_cells=True)
    every.load_state_dict(chosen.state_dict())
    few = chosen.decode(memory, SHAPES, CANVAS, None)
    all_ = every.decode(memory, SHAPES, CANVAS, None)
    torch.testing.assert_close(all_.logits, few.logits)
    torch.testing.assert_close(all_.boxes, few.boxes)
    assert few.others["_encoder"].logits.shape == (1, 2, QUERIES, CLASSES)
    assert all_.others["_encoder"].logits.shape == (1, 2, CELLS, CLASSES)
    all_.others["_encoder"].boxes.sum().backward()
    assert memory.grad is not None
    _, usable = cell_anchors(SHAPES, memory)
    assert memory.grad[:, usable[:, 0]].abs().sum(-1).gt(0).all()
