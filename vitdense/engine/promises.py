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
from vitdense.structures import IGNORE, Level, Prediction, Sample, Size, Target


@contextmanager
def maps_watched(model: Model) -> Iterator[None]:
    """Inside, a backbone or neck whose maps are not those of its `levels` raises ValueError."""
    sizes: list[Size] = []

    def look(module: Any, inputs: tuple[Any, ...], maps: Any) -> None:
        if isinstance(module, Backbone) and inputs:  # none where it is called by keyword
            sizes.append((inputs[0].shape[-2], inputs[0].shape[-1]))
        if sizes and (fault := map_fault(maps, module.levels, sizes[-1])):
            raise ValueError(f"model.{names[module]}: {type(module).__name__}{fault}")

    names: dict[nn.Module, str] = {
        child: name for name, child in model.named_children() if isinstance(child, Backbone | Neck)
    }
    with ExitStack() as hooks:
        for child in names:
            hooks.enter_context(child.register_forward_hook(look))
        yield


def map_fault(maps: Any, levels: Sequence[Level], size: Size) -> str | None:
    """How maps differ from what the levels declare; None if they do not.

    Args:
        size: (height, width) of the image that they are of.
    """
    if not isinstance(maps, list | tuple) or len(maps) != len(levels):
        count = f" of {len(maps)}" if isinstance(maps, list | tuple) else ""
        return (
            f".forward must return a list of {len(levels)} maps, one per level of `self.levels`; "
            f"it returned a {type(maps).__name__}{count}"
        )
    for index, (found, level) in enumerate(zip(maps, levels, strict=True)):
        expected = (level.channels, *(math.ceil(side / level.stride) for side in size))
        if tuple(found.shape[1:]) != expected:
            return (
                f": level {index} declares {level}, so an image of {size} gives a map of "
                f"{expected}; the real one is {tuple(found.shape[1:])}. Correct `self.levels`, or "
                "pad the input so that the map has ceil(size / stride) cells"
            )
    return None


def check_sample(part: Dataset | Policy, sample: Any, dataset: Dataset) -> None:
    """Raise ValueError unless it is a sample whose image and truth can be what they say.

    Args:
        part: what returned it: a data set, or a policy of transforms.
    """
    key = "data.dataset" if isinstance(part, Dataset) else "data.transforms"
    kind = type(part).__name__
    if fault := sample_fault(sample):
        raise ValueError(f"{key}: {kind} {fault}")
    target, where = sample.target, f"{key}: {kind}, {sample.path}:"
    if sample.image.ndim != 3 or len(sample.image) != dataset.channels:
        raise ValueError(
            f"{where} the image is {list(sample.image.shape)}; it must be [C, H, W] with "
            f"{dataset.channels} channels, the `channels` of the data set"
        )
    classes = len(dataset.classes)
    for name in ("labels", "semantic"):
        values = getattr(target, name)
        if values is None or not (values := values[values != IGNORE]).numel():
            continue
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= classes:
            raise ValueError(
                f"{where} {name} are {low}..{high}, and the {classes} classes are 0..{classes - 1}"
            )
    boxes = target.boxes
    if boxes is not None and bool((boxes[:, 2:] < boxes[:, :2]).any()):
        raise ValueError(f"{where} boxes must be x1, y1, x2, y2; in some x2 < x1 or y2 < y1")


def sample_fault(sample: Any) -> str | None:
    """What a part returned in the place of a sample; None if it is one."""
    target = getattr(sample, "target", None)
    if isinstance(sample, Sample) and isinstance(target, Target):
        return None
    inner = f" with a {type(target).__name__}" if target is not None else ""
    return (
        "must return a Sample with a Target, both of vitdense.structures; it returned a "
        f"{type(sample).__name__}{inner}"
    )


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


def numbers_of(metric: Metric) -> dict[str, float]:
    """What a metric computes, as floats of Python; raises ValueError if it is something else."""
    found = metric.compute()
    try:
        # a checkpoint with numpy's floats, which a metric of one's own may give, cannot be read
        return {name: float(value) for name, value in found.items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(
            f"metric: {type(metric).__name__}.compute must return a dict of numbers by name; it "
            f"returned {found!r:.80}"
        ) from None


def check_headline(metric: Metric, headline: str, numbers: Mapping[str, float]) -> None:
    """Raise ValueError if the number that is to choose the best model is not computed."""
    # a few images may lack the class of a number such as IoU/cat
    if headline not in numbers and "/" not in headline:
        raise ValueError(
            f"metric: {type(metric).__name__} computes no {headline!r}, by which the best model is "
            f"chosen (its headline, or train.best); there are {', '.join(map(str, numbers))}"
        )
