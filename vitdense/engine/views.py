"""Answers of a semantic model from windows, from mirrored and from scaled images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import ceil

import torch
from torch import Tensor

from vitdense.config.schema import Inference
from vitdense.data.geometry import resize
from vitdense.engine.windows import Compute, Mosaic, count_windows
from vitdense.ops.rows import chunks, restore_rows, rows_at_once, rows_needed
from vitdense.structures import Frame, Prediction, Size

Probabilities = Callable[[Tensor], Tensor]
"""Scores of classes [K, n, W] -> their probabilities."""

SOFTMAX = partial(torch.softmax, dim=0)
"""That of logits."""

Advance = Callable[[float], object]
"""Is told of each part of the work that is done; all parts together are 1."""


def segment(
    compute: Compute,
    images: Tensor,
    frames: Sequence[Frame],
    settings: Inference,
    divisor: int,
    device: torch.device,
    advance: Advance | None = None,
    glances: Glances | None = None,
    confidence: bool = False,
    probabilities: Probabilities = SOFTMAX,
) -> list[Prediction]:
    """The most likely class of each original pixel.

    Scores of windows are averaged as they are; those of mirrored and scaled images as
    probabilities at original size. At no time are there scores of a whole large image.

    Args:
        images: [B, C, H, W] on one canvas, on any device.
        frames: where each image lies on it.
        divisor: of the model's canvases.
        device: of the scores.
        glances: holds what `compute` notes of whole images, if it does.
        confidence: also answer the probability of the class of each pixel.
        probabilities: what the scores mean; by default they are logits.
    """
    # Only images that fit into one batch of windows are computed together.
    together = max(1, settings.batch_size // count_windows(settings, frames[0].canvas, divisor))
    predictions = []
    for start in range(0, len(images), together):
        some = slice(start, start + together)
        views = make_views(compute, images[some], frames[some], settings, divisor, device)
        for index, frame in enumerate(frames[some]):
            labels = torch.empty(frame.original, dtype=torch.long, device=device)
            sure = torch.empty(frame.original, device=device) if confidence else None
            for first, last in chunks(views[0].mosaic.classes, frame, device):
                scores = mean_scores(views, index, first, last, probabilities)
                labels[first:last] = scores.max(dim=0).indices
                if sure is not None:  # the scores of one view are no probabilities yet
                    scores = probabilities(scores) if len(views) == 1 else scores
                    sure[first:last] = scores.amax(0)
                if advance is not None:
                    advance((last - first) / frame.original[0] / len(images))
            predictions.append(Prediction(semantic=labels, confidence=sure))
        if glances is not None:
            found = predictions[start:]
            for prediction, image_scores in zip(found, glances.take(len(found)), strict=True):
                prediction.image_scores = image_scores
    return predictions


def mean_scores(
    views: Sequence[View],
    index: int,
    first: int,
    last: int,
    probabilities: Probabilities = SOFTMAX,
) -> Tensor:
    """Rows of scores at original size, float [K, last - first, W]: probabilities if of many."""
    if len(views) == 1:
        return views[0].rows(index, first, last)
    total = probabilities(views[0].rows(index, first, last))
    for view in views[1:]:
        total += probabilities(view.rows(index, first, last))
    return total / len(views)


class Glances:
    """Scores of image classes: the mean over all windows, scales and mirrorings of an image."""

    def __init__(self) -> None:
        self._logits: list[Tensor] = []

    def add(self, logits: Tensor) -> None:
        """Note logits [N * B, K] of N windows of each of B images, window after window."""
        self._logits.append(logits)

    def take(self, images: int) -> list[Tensor]:
        """float [K] in 0..1 of each of B images, since the last time."""
        looks = torch.cat(self._logits).float().sigmoid().unflatten(0, (-1, images))
        self._logits = []
        return list(looks.mean(0))


class View:
    """Images as the model sees them once: scaled, mirrored or not, window by window."""

    def __init__(self, mosaic: Mosaic, frames: Sequence[Frame], flip: bool) -> None:
        self.mosaic, self.frames, self.flip = mosaic, frames, flip

    def rows(self, index: int, first: int, last: int) -> Tensor:
        """Original rows of an image's scores, float [K, last - first, W]; to be read downwards."""
        read = partial(self.mosaic.read, index)
        scores = restore_rows(read, self.mosaic.size, self.frames[index], first, last)
        return scores.flip(-1) if self.flip else scores


def make_views(
    compute: Compute,
    images: Tensor,
    frames: Sequence[Frame],
    settings: Inference,
    divisor: int,
    device: torch.device,
) -> list[View]:
    """A view for each scale, and for each scale mirrored."""

    def keep(frame: Frame, classes: int, size: Size) -> int:
        return rows_needed(rows_at_once(classes, frames[0], device), size, frame)

    views = []
    for scale in settings.scales:
        scaled = scale_frames(frames, scale, divisor)
        # A single image is read from top to bottom, so that what lies above can be forgotten.
        kept = partial(keep, scaled[0]) if len(frames) == 1 else None
        for flip in (False, True) if settings.flip else (False,):
            shown = show(images, frames, scaled, flip)
            views.append(View(Mosaic(compute, shown, settings, divisor, kept), scaled, flip))
    return views


def scale_frames(frames: Sequence[Frame], scale: float, divisor: int) -> Sequence[Frame]:
    """The frames of the images at another size, on one canvas with no more padding than needed."""
    if scale == 1:
        return frames
    contents = [
        (max(1, round(frame.content[0] * scale)), max(1, round(frame.content[1] * scale)))
        for frame in frames
    ]
    height, width = (ceil(max(sides) / divisor) * divisor for sides in zip(*contents, strict=True))
    return [
        Frame((height, width), content, frame.original)
        for content, frame in zip(contents, frames, strict=True)
    ]


def show(images: Tensor, frames: Sequence[Frame], shown: Sequence[Frame], flip: bool) -> Tensor:
    """Images at the size of other frames, perhaps mirrored; padding stays right and below."""
    if list(frames) == list(shown) and not flip:
        return images
    result = images.new_zeros((*images.shape[:2], *shown[0].canvas))
    for place, image, frame, new in zip(result, images, frames, shown, strict=True):
        content = resize(image[:, : frame.content[0], : frame.content[1]], new.content)
        place[:, : new.content[0], : new.content[1]] = content.flip(-1) if flip else content
    return result
