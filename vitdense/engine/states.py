"""Checkpoints of a run: written beside training, found again, dropped when newer ones are whole."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from vitdense.engine import checkpoint, parts
from vitdense.engine.checkpoint import ASIDE, PARTIAL, CheckpointError
from vitdense.engine.stopping import Stopped

State = dict[str, Any]
"""Numbers, strings and tensors in mappings and lists; has at least `step` and `model`."""

ENTRY = re.compile(r"step_(\d{6,})(\.pt)?")


class States:
    """The checkpoints in a folder.

    An entry is named after its step, of six digits or more: `step_000500.pt` is a file of
    torch.save, `step_000500` a folder of torch.distributed.checkpoint. What lies under that name is
    whole: it is written as `.step_000500.pt.partial`, brought to the disk, and moved. A subclass
    writes another form with `suffix`, `write` and `read`.

    Attributes:
        suffix: of the entries that are written; "" for a folder.
        keep: so many of the latest entries stay.
        together: whether all processes save, or the main one for all.
    """

    suffix = ".pt"
    together = False

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    @property
    def entries(self) -> list[Path]:
        """All of them, the oldest first."""
        return entries_in(self.folder)

    def clean(self) -> None:
        """Remove what a lost process left half written; nobody may be writing."""
        for path in self.folder.glob(f".*{ASIDE}"):
            place = path.with_name(path.name.removeprefix(".").removesuffix(ASIDE))
            if not place.exists():
                path.rename(place)
            checkpoint.remove(path)
        for path in self.folder.glob(f".*{PARTIAL}"):
            checkpoint.remove(path)

    def load(self) -> tuple[Path, State]:
        """The latest entry that is whole; those that are not are passed over with a warning.

        Raises:
            CheckpointError: none is whole.
        """
        entries = self.entries
        for path in reversed(entries):
            try:
                state = self.read(path)
            except CheckpointError as error:
                warnings.warn(f"passed over: {error}", stacklevel=2)
                continue
            return path, state
        raise CheckpointError(
            f"{self.folder}: none of the {len(entries)} checkpoints is whole; put one back from a "
            "copy, or begin again in another folder, with train.init=model.safetensors of this one"
        )

    def save(self, step: int, state: State, then: Callable[[State], Any] | None = None) -> None:
        """Copy the state and return: a thread writes the copy. Waits for the save before.

        Args:
            then: is called by the thread with the copy, when the entry is whole.

        Raises:
            CheckpointError: the save before failed.
        """
        self.wait()
        self._writing = self._thread.submit(self._store, step, clone(state), then)

    def wait(self) -> None:
        """Wait until all is on the disk; raises CheckpointError if it could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the write; its failure is a warning where another error is on its way."""
        try:
            self.wait()
        except CheckpointError as failure:
            if error is None or isinstance(error, Stopped):  # which says that all is saved
                raise
            warnings.warn(str(failure), stacklevel=2)

    def check(self) -> None:
        """Raise CheckpointError if the latest save has failed; does not wait for it."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def write(self, path: Path, state: State) -> None:
        """Write a copied state to `path`, a name that is not yet an entry's; may raise OSError."""
        checkpoint.write_state(path, state)

    def read(self, path: Path) -> State:
        """The state of an entry, on the CPU; raises CheckpointError if it is not whole."""
        state = parts.read(path) if path.is_dir() else checkpoint.load_state(path)
        if not isinstance(state, dict) or not {"step", "model"} <= state.keys():
            raise CheckpointError(f"{path}: is no checkpoint of vitdense")
        return state

    def whole(self, path: Path, state: State) -> State:
        """The state that was read from an entry, with whole weights."""
        return state

    def _store(self, step: int, state: State, then: Callable[[State], Any] | None) -> None:
        path = self.folder / f"step_{step:06d}{self.suffix}"
        try:
            checkpoint.write_atomic(path, lambda partial: self.write(partial, state))
            if then is not None:
                then(state)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {self._remedy()}") from error
        self._drop(step)

    def _remedy(self) -> str:
        whole = self.entries
        if not whole:
            return "there is no checkpoint before it; make room, or choose another output"
        return f"{whole[-1]} is whole: when there is room again, go on from there with --resume"

    def _drop(self, step: int) -> None:
        """Keep the latest up to `step`; later ones were torn when the run was resumed."""
        entries = self.entries
        kept = [path for path in entries if step_of(path) <= step][-self.keep :]
        for path in entries:
            if path not in kept:
                with contextlib.suppress(OSError):  # it is whole, and only takes room
                    checkpoint.remove(path)


def entries_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, which need not exist, the oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if ENTRY.fullmatch(path.name)), key=step_of)


def step_of(entry: Path) -> int:
    """Optimizer steps that an entry was written after."""
    found = ENTRY.fullmatch(entry.name)
    assert found is not None, entry
    return int(found[1])


def clone(value: Any, device: torch.device | str = "cpu") -> Any:
    """Mappings, lists and tuples anew, with copies of their tensors on the device."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, dict):
        return {key: clone(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(clone(item, device) for item in value)
    return value
