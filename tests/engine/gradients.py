"""What the processes of test_processes_gradients.py do."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.test_registered_parts import SMALL
from vitdense.backbones.base import Backbone
from vitdense.engine.runtime import Runtime
from vitdense.heads.base import Head
from vitdense.heads.detection.denoising import Denoising
from vitdense.losses import dot_masks, mask_criterion, points
from vitdense.losses.divisors import one_step
from vitdense.models.base import Model
from vitdense.ops.processes import alone
from vitdense.registry import HEADS, MODELS
from vitdense.structures import Level, Target
from vitdense.testing import probes

CANVAS = (64, 64)
MIXED, HALF_EMPTY = (3, 1, 2, 3), (3, 1, 0, 0)
"""Objects of four images. Denoising pads to the fullest image, so that of each half is equal."""

EXTRA = [
    ("linear", {"class_weights": [1.0, 2.0, 0.5], "label_smoothing": 0.1}),
    ("linear", {"losses": {"focal": 1.0, "cross_entropy": 2.0}}),
    ("rtdetr", {**dict(SMALL["head"])["rtdetr"], "masks": True, "mask_points": 64}),
]


class Toy(Model):
    """A convolution for each level, and a head."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.backbone, self.head, self.task = Backbone(), head, head.task
        self.stems = nn.ModuleList(
            nn.Conv2d(3, it.channels, int(it.stride), int(it.stride)) for it in head.levels
        )

    def forward(self, images: Tensor, targets: list[Target] | None = None) -> Any:
        maps = self.normalize(images)
        return self.head([stem(maps).tanh() for stem in self.stems], targets)

    def loss(self, outputs: Any, targets: list[Target]) -> dict[str, Tensor]:
        return self.head.loss(outputs, targets)


def make_models() -> Iterator[tuple[str, Model]]:
    """Every registered head and model, small, without what is random."""
    cases = [("head", *case) for case in [*SMALL["head"], *EXTRA]]
    cases += [("model", *case) for case in SMALL["model"]]
    for number, (kind, name, options) in enumerate(cases):
        torch.manual_seed(number)
        if kind == "model":
            model = MODELS.get(name)(3, **options)
        else:
            options = {"levels": list(probes.PYRAMID), **options}
            levels: list[Level] = options.pop("levels")
            model = Toy(HEADS.get(name)(levels, 3, **options))
        probes.shake(model)
        model.progress = 1.0  # here EoMT hides nothing from its queries
        yield f"{number} {kind} {name}", settled(model)


def settled(model: Model) -> Model:
    """In training, but for random numbers and the statistics of a batch."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
        if isinstance(module, Denoising):
            module.label_noise = module.box_noise = 0.0
    return model


def same_points(rows: int, count: int, like: Tensor) -> Tensor:
    """In place of random points."""
    generator = torch.Generator().manual_seed(count)
    return torch.rand(1, count, 2, generator=generator, dtype=like.dtype).expand(rows, -1, -1)


def make_batch(objects: tuple[int, ...]) -> tuple[Tensor, list[Target]]:
    torch.manual_seed(sum(objects))
    images = torch.randint(256, (len(objects), 3, *CANVAS), dtype=torch.uint8)
    targets = [probes.make_target(CANVAS, 3, count) for count in objects]
    targets[0].image_labels = None
    return images, targets


def backward(net: nn.Module, model: Model, parts: list[tuple[Tensor, list[Target]]]) -> list[str]:
    """The gradients of a step of these batches; returns the names of the loss's terms."""
    names: list[str] = []
    with one_step([targets for _, targets in parts]):
        for images, targets in parts:
            losses = model.loss(net(images, targets), targets)
            (torch.stack(list(losses.values())).sum() / len(parts)).backward()
            names += losses
    return names


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: it.grad for name, it in model.named_parameters() if it.grad is not None}


def halves(batch: tuple[Tensor, list[Target]]) -> list[tuple[Tensor, list[Target]]]:
    images, targets = batch
    return [(images[:2], targets[:2]), (images[2:], targets[2:])]


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))


def compare(rank: int, folder: Path) -> None:
    """Two processes, and two batches of one process, learn what one batch of all images says."""
    torch.set_default_dtype(torch.float64)
    for module in (points, mask_criterion, dot_masks):
        module.random_points = same_points
    wrong = []
    for name, model in make_models():
        for objects in (MIXED, HALF_EMPTY):
            batch = make_batch(objects)
            parts = halves(batch)
            shared = copy.deepcopy(model)
            net = Runtime(torch.device("cpu"), rank, 2).wrap(shared)
            terms = backward(net, shared, [parts[rank]])
            everyone: list[Any] = [None, None]
            dist.all_gather_object(everyone, terms)
            assert everyone == [terms, terms], name
            if rank:
                continue
            found = gradients(shared)
            with alone():
                whole, summed = copy.deepcopy(model), copy.deepcopy(model)
                assert backward(whole, whole, [batch]) == terms, name
                backward(summed, summed, parts)
            if objects == HALF_EMPTY and any(isinstance(it, Denoising) for it in model.modules()):
                continue  # its queries are padded to another number
            if found.keys() != gradients(whole).keys():
                wrong.append(f"{name} {objects}: {found.keys() ^ gradients(whole).keys()}")
            for kind, those in (("processes", found), ("batches", gradients(summed))):
                error = max(difference(those[key], it) for key, it in gradients(whole).items())
                if error > 1e-6:
                    wrong.append(f"{name} {objects}: {kind} differ by {error}")
    assert not wrong, "\n".join(wrong)
