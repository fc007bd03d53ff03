"""Mask classification: answers equal transformers', in original pixels, in bounded memory."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import EomtImageProcessor

from vitdense.heads.segmentation.mask_head import MaskHead, MaskOutputs
from vitdense.losses.mask_criterion import MaskCriterion
from vitdense.models.base import Model
from vitdense.ops import rows
from vitdense.ops.panoptic import merge_masks
from vitdense.ops.restoring import restore_masks
from vitdense.structures import Frame, Level, Prediction, Target, Task
from vitdense.testing import check_head
from vitdense.testing.probes import PYRAMID

CLASSES = 4
CANVAS = (64, 96)
FRAME = Frame(CANVAS, (64, 96), (50, 81))
PADDED = Frame(CANVAS, (57, 96), (50, 81))
TASKS: list[Task] = ["semantic", "instance", "panoptic"]


class DotHead(MaskHead):
    """Learned queries, and their products with the finest map."""

    def __init__(
        self, levels: list[Level], num_classes: int, *, task: Task = "instance", queries: int = 6
    ) -> None:
        super().__init__(levels, num_classes, task, MaskCriterion(points=128), score_threshold=0.1)
        width = levels[0].channels
        self.queries = nn.Embedding(queries, width)
        self.project = nn.Conv2d(width, width, 1)
        self.classes = nn.Linear(width, num_classes + 1)

    def forward(self, features: list[Tensor], targets: list[Target] | None = None) -> MaskOutputs:
        maps = self.project(features[0])
        queries = self.queries.weight + maps.mean((2, 3))[:, None]
        masks = torch.einsum("bqc,bchw->bqhw", queries, maps)
        logits = torch.stack([self.classes(queries), self.classes(queries * 2)])
        return MaskOutputs(logits, [masks, masks * 3], self.canvas(features))


def make_outputs(batch: int = 2, queries: int = 12) -> MaskOutputs:
    """Smooth masks that overlap a little, and queries that are sure of their class."""
    logits = torch.randn(2, batch, queries, CLASSES + 1) * 4
    coarse = torch.randn(2 * batch, queries, 3, 4) * 4 - 2
    masks = F.interpolate(coarse, (16, 24), mode="bicubic").unflatten(0, (2, batch))
    return MaskOutputs(logits, list(masks), CANVAS)


def make_head(task: Task, **options: object) -> MaskHead:
    return MaskHead(list(PYRAMID), CLASSES, task, **options)


def as_transformers(outputs: MaskOutputs) -> SimpleNamespace:
    """The last layer, as EoMT's output."""
    return SimpleNamespace(
        class_queries_logits=outputs.logits[-1],
        masks_queries_logits=outputs.masks[-1],
        patch_offsets=None,
    )


def processor() -> mock._patch:
    """Resizes to the original as ours does: the cropping of padding is tested elsewhere."""

    def unpad(self: object, masks: Tensor, sizes: list, _: object) -> list[Tensor]:
        pairs = zip(masks, sizes, strict=True)
        return [F.interpolate(m[None], size, mode="bilinear")[0] for m, size in pairs]

    return mock.patch.object(EomtImageProcessor, "unpad_image", unpad)


SIZE = {"shortest_edge": 16, "longest_edge": 24}  # of the masks: no other resizing


@pytest.mark.parametrize("threshold", [0.3, 0.8])
def test_panoptic_equals_transformers(threshold):
    torch.manual_seed(1)
    outputs, frames = make_outputs(3), [FRAME] * 3
    head = make_head("panoptic", score_threshold=threshold)
    head.things.copy_(torch.tensor([True, False, False, True]))
    with processor():
        theirs = EomtImageProcessor().post_process_panoptic_segmentation(
            as_transformers(outputs), [FRAME.original] * 3, threshold=threshold,
            stuff_classes=[1, 2], size=SIZE,
        )  # fmt: skip
    kinds = set()
    for mine, other in zip(head.predict(outputs, frames), theirs, strict=True):
        assert mine.panoptic is not None and mine.labels is not None and mine.scores is not None
        assert torch.equal(mine.panoptic == 0, other["segmentation"] == -1)
        assert len(mine.labels) == len(other["segments_info"])
        for info in other["segments_info"]:
            (number,) = mine.panoptic[other["segmentation"] == info["id"]].unique().tolist()
            assert mine.labels[number - 1] == info["label_id"]
            if head.things[info["label_id"]]:
                torch.testing.assert_close(mine.scores[number - 1].item(), info["score"])
            kinds.add(bool(head.things[info["label_id"]]))
    assert kinds == {True, False}


