"""Checkpoints in their folder: written beside training, found, kept, dropped, whole or absent."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.small import assert_same
from vitdense.engine import checkpoint, parts
from vitdense.engine.checkpoint import CheckpointError
from vitdense.engine.states import States, clone
from vitdense.engine.stopping import Stopped


def state(step: int, size: int = 1000) -> dict[str, Any]:
    return {"step": step, "model": {"weight": torch.full((size,), float(step))}}


def save(states: States, *steps: int) -> None:
    for step in steps:
        states.save(step, state(step))
    states.wait()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_last_ones_stay(tmp_path: Path) -> None:
    states = States(tmp_path / "checkpoints", keep=2)
    assert states.entries == []
    save(states, 5, 40, 999_999, 1_000_000)
    assert names(tmp_path / "checkpoints") == ["step_1000000.pt", "step_999999.pt"]
    path, found = states.load()
    assert (path.name, found["step"]) == ("step_1000000.pt", 1_000_000)
    torch.testing.assert_close(found["model"]["weight"], torch.full((1000,), 1e6))


def test_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    states = States(tmp_path)
    save(states, 5)
    states.save(5, state(5) | {"evaluated": True})
    states.wait()
    assert names(tmp_path) == ["step_000005.pt"]
    assert states.load()[1]["evaluated"] is True


def test_training_goes_on_while_a_copy_is_written(tmp_path: Path) -> None:
    go_on = threading.Event()

    class Slow(States):
        def write(self, path: Path, state: dict[str, Any]) -> None:
            assert go_on.wait(20)
            super().write(path, state)

    states, weight = Slow(tmp_path), torch.ones(3)
    states.save(1, {"step": 1, "model": {"weight": weight}})
    assert states.entries == []
    weight.zero_()
    states.check()
    go_on.set()
    states.wait()
    assert states.load()[1]["model"]["weight"].tolist() == [1, 1, 1]


def test_a_snapshot_shares_nothing() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    inner = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "pair": (1, [None])}
    copy = clone(inner)
    assert copy["pair"] == (1, [None]) and copy["pair"][1] is not inner["pair"][1]
    before = clone(copy)
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = 7.0
    assert copy["optimizer"]["param_groups"] == before["optimizer"]["param_groups"]
    for index, moments in copy["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, before["optimizer"]["state"][index][name]), name
    for name, value in copy["model"].items():
        assert not torch.equal(value, model.state_dict()[name]), name


def damage(path: Path, how: str) -> None:
    raw = bytearray(path.read_bytes())
    if how == "truncated":
        raw = raw[: len(raw) // 2]
    elif how == "empty":
        raw = bytearray()
    elif how == "zeros within":  # of a disk that lost a page
        raw[1024:2048] = bytes(1024)
    elif how == "foreign":
        raw = bytearray(b"no checkpoint")
    path.write_bytes(raw)


@pytest.mark.parametrize("how", ["truncated", "empty", "zeros within", "foreign"])
def test_a_torn_one_is_passed_over(how: str, tmp_path: Path) -> None:
    states = States(tmp_path)
    save(states, 5, 10)
    damage(tmp_path / "step_000010.pt", how)
    with pytest.warns(UserWarning, match=r"passed over: .*step_000010.pt: is torn"):
        path, found = states.load()
    assert (path.name, found["step"]) == ("step_000005.pt", 5)
    save(states, 8)  # of the life that went on from 5: the torn one must not outlive it
    assert names(tmp_path) == ["step_000005.pt", "step_000008.pt"]
    for entry in states.entries:
        damage(entry, how)
    with (
        pytest.warns(UserWarning),
        pytest.raises(CheckpointError, match="none of the 2 checkpoints is whole; put one back"),
    ):
        states.load()


def test_a_wrong_bit_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    """Or it is where it means nothing, as in the time of a file within."""
    path, written = tmp_path / "step_000005.pt", state(5, size=4) | {"names": ["a"]}
    checkpoint.write_state(path, written)
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), 5):
        wrong = bytearray(whole)
        wrong[place] ^= 1 << place % 8
        path.write_bytes(wrong)
        try:
            assert_same(checkpoint.load_state(path), written)
        except CheckpointError as error:
            assert str(error).startswith(f"{path}: is ")
            refused += 1
    assert refused > len(whole) / 5 / 3


def test_what_is_no_state_is_passed_over(tmp_path: Path) -> None:
    states = States(tmp_path)
    save(states, 5)
    torch.save([1, 2], tmp_path / "step_000006.pt")
    with pytest.warns(UserWarning, match=r"step_000006.pt: is no checkpoint of vitdense"):
        assert states.load()[1]["step"] == 5


def test_what_a_lost_process_left_is_removed(tmp_path: Path) -> None:
    states = States(tmp_path)
    save(states, 5)
    (tmp_path / ".step_000006.pt.partial").write_bytes(b"half")
    (tmp_path / ".step_000006.partial").mkdir()
    (tmp_path / ".step_000006.partial" / "shard").write_bytes(b"half")
    (tmp_path / ".step_000004.aside").mkdir()  # its successor never came
    assert [path.name for path in states.entries] == ["step_000005.pt"]
    states.clean()
    assert names(tmp_path) == ["step_000004", "step_000005.pt"]


def test_a_failure_surfaces_once_and_names_what_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = States(tmp_path)

    def full(path: Path, state: dict[str, Any]) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_state", full)
        states.save(5, state(5))
        with pytest.raises(CheckpointError, match="No space left on device; there is no checkpo"):
            states.wait()
    states.wait()
    save(states, 5)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_state", full)
        states.save(9, state(9))
        with pytest.raises(CheckpointError) as caught:
            states.save(10, state(10))
    assert str(caught.value) == (
        f"{tmp_path}/step_000009.pt: cannot be written: No space left on device; "
        f"{tmp_path}/step_000005.pt is whole: when there is room again, go on from there with "
        "--resume"
    )
    assert names(tmp_path) == ["step_000005.pt"]


def test_a_failure_hides_no_other_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = States(tmp_path)
    monkeypatch.setattr(checkpoint, "write_state", lambda *_: (_ for _ in ()).throw(OSError("x")))
    with (
        pytest.warns(UserWarning, match="step_000001.pt: cannot be written: x"),
        pytest.raises(MemoryError),
        states,
    ):
        states.save(1, state(1))
        raise MemoryError
    with pytest.raises(CheckpointError, match="cannot be written: x"), states:
        states.save(1, state(1))
    with pytest.raises(CheckpointError, match="cannot be written: x"), states:
        states.save(1, state(1))
        raise Stopped("stopped, all is saved")


def test_the_system_says_why(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: the same call fails."""
    resource = pytest.importorskip("resource")
    states, path = States(tmp_path), tmp_path / "step_000009.pt"
    save(states, 5)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        states.save(9, state(9, size=100_000))
        with pytest.raises(CheckpointError, match=f"{path}: cannot be written: File too large"):
            states.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == ["step_000005.pt"]


