"""Where a run computes: its device, its place among processes, its random numbers."""

from __future__ import annotations

import atexit
import os
import random
import sys
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True, slots=True)
class Runtime:
    """This process among those of the run; one process alone is rank 0 of 1."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model to call in training: with several processes, one that averages gradients."""
        if self.world_size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=devices)

    def agree(self, value: Any) -> Any:
        """The main process's value in all processes."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=self.device)
        return box[0]


def start(device: str = "auto") -> Runtime:
    """Choose the device, and join the other processes if torchrun started this one."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        return Runtime(choose_device(device))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)  # else a process that is left alone aborts
    return Runtime(chosen, dist.get_rank(), dist.get_world_size())


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of that name; `auto` takes the CUDA GPU if there is one, else the CPU.

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
        device = torch.device("cuda", local_rank if device.index is None else device.index)
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
    """Type of autocast: `auto` is bf16 on CUDA, fp32 elsewhere."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


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
