"""Decoded images are kept: equal bit for bit, never stale, never more than there is room for."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitdense.data import cache as module
from vitdense.data.base import DataError
from vitdense.data.cache import ImageCache, memory_of_machine, open_cache
from vitdense.data.images import read_image
from vitdense.data.loader import training_loader
from vitdense.data.shapes import ShapesDataset
from vitdense.data.transforms import DetectionPolicy
from vitdense.structures import Batch


def save(path: Path, seed: int, size: tuple[int, int] = (20, 30)) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def entries(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.npy"))


def never_decodes(*arguments: object) -> torch.Tensor:
    raise AssertionError("decoded again")


@pytest.fixture(autouse=True)
def roomy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disk and memory are half empty, whatever this machine has."""
    usage = module.shutil.disk_usage(tmp_path)._replace(total=2**30, free=2**29)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(module, "memory_of_machine", lambda: (2**29, 2**30))


@pytest.fixture
def cache(tmp_path: Path) -> ImageCache:
    return ImageCache(tmp_path / "cache")


@pytest.mark.parametrize("name", ["image.png", "image.jpg"])
def test_what_is_kept_equals_what_is_decoded(name, cache, tmp_path, monkeypatch):
    path = save(tmp_path / name, 0)
    expected = [read_image(path, channels) for channels in (3, 1)]
    first = [cache.read(path, channels) for channels in (3, 1)]
    monkeypatch.setattr(module, "read_image", never_decodes)
    second = [cache.read(path, channels) for channels in (3, 1)]
    for decoded, kept, again in zip(expected, first, second, strict=True):
        assert torch.equal(decoded, kept) and torch.equal(decoded, again)
        assert decoded.dtype == again.dtype
    second[0].zero_()  # what a transform writes into stays its own
    assert torch.equal(cache.read(path, 3), expected[0])


def test_deep_images_and_sizes_are_kept_apart(cache, tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100).save(path)
    wide, narrow = (cache.read(path, 1, (20, 30), limits) for limits in (None, (0.0, 1000.0)))
    assert wide.dtype == torch.float32 and not torch.equal(wide, narrow)
    assert torch.equal(cache.read(path, 1, (20, 30), (0.0, 1000.0)), narrow)
    with pytest.raises(DataError, match="annotation was made for"):
        cache.read(path, 1, (99, 30))


def test_a_changed_file_is_decoded_anew(cache, tmp_path):
    path = save(tmp_path / "image.bmp", 0)
    before, stat = cache.read(path, 3), path.stat()
    save(path, 1)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as `cp -p` does
    assert path.stat().st_size == stat.st_size
    after = cache.read(path, 3)
    assert not torch.equal(before, after) and torch.equal(after, read_image(path, 3))
    assert torch.equal(cache.read(path, 3), after)
    assert len(entries(cache.folder)) == 1
    path.unlink()
    with pytest.raises(DataError, match="no such file"):
        cache.read(path, 3)


@pytest.mark.parametrize("damage", ["cut", "empty", "changed"])
def test_a_damaged_entry_does_not_count(damage, cache, tmp_path):
    path = save(tmp_path / "image.png", 0)
    expected = cache.read(path, 3)
    (entry,) = entries(cache.folder)
    whole = entry.read_bytes()
    changed = whole[:-1] + bytes([whole[-1] ^ 1])
    entry.write_bytes({"cut": whole[:-7], "empty": b"", "changed": changed}[damage])
    assert torch.equal(cache.read(path, 3), expected)
    assert entry.read_bytes() == whole, "it is written anew"


def test_no_more_is_kept_than_there_is_room_for(cache, tmp_path, monkeypatch):
    one, two = save(tmp_path / "1.png", 1), save(tmp_path / "2.png", 2)
    cache.read(one, 3)
    monkeypatch.setattr(ImageCache, "room", 100)
    assert torch.equal(cache.read(two, 3), read_image(two, 3))
    assert len(entries(cache.folder)) == 1
    monkeypatch.setattr(module, "read_image", never_decodes)
    assert cache.read(one, 3).shape == (3, 20, 30)  # what is kept stays of use


def test_room_leaves_a_part_of_disk_and_memory_free(tmp_path, monkeypatch):
    usage = module.shutil.disk_usage(tmp_path)
    rounded = usage._replace(total=1000, free=300)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: rounded)
    monkeypatch.setattr(module, "memory_of_machine", lambda: (350, 1000))
    assert ImageCache(tmp_path / "disk").room == 200
    assert ImageCache(tmp_path / "memory", in_memory=True).room == 100


def test_a_full_disk_is_no_fault(cache, tmp_path, monkeypatch):
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    path = save(tmp_path / "image.png", 0)
    monkeypatch.setattr(module.np, "save", full)
    assert torch.equal(cache.read(path, 3), read_image(path, 3))
    assert [it for it in cache.folder.rglob("*") if it.is_file()] == []


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data.cache: cannot write to .*file"):
        open_cache(tmp_path / "file", tmp_path)


def test_a_cache_in_memory_goes_with_its_run(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_memory", lambda: tmp_path)
    mine = open_cache("memory", Path("runs/mine"))
    same = open_cache("memory", Path("runs/mine"))
    other = open_cache("memory", Path("runs/other"))
    assert mine is not None and same is not None and other is not None
    assert mine.folder == same.folder != other.folder
    assert mine.folder.exists(), "another run leaves the folder of one that lives"
    image = save(tmp_path / "image.png", 0)
    mine.read(image, 3)
    assert len(entries(same.folder)) == 1
    # as after SIGKILL: nobody holds the lock any more
    module._held.pop(mine.folder).close()
    open_cache("memory", Path("runs/other"))
    assert not mine.folder.exists() and other.folder.exists()
    module._release(other.folder)
    assert not other.folder.exists()
    assert open_cache(None, Path("runs/mine")) is None


def test_memory_of_machine_is_plausible():
    found = memory_of_machine()
    assert found is None or 0 < found[0] <= found[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_with_and_without(workers, shapes_root, tmp_path):
    """Two epochs with augmentation: the first fills, the second reads."""

    def batches(where: Path | None) -> list[Batch]:
        dataset = ShapesDataset(shapes_root, "train", task="instance", images=12, size=96)
        dataset.cache = open_cache(where, tmp_path)
        policy = DetectionPolicy(size=64, mosaic=0.5)
        loader = training_loader(dataset, policy, 4, workers=workers)
        return list(itertools.islice(loader, 6))

    plain, kept = batches(None), batches(tmp_path / "cache")
    assert len(entries(tmp_path / "cache")) == 12
    for ours, theirs in zip(kept, plain, strict=True):
        assert torch.equal(ours.images, theirs.images) and ours.paths == theirs.paths
        for a, b in zip(ours.targets, theirs.targets, strict=True):
            assert torch.equal(a.boxes, b.boxes) and torch.equal(a.masks, b.masks)
