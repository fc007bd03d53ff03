"""Starting from an earlier or converted model: classes are matched by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vitdense.engine import checkpoint
from vitdense.engine.classes import ClassAxis, class_axes
from vitdense.models.base import Model

Build = Callable[[int], Model]
Weights = dict[str, Tensor]

HEAD, IMAGE_HEAD = "head.", "image_head."
"""What the names of the parameters of a head begin with."""


@dataclass(slots=True)
class Transfer:
    """What a model took over from a file.

    Attributes:
        path: of the file.
        classes: ours.
        matches: for each class of ours that the file has, (our label, the file's label).
        unused: the file's classes that we have not.
        axes: names of the parameters with a row for each class.
        new_head: whether the head starts anew.
        images: the same for labels of whole images, if we have such.
    """

    path: Path
    classes: list[str]
    matches: list[tuple[int, int]]
    unused: list[str] = field(default_factory=list)
    axes: list[str] = field(default_factory=list)
    new_head: bool = False
    images: Transfer | None = None

    @property
    def new(self) -> list[str]:
        """Our classes whose rows start from new values."""
        kept = {ours for ours, _ in self.matches}
        return [name for label, name in enumerate(self.classes) if label not in kept]

    def __str__(self) -> str:
        return f"{self._pixels()}\n{self.images._labels()}" if self.images else self._pixels()

    def _labels(self) -> str:
        if self.new_head:
            return "labels of images: the file has no such head, it starts anew"
        kept = ", ".join(self.classes[ours] for ours, _ in self.matches) or "none"
        return f"labels of images: kept {kept}; new: {', '.join(self.new) or 'none'}"

    def _pixels(self) -> str:
        if self.new_head:
            return f"start from {self.path}: all but the head, which starts anew"
        kept = ", ".join(self.classes[ours] for ours, _ in self.matches) or "none"
        rows = [
            f"start from {self.path}: kept {len(self.matches)} of {len(self.classes)} classes by "
            f"name (case apart): {kept}; new: {', '.join(self.new) or 'none'}"
        ]
        if self.unused:
            rows.append(f"classes of the file that are left out: {', '.join(self.unused)}")
        if self.new and self.axes:
            rows.append(f"new rows in: {', '.join(checkpoint.shorten(self.axes))}")
        return "\n".join(rows)


def transfer(
    path: Path,
    model: Model,
    build: Build,
    classes: list[str],
    new_head: bool,
    image_classes: Sequence[str] = (),
    build_images: Build | None = None,
) -> Transfer:
    """Give a new model the weights of a file, class-wise rows by the names of the classes.

    Args:
        model: new, for `classes`; what the file cannot give keeps its initial values.
        build: another such model, for a number of classes.
        new_head: leave out the head, ours and the file's.
        image_classes: labels of whole images that the model is for.
        build_images: another such model, for a number of these.

    Raises:
        CheckpointError: the file is absent, none of vitdense, or anything but the rows of classes
            does not match; names it.
        ValueError: `new_head` is set, and the model has no head of its own.
    """
    meta, weights = checkpoint.read_meta(path), checkpoint.read_weights(path)
    done = Transfer(path, classes, match(classes, meta.classes), new_head=new_head)
    used = {theirs for _, theirs in done.matches}
    done.unused = [name for label, name in enumerate(meta.classes) if label not in used]
    if image_classes and build_images is not None:
        done.images = Transfer(path, list(image_classes), [])
        _take_image_head(done.images, model, weights, meta.image_classes, build_images)
    else:
        _drop(weights, IMAGE_HEAD)
    if new_head:
        weights = _with_head_of(model, weights)
    elif classes != meta.classes:
        axes = class_axes(model, build)
        done.axes = sorted(axes)
        counts = model.num_classes, len(meta.classes)
        _take_rows(model, weights, axes, done.matches, *counts)
    checkpoint.fill(model, weights, path, remedy=_remedy(model))
    return done


def _with_head_of(model: Model, weights: Weights) -> Weights:
    if not isinstance(getattr(model, "head", None), torch.nn.Module):
        raise ValueError(f"new_head: {type(model).__name__} has no head that could start anew")
    others = {name: value for name, value in weights.items() if not name.startswith(HEAD)}
    ours = {name: value for name, value in model.state_dict().items() if name.startswith(HEAD)}
    return others | ours


def _take_rows(
    model: Model,
    weights: Weights,
    axes: dict[str, ClassAxis],
    matches: list[tuple[int, int]],
    ours_count: int,
    count: int,
) -> None:
    """Bring the file's class-wise weights, of `count` classes, into our order of `ours_count`.

    What has another shape beside that is left as it is, and found when the model is filled.
    """
    ours = model.state_dict()
    for name in axes.keys() & weights.keys():
        where, theirs = axes[name], weights[name]
        if where.others(theirs) != where.others(ours[name]):
            continue
        if theirs.shape[where.axis] == count + where.extra:
            mixed = ours[name].cpu().clone()
            rows = where.rows(theirs, [row for _, row in matches], count)
            places = where.places([row for row, _ in matches], ours_count)
            weights[name] = mixed.index_copy(where.axis, places, rows.to(mixed.dtype))


def _take_image_head(
    done: Transfer, model: Model, weights: Weights, theirs: list[str], build: Build
) -> None:
    """Keep the rows of labels that the file has; a head of another kind starts anew."""
    ours = {name: t for name, t in model.state_dict().items() if name.startswith(IMAGE_HEAD)}
    found = _drop(weights, IMAGE_HEAD)
    done.matches = match(done.classes, theirs)
    if done.classes != theirs:
        axes = class_axes(model, build, len(done.classes))
        _take_rows(model, found, axes, done.matches, len(done.classes), len(theirs))
    same = {name: t.shape for name, t in ours.items()} == {n: t.shape for n, t in found.items()}
    done.new_head = not same
    weights.update(found if same else ours)


def _drop(weights: Weights, prefix: str) -> Weights:
    """Take the weights of such names out."""
    return {name: weights.pop(name) for name in list(weights) if name.startswith(prefix)}


def match(ours: list[str], theirs: list[str]) -> list[tuple[int, int]]:
    """Pairs of labels of one name: the same, or if there is none, but one with its first name."""
    firsts = [first_name(name) for name in theirs]
    pairs = []
    for label, name in enumerate(ours):
        near = [i for i, first in enumerate(firsts) if first == first_name(name)]
        same = [i for i in near if theirs[i] == name]
        if same or len(near) == 1:
            pairs.append((label, (same or near)[0]))
    return pairs


def first_name(name: str) -> str:
    """A name for comparing classes: the first of synonyms, as ADE20K lists them, without case."""
    return re.split("[,;]", name)[0].strip().casefold()


def _remedy(model: Model) -> str:
    if isinstance(getattr(model, "head", None), torch.nn.Module):
        return (
            "use the config of that file (all but the classes must match), or set "
            "train.new_head=true to start the head anew"
        )
    return "use the config of that file: all but the classes must match"
