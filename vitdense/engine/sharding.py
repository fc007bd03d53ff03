"""Models too large for one GPU: FSDP2 splits weights, gradients and optimizer over processes.

Every process holds its part of each tensor (a DTensor), and gathers a block's weights only while
that computes (`torch.distributed.fsdp.fully_shard`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from vitdense.engine import parts
from vitdense.engine.checkpoint import PARTIAL, CheckpointError
from vitdense.engine.peers import TIMEOUT
from vitdense.engine.states import State, States


def shard(model: nn.Module) -> None:
    """Split the parameters over all processes: in units of a backbone's block, and the rest.

    What repeats in the backbone is a unit, as the blocks of a ViT and the stages and blocks of a
    Swin. Buffers stay whole.
    """
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for block in _repeated(model.get_submodule("backbone")):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _repeated(module: nn.Module) -> Iterator[nn.Module]:
    """Items of lists whose items are all of one class with parts of its own, innermost first."""
    for child in module.children():
        yield from _repeated(child)
        items = list(child.children()) if isinstance(child, nn.ModuleList | nn.Sequential) else []
        compound = [item for item in items if any(True for _ in item.children())]
        if len(items) == len(compound) > 0 and len({type(item) for item in items}) == 1:
            yield from items


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has split it."""
    return isinstance(model, FSDPModule)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, every process holds all of the model and the main one's buffers.

    So their answers are those of the model that is saved, and they need not call it equally often.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    share_buffers(model)
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not model, recurse=False)


def share_buffers(model: nn.Module) -> None:
    """Give all processes the main one's buffers, as the statistics of batch norms."""
    if dist.is_available() and dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


class ShardedStates(States):
    """Checkpoints of a split model, as folders (see `parts`): all processes write together.

    Args:
        model: says in which parts a process wants its tensors.
    """

    suffix = ""
    together = True

    def __init__(self, folder: Path, keep: int, model: nn.Module) -> None:
        super().__init__(folder, keep)
        self.parameters = dict(model.named_parameters())
        # its own, because a thread writes while training goes on talking
        self.group: Any = dist.new_group(backend="gloo", timeout=TIMEOUT)

    def write(self, path: Path, state: State) -> None:
        """Write this process's part; raises OSError if one of the processes cannot."""
        parts.write(path, state, self.group)

    def read(self, path: Path) -> State:
        """The state, in this process's parts; raises CheckpointError if it is not whole."""
        if path.is_dir():
            return parts.read(path, self._like)
        return parts.split(super().read(path), self._like)

    def whole(self, path: Path, state: State) -> State:
        """The weights of an entry, all of them."""
        return super().read(path) if path.is_file() else parts.read(path, wanted=("model", "ema"))

    def _store(self, step: int, state: State, then: Callable[[State], Any] | None) -> None:
        path = self.folder / f"step_{step:06d}"
        if dist.get_rank() == 0:
            super()._store(step, state, then and (lambda state: then(self.whole(path, state))))
            return
        try:
            self.write(path.with_name(f".{path.name}{PARTIAL}"), state)
        except OSError as error:
            what = f"{path}: cannot be written: {error}; {self._remedy()}"
            raise CheckpointError(what) from error

    def _like(self, keys: parts.Keys, size: torch.Size) -> Tensor | None:
        found = (self.parameters[key] for key in keys if key in self.parameters)
        parameter = next(found, None)
        return parameter if parameter is not None and parameter.shape == size else None
