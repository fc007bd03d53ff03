"""Mask2Former's head: which levels it reads, how it masks its attention, and that it learns."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vitdense.heads.segmentation.mask2former import Mask2FormerHead
from vitdense.heads.segmentation.masked_decoder import attention_mask, draw_masks
from vitdense.models.pyramid import PyramidModel
from vitdense.registry import BACKBONES
from vitdense.structures import Frame, Level, Prediction, Target

SMALL: dict[str, Any] = dict(
    queries=6, width=32, heads=4, encoder_layers=1, decoder_layers=3, ffn=48, encoder_ffn=40,
    mask_points=64,
)  # fmt: skip
PYRAMID = [Level(8, 4), Level(12, 8), Level(16, 16), Level(20, 32)]
CANVAS = (64, 96)


def build(levels: list[Level] = PYRAMID, classes: int = 3, **options: Any) -> Mask2FormerHead:
    torch.manual_seed(0)
    return Mask2FormerHead(levels, classes, **(SMALL | options))


def maps(levels: list[Level] = PYRAMID, images: int = 2, canvas: Any = CANVAS) -> list[Tensor]:
    torch.manual_seed(1)
    return [
        torch.randn(images, it.channels, *(round(side / it.stride) for side in canvas))
        for it in levels
    ]


@pytest.mark.parametrize(
    ("strides", "options", "coarse", "fine", "mask_stride"),
    [
        ([4, 8, 16, 32], {}, [1, 2, 3], [0], 4),
        ([8, 16, 32], {}, [0, 1, 2], [], 8),
        ([4, 8, 16, 32, 64], {}, [1, 2, 3], [0], 4),
        ([4, 8, 16, 32, 64], {"num_levels": 4}, [1, 2, 3, 4], [0], 4),
        ([2, 4, 8], {}, [2], [1], 4),
        ([4, 8, 16, 32], {"input_levels": [2, 3]}, [2, 3], [0, 1], 4),
        ([16], {}, [0], [], 16),
        ([16, 16, 16, 16], {}, [0, 1, 2], [], 16),
        ([4], {"num_levels": 1}, [0], [], 4),
    ],
)
def test_reads_any_pyramid(strides, options, coarse, fine, mask_stride):
    levels = [Level(8, stride) for stride in strides]
    head = build(levels, **options)
    outputs = head(maps(levels, canvas=(128, 192)))
    assert (head.coarse, head.fine) == (coarse, fine)
    assert outputs.canvas == (128, 192)
    assert outputs.logits.shape == (4, 2, 6, 4)
    shape = (2, 6, 128 // mask_stride, 192 // mask_stride)
    assert [it.shape for it in outputs.masks] == [shape] * 4


def test_reads_a_plain_vit_with_patch_14():
    vit = partial(
        BACKBONES.get("timm"),
        model="vit_tiny_patch16_224",
        img_size=56,
        patch_size=14,
        options={"depth": 2, "embed_dim": 24},
        out_indices=[1],
    )
    model = PyramidModel(3, backbone=vit, head=partial(Mask2FormerHead, **SMALL))
    assert [level.stride for level in model.head.levels] == [3.5, 7, 14, 28]
    outputs = model.eval()(torch.zeros(1, 3, 56, 84, dtype=torch.uint8))
    assert outputs.masks[-1].shape == (1, 6, 16, 24)
    assert outputs.canvas == (56, 84)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 30, "heads": 5}, "width: must be a multiple of 4"),
        ({"heads": 5}, "heads: 5 does not divide the width 32"),
        ({"input_levels": [3, 4]}, "input_levels: must be rising numbers below 4"),
        ({"input_levels": [0, 1, 2, 3]}, "num_levels: must be at least the 4 input_levels"),
        ({"encoder_layers": 0, "decoder_layers": 1}, "decoder_layers: 1 read so many levels of 3"),
        ({"task": "detection"}, "task: is 'detection'"),
    ],
)
def test_faulty_options_are_named(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        build(**options)


def test_evaluation_gives_the_last_layer_of_training():
    head, features = build(), maps()
    every, last = head.train()(features), head.eval()(features)
    assert len(every.masks) == len(every.logits) == 4
    assert len(last.masks) == len(last.logits) == 1
    torch.testing.assert_close(last.logits[-1], every.logits[-1])
    torch.testing.assert_close(last.masks[-1], every.masks[-1])


def test_an_image_gets_the_same_alone_and_in_a_batch():
    head, features = build().eval().double(), [x.double() for x in maps()]
    together = head(features)
    for image in range(2):
        alone = head([x[image : image + 1] for x in features])
        torch.testing.assert_close(alone.logits[:, 0], together.logits[:, image])
        torch.testing.assert_close(alone.masks[-1][0], together.masks[-1][image])


def test_attention_masks_are_the_resized_masks():
    torch.manual_seed(0)
    embeddings, features = torch.randn(2, 5, 8).double(), torch.randn(2, 8, 12, 20).double()
    small = F.interpolate(features, (3, 5), mode="bilinear", align_corners=False)
    found = attention_mask(embeddings, small)
    masks = draw_masks(embeddings, features)
    resized = F.interpolate(masks, (3, 5), mode="bilinear", align_corners=False)
    expected = resized.sigmoid().flatten(2) >= 0.5
    assert found.shape == (2, 1, 5, 15)
    assert expected.any(-1).all() and not expected.all(-1).any()
    assert torch.equal(found[:, 0], expected)


def test_a_query_without_a_mask_sees_all_cells():
    features = torch.ones(1, 4, 2, 3)
    features[..., 0, 0] = -1
    embeddings = torch.stack([-torch.ones(4), torch.ones(4), torch.full((4,), -1e-3)])[None]
    embeddings[:, 2, 0] = -100.0  # inside the first cell alone
    found = attention_mask(embeddings, features)[0, 0]
    assert found.tolist() == [[True] + [False] * 5, [False] + [True] * 5, [True] + [False] * 5]
    assert attention_mask(embeddings[:, :1], features[..., 1:]).all()


def test_queries_see_nothing_outside_of_their_masks():
    layer = build().decoder.layers[0].eval()
    torch.manual_seed(0)
    queries, places = torch.randn(2, 6, 32), torch.randn(1, 6, 32)
    cells, positions = torch.randn(2, 8, 32), torch.randn(1, 8, 32)
    mask = torch.zeros(2, 1, 6, 8, dtype=torch.bool)
    mask[..., :5] = True
    other = cells.clone()
    other[:, 5:] = 100.0
    expected = layer(queries, places, cells, positions, mask)
    torch.testing.assert_close(layer(queries, places, other, positions, mask), expected)
    assert not torch.allclose(
        layer(queries, places, other, positions, torch.ones_like(mask)), expected, atol=1e-3
    )


def test_layers_take_the_levels_in_turns_from_the_coarsest():
    head = build(decoder_layers=4).eval()
    seen = []
    for layer in head.decoder.layers:
        layer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[2].shape[1]))
    head(maps())
    assert seen == [2 * 3, 4 * 6, 8 * 12, 2 * 3]


class Waiting(TorchDispatchMode):
    """Notes operators whose result the host must know."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in {"_local_scalar_dense", "nonzero", "masked_select"}:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_forward_does_not_wait_for_the_device():
    head, features = build(), maps()
    with Waiting() as waiting:
        outputs = head(features)
        (outputs.logits.sum() + sum(it.sum() for it in outputs.masks)).backward()
    assert waiting.found == []


