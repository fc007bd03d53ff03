"""Losses of the latest steps, kept on the device until somebody reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor


class NonFiniteLoss(RuntimeError):
    """A loss was infinite or not a number: names the step, the terms and the images."""


@dataclass(slots=True)
class Entry:
    """The terms of one batch."""

    step: int
    names: list[str]
    values: Tensor
    paths: Sequence[Path]


@dataclass(slots=True)
class Tally:
    """What was lost since the last reading. Adding copies nothing to the host."""

    entries: list[Entry] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)

    def add(self, step: int, losses: Mapping[str, Tensor], paths: Sequence[Path]) -> None:
        """Note the terms of a batch (scalars) that step number `step` learns from."""
        values = torch.stack([value.detach().float() for value in losses.values()])
        self.entries.append(Entry(step, list(losses), values, paths))

    def add_norm(self, norm: Tensor) -> None:
        """Note the norm of a step's gradient before clipping."""
        self.norms.append(norm.detach())

    def read(self) -> dict[str, float]:
        """Mean `loss`, each term as `loss/<name>` and `grad_norm`, and forget them.

        Raises:
            NonFiniteLoss: one of the terms was not finite.
        """
        entries, norms = self.entries, self.norms
        self.entries, self.norms = [], []
        if not entries:
            return {}
        values = torch.cat([entry.values for entry in entries]).tolist()
        means: dict[str, list[float]] = {"loss": []}
        for entry in entries:
            terms = dict(zip(entry.names, values[: len(entry.names)], strict=True))
            values = values[len(terms) :]
            _check(entry, terms)
            means["loss"].append(sum(terms.values()))
            for name, value in terms.items():
                means.setdefault(f"loss/{name}", []).append(value)
        if norms:
            means["grad_norm"] = torch.stack(norms).tolist()
        return {name: sum(numbers) / len(numbers) for name, numbers in means.items()}


def _check(entry: Entry, terms: dict[str, float]) -> None:
    faulty = [f"{name} = {value}" for name, value in terms.items() if not math.isfinite(value)]
    if faulty:
        raise NonFiniteLoss(
            f"step {entry.step}: the loss is not finite: {', '.join(faulty)}; images: "
            f"{', '.join(str(path) for path in entry.paths)}. Look at these images and their "
            "annotations, lower optimizer.lr, set train.clip, or train in precision fp32"
        )
