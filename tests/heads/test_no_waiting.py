"""A training step of every detection head waits for the device once: in the matcher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from vitdense.heads.base import Head
from vitdense.models.pyramid import PyramidModel
from vitdense.registry import BACKBONES, HEADS
from vitdense.structures import Frame, Level, Target

LEVELS = [Level(8, 8), Level(12, 16)]
CANVAS = (64, 96)
CLASSES = 5

TINY: dict[str, Any] = dict(
    width=32, heads=4, cross_heads=4, points=2, ffn=32, encoder_ffn=32, blocks=1, num_levels=2,
    encoder_layers=1, decoder_layers=2, queries=12, groups=2, denoising=6,
)  # fmt: skip
"""What keeps a head small, where it has such an option."""

CASES: list[tuple[str, dict[str, Any]]] = [
    ("detr", {}),
    ("detr", {"query_kind": "conditional"}),
    ("detr", {"query_kind": "dab"}),
    ("deformable_detr", {}),
    ("deformable_detr", {"two_stage": False, "box_refinement": False}),
    ("dino", {}),
    ("rtdetr", {}),
    ("rtdetr", {"distribution": True}),
    ("lwdetr", {}),
    ("rtdetr", {"masks": True}),
    ("lwdetr", {"masks": True}),
]

WAITING = (
    "_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "repeat_interleave", "equal", "allclose",
)  # fmt: skip
"""Operators whose result, or its size, the host must know."""

FETCHING = (
    Tensor.cpu, Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__bool__, Tensor.__int__,
    Tensor.__float__, Tensor.__index__,
)  # fmt: skip
"""Methods that bring values to the host."""

SENDING = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
"""What makes a tensor of python numbers: on a GPU it waits, from the host it need not."""


class Operators(TorchDispatchMode):
    """Notes the operators that make the host wait for a GPU."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in WAITING:
            self.found.append(name)
        if name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        ):
            self.found.append(f"{name} by a mask")
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """Notes the calls that copy between host and device and wait for it."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made_there = func in SENDING and ("device" in kwargs or func is Tensor.new_tensor)
        if func in FETCHING or made_there:
            self.found.append(func.__name__)
        return func(*args, **kwargs)


def waits_of(step) -> list[str]:
    found: list[str] = []
    with Operators(found), Calls(found):
        step()
    return found


def make_targets(*counts: int) -> list[Target]:
    targets = []
    for count in counts:
        start = torch.rand(count, 2) * 40
        boxes = torch.cat((start, start + 4 + torch.rand(count, 2) * 20), 1)
        masks = torch.rand(count, *CANVAS) < 0.5
        targets.append(Target(torch.randint(CLASSES, (count,)), boxes, masks))
    return targets


def build(name: str, options: dict[str, Any]) -> Head:
    known = HEADS.resolve(name)[0].options
    tiny = {key: value for key, value in TINY.items() if key in known}
    return HEADS.get(name)(LEVELS, CLASSES, **tiny, **options).train()


@pytest.mark.parametrize("counts", [(4, 2), (0, 0)])
@pytest.mark.parametrize("name, options", CASES, ids=lambda x: x if isinstance(x, str) else None)
def test_a_step_copies_to_the_host_once(name, options, counts):
    torch.manual_seed(0)
    head, targets = build(name, options), make_targets(*counts)
    features = [
        torch.randn(2, level.channels, int(CANVAS[0] / level.stride), int(CANVAS[1] / level.stride))
        for level in LEVELS
    ]

    def step():
        losses = head.loss(head(features, targets), targets)
        sum(losses.values()).backward()

    # numpy() is called on what cpu() gave
    assert waits_of(step) == ["cpu", "numpy"]


def test_boxes_are_answered_without_waiting():
    torch.manual_seed(0)
    head = build("rtdetr", {}).eval()
    outputs = head([torch.randn(1, 8, 8, 12), torch.randn(1, 12, 4, 6)])
    frame = Frame(CANVAS, (60, 90), (120, 181))
    assert waits_of(lambda: head.predict(outputs, [frame])) == []


def test_every_detection_head_is_tested():
    names = [n for n in HEADS.names() if HEADS.resolve(n)[0].module.startswith("vitdense.")]
    names = [n for n in names if getattr(HEADS.get(n), "task", None) == "detection"]
    assert {name for name, _ in CASES} == set(names)


@pytest.mark.parametrize(
    "name, options",
    [
        ("resnet18", {"channels": [8, 8, 8, 8]}),
        ("vit_tiny_patch16_224", {"depth": 2, "embed_dim": 12}),
    ],
)
def test_pixels_become_maps_without_waiting(name, options):
    backbone = BACKBONES.get("timm")(model=name, img_size=None, options=options)
    model = PyramidModel(CLASSES, backbone=lambda: backbone, head=lambda *_: build("detr", {}))
    images = torch.randint(256, (2, 3, 32, 48), dtype=torch.uint8)
    assert waits_of(lambda: model.backbone(model.normalize(images))) == []


@pytest.mark.parametrize(
    "step, found",
    [
        (lambda x: x[x > 0], ["index by a mask", "nonzero"]),
        (lambda x: x.sum().item(), ["item", "_local_scalar_dense"]),
        (lambda x: bool(x.sum() > 0), ["__bool__"]),
        (lambda x: torch.where(x > 0), ["nonzero"]),
        (lambda x: x.tolist(), ["tolist"]),
        (lambda x: torch.tensor([1.0], device=x.device), ["tensor"]),
        (lambda x: x.new_tensor([1.0]), ["new_tensor"]),
    ],
)
def test_what_waits_is_noticed(step, found):
    assert set(found) & set(waits_of(lambda: step(torch.randn(4))))