def test_stuff_is_one_segment_with_its_best_score_and_things_are_several():
    logits = torch.full((4, 3), -9.0)
    for query, (label, score) in enumerate([(0, 5.0), (0, 4.0), (1, 6.0), (1, 3.0)]):
        logits[query, label] = score
    masks = torch.full((4, 8, 8), -5.0)
    for query in range(4):
        masks[query, :, 2 * query : 2 * query + 2] = 5
    frame = Frame((8, 8), (8, 8), (8, 8))
    found = merge_masks(logits, masks, torch.tensor([False, True]), frame)
    assert found.labels is not None and found.panoptic is not None and found.scores is not None
    assert found.labels.tolist() == [1, 0, 1]
    assert found.panoptic[0].tolist() == [2, 2, 2, 2, 1, 1, 3, 3]
    expected = logits.softmax(-1).amax(-1)[torch.tensor([2, 0, 3])]
    torch.testing.assert_close(found.scores, expected)


def test_a_mask_that_loses_its_pixels_is_dropped():
    logits = torch.tensor([[9.0, -9.0], [4.0, -4.0]])
    masks = torch.full((2, 8, 8), -5.0)
    masks[0, :, :4] = 5
    masks[1, :, 2:6] = 5  # half of it is the first's
    frame = Frame((8, 8), (8, 8), (8, 8))
    things = torch.tensor([True])
    assert len(merge_masks(logits, masks, things, frame, overlap_threshold=0.8).labels) == 1
    assert len(merge_masks(logits, masks, things, frame, overlap_threshold=0.3).labels) == 2


def test_nothing_is_sure_enough():
    outputs = make_outputs(1)
    (found,) = make_head("panoptic", score_threshold=1.0).predict(outputs, [PADDED])
    assert len(found.labels) == len(found.scores) == 0
    assert found.panoptic.shape == (50, 81) and found.panoptic.dtype == torch.int64
    assert not found.panoptic.any()


def test_instances_equal_transformers():
    """Its processor keeps the best class of each query; with one class that is all there is."""
    torch.manual_seed(1)
    outputs, frames = make_outputs(3), [FRAME] * 3
    outputs.logits = outputs.logits[..., :2]
    head = MaskHead(list(PYRAMID), 1, "instance")
    with processor():
        theirs = EomtImageProcessor().post_process_instance_segmentation(
            as_transformers(outputs), [FRAME.original] * 3, threshold=0.0, size=SIZE
        )
    for mine, other in zip(head.predict(outputs, frames), theirs, strict=True):
        scores = torch.tensor([info["score"] for info in other["segments_info"]])
        assert mine.scores is not None and mine.masks is not None and mine.boxes is not None
        torch.testing.assert_close(mine.scores, scores.sort(descending=True).values, atol=2e-6,
                                   rtol=0)  # fmt: skip
        for mask, box in zip(mine.masks, mine.boxes.int().tolist(), strict=True):
            x1, y1, x2, y2 = box
            assert mask[y1:y2, x1:x2].sum() == mask.sum()
            assert mask[y1].any() and mask[y2 - 1].any() and mask[:, x1].any()


def test_every_pair_of_query_and_class_may_be_an_instance():
    outputs = make_outputs(1, queries=3)
    outputs.masks[-1] = outputs.masks[-1].abs() + 0.1
    (found,) = make_head("instance").predict(outputs, [FRAME])
    assert len(found.scores) == 3 * CLASSES
    (best,) = make_head("instance", max_detections=5).predict(outputs, [FRAME])
    assert len(best.scores) == 5


