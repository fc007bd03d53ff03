"""Checkpoints in a folder: every process writes its part, any number of processes reads them.

`state.pt` holds numbers, names and the sums of the other files, which are those of
torch.distributed.checkpoint. Its `.metadata` is a pickle; of that only descriptions of tensors are
read, so a folder runs no code.
"""

from __future__ import annotations

import enum
import hashlib
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor

from vitdense.engine import checkpoint
from vitdense.engine.checkpoint import BROKEN, CheckpointError

State = dict[str, Any]
Keys = tuple[str, ...]

PARTS = ("model", "ema", "optimizer")
"""What of a state is large: its tensors are written in parts."""

REST = "state.pt"
"""The file of all else."""

METADATA, SUMS = ".metadata", "sums"

Like = Callable[[Keys, torch.Size], Tensor | None]
"""The tensor in whose parts the one with these keys and of this size is wanted; None = whole."""


def whole(keys: Keys, size: torch.Size) -> None:
    """Every tensor as a whole."""


def write(path: Path, state: State, group: dist.ProcessGroup) -> None:
    """Write this process's part of a state into a folder; all of `group` must call this.

    What is not split, as statistics of batches, is the main process's.

    Raises:
        OSError: one of them cannot write.
    """
    rank = dist.get_rank(group)
    is_main = rank == 0
    tensors = {
        "/".join(keys): tensor
        for keys, tensor in _tensors(state)
        if is_main or isinstance(tensor, DTensor)
    }
    try:
        dcp.save(tensors, checkpoint_id=path, process_group=group)
    except CheckpointException as error:  # no Exception to Python
        cause, _ = next(iter(error.failures.values()))
        raise cause if isinstance(cause, OSError) else OSError(str(cause)) from error
    mine = [*path.glob(f"__{rank}_*"), *([path / METADATA] if is_main else [])]
    sums: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(sums, {file.name: _sum(file) for file in mine}, group)
    if is_main:
        everyone = {name: it for those in sums for name, it in those.items()}
        checkpoint.write_state(path / REST, _without_tensors(state) | {SUMS: everyone})


def read(path: Path, like: Like = whole, wanted: tuple[str, ...] = PARTS) -> State:
    """The state in a folder; a process may read it alone.

    Args:
        wanted: of the `PARTS`; the others stay empty.

    Raises:
        CheckpointError: it is not whole.
    """
    state = checkpoint.load_state(path / REST)
    reader = _Reader(path)
    try:
        for name, known in state.pop(SUMS, {}).items():  # torch itself does not look
            if _sum(path / name) != known:
                raise CheckpointError(f"{path}: is torn: {name} in it is not what was written")
        found = reader.read_metadata().state_dict_metadata
        tensors = {
            key: _empty(tuple(key.split("/")), entry, like)
            for key, entry in found.items()
            if isinstance(entry, TensorStorageMetadata) and key.split("/")[0] in wanted
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that a process reads alone
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except (CheckpointException, *BROKEN) as error:
        why = str(error).strip().rpartition("\n")[2]
        raise CheckpointError(f"{path}: is torn, or no checkpoint of vitdense ({why})") from error
    for key, tensor in tensors.items():
        *outer, last = key.split("/")
        place = state
        for name in outer:
            place = place.setdefault(name, {})
        place[last] = tensor
    return state


def _sum(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "blake2b").hexdigest()


def split(state: State, like: Like) -> State:
    """A state of whole tensors, in this process's parts."""
    return {
        name: _split(value, (name,), like) if name in PARTS else value
        for name, value in state.items()
    }


def _split(value: Any, keys: Keys, like: Like) -> Any:
    if isinstance(value, dict):
        return {name: _split(item, (*keys, name), like) for name, item in value.items()}
    model = like(keys, value.shape) if isinstance(value, Tensor) else None
    if not isinstance(model, DTensor):
        return value
    return distribute_tensor(value, model.device_mesh, model.placements, src_data_rank=None)


def _empty(keys: Keys, entry: TensorStorageMetadata, like: Like) -> Tensor:
    model = like(keys, entry.size)
    if model is None:
        return torch.empty(entry.size, dtype=entry.properties.dtype)
    return torch.empty_like(model, dtype=entry.properties.dtype, requires_grad=False)


def _tensors(state: State) -> Iterator[tuple[Keys, Tensor]]:
    """The tensors of the large parts."""

    def walk(value: Any, keys: Keys) -> Iterator[tuple[Keys, Tensor]]:
        if isinstance(value, Tensor):
            yield keys, value
        elif isinstance(value, dict):
            for name, item in value.items():
                yield from walk(item, (*keys, name))

    for part in PARTS:
        yield from walk(state.get(part), (part,))


def _without_tensors(state: State) -> State:
    def bare(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: bare(item) for key, item in value.items() if not isinstance(item, Tensor)}

    return {name: bare(value) if name in PARTS else value for name, value in state.items()}


class _Reader(dcp.FileSystemReader):
    """torch's, but that its pickle can only make descriptions."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / METADATA).open("rb") as file:
            metadata: Metadata = _Descriptions(file).load()
        return metadata


class _Descriptions(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] not in ("torch", "pathlib"):  # to import is to run code
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a description")
        found = super().find_class(module, name)
        kind = found if isinstance(found, type) else type(None)
        if module.startswith("torch.distributed.checkpoint."):
            allowed = is_dataclass(kind) or issubclass(kind, enum.Enum)
        elif module == "torch":
            allowed = found is torch.Size or isinstance(found, torch.dtype)
        else:
            allowed = found is _get_layout or issubclass(kind, PurePath)
        if not allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a description")
        return found


_get_layout = torch.serialization._get_layout
