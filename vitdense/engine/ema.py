"""Exponential moving average of a model's weights."""

from __future__ import annotations

import copy
from typing import Any, Generic, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


class Ema(Generic[M]):
    """A second model whose parameters are the running mean of the first's.

    After the n-th update the decay is min(`decay`, n / (n + 9)), so that a young average forgets
    the start and reaches over about a tenth of a short run. Buffers are copied.

    Attributes:
        model: the averaged model, in evaluation mode, without gradients.
        updates: how often it was updated.
    """

    def __init__(self, model: M, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema: must be in 0..1, without 1, got {decay}")
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the parameters of `model` after a step."""
        self.updates += 1
        weight = 1 - min(self.decay, self.updates / (self.updates + 9))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), weight)
        ours, theirs = list(self.model.buffers()), list(model.buffers())
        if ours:
            torch._foreach_copy_(ours, theirs)

    def state_dict(self) -> dict[str, Any]:
        """Weights and the number of updates, for resuming."""
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.updates = state["updates"]
