"""Inputs and assertions that the checks share."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitdense.config import contract
from vitdense.engine.promises import map_fault
from vitdense.structures import IGNORE, Frame, Level, Size, Target

IMAGE_CLASSES = 3
"""Of the targets' labels of whole images."""

PYRAMID = (Level(8, 4), Level(16, 8), Level(24, 16), Level(32, 32))
"""The levels that heads and necks are checked on unless told otherwise."""


def require(condition: object, message: str) -> None:
    """Raise AssertionError with `message` unless `condition`; also under `python -O`."""
    if not condition:
        raise AssertionError(message)


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Fixed random numbers inside, the caller's untouched outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def noting(situation: str) -> Iterator[None]:
    """Add to an error from inside the part what it was asked to do."""
    try:
        yield
    except Exception as error:
        error.add_note(situation)
        raise


def make_target(size: Size, num_classes: int, objects: int = 3) -> Target:
    """A training target with every field, on a canvas of `size`; without objects all is ignored."""
    height, width = size
    low = torch.rand(objects, 2) * 0.5
    high = low + 0.2 + torch.rand(objects, 2) * 0.3
    boxes = torch.cat([low, high], 1) * torch.tensor([width, height, width, height])
    masks = torch.zeros(objects, height, width, dtype=torch.bool)
    semantic = torch.full(size, IGNORE, dtype=torch.uint8)
    labels = torch.randint(num_classes, (objects,))
    for index, (x1, y1, x2, y2) in enumerate(boxes.round().int().tolist()):
        masks[:index, y1:y2, x1:x2] = False
        masks[index, y1:y2, x1:x2] = True
        semantic[y1:y2, x1:x2] = int(labels[index])
    return Target(
        labels=labels,
        boxes=boxes.round(),
        masks=masks,
        semantic=semantic,
        crowd=torch.zeros(objects, dtype=torch.bool),
        area=masks.flatten(1).sum(1).float(),
        image_labels=torch.arange(IMAGE_CLASSES) < objects,
    )


def make_frames(canvas: Size, count: int) -> list[Frame]:
    """Frames with padding and with originals of odd sizes, larger and smaller than the canvas."""
    height, width = canvas
    frames = [
        Frame(canvas, (height - 9, width), (2 * height + 5, 2 * width + 3)),
        Frame(canvas, (height, width - 7), (height // 2 + 1, width // 2 + 2)),
    ]
    return [frames[index % 2] for index in range(count)]


def make_maps(levels: Sequence[Level], size: Size, count: int) -> list[Tensor]:
    """Random feature maps, float [count, C, H / stride, W / stride], that take gradients."""
    return [
        torch.randn(count, level.channels, *map_size(level, size)).requires_grad_()
        for level in levels
    ]


def map_size(level: Level, size: Size) -> Size:
    """Size of a level's map over an image of `size`."""
    return math.ceil(size[0] / level.stride), math.ceil(size[1] / level.stride)


def shake(module: nn.Module) -> None:
    """Move parameters off their initial values: zeros and ties would hide faults."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.02)


def check_contract(kind: str, part: object) -> None:
    """The part is of its kind, and has what every part of it has."""
    message = contract.fault(kind, part)
    require(message is None, message or "")


def check_state(name: str, module: nn.Module) -> None:
    """No tensor stays behind when the module goes to another device."""
    for path, inner in module.named_modules():
        for key, value in vars(inner).items():
            held = value if isinstance(value, (list, tuple)) else [value]
            require(
                not any(isinstance(item, Tensor) for item in held),
                f"{name}: `{'.'.join(filter(None, [path, key]))}` holds a tensor that stays on the "
                "CPU when the model goes to a GPU; use register_buffer, with persistent=False if "
                "it can be computed again",
            )


def check_gradients(name: str, module: nn.Module, situation: str) -> None:
    """Every parameter that trains has a finite gradient."""
    trained = [(key, p.grad) for key, p in module.named_parameters() if p.requires_grad]
    missing = [key for key, grad in trained if grad is None]
    require(
        not missing,
        f"{name}: no gradient reaches {_some(missing)} {situation}. Use the parameter in the loss "
        "(add `0 * output.sum()` where it has no target), remove it, or freeze it: "
        "distributed training waits for every gradient",
    )
    wrong = [key for key, grad in trained if grad is not None and not grad.isfinite().all()]
    require(
        not wrong,
        f"{name}: the gradient of {_some(wrong)} is not finite {situation}. "
        "Look for a division by a count of zero, log(0) or sqrt(0)",
    )
    module.zero_grad(set_to_none=True)


def check_maps(name: str, maps: Any, levels: Sequence[Level], size: Size) -> None:
    """The maps are what the levels declare."""
    fault = map_fault(maps, levels, size)
    require(fault is None, f"{name}{fault}")


def check_levels(name: str, levels: Any) -> None:
    """Levels exist before anything ran and are ordered."""
    require(
        isinstance(levels, list) and levels and all(isinstance(item, Level) for item in levels),
        f"{name}.levels must be a non-empty list of Level, set in __init__; it is {levels!r}",
    )
    strides = [level.stride for level in levels]
    require(
        strides == sorted(strides),
        f"{name}.levels must go from the finest map to the coarsest; strides are {strides}",
    )


def check_copies(
    name: str, module: nn.Module, build: Callable[[], nn.Module], same: Callable[[nn.Module], bool]
) -> None:
    """A copy, and a new instance with the same state, behave the same."""
    require(
        same(module),
        f"{name}: the same input gives another result in evaluation. Random numbers, dropout and "
        "running statistics belong to training: ask `self.training`",
    )
    require(
        same(copy.deepcopy(module)),
        f"{name}: a copy.deepcopy answers differently; keep tensors as parameters or buffers",
    )
    fresh = build().eval()
    fresh.load_state_dict(module.state_dict())
    require(
        same(fresh),
        f"{name}: a new instance that loaded state_dict() answers differently. State outside of "
        "parameters and buffers is lost in a checkpoint: use register_buffer",
    )


def kind(value: Any) -> Any:
    """The type of an output with the types inside tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return Tensor
    if is_dataclass(value):
        return type(value)
    if isinstance(value, dict):
        return {key: kind(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [kind(item) for item in value]
    return type(value)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"'{name}'" for name in names[:3]) + more
