"""What an answer must look like, and when two answers are the same."""

from __future__ import annotations

import torch
from torch import Tensor

from vitdense.structures import Frame, Prediction, Size, Task
from vitdense.testing.probes import require

FIELDS: dict[Task, tuple[str, ...]] = {
    "detection": ("scores", "labels", "boxes"),
    "instance": ("scores", "labels", "masks"),
    "semantic": ("semantic",),
    "panoptic": ("scores", "labels", "panoptic"),
}
"""What a prediction must hold for each task."""


def check_prediction(
    name: str, prediction: Prediction, task: Task, frame: Frame, num_classes: int
) -> None:
    """Assert the fields, types, shapes and ranges of one image's answer.

    Raises:
        AssertionError: begins with `name`.
    """
    require(
        isinstance(prediction, Prediction),
        f"{name}: give a Prediction for each image, not a {type(prediction).__name__}",
    )
    missing = [key for key in FIELDS[task] if getattr(prediction, key) is None]
    require(not missing, f"{name}: a {task} answer must hold {missing}, which are None")
    _check_objects(name, prediction, num_classes)
    if prediction.image_scores is not None:
        _check_image_scores(name, prediction.image_scores)
    if prediction.boxes is not None:
        _check_boxes(name, prediction.boxes, frame)
    for key in ("semantic", "panoptic"):
        value = getattr(prediction, key)
        if value is not None:
            require(
                value.dtype == torch.int64 and tuple(value.shape) == frame.original,
                f"{name}: {key} must be int64 of the original's size {frame.original}, it is "
                f"{value.dtype} {tuple(value.shape)}. Use frame.restore_map before the argmax",
            )
    if prediction.semantic is not None:
        _check_range(name, "semantic", prediction.semantic, num_classes)
    if prediction.panoptic is not None and prediction.labels is not None:
        _check_segments(name, prediction.panoptic, len(prediction.labels))
    if prediction.masks is not None:
        expected = (len(_given(prediction.labels)), *frame.original)
        require(
            prediction.masks.dtype == torch.bool and tuple(prediction.masks.shape) == expected,
            f"{name}: masks must be bool {expected} (objects, original size), they are "
            f"{prediction.masks.dtype} {tuple(prediction.masks.shape)}",
        )


def _check_objects(name: str, prediction: Prediction, num_classes: int) -> None:
    scores, labels = prediction.scores, prediction.labels
    if scores is not None:
        require(
            scores.is_floating_point() and scores.ndim == 1 and bool(scores.isfinite().all()),
            f"{name}: scores must be float [N] and finite, they are {scores.dtype} "
            f"{tuple(scores.shape)}",
        )
        require(
            not len(scores) or (scores.min() >= 0 and scores.max() <= 1),
            f"{name}: scores must lie in 0..1; apply a sigmoid or a softmax",
        )
        require(bool((scores.diff() <= 0).all()), f"{name}: scores must descend; sort the objects")
        require(
            len(scores) == len(_given(labels)),
            f"{name}: {len(scores)} scores for {len(_given(labels))} labels",
        )
    if labels is not None:
        require(labels.dtype == torch.int64, f"{name}: labels must be int64, not {labels.dtype}")
        _check_range(name, "labels", labels, num_classes)


def _check_image_scores(name: str, scores: Tensor) -> None:
    require(
        scores.is_floating_point()
        and scores.ndim == 1
        and bool(((scores >= 0) & (scores <= 1)).all()),
        f"{name}: image_scores must be float [K] in 0..1, they are {scores.dtype} "
        f"{tuple(scores.shape)}; apply a sigmoid",
    )


def _check_boxes(name: str, boxes: Tensor, frame: Frame) -> None:
    require(
        boxes.is_floating_point() and boxes.ndim == 2 and boxes.shape[1] == 4,
        f"{name}: boxes must be float [N, 4], they are {boxes.dtype} {tuple(boxes.shape)}",
    )
    height, width = frame.original
    inside = (boxes >= 0).all() and (boxes <= boxes.new_tensor([width, height] * 2)).all()
    require(
        inside,
        f"{name}: boxes leave the original image of {frame.original}; use "
        "frame.restore_boxes on xyxy canvas pixels",
    )
    require(
        bool((boxes[:, 2:] >= boxes[:, :2]).all()),
        f"{name}: boxes must be xyxy with x2 >= x1 and y2 >= y1; these look like another format",
    )