class Folders(States):
    """Entries that are folders, as sharded ones are."""

    suffix = ""

    def write(self, path: Path, state: dict[str, Any]) -> None:
        path.mkdir()
        torch.save(state, path / "shard.pt")

    def read(self, path: Path) -> dict[str, Any]:
        return super().read(path / "shard.pt")


def test_an_entry_may_be_a_folder(tmp_path: Path) -> None:
    states = Folders(tmp_path, keep=2)
    save(states, 5, 10, 10, 15)
    assert names(tmp_path) == ["step_000010", "step_000015"]
    assert states.load()[1]["step"] == 15
    (tmp_path / "step_000015" / "shard.pt").unlink()
    with pytest.warns(UserWarning, match="step_000015"):
        assert states.load()[1]["step"] == 10


def test_what_follows_sees_a_whole_entry(tmp_path: Path) -> None:
    states, seen = States(tmp_path), []
    states.save(5, state(5), lambda copy: seen.append((copy["step"], names(tmp_path))))
    states.wait()
    assert seen == [(5, ["step_000005.pt"])]


def test_a_folder_of_parts_imports_no_strange_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "strange.py").write_text("raise SystemExit('was run')\n")
    monkeypatch.syspath_prepend(tmp_path)
    torch.save({"step": 1}, tmp_path / parts.REST)
    (tmp_path / ".metadata").write_bytes(b"cstrange\nthing\n.")
    with pytest.raises(CheckpointError, match=r"strange\.thing is no part of a description"):
        parts.read(tmp_path)
