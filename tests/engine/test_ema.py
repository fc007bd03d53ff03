"""The running mean of weights."""

from __future__ import annotations

import pytest
import torch

from vitdense.engine.ema import Ema
from vitdense.models.base import Model


def walk(model: Model, ema: Ema, steps: int) -> list[torch.Tensor]:
    """Random steps; returns the weight after each."""
    visited = []
    for _ in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model.train()(torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8))
        ema.update(model)
        visited.append(model.head.weight.detach().clone())
    return visited


def test_closed_form(tiny_model: Model) -> None:
    """Decays of 1/10, 2/11, ... until the limit."""
    ema = Ema(tiny_model, 0.25)
    expected = tiny_model.head.weight.detach().clone()
    for n, weight in enumerate(walk(tiny_model, ema, 6), start=1):
        decay = min(0.25, n / (n + 9))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(ema.model.head.weight, expected)


def test_buffers_are_copied(tiny_model: Model) -> None:
    ema = Ema(tiny_model, 0.999)
    walk(tiny_model, ema, 3)
    for ours, theirs in zip(ema.model.buffers(), tiny_model.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert ema.model.norm.num_batches_tracked == 3


def test_the_average_does_not_train(tiny_model: Model) -> None:
    ema = Ema(tiny_model, 0.9)
    assert not ema.model.training
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
    assert all(parameter.requires_grad for parameter in tiny_model.parameters())


def test_state_continues(tiny_model: Model) -> None:
    ema = Ema(tiny_model, 0.999)
    walk(tiny_model, ema, 3)
    other = Ema(tiny_model, 0.999)
    other.load_state_dict(ema.state_dict())
    assert other.updates == 3
    for each in (ema, other):
        each.update(tiny_model)
    assert torch.equal(ema.model.head.weight, other.model.head.weight)


def test_decay_of_one_is_refused(tiny_model: Model) -> None:
    with pytest.raises(ValueError, match="^ema: must be in 0..1"):
        Ema(tiny_model, 1.0)