def _check_segments(name: str, panoptic: Tensor, count: int) -> None:
    _check_range(name, "panoptic", panoptic, count + 1)
    missing = sorted(set(range(1, count + 1)) - set(panoptic.unique().tolist()))
    require(
        not missing,
        f"{name}: segments {missing[:3]} of {count} have no pixel in panoptic; k in the map is "
        "the k-th entry of labels, from 1, and 0 is void",
    )


def check_semantic_logits(
    name: str, logits: object, count: int, num_classes: int, canvas: Size
) -> None:
    """Assert what windows and flipped images are averaged from.

    Raises:
        AssertionError: begins with `name`.
    """
    require(
        isinstance(logits, Tensor)
        and logits.is_floating_point()
        and logits.shape[:-2] == (count, num_classes)
        and bool(logits.isfinite().all()),
        f"{name} must be float [B, C, h, w] = [{count}, {num_classes}, h, w] and finite; it is "
        + (
            f"{logits.dtype} {tuple(logits.shape)}"
            if isinstance(logits, Tensor)
            else type(logits).__name__
        ),
    )
    assert isinstance(logits, Tensor)
    (height, width), (rows, columns) = canvas, logits.shape[-2:]
    require(
        abs(rows * width / height - columns) <= 1,
        f"{name} must lie over the whole canvas of {canvas}; a map of {(rows, columns)} has "
        "another form",
    )


def _check_range(name: str, key: str, values: Tensor, count: int) -> None:
    require(
        not values.numel() or (values.min() >= 0 and values.max() < count),
        f"{name}: {key} must lie in 0..{count - 1}",
    )


def _given(labels: Tensor | None) -> Tensor:
    return torch.empty(0) if labels is None else labels


def agreement(first: Prediction, second: Prediction) -> float:
    """Share of the answers, in 0..1, that two predictions for one image have in common."""
    shares = [1.0]
    if first.image_scores is not None and second.image_scores is not None:
        close = (first.image_scores - second.image_scores).abs() < 1e-3
        shares.append(close.float().mean().item())
    if first.semantic is not None and second.semantic is not None:
        shares.append((first.semantic == second.semantic).float().mean().item())
    if first.panoptic is not None and second.panoptic is not None:
        shares.append(_same_pixels(first, second))
    elif first.scores is not None and second.scores is not None:
        shares += [_found(first, second), _found(second, first)]
    return min(shares)


def _same_pixels(first: Prediction, second: Prediction) -> float:
    maps = []
    for item in (first, second):
        assert item.labels is not None and item.panoptic is not None
        maps.append(torch.cat([item.labels.new_tensor([-1]), item.labels])[item.panoptic])
    return (maps[0] == maps[1]).float().mean().item()


def _found(first: Prediction, second: Prediction) -> float:
    """Share of the objects of `first` that `second` also has, whatever their order."""
    a, b = _objects(first), _objects(second)
    if len(a) == 0 or len(b) == 0:
        return float(len(a) == len(b))
    tolerance = a.new_tensor([1e-3, 1e-3, 0.5, 0.5, 0.5, 0.5])[: a.shape[1]]
    close = ((a[:, None] - b[None]).abs() <= tolerance).all(-1)
    if first.masks is not None and second.masks is not None:
        close &= _overlaps(first.masks, second.masks) > 0.9
    return close.any(1).float().mean().item()


def _objects(prediction: Prediction) -> Tensor:
    """float [N, 2 or 6]: score, label and box of each object."""
    assert prediction.scores is not None and prediction.labels is not None
    columns = [prediction.scores[:, None].float(), prediction.labels[:, None].float()]
    if prediction.boxes is not None:
        columns.append(prediction.boxes.float())
    return torch.cat(columns, 1)


def _overlaps(first: Tensor, second: Tensor) -> Tensor:
    """IoU of every mask with every other, float [N, M]; 1 for two empty ones."""
    a, b = first.flatten(1).float(), second.flatten(1).float()
    common = a @ b.mT
    return (common + 1e-6) / (a.sum(1)[:, None] + b.sum(1)[None] - common + 1e-6)
