"""Decoded images, kept where all processes find them, so that later epochs need not decode."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import zlib
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from torch import Tensor

from vitdense import __version__
from vitdense.data.deep import Limits
from vitdense.data.images import read_image
from vitdense.structures import Size

DISK_KEPT_FREE = 0.1
"""Part of the disk that a cache leaves to others."""

MEMORY_KEPT_FREE = 0.25
"""Part of the memory that a cache leaves to models, workers and others."""

_held: dict[Path, IO[bytes]] = {}
"""Locks of this process on folders in memory: one that nobody locks was left by a dead run."""


class ImageCache:
    """Decoded images as files of raw pixels, which processes share through the system's memory.

    An entry belongs to a path, to what its decoder was asked for, and to the versions that decoded
    it; it counts only while the image's file has the size and the times of change that it had. What
    is read equals what `read_image` gives, bit for bit. When there is no more room nothing is
    added; what is kept stays of use.

    Args:
        folder: is made if it is not there.
        in_memory: the folder lies in memory, which must not run short.

    Raises:
        ValueError: the folder cannot be written.
    """

    def __init__(self, folder: Path, in_memory: bool = False) -> None:
        import PIL

        self.folder, self.in_memory = folder.absolute(), in_memory
        self._versions = __version__, PIL.__version__
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700 if in_memory else 0o777)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise ValueError(
                f"data.cache: cannot write to {folder} ({error.strerror}); name another folder, or "
                "null for none"
            ) from None

    def read(
        self, path: Path, channels: int, size: Size | None = None, limits: Limits | None = None
    ) -> Tensor:
        """As `read_image`; raises DataError as it does."""
        try:
            found = path.stat()
        except OSError:
            return read_image(path, channels, size, limits)  # it says what is wrong
        # the time of the last change of any kind too: `cp -p` and `touch` bring back the other
        stamp = [found.st_size, found.st_mtime_ns, found.st_ctime_ns]
        wanted = str(path.absolute()), channels, size, limits, self._versions
        name = blake2b(repr(wanted).encode(), digest_size=16).hexdigest()
        entry = self.folder / name[:2] / f"{name[2:]}.npy"
        pixels = _load(entry, stamp)
        if pixels is None:
            # before decoding: a file that changes meanwhile leaves an entry that never counts
            pixels = read_image(path, channels, size, limits).numpy()
            if pixels.nbytes < self.room:
                _keep(entry, stamp, pixels)
        return torch.from_numpy(pixels)

    @property
    def room(self) -> float:
        """Bytes that may still be added; at most 0 where there is no more room."""
        try:
            disk = shutil.disk_usage(self.folder)
        except OSError:  # another process took the folder away
            return 0.0
        room = disk.free - DISK_KEPT_FREE * disk.total
        if self.in_memory and (memory := memory_of_machine()) is not None:
            room = min(room, memory[0] - MEMORY_KEPT_FREE * memory[1])
        return room


def open_cache(where: Literal["memory"] | Path | None, run: Path) -> ImageCache | None:
    """The cache that a config asks for; one in memory goes when the run's processes have ended.

    Args:
        where: a folder that stays, "memory", or None for no cache.
        run: the run's folder; its processes share what is in memory.

    Raises:
        ValueError: the folder cannot be written.
    """
    if where is None:
        return None
    if where != "memory":
        return ImageCache(Path(where))
    user = os.getuid() if hasattr(os, "getuid") else 0
    base, prefix = _memory(), f"vitdense-{user}-"
    folder = base / (prefix + blake2b(str(run.absolute()).encode(), digest_size=8).hexdigest())
    for left in base.glob(f"{prefix}*"):
        if left != folder:
            _remove_if_left(left)
    cache = ImageCache(folder, in_memory=True)
    if hasattr(os, "getuid") and folder.stat().st_uid != user:
        raise ValueError(f"data.cache: {folder} belongs to another user; remove it, or name a path")
    _hold(folder)
    return cache


def memory_of_machine() -> tuple[int, int] | None:
    """Bytes of memory that are free for use and that there are, of the container if it has less."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return None
    table = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    free, total = table["MemAvailable"], table["MemTotal"]
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        stat = (group / "memory.stat").read_text().split()
        cached = int(stat[stat.index("inactive_file") + 1])
        free, total = min(free, limit - used + cached), min(total, limit)
    return free, total


def _load(entry: Path, stamp: list[int]) -> np.ndarray | None:
    """The pixels of a whole entry with that stamp."""
    try:
        with entry.open("rb") as file:
            *found, check = np.load(file).tolist()
            if found != stamp:
                return None
            pixels = np.load(file)
    except (OSError, ValueError, EOFError):
        return None
    return pixels if zlib.crc32(pixels.data) == check else None


def _keep(entry: Path, stamp: list[int], pixels: np.ndarray) -> None:
    """Write an entry whole or not at all; what cannot be written is decoded again."""
    pixels = np.ascontiguousarray(pixels)
    partial: str | None = None
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=entry.parent)
        with os.fdopen(handle, "wb") as file:
            np.save(file, np.array([*stamp, zlib.crc32(pixels.data)]))
            np.save(file, pixels)
        os.replace(partial, entry)
    except OSError:
        if partial is not None:
            Path(partial).unlink(missing_ok=True)


def _memory() -> Path:
    """Where files lie in memory; elsewhere the system keeps temporary ones there while it can."""
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


def _hold(folder: Path) -> None:
    """Keep a lock on the folder, which dies with this process, and remove it if it ends well."""
    import atexit

    if folder not in _held:
        _held[folder] = file = (folder / "lock").open("wb")
        _lock(file, shared=True)
        atexit.register(_release, folder)


def _release(folder: Path) -> None:
    if (file := _held.pop(folder, None)) is not None:
        if _lock(file) is not False:
            shutil.rmtree(folder, ignore_errors=True)
        file.close()


def _remove_if_left(folder: Path) -> None:
    """Remove the folder of a run that was killed."""
    with contextlib.suppress(OSError), (folder / "lock").open("rb") as file:
        if _lock(file):
            shutil.rmtree(folder, ignore_errors=True)


def _lock(file: IO[Any], shared: bool = False) -> bool | None:
    """Whether this process has the lock now; None where the system has none."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
