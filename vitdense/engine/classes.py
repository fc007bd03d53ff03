"""Which parameters of a model have a row for each class: found by building it with one more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vitdense.models.base import Model


@dataclass(frozen=True, slots=True)
class ClassAxis:
    """Where a parameter has its classes.

    Rows of classes come first along the axis; those of "no object" and the like lie behind them.

    Attributes:
        axis: of the tensor.
        extra: rows that are there whatever the number of classes.
    """

    axis: int
    extra: int

    def places(self, classes: list[int], count: int) -> Tensor:
        """Indices of the classes' rows among those for `count` classes, and of those behind."""
        return torch.tensor([*classes, *range(count, count + self.extra)], dtype=torch.long)

    def rows(self, tensor: Tensor, classes: list[int], count: int) -> Tensor:
        """These rows of a tensor on the CPU."""
        return tensor.index_select(self.axis, self.places(classes, count))

    def others(self, tensor: Tensor) -> list[int]:
        """Sizes of the other axes."""
        return [size for axis, size in enumerate(tensor.shape) if axis != self.axis]


def class_axes(
    model: Model, build: Callable[[int], Model], count: int | None = None
) -> dict[str, ClassAxis]:
    """The class-wise parameters and buffers of a model, by name.

    They are those that have another shape in a model for one class more, so that no head has to
    say which of its parameters they are.

    Args:
        build: a model of the same kind for a number of classes; called on the meta device, where
            that costs no memory, or on the CPU if a constructor cannot do with that.
        count: of the model's classes, where `build` takes the number of others than `num_classes`.

    Raises:
        ValueError: a parameter has not one row for each class along one axis.
    """
    count = model.num_classes if count is None else count
    more = _shapes(build, count + 1)
    ours = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if ours.keys() != more.keys():
        odd = min(ours.keys() ^ more.keys())
        raise ValueError(f"classes: whether the model has {odd} depends on the number of classes")
    return {
        name: _axis(name, shape, more[name], count)
        for name, shape in ours.items()
        if shape != more[name]
    }


def _axis(name: str, ours: torch.Size, more: torch.Size, num_classes: int) -> ClassAxis:
    steps = [b - a for a, b in zip(ours, more, strict=True)]
    if sorted(map(abs, steps)) != [0] * (len(steps) - 1) + [1] or sum(steps) != 1:
        raise ValueError(
            f"classes: {name} is {list(ours)} for {num_classes} classes and {list(more)} for one "
            "more; it must have one row for each class along one axis"
        )
    axis = steps.index(1)
    return ClassAxis(axis, ours[axis] - num_classes)


def _shapes(build: Callable[[int], Model], num_classes: int) -> dict[str, torch.Size]:
    state = torch.get_rng_state()
    try:
        try:
            with torch.device("meta"):
                model = build(num_classes)
        except (RuntimeError, NotImplementedError, TypeError):  # it reads values as it is built
            model = build(num_classes)
    except Exception as error:  # of any constructor
        raise ValueError(
            "classes: to find what has a row for each class, the model was built for one class "
            f"more, which failed: {error}"
        ) from error
    finally:
        torch.set_rng_state(state)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
