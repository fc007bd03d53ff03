"""Where a run computes: its device, its place among processes, its random numbers."""

from __future__ import annotations

import atexit
import os
import platform
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from vitdense.data.workers import own_cores
from vitdense.engine.launch import read_launch, share_of_cores
from vitdense.engine.peers import TIMEOUT, FailedProcess

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Runtime:
    """This process among those of the run; one process alone is rank 0 of 1.

    Attributes:
        cores: that it has for itself, if others may run on the same; None = all that it may use.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    cores: int | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model to call in training: with several processes, one that averages gradients.

        A sharded model does that itself.
        """
        if self.world_size == 1 or isinstance(model, FSDPModule):
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=devices,
            # a neck may make levels that no head reads: their parameters never have a gradient
            find_unused_parameters=True,
            gradient_as_bucket_view=True,  # else all gradients are there twice
        )

    def synchronize_norms(self, model: M) -> M:
        """The model with batch norms over the images of all processes; for one, as it is.

        Raises:
            ValueError: there are several processes without GPUs.
        """
        if self.world_size == 1:
            return model
        if self.device.type == "cpu":
            raise ValueError(
                "train.sync_batch_norm: torch synchronises batch norms on GPUs only; on CPUs leave "
                "it out, or take a norm without batch statistics where the part has the option, as "
                "model.head.norm=group"
            )
        from timm.layers import convert_sync_batchnorm  # torch's own loses timm's activations

        return convert_sync_batchnorm(model)

    def agree(self, value: Any) -> Any:
        """The main process's value in all processes."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Everyone's values, by rank, in all processes; tensors must be on the CPU."""
        if self.world_size == 1:
            return [value]
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, value)
        return everyone

    def anyone(self, value: bool) -> bool:
        """Whether it holds in one of the processes."""
        if self.world_size == 1:
            return value
        flag = torch.tensor(int(value))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def mean(self, read: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The mean of everyone's numbers by name; where `read` fails for one, it fails for all."""
        if self.world_size == 1:
            return read()
        mine: dict[str, float] | str
        fault: Exception | None = None
        try:
            mine = read()
        except Exception as error:
            fault, mine = error, f"rank {self.rank}: {type(error).__name__}: {error}"
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, mine)
        if fault is not None:
            raise fault
        if faults := [said for said in everyone if isinstance(said, str)]:
            raise FailedProcess("; ".join(faults))
        names = dict.fromkeys(name for numbers in everyone for name in numbers)
        return {name: _mean([it[name] for it in everyone if name in it]) for name in names}


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def start(device: str = "auto") -> Runtime:
    """Choose the device, and join the other processes if torchrun or srun started this one.

    Raises:
        ValueError: there is no such device here, or metrics cannot be computed on it.
    """
    if device.startswith("mps"):
        raise ValueError("device: mps has no float64, which metrics need; write auto or cpu")
    launch = read_launch(os.environ)
    if launch.world_size == 1:
        return Runtime(choose_device(device))
    local_rank = launch.local_rank
    if launch.meeting is not None:  # srun may show each process its own GPU alone
        local_rank %= max(1, torch.cuda.device_count())
    chosen = choose_device(device, local_rank)
    if not dist.is_initialized():
        # what is agreed on among CPUs does not wait for GPUs
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            init_method=launch.meeting or "env://",
            world_size=launch.world_size,
            timeout=TIMEOUT,
            rank=launch.rank,
        )
        atexit.register(dist.destroy_process_group)  # else a process that is left alone aborts
    found = Runtime(chosen, dist.get_rank(), dist.get_world_size())
    everyone = found.gather((platform.node(), own_cores()))
    return replace(found, cores=share_of_cores(found.rank, everyone))


def choose_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device of that name; `auto` takes the CUDA GPU if there is one, else the CPU.

    Args:
        local_rank: of several processes, which have a GPU each; None for one alone.

    Raises:
        ValueError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        message = f"device: {name!r} is no device; write auto, cpu, cuda or cuda:1"
        raise ValueError(message) from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if local_rank is not None and device.index not in (None, local_rank):
            raise ValueError(
                f"device: {name} is one GPU, and several processes would share it; write cuda, and "
                "each takes its own"
            )
        device = torch.device("cuda", local_rank or 0 if device.index is None else device.index)
        if device.index >= count:
            raise ValueError(f"device: {name} is not here, {count} GPUs are; write auto or cpu")
        torch.cuda.set_device(device)
    return device


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seed all generators for one step, so that a resumed run draws the same numbers."""
    state = np.random.SeedSequence([seed, step, rank]).generate_state(2, np.uint64)
    torch.manual_seed(int(state[0] >> np.uint64(1)))
    random.seed(int(state[1]))
    np.random.seed(int(state[1]) & 0xFFFFFFFF)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Type of autocast: `auto` is bf16 on a GPU that has it, fp32 elsewhere."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" and has_bf16() else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def has_bf16() -> bool:
    """Whether the GPU computes in bf16 by itself: torch emulates it on older ones, slowly."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Context of mixed precision; for fp32 one that changes nothing."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def to_float(outputs: Any) -> Any:
    """The same outputs with bf16 and fp16 tensors in fp32, as losses and predictions want them.

    Fields of a dataclass whose metadata say `own_type` stay as they are: what reads such large
    tensors raises the few numbers that it needs itself.
    """
    if isinstance(outputs, torch.Tensor):
        return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs
    if isinstance(outputs, dict):
        return {key: to_float(value) for key, value in outputs.items()}
    if isinstance(outputs, list | tuple):
        values = [to_float(value) for value in outputs]
        return type(outputs)(*values) if hasattr(outputs, "_fields") else type(outputs)(values)
    if is_dataclass(outputs) and not isinstance(outputs, type):
        kept = [field for field in fields(outputs) if field.init]
        names = [field.name for field in kept if not field.metadata.get("own_type")]
        return replace(outputs, **{name: to_float(getattr(outputs, name)) for name in names})
    return outputs


def memory_used(device: torch.device) -> float | None:
    """Most memory in GiB that was in use so far: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
