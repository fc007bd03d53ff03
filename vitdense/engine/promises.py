"""What parts promise about what they return, held against one real batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from vitdense.backbones.base import Backbone
from vitdense.data.base import Dataset, Policy
from vitdense.metrics.base import Metric
from vitdense.models.base import Model
from vitdense.necks.base import Neck
from vitdense.structures import IGNORE, Prediction, Sample, Size, Target


@contextmanager
def maps_watched(model: Model) -> Iterator[None]:
    """Inside, a backbone or neck whose maps are not those of its `levels` raises ValueError."""
    sizes: list[Size] = []

    def look(module: Any, inputs: tuple[Any, ...], maps: Any) -> None:
        if isinstance(module, Backbone):
            sizes.append((inputs[0].shape[-2], inputs[0].shape[-1]))
        if sizes and (fault := _map_fault(module, maps, sizes[-1])):
            raise ValueError(f"model.{names[module]}: {type(module).__name__} {fault}")

    names: dict[nn.Module, str] = {
        child: name for name, child in model.named_children() if isinstance(child, Backbone | Neck)
    }
    with ExitStack() as hooks:
        for child in names:
            hooks.enter_context(child.register_forward_hook(look))
        yield


def _map_fault(module: Backbone | Neck, maps: Any, size: Size) -> str | None:
    levels = module.levels
    if not isinstance(maps, list | tuple) or len(maps) != len(levels):
        count = f" of {len(maps)}" if isinstance(maps, list | tuple) else ""
        return (
            f"must return a list of {len(levels)} maps, one for each of its levels; it returned a "
            f"{type(maps).__name__}{count}"
        )
    for index, (found, level) in enumerate(zip(maps, levels, strict=True)):
        cells = [math.ceil(side / level.stride) for side in size]
        if list(found.shape[1:]) != [level.channels, *cells]:
            return (
                f"promises {level.channels} channels at stride {level.stride:g} on level {index}, "
                f"which for an image of {size[0]} x {size[1]} is {[level.channels, *cells]}; the "
                f"map is {list(found.shape[1:])}; correct its `levels` or its maps"
            )
    return None


def check_sample(part: Dataset | Policy, sample: Any, dataset: Dataset) -> None:
    """Raise ValueError unless it is a sample whose image and truth can be what they say.

    Args:
        part: what returned it: a data set, or a policy of transforms.
    """
    key = "data.dataset" if isinstance(part, Dataset) else "data.transforms"
    kind = type(part).__name__
    target = getattr(sample, "target", None)
    if not isinstance(sample, Sample) or not isinstance(target, Target):
        inner = f" with a {type(target).__name__}" if target is not None else ""
        raise ValueError(
            f"{key}: {kind} must return a Sample with a Target; it returned a "
            f"{type(sample).__name__}{inner}"
        )
    where = f"{key}: {kind}, {sample.path}:"
    if sample.image.ndim != 3 or len(sample.image) != dataset.channels:
        raise ValueError(
            f"{where} the image is {list(sample.image.shape)}; it must be [C, H, W] with "
            f"{dataset.channels} channels, the `channels` of the data set"
        )
    classes = len(dataset.classes)
    for name in ("labels", "semantic"):
        values = getattr(target, name)
        values = None if values is None else values[values != IGNORE]
        if (
            values is not None
            and values.numel()
            and not 0 <= values.min() <= values.max() < classes
        ):
            raise ValueError(
                f"{where} {name} are {int(values.min())}..{int(values.max())}, and the {classes} "
                f"classes are 0..{classes - 1}"
            )
    boxes = target.boxes
    if boxes is not None and bool((boxes[:, 2:] < boxes[:, :2]).any()):
        raise ValueError(f"{where} boxes must be x1, y1, x2, y2; in some x2 < x1 or y2 < y1")


def check_losses(model: Model, losses: Any) -> None:
    """Raise ValueError unless they are named scalar tensors."""
    kind = type(getattr(model, "head", model)).__name__
    if not isinstance(losses, Mapping) or not losses:
        what = type(losses).__name__
        raise ValueError(f"model.loss: {kind}.loss must return a dict of named terms, not {what}")
    for name, term in losses.items():
        if not isinstance(term, Tensor) or term.ndim:
            what = f"{list(term.shape)}" if isinstance(term, Tensor) else f"a {type(term).__name__}"
            raise ValueError(
                f"model.loss: term {name!r} of {kind}.loss must be a scalar tensor, a mean or "
                f"a sum; it is {what}"
            )


def check_answers(model: Model, answers: Any, images: int) -> None:
    """Raise ValueError unless they are one `Prediction` for each image."""
    kind = type(getattr(model, "head", model)).__name__
    right = isinstance(answers, Sequence) and all(isinstance(it, Prediction) for it in answers)
    if not right or len(answers) != images:
        raise ValueError(
            f"model.predict: {kind}.predict must return a list with a Prediction for each of "
            f"{images} images; it returned a {type(answers).__name__}"
        )


def check_numbers(metric: Metric, headline: str, numbers: Any) -> None:
    """Raise ValueError unless they are plain numbers by name, the headline among them."""
    kind = type(metric).__name__
    plain = (int, float)
    if not isinstance(numbers, dict) or not all(isinstance(it, plain) for it in numbers.values()):
        raise ValueError(
            f"metric: {kind}.compute must return a dict of plain numbers by name; it returned "
            f"{numbers!r:.80}"
        )
    if headline not in numbers:
        raise ValueError(
            f"metric: {kind} computes no {headline!r}, by which the best model is chosen (its "
            f"headline, or train.best); there are {', '.join(map(str, numbers))}"
        )
