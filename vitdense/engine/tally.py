"""Losses of the latest steps, kept on the device until somebody reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True, slots=True)
class Fault:
    """A step with a loss or a gradient that is not finite.

    Attributes:
        step: its number; `fraction` is how much of the run was done before it.
        terms: of the loss, for each of the batches that it learned from.
        images: of each of them.
        grad_norm: the norm of its gradient before clipping, if it is known.
    """

    step: int
    fraction: float
    terms: list[dict[str, float]]
    images: list[list[str]]
    grad_norm: float | None

    def __str__(self) -> str:
        faulty = [
            (f"{name} = {value}", images)
            for terms, images in zip(self.terms, self.images, strict=True)
            for name, value in terms.items()
            if not math.isfinite(value)
        ]
        if faulty:
            what = f"the loss is not finite: {', '.join(text for text, _ in faulty)}"
            images = faulty[0][1]
        else:
            what = f"the gradient is not finite (its norm is {self.grad_norm}), though the loss is"
            images = [image for batch in self.images for image in batch]
        return (
            f"step {self.step}: {what}; images: {', '.join(images)}. Look at them and at their "
            "annotations, lower optimizer.lr, set train.clip, or train in precision fp32"
        )


class NonFiniteLoss(RuntimeError):
    """A loss or gradient was infinite or not a number: names the step, the terms and the images."""

    def __init__(self, message: str, fault: Fault) -> None:
        super().__init__(message)
        self.fault = fault


@dataclass(slots=True)
class Entry:
    """The terms of one batch."""

    step: int
    fraction: float
    names: list[str]
    values: Tensor
    paths: Sequence[Path]


@dataclass(slots=True)
class Tally:
    """Loss terms and gradient norms since the last reading; to add some waits for no device.

    Attributes:
        faulty: 1 from the first loss or gradient on that is not finite, before it 0; a scalar on
            the device, None before the first.
    """

    entries: list[Entry] = field(default_factory=list)
    norms: dict[int, Tensor] = field(default_factory=dict)
    faulty: Tensor | None = None

    def add(
        self, step: int, losses: Mapping[str, Tensor], paths: Sequence[Path], fraction: float = 0.0
    ) -> None:
        """Note the terms of a batch (scalars) that step number `step` learns from.

        Args:
            fraction: of the run that is done before that step.
        """
        values = torch.stack([value.detach().float() for value in losses.values()])
        self.entries.append(Entry(step, fraction, list(losses), values, paths))
        self._judge(values)

    def add_norm(self, norm: Tensor, scaled: bool = False) -> None:
        """Note the norm of the latest step's gradient before clipping.

        Args:
            scaled: a scaler watches the gradient, and leaves out steps where it is not finite.
        """
        if scaled:
            norm = torch.where(norm.isfinite(), norm, -1)  # no norm is; it counts nowhere
        self.norms[self.entries[-1].step if self.entries else 0] = norm.detach()
        self._judge(norm)

    def read(self) -> dict[str, float]:
        """Mean `loss`, each term as `loss/<name>` and `grad_norm`, and forget them.

        Raises:
            NonFiniteLoss: one of the terms or norms was not finite.
        """
        entries, pending = self.entries, self.norms
        self.entries, self.norms = [], {}
        if not entries:
            return {}
        values = torch.cat([entry.values for entry in entries]).tolist()
        norms = dict(
            zip(pending, torch.stack([*pending.values()]).tolist() if pending else [], strict=True)
        )
        terms = []
        for entry in entries:
            terms.append(dict(zip(entry.names, values[: len(entry.names)], strict=True)))
            values = values[len(entry.names) :]
        _check(entries, terms, norms)
        means: dict[str, list[float]] = {"loss": [sum(them.values()) for them in terms]}
        for them in terms:
            for name, value in them.items():
                means.setdefault(f"loss/{name}", []).append(value)
        if known := [norm for norm in norms.values() if norm >= 0]:
            means["grad_norm"] = known
        return {name: sum(numbers) / len(numbers) for name, numbers in means.items()}

    def peek(self) -> dict[str, float]:
        """The same without forgetting them."""
        entries, norms = self.entries, self.norms
        means = self.read()
        self.entries, self.norms = entries, norms
        return means

    def state_dict(self) -> dict[str, Any]:
        """What is not read yet, for resuming."""
        entries = [
            [it.step, it.fraction, it.names, it.values, [str(path) for path in it.paths]]
            for it in self.entries
        ]
        return {"entries": entries, "norms": dict(self.norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.entries = [
            Entry(step, fraction, names, values, [Path(path) for path in paths])
            for step, fraction, names, values, paths in state["entries"]
        ]
        self.norms = dict(state["norms"])

    def _judge(self, values: Tensor) -> None:
        faulty = 1 - values.isfinite().all().float()
        self.faulty = faulty if self.faulty is None else torch.maximum(self.faulty, faulty)


def _check(entries: list[Entry], terms: list[dict[str, float]], norms: dict[int, float]) -> None:
    for entry, them in zip(entries, terms, strict=True):
        norm = norms.get(entry.step, 0.0)
        if all(map(math.isfinite, [*them.values(), norm])):
            continue
        whole = [place for place, other in enumerate(entries) if other.step == entry.step]
        fault = Fault(
            entry.step,
            entry.fraction,
            [terms[place] for place in whole],
            [[str(path) for path in entries[place].paths] for place in whole],
            norms.get(entry.step),
        )
        raise NonFiniteLoss(str(fault), fault)


def hold_at_fault(optimizer: Optimizer, tally: Tally) -> None:
    """From the first fault on let the optimizer change nothing, without waiting for the device.

    Losses are read some steps late. Until then the weights stay those with which the faulty step
    began, to be looked at. The optimizer is told as a `GradScaler` would tell it, by `found_inf`,
    which only fused ones heed.
    """
    if not holds(optimizer):
        return

    def tell(optimizer: Any, args: Any, kwargs: Any) -> None:
        if tally.faulty is not None:
            scaler = getattr(optimizer, "found_inf", None)
            faulty = tally.faulty
            optimizer.found_inf = faulty if scaler is None else torch.maximum(faulty, scaler)

    optimizer.register_step_pre_hook(tell)


def holds(optimizer: Optimizer) -> bool:
    """Whether the optimizer heeds `hold_at_fault`: a fused one."""
    return all(group.get("fused") for group in optimizer.param_groups)
