"""What every metric promises."""

from __future__ import annotations

from typing import ClassVar

from vitdense.structures import Batch, Prediction, Task


class Metric:
    """Compares predictions with truth over a whole data set, in original pixels.

    Subclasses take the class names first and their options after `*`.

    Attributes:
        tasks: of the models that it can judge; None leaves that open.
        headline: the key of `compute` by which the best model is chosen; higher is better.
        lower: keys of `compute` that are the better the lower they are.
        confidence: whether it reads `Prediction.confidence`, which takes a softmax.
        frequencies: of each class, as in `Dataset`; None if the data set tells none.
    """

    tasks: tuple[Task, ...] | None = None
    headline: ClassVar[str]
    lower: tuple[str, ...] = ()
    confidence: bool = False
    frequencies: list[str] | None = None

    def __init__(self, classes: list[str]) -> None:
        self.classes = classes

    def __str__(self) -> str:
        return type(self).__name__

    def update(self, predictions: list[Prediction], batch: Batch) -> None:
        """Count one batch in."""
        raise NotImplementedError

    def compute(self) -> dict[str, float]:
        """The numbers over all that was counted, by all processes; per-class values as `AP/cat`.

        Each process counts its share: `metrics.processes` has what brings the shares together.
        """
        raise NotImplementedError

    def reset(self) -> None:
        """Forget all."""
        raise NotImplementedError