@pytest.fixture(scope="module")
def scene() -> list[Target]:
    """Two images of 64 x 64: rectangles of classes 0 to 2 before a background of class 3."""
    rows = [
        [(0, 4, 28, 6, 30), (1, 34, 60, 30, 58), (0, 40, 60, 4, 24)],
        [(2, 10, 40, 20, 56), (1, 44, 62, 2, 22)],
    ]
    found = []
    for objects in rows:
        masks = torch.zeros(len(objects) + 1, 64, 64, dtype=torch.bool)
        for mask, (_, top, bottom, left, right) in zip(masks, objects, strict=False):
            mask[top:bottom, left:right] = True
        masks[-1] = ~masks.any(0)
        labels = torch.tensor([row[0] for row in objects] + [3])
        found.append(Target(labels=labels, masks=masks, semantic=labels[masks.int().argmax(0)]))
    return found


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_every_parameter_learns(task: str, scene: list[Target]) -> None:
    head = build(classes=4, task=task)
    for parameter in head.parameters():  # offsets start at zero, whatever the level
        nn.init.normal_(parameter, std=0.2)
    sum(head.loss(head(maps(canvas=(64, 64))), scene).values()).backward()
    still = [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def overfit(task: str, scene: list[Target], steps: int) -> list[Prediction]:
    """Learn the images by heart: coloured rectangles, to be found through a small pyramid."""
    torch.manual_seed(0)
    images = torch.stack([F.one_hot(it.semantic, 4)[..., :3].permute(2, 0, 1) for it in scene])
    images = images.float()
    fine = nn.Sequential(nn.Conv2d(3, 32, 4, 4), nn.GroupNorm(8, 32), nn.ReLU())
    coarse = nn.Sequential(nn.Conv2d(32, 32, 2, 2), nn.GroupNorm(8, 32), nn.ReLU())
    options = dict(mask_points=128, num_levels=2, decoder_layers=2, queries=8, task=task)
    head = build([Level(32, 4), Level(32, 8)], classes=4, **options)
    head.things[3] = False
    model = nn.ModuleList([fine, coarse, head])
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)

    def outputs() -> Any:
        features = fine(images)
        return head([features, coarse(features)])

    for _ in range(steps):
        optimizer.zero_grad()
        sum(head.loss(outputs(), scene).values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    head.eval()
    with torch.no_grad():
        return head.predict(outputs(), [Frame((64, 64), (64, 64), (64, 64))] * 2)


def iou(one: Tensor, other: Tensor) -> Tensor:
    return (one & other).sum((-2, -1)) / (one | other).sum((-2, -1))


def check_found(masks: Tensor, labels: Tensor, target: Target) -> None:
    """Each mask is another one of the truth."""
    best, which = iou(masks[:, None], target.masks[None]).max(1)
    assert best.min() > 0.9
    assert sorted(which.tolist()) == list(range(len(target.labels)))
    assert torch.equal(labels, target.labels[which])


def test_learns_instances_by_heart(scene: list[Target]) -> None:
    for answer, target in zip(overfit("instance", scene, 70), scene, strict=True):
        count = len(target.labels)
        check_found(answer.masks[:count], answer.labels[:count], target)
        assert answer.scores[count - 1] > 0.5 > answer.scores[count]


def test_learns_panoptic_segments_by_heart(scene: list[Target]) -> None:
    for answer, target in zip(overfit("panoptic", scene, 70), scene, strict=True):
        numbers = torch.arange(1, len(answer.labels) + 1)
        check_found(answer.panoptic == numbers[:, None, None], answer.labels, target)


def test_learns_semantic_maps_by_heart(scene: list[Target]) -> None:
    for answer, target in zip(overfit("semantic", scene, 40), scene, strict=True):
        assert (answer.semantic == target.semantic).float().mean() > 0.95
