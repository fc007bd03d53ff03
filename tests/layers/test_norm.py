"""Norms of feature maps where several processes train."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from vitdense.layers.norm import BatchNorm, SyncBatchNorm, make_norm
from vitdense.ops.processes import alone


@pytest.fixture(autouse=True)
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)


@pytest.mark.parametrize(
    ("backend", "expected"),
    [("gloo", BatchNorm), ("nccl", SyncBatchNorm), ("cpu:gloo,cuda:nccl", SyncBatchNorm)],
)
def test_auto_synchronizes_on_gpus_alone(
    backend: str, expected: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes on the CPU of a machine with a GPU cannot: torch refuses."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda *_: backend)
    assert type(make_norm("auto", 4)) is expected
    with alone():
        assert type(make_norm("auto", 4)) is BatchNorm


def test_a_process_alone_waits_for_no_other() -> None:
    ours, theirs = make_norm("sync", 4), nn.BatchNorm2d(4)
    maps = torch.randn(2, 4, 3, 3)
    with alone():
        torch.testing.assert_close(ours(maps), theirs(maps))
        assert torch.equal(ours(maps[:1, :, :1, :1]), ours.eval()(maps[:1, :, :1, :1]))
    with pytest.raises(ValueError, match="GPU"):  # where it would meet the others
        ours.train()(maps)
