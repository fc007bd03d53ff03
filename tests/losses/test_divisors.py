"""What losses are divided by where a step has several batches."""

from __future__ import annotations

import pytest
import torch

from vitdense.losses.divisors import divisor, mean_count, objects, one_step
from vitdense.structures import Target

LIKE = torch.zeros(())


def batch(*counts: int) -> list[Target]:
    return [Target(labels=torch.zeros(count, dtype=torch.long)) for count in counts]


def test_of_one_batch_it_is_its_own_count():
    assert divisor(6, objects, LIKE) == 6
    assert divisor(torch.tensor(2.5), objects, LIKE) == 2.5
    assert (divisor(0, objects, LIKE), mean_count(0, objects, LIKE)) == (1, 0)
    assert divisor(1, objects, LIKE.double()).dtype == torch.float64
    assert divisor(1, objects, LIKE.bfloat16()).dtype == torch.float32


def test_of_several_batches_it_is_the_mean():
    with one_step([batch(1, 2), batch(0, 0), batch(4, 0)]):
        assert divisor(3, objects, LIKE) == divisor(0, objects, LIKE) == pytest.approx(7 / 3)
    with one_step([batch(0), batch(0)]):  # together as one batch without any
        assert (divisor(0, objects, LIKE), mean_count(0, objects, LIKE)) == (0.5, 0)
    with one_step([batch(5)]):
        assert divisor(6, objects, LIKE) == 6


def test_a_step_counts_once_and_is_forgotten():
    asked = []

    def count(target: Target) -> torch.Tensor:
        asked.append(target)
        return torch.tensor(2.0)

    for _ in range(2):
        with one_step([batch(0, 0), batch(0)]):
            assert [divisor(9, count, LIKE).item() for _ in range(3)] == [3, 3, 3]
    assert len(asked) == 2 * 3
    assert divisor(9, count, LIKE) == 9


def test_processes_are_averaged(monkeypatch: pytest.MonkeyPatch):
    ranks = torch.distributed
    monkeypatch.setattr(ranks, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks, "get_world_size", lambda: 2)
    monkeypatch.setattr(ranks, "all_reduce", lambda count: count.add_(5))  # the other rank's
    assert divisor(0, objects, LIKE) == 2.5
    with one_step([batch(3), batch(0)]):
        assert divisor(3, objects, LIKE) == 2
    monkeypatch.setattr(ranks, "all_reduce", lambda count: None)
    assert divisor(0, objects, LIKE) == 0.5
