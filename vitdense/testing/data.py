"""Checks of the parts that feed a model: data sets and transform policies."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitdense.data.base import Dataset, Policy, shown_labels
from vitdense.engine.promises import sample_fault
from vitdense.structures import IGNORE, Sample, Size, Target
from vitdense.testing import probes
from vitdense.testing.probes import require


def check_dataset(
    cls: Callable[..., Dataset],
    root: Path | str,
    split: str,
    *,
    samples: int = 8,
    channels: int = 3,
    **options: Any,
) -> None:
    """Assert what every data set must keep.

    Class names and category ids that fit each other; unique image ids; images of the told number
    of channels, uint8 or float32 in 0..255; targets of the right types inside the image; the same
    truth with and without the image; the same sample each time; pickling, for worker processes.

    Args:
        cls: the class, or a function that builds the part.
        root, split: the facts it is built with; a small set is enough.
        samples: how many of its samples are looked at.
        channels: of its images; with 3 it is tried whether they can be read as grey, too.
        options: what a config would set.

    Raises:
        AssertionError: says what is broken and how to mend it.
    """
    name = getattr(cls, "__name__", type(cls).__name__)
    dataset = cls(Path(root), split, **options)
    probes.check_contract("dataset", dataset)
    dataset.channels = channels
    _check_classes(name, dataset)
    require(len(dataset) > 0, f"{name}: no samples in split '{split}' of {root}")
    indices = range(min(samples, len(dataset)))
    found = [dataset[index] for index in indices]
    for index, sample in enumerate(found):
        _require_sample(f"{name}[{index}]", sample)
        _check_sample(name, sample, dataset)
        _check_labels(name, dataset.labels(index), sample.target, index)
    ids = [sample.image_id for sample in found]
    require(
        len(set(ids)) == len(ids), f"{name}: two samples have one image_id; metrics need unique ids"
    )
    for copy in (dataset, _pickled(name, dataset)):
        require(
            _equal(found[0], copy[0]),
            f"{name}: sample 0 differs when read again, or from a pickled copy in a worker. "
            "Random changes belong to a policy",
        )
    require(
        _equal(found[0].target, dataset.target(0)),
        f"{name}.target(0) is another truth than that of sample 0",
    )
    if channels != 3:
        return
    dataset.channels = 1
    require(
        dataset[0].image.shape[0] == 1,
        f"{name}: with `channels = 1` the image still has {dataset[0].image.shape[0]} channels; "
        "decode to self.channels: the engine sets it to what the model takes",
    )


def _check_labels(name: str, labels: Tensor, target: Target, index: int) -> None:
    shown = shown_labels(target)
    require(
        _equal(labels, shown),
        f"{name}.labels({index}) is {labels.tolist()}, and the truth shows {shown.tolist()}: "
        "int64, each once, ascending, without crowds",
    )


def check_policy(cls: Callable[..., Policy], *, channels: int = 3, **options: Any) -> None:
    """Assert what every transform policy must keep.

    Training changes image and truth together, evaluation the image alone; types stay, uint8 and
    the float32 of deeper images; objects that are cropped away leave every field; images without
    objects work; the sample that comes in stays as it is; the same random state gives the same
    sample.

    Args:
        cls: the class, or a function that builds the part.
        channels: channels of the images it is tried on.
        options: what a config would set.

    Raises:
        AssertionError: says what is broken and how to mend it.
    """
    name = getattr(cls, "__name__", type(cls).__name__)
    with probes.seeded():
        policy = cls(**options)
        probes.check_contract("transform", policy)
        for seed, (size, objects) in enumerate((((70, 101), 3), ((96, 64), 0), ((50, 50), 9))):
            sample = _make_sample(size, objects, channels, deep=objects == 9)
            before = pickle.dumps(sample)
            for part in ("train", "evaluate"):
                torch.manual_seed(seed)
                first = getattr(policy, part)(sample)
                _require_sample(f"{name}.{part}", first)
                torch.manual_seed(seed)
                second = getattr(policy, part)(pickle.loads(before))
                require(
                    _equal(first, second),
                    f"{name}.{part}: one random state gives two samples. Draw from torch, "
                    "not from random or numpy: only torch's state makes a run repeatable",
                )
                require(
                    _equal(sample, pickle.loads(before)),
                    f"{name}.{part} changes the sample that comes in; return a new one",
                )
                _check_prepared(f"{name}.{part}", policy, sample, first, part == "evaluate")


def _pickled(name: str, dataset: Dataset) -> Dataset:
    try:
        copy: Dataset = pickle.loads(pickle.dumps(dataset))
    except Exception as error:
        raise AssertionError(
            f"{name} cannot be pickled, so no worker process can read it: {error}. "
            "Keep no open files, lambdas or local functions on it"
        ) from error
    return copy


def _check_classes(name: str, dataset: Dataset) -> None:
    classes, ids = list(dataset.classes), list(dataset.category_ids)
    require(
        bool(classes) and all(isinstance(item, str) for item in classes),
        f"{name}.classes must be a non-empty list of names; it is {classes!r:.80}",
    )
    require(len(set(classes)) == len(classes), f"{name}.classes names a class twice: {classes}")
    require(
        len(ids) == len(classes) and len(set(ids)) == len(ids),
        f"{name}.category_ids must hold one number per class, each once: "
        f"{len(ids)} ids for {len(classes)} classes",
    )


def _require_sample(what: str, sample: object) -> None:
    fault = sample_fault(sample)
    require(fault is None, f"{what} {fault}")


def _check_sample(name: str, sample: Sample, dataset: Dataset) -> None:
    where = f"{name}, image {sample.image_id}"
    image = sample.image
    require(
        _is_image(image) and image.shape[0] == dataset.channels,
        f"{where}: image must be uint8 [{dataset.channels}, H, W], or float32 in 0..255 for files "
        f"of more than 8 bits, it is {image.dtype} {tuple(image.shape)} up to {image.max():g}; "
        "the model normalises",
    )
    require(
        sample.original == tuple(image.shape[1:]),
        f"{where}: original is {sample.original} and the image is {tuple(image.shape[1:])}: "
        "both must be (height, width) of the file",
    )
    require(
        isinstance(sample.path, Path) and sample.path.exists(),
        f"{where}: path must be a pathlib.Path to the file, it is {sample.path!r}",
    )
    _check_target(where, sample.target, sample.original, len(dataset.classes))
    labels = sample.target.image_labels
    require(
        len(dataset.image_classes) == (0 if labels is None else len(labels)),
        f"{where}: target.image_labels must hold one bool for each of {name}.image_classes",
    )


def _check_target(where: str, target: Target, size: Size, num_classes: int) -> None:
    """Types, shapes and ranges of a truth in the pixels of an image of `size`."""
    count = 0 if target.labels is None else len(target.labels)
    expected = {
        "labels": (torch.int64, (count,)),
        "boxes": (torch.float32, (count, 4)),
        "masks": (torch.bool, (count, *size)),
        "crowd": (torch.bool, (count,)),
        "area": (torch.float32, (count,)),
    }
    for key, (dtype, shape) in expected.items():
        value = getattr(target, key)
        require(
            value is None or (value.dtype == dtype and tuple(value.shape) == shape),
            f"{where}: target.{key} must be {dtype} {shape}, it is "
            f"{value is not None and (value.dtype, tuple(value.shape))}",
        )
    if target.labels is not None and count:
        require(
            int(target.labels.min()) >= 0 and int(target.labels.max()) < num_classes,
            f"{where}: target.labels must lie in 0..{num_classes - 1}; map the file's ids",
        )
    for key in ("judged", "partial"):
        flags = getattr(target, key)
        require(
            flags is None or (flags.dtype == torch.bool and tuple(flags.shape) == (num_classes,)),
            f"{where}: target.{key} must be bool {(num_classes,)}, a flag of each class",
        )
    labels = target.image_labels
    require(
        labels is None or (labels.dtype == torch.bool and labels.ndim == 1),
        f"{where}: target.image_labels must be bool [K], it is "
        f"{labels is not None and (labels.dtype, tuple(labels.shape))}",
    )
    if target.boxes is not None and count:
        height, width = size
        require(
            bool((target.boxes >= 0).all())
            and bool((target.boxes <= target.boxes.new_tensor([width, height] * 2)).all())
            and bool((target.boxes[:, 2:] > target.boxes[:, :2]).all()),
            f"{where}: target.boxes must be xyxy pixels inside the image of {size}, "
            f"with x2 > x1 and y2 > y1: {target.boxes.tolist()!r:.120}",
        )
    if target.semantic is not None:
        _check_semantic(where, target.semantic, size, num_classes)


def _check_semantic(where: str, semantic: Tensor, size: Size, num_classes: int) -> None:
    require(
        semantic.dtype in (torch.uint8, torch.int64) and tuple(semantic.shape) == size,
        f"{where}: target.semantic must be uint8 or int64 {size}, it is {semantic.dtype} "
        f"{tuple(semantic.shape)}",
    )
    values = semantic[semantic != IGNORE]
    require(
        not values.numel() or (values.min() >= 0 and values.max() < num_classes),
        f"{where}: target.semantic must lie in 0..{num_classes - 1} or be {IGNORE} (ignored)",
    )


def _is_image(image: Tensor) -> bool:
    if image.dtype == torch.uint8:
        return image.ndim == 3
    in_range = not image.any() or (image.min() >= 0 and 1 < image.max() <= 255)
    return image.dtype == torch.float32 and image.ndim == 3 and bool(in_range)


def _make_sample(size: Size, objects: int, channels: int, deep: bool) -> Sample:
    image = torch.randint(256, (channels, *size), dtype=torch.uint8)
    image = image.float().mul_(0.999) if deep else image
    target = probes.make_target(size, 3, objects)
    return Sample(image, target, 7, size, Path("images/7.jpg"))


def _check_prepared(
    name: str, policy: Policy, before: Sample, after: Sample, evaluation: bool
) -> None:
    require(
        _is_image(after.image)
        and after.image.dtype == before.image.dtype
        and after.image.shape[0] == before.image.shape[0],
        f"{name} must return an image of the type ({before.image.dtype}), the range and the "
        f"channels that came in, it returned {after.image.dtype} {tuple(after.image.shape)} up to "
        f"{after.image.max():g}; the model normalises",
    )
    size = after.size
    same_facts = (after.image_id, after.original, after.path) == (
        before.image_id, before.original, before.path,
    )  # fmt: skip
    require(same_facts, f"{name} must keep image_id, original and path")
    if evaluation:
        require(
            _equal(after.target, before.target),
            f"{name} must leave the truth in original pixels: resize the image alone",
        )
        fits = policy.canvas is None or all(
            a <= b for a, b in zip(size, policy.canvas, strict=True)
        )
        require(fits, f"{name} returned {size}, larger than the promised canvas {policy.canvas}")
    else:
        _check_target(name, after.target, size, 3)
        require(
            _equal(after.target.image_labels, before.target.image_labels),
            f"{name} must keep target.image_labels: they are of the whole image",
        )


def _equal(first: Any, second: Any) -> bool:
    """Equality of records that hold tensors."""
    if isinstance(first, (Sample, Target)):
        names = type(first).__dataclass_fields__
        return all(_equal(getattr(first, key), getattr(second, key)) for key in names)
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    return bool(first == second)