def test_masks_without_a_pixel_are_no_instances():
    outputs = make_outputs(1)
    outputs.masks[-1][:, 2:] = -1.0
    (found,) = make_head("instance").predict(outputs, [FRAME])
    assert 0 < len(found.scores) <= 2 * CLASSES
    outputs.masks[-1][:] = -1.0
    (none,) = make_head("instance").predict(outputs, [FRAME])
    assert none.masks.shape == (0, 50, 81) and none.boxes.shape == (0, 4)


def test_semantic_equals_transformers():
    torch.manual_seed(0)
    outputs, frames = make_outputs(2), [FRAME] * 2
    head = make_head("semantic")
    theirs = EomtImageProcessor().post_process_semantic_segmentation(
        as_transformers(outputs), [FRAME.original] * 2, size=SIZE
    )
    for mine, other in zip(head.predict(outputs, frames), theirs, strict=True):
        assert (mine.semantic == other).float().mean() > 0.999
    assert head.semantic_logits(outputs).shape == (2, CLASSES, 16, 24)


@pytest.mark.parametrize("frame", [FRAME, PADDED, Frame(CANVAS, CANVAS, (16, 24))])
def test_masks_are_resized_before_they_are_cut_off(frame, monkeypatch):
    monkeypatch.setitem(rows.CHUNK, "cpu", 300)
    torch.manual_seed(0)
    logits = torch.randn(5, 16, 24)
    before = logits.clone()
    masks, sureness = restore_masks(logits, frame)
    whole = frame.restore_map(logits)
    assert (masks == (whole > 0)).float().mean() > 0.9999
    inside = (whole.sigmoid() * (whole > 0)).flatten(1).sum(1) / (whole > 0).flatten(1).sum(1)
    torch.testing.assert_close(sureness, inside, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("task", TASKS)
def test_an_answer_is_its_own_whatever_the_batch_and_the_chunk(task):
    torch.manual_seed(0)
    outputs, frames = make_outputs(2), [FRAME, PADDED]
    head = make_head(task, score_threshold=0.3)
    together = head.predict(outputs, frames)
    with mock.patch.dict(rows.CHUNK, {"cpu": 1}):
        for index, frame in enumerate(frames):
            part = [m[index : index + 1] for m in outputs.masks]
            (alone,) = head.predict(
                MaskOutputs(outputs.logits[:, index : index + 1], part, CANVAS), [frame]
            )
            assert_same(alone, together[index])


def assert_same(first: Prediction, second: Prediction) -> None:
    for name in ("scores", "labels", "boxes", "masks", "semantic", "panoptic"):
        a, b = getattr(first, name), getattr(second, name)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("task", TASKS)
def test_keeps_what_every_head_must(task):
    check_head(DotHead, task=task)


def test_things_are_set_from_outside_and_are_part_of_the_weights():
    model = Model()
    model.head = make_head("panoptic")
    model.set_things([True, False, False, True])
    state = model.state_dict()
    other = Model()
    other.head = make_head("panoptic")
    other.load_state_dict(state)
    assert other.head.things.tolist() == [True, False, False, True]


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match="task: is 'detection'"):
        make_head("detection")


def test_suppression_drops_the_lesser_mask_of_a_class_alone():
    masks = torch.full((4, 16, 24), -9.0)
    masks[:3, 2:10, 2:10] = 9.0  # the second and the third lie in the same place as the first
    masks[3, 4:12, 12:20] = 9.0
    logits = torch.full((4, CLASSES + 1), -9.0)
    logits[:, -1] = 0.0
    for query, (label, score) in enumerate([(0, 2.0), (0, 3.0), (1, 1.0), (0, 0.0)]):
        logits[query, label] = score
    outputs = MaskOutputs(logits[None, None], [masks[None]], CANVAS)
    (all_,) = make_head("instance", max_detections=4).predict(outputs, [FRAME])
    (kept,) = make_head("instance", max_detections=4, nms=0.5).predict(outputs, [FRAME])
    assert all_.labels.tolist() == [0, 0, 1, 0] and kept.labels.tolist() == [0, 1, 0]
    places = torch.tensor([0, 2, 3])
    for name in ("scores", "boxes", "masks"):
        assert torch.equal(getattr(kept, name), getattr(all_, name)[places])
