"""EoMT: opened backbones, annealed masking, parameter groups, learning by heart."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vitdense.backbones.timm import TimmBackbone
from vitdense.engine.optim import parameter_groups
from vitdense.heads.segmentation.eomt_head import attention_bias
from vitdense.models.eomt import EomtModel
from vitdense.structures import Frame, Target

TINY = {"depth": 4, "embed_dim": 32, "num_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 64, "drop_path": 0.1},
    "deit3_small_patch16_224": {"img_size": 64},
    "vit_small_patch14_reg4_dinov2": {"img_size": 64, "patch_size": 16},
    "vit_small_patch16_dinov3_qkvb": {},
    "eva02_tiny_patch14_224": {},  # its norm lies behind the pooling
    "vit_small_patch16_rope_mixed_224": {},  # other rotations in each block
}


def build(name: str = "vit_tiny_patch16_224", **options: Any) -> EomtModel:
    """A small model; options that `timm` knows go to the backbone."""
    torch.manual_seed(0)
    known = {"in_chans", "checkpointing", "windows", "level_norm", "class_token", "out_indices"}
    mine = {key: options.pop(key) for key in known & options.keys()} | FAMILIES.get(name, {})
    usual = {"queries": 6, "blocks": 2, "mask_points": 64}
    small = {"options": TINY} if name in FAMILIES else {}
    return EomtModel(
        3, backbone=lambda: TimmBackbone(model=name, **mine, **small), **usual | options
    )


def pixels(model: EomtModel, rows: int = 3, columns: int = 5) -> Tensor:
    size = (2, model.in_chans, rows * model.divisor, columns * model.divisor)
    return torch.randint(256, size, dtype=torch.uint8, generator=torch.manual_seed(1))


@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_plain_vits(name):
    model = build(name)
    images = pixels(model)
    outputs = model.train()(images)
    assert outputs.logits.shape == (3, 2, 6, 4)
    scale = 2 ** len(model.head.upscale)
    assert [masks.shape for masks in outputs.masks] == [(2, 6, 3 * scale, 5 * scale)] * 3
    assert outputs.canvas == (3 * model.divisor, 5 * model.divisor)
    torch.stack([masks.square().mean() for masks in outputs.masks]).sum().backward()
    model.eval()
    with torch.no_grad():
        last = model(images)
        assert last.logits.shape == (1, 2, 6, 4) and len(last.masks) == 1
        # queries are a set: where they stand in the sequence means nothing, least so as positions
        order = torch.tensor([3, 0, 5, 1, 2, 4])
        model.head.queries.weight.data = model.head.queries.weight.data[order]
        permuted = model(images)
    torch.testing.assert_close(permuted.logits[0], last.logits[0][:, order])
    torch.testing.assert_close(permuted.masks[0], last.masks[0][:, order])


@pytest.mark.parametrize(("channels", "grid"), [(1, (4, 4)), (5, (2, 7))])
def test_other_channels_and_sizes(channels, grid):
    model = build(in_chans=channels).eval()
    assert model(pixels(model, *grid)).masks[0].shape == (2, 6, 4 * grid[0], 4 * grid[1])


@pytest.mark.parametrize(("patch", "doublings"), [(8, 1), (14, 1), (16, 2), (32, 3)])
def test_masks_have_stride_4(patch, doublings):
    backbone = dict(model="vit_tiny_patch16_224", img_size=2 * patch, patch_size=patch)
    model = EomtModel(3, backbone=lambda: TimmBackbone(**backbone, options=TINY), blocks=1)
    assert len(model.head.upscale) == doublings


def test_masking_fades_one_block_after_the_other():
    model = build(blocks=4).train()
    expected = {
        0.0: [1, 1, 1, 1],
        0.25: [0.5**0.9, 1, 1, 1],
        0.5: [0, 0, 1, 1],
        0.75: [0, 0, 0, 0.5**0.9],
        1.0: [0, 0, 0, 0],
    }
    for progress, probabilities in expected.items():
        model.progress = progress
        assert model.masking_probabilities() == pytest.approx(probabilities)
    model.progress = 0.0
    assert model.eval().masking_probabilities() == [0, 0, 0, 0]


def test_masking_as_it_is_told():
    model = build(annealing=[(0.0, 0.5), (0.5, 0.5)], annealing_power=2.0).train()
    model.progress = 0.25
    assert model.masking_probabilities() == [0.25, 1]
    model.progress = 0.5
    assert model.masking_probabilities() == [0, 0]
    assert build(masking="always").eval().masking_probabilities() == [1, 1]
    assert build(masking="never").train().masking_probabilities() == [0, 0]


def test_bias_closes_what_lies_outside_a_mask():
    masks = torch.full((1, 2, 8, 8), -1.0)
    masks[0, 1, :4, 4:] = 1
    tokens = torch.zeros(1, 2 + 1 + 4, 3)
    bias = attention_bias(masks, (2, 2), tokens, probability=1.0)
    closed = bias.isinf()[0, 0]
    assert closed[0].tolist() == [False] * 3 + [True] * 4
    assert closed[1].tolist() == [False] * 3 + [True, False, True, True]
    assert not closed[2:].any()


def test_bias_holds_each_query_by_chance():
    masks, tokens = torch.full((4, 500, 2, 2), -1.0), torch.zeros(4, 500 + 4, 1)
    torch.manual_seed(0)
    bias = attention_bias(masks, (2, 2), tokens, probability=0.3).isinf()[:, 0, :500, -4:]
    assert torch.equal(bias.all(2), bias.any(2))  # a query as a whole
    assert bias.float().mean().item() == pytest.approx(0.3, abs=0.04)
    torch.manual_seed(0)
    again = attention_bias(masks, (2, 2), tokens, probability=0.3).isinf()[:, 0, :500, -4:]
    assert torch.equal(bias, again)


def test_masking_matters_in_training_alone():
    model, images = build(), pixels(build())
    with torch.no_grad():
        torch.nn.init.normal_(model.head.masks[-1].bias, std=3.0)
        first, last = [], []
        for model.progress, logits in ((0.0, first), (1.0, last)):
            for training in (True, False):
                logits.append(model.train(training)(images).logits[-1])
    assert not torch.allclose(first[0], last[0], atol=1e-4)
    assert torch.equal(first[1], last[1])


def test_nothing_in_a_step_waits_for_the_device():
    class Waiting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero")
            return func(*args, **(kwargs or {}))

    model = build().train()
    model.progress = 0.3
    with Waiting():
        outputs = model(pixels(model))
        outputs.logits.sum().backward()
    assert outputs.logits.isfinite().all()


def test_checkpointing_changes_no_gradient():
    model = build("deit3_small_patch16_224").train()
    other = build("deit3_small_patch16_224", checkpointing=True).train()
    other.load_state_dict(model.state_dict())
    gradients = []
    for each in (model, other):
        outputs = each(pixels(each))
        (outputs.logits.square().mean() + outputs.masks[-1].square().mean()).backward()
        gradients.append({n: p.grad for n, p in each.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients)


def test_layers_decay_and_the_head_does_not():
    model = build()
    groups = parameter_groups(model, 0.05, layer_decay=0.5)
    scales = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    decays = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert len(scales) == len(list(model.parameters()))
    blocks = [scales[id(block.norm1.weight)] for block in model.vit.blocks]
    assert blocks == sorted(blocks) and len(set(blocks)) == len(blocks)
    assert all(scales[id(parameter)] == 1 for parameter in model.head.parameters())
    assert decays[id(model.head.queries.weight)] == 0
    assert decays[id(model.head.masks[0].weight)] == 0.05


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "resnet10t", "beit_base_patch16_224"]
)
def test_what_cannot_be_opened_is_refused(name):
    with pytest.raises(ValueError, match=f"^backbone: {name} cannot be opened"):
        build(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 5}, "^blocks: .* has 4, not 5"),
        ({"windows": 2}, "^backbone: .* leave out windows"),
        ({"level_norm": True}, "^backbone: .* leave out windows"),
        ({"class_token": "concat"}, "^backbone: .* leave out windows"),
        ({"annealing": [(0.1, 0.2)]}, "^annealing: .* must be 2 pairs"),
        ({"annealing": [(0.1, 0.2), (0.3, 0.2)]}, "^annealing: .* must be 2 pairs"),
        ({"annealing": [(0.1, 0.2)] * 2, "masking": "never"}, "^annealing: .* not of never"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_blocks_behind_the_last_map_are_cut_off():
    model = build(out_indices=[2], blocks=3)
    assert len(model.vit.blocks) == 3 and model.first == 0
    assert model.eval()(pixels(model)).logits.isfinite().all()


def make_scene() -> tuple[Tensor, list[Target]]:
    """Two images of rectangles; what they do not cover is stuff, class 2."""
    boxes = [[(8, 8, 32, 28), (40, 36, 60, 60)], [(20, 12, 52, 44)]]
    labels = [[0, 1, 2], [1, 2]]
    images, targets = torch.full((2, 3, 64, 64), 60, dtype=torch.uint8), []
    for image, corners, classes in zip(images, boxes, labels, strict=True):
        masks = torch.zeros(len(classes), 64, 64, dtype=torch.bool)
        for mask, (x1, y1, x2, y2), label in zip(masks, corners, classes, strict=False):
            mask[y1:y2, x1:x2] = True
            image[label][mask] = 220
        masks[-1] = ~masks.any(0)
        rows = torch.tensor(classes)
        semantic = (masks.long() * rows[:, None, None]).sum(0)
        targets.append(Target(labels=rows, masks=masks, semantic=semantic))
    return images, targets


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_learns_two_images_by_heart(task):
    model, steps = build(task=task, mask_points=256, score_threshold=0.5), 100
    model.set_things([True, True, False])
    images, targets = make_scene()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.0)
    for step in range(steps):
        model.progress = step / steps
        loss = sum(model.train().loss(model(images, targets), targets).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    frames = [Frame((64, 64), (64, 64), (64, 64))] * 2
    with torch.no_grad():
        predictions = model.eval().predict(model(images), frames)
    for found, target in zip(predictions, targets, strict=True):
        if task == "semantic":
            assert (found.semantic == target.semantic).float().mean() > 0.95
            continue
        masks = found.masks
        if task == "panoptic":
            masks = torch.stack([found.panoptic == k + 1 for k in range(len(found.labels))])
            assert sorted(found.labels.tolist()) == sorted(target.labels.tolist())
        for label, mask in zip(target.labels, target.masks, strict=True):
            same = masks[found.labels == label]
            overlaps = (same & mask).sum((1, 2)) / (same | mask).sum((1, 2))
            assert overlaps.max() > 0.85


def test_copies_answer_the_same():
    model = build("vit_small_patch16_dinov3_qkvb").eval()
    images = pixels(model)
    torch.testing.assert_close(copy.deepcopy(model)(images).logits, model(images).logits)
