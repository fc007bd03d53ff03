"""Devices, seeds, precision."""

from __future__ import annotations

import random
from collections import namedtuple
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vitdense.engine import runtime
from vitdense.layers.norm import BatchNorm


def draw() -> tuple[float, float, float]:
    return torch.rand(1).item(), random.random(), float(np.random.rand())


def test_a_step_draws_the_same_numbers_again() -> None:
    runtime.seed_step(3, 10, 1)
    first = draw()
    draw()
    runtime.seed_step(3, 10, 1)
    assert draw() == first
    for other in ((4, 10, 1), (3, 11, 1), (3, 10, 0)):
        runtime.seed_step(*other)
        assert not set(draw()) & set(first)


def test_seeds_up_to_63_bits() -> None:
    runtime.seed_step(2**63 - 1, 10**9)
    assert torch.rand(2).unique().numel() == 2


def test_auto_takes_what_there_is() -> None:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    assert runtime.choose_device("auto").type == kind
    assert runtime.start("cpu") == runtime.Runtime(torch.device("cpu"), 0, 1)
    assert runtime.choose_precision("auto", torch.device("cpu")) == torch.float32


def test_auto_leaves_emulated_bf16_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A V100 or a T4 computes in bf16 too, slower than in fp32."""
    gpu = SimpleNamespace(major=7)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)
    assert runtime.choose_precision("auto", torch.device("cuda")) == torch.float32
    gpu.major = 8
    assert runtime.choose_precision("auto", torch.device("cuda")) == torch.bfloat16


def test_absent_devices_are_named() -> None:
    with pytest.raises(ValueError, match="^device: cuda:99 is not here"):
        runtime.choose_device("cuda:99")
    with pytest.raises(ValueError, match="^device: 'gpu' is no device"):
        runtime.choose_device("gpu")
    with pytest.raises(ValueError, match="^device: mps has no float64"):
        runtime.start("mps")


def test_processes_do_not_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    assert [runtime.choose_device("cuda", rank).index for rank in (0, 1)] == [0, 1]
    assert runtime.choose_device("cuda:1").index == 1
    assert runtime.choose_device("cuda:1", 1).index == 1
    for name, rank in (("cuda:0", 1), ("cuda:1", 0)):
        with pytest.raises(ValueError, match=f"^device: {name} is one GPU, and several processes"):
            runtime.choose_device(name, rank)


@dataclass
class Outputs:
    logits: Tensor
    aux: list[Tensor] | None
    canvas: tuple[int, int]
    maps: list[Tensor] = field(default_factory=list, metadata={"own_type": True})


def test_outputs_become_fp32_in_any_container() -> None:
    pair = namedtuple("pair", "a b")
    half, whole = torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.int64)
    outputs = runtime.to_float(Outputs(half, [half, half.half()], (4, 5)))
    assert outputs.logits.dtype == outputs.aux[1].dtype == torch.float32
    assert outputs.canvas == (4, 5)
    nested = runtime.to_float({"x": pair(half, (whole, half.double()))})
    assert isinstance(nested["x"], pair) and nested["x"].a.dtype == torch.float32
    assert [value.dtype for value in nested["x"].b] == [torch.int64, torch.float64]


def test_large_maps_keep_their_type() -> None:
    maps = [torch.ones(2, dtype=torch.bfloat16)]
    assert runtime.to_float(Outputs(maps[0], None, (4, 5), maps)).maps is maps


def test_batch_norms_become_synchronised() -> None:
    """Those of timm keep their activation, and all keep the names of their weights."""
    from timm.layers import BatchNormAct2d

    model = nn.Sequential(BatchNormAct2d(4), nn.Sequential(BatchNorm(4), nn.GroupNorm(2, 4)))
    names, place = list(model.state_dict()), runtime.Runtime(torch.device("cuda"), 0, 2)
    assert runtime.Runtime(torch.device("cpu")).synchronize_norms(model) is model
    found = place.synchronize_norms(model)
    assert isinstance(found[0], nn.SyncBatchNorm) and isinstance(found[0].act, nn.ReLU)
    assert isinstance(found[1][0], nn.SyncBatchNorm) and isinstance(found[1][1], nn.GroupNorm)
    assert list(found.state_dict()) == names
