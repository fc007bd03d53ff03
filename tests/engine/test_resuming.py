"""Runs that stop in every way there is, and go on: nothing is lost, and nothing is unclear."""

from __future__ import annotations

import errno
import json
import random
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.small import Make, assert_same
from vitdense import cli
from vitdense.config import Config, ConfigError, dump
from vitdense.engine import checkpoint, folder
from vitdense.engine import run as run_module
from vitdense.engine import train as train_module
from vitdense.engine.observers import read_records
from vitdense.engine.runtime import Runtime
from vitdense.engine.states import States, entries_in
from vitdense.engine.stopping import Stopped
from vitdense.engine.train import train

OVERRIDES = (
    "model.head.dropout=0.1",
    "data.dataset.images=8",
    "train.steps=6",
    "train.checkpoint_every=2",
    "train.pictures=0",
    "train.observers=[]",
)


Train = Callable[..., int]


@pytest.fixture
def make(make: Make) -> Make:
    """Six steps, with a checkpoint after every second one."""
    return lambda *overrides, out="run": make(*OVERRIDES, *overrides, out=out)


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Train]:
    """`vitdense train` of a config; the exit status."""
    before = signal.getsignal(signal.SIGTERM)

    def command(config: Config, *words: str) -> int:
        path = tmp_path / "config.yaml"
        path.write_text(dump(config))
        return cli.main(["train", str(path), *words])

    yield command
    signal.signal(signal.SIGTERM, before)


def outcome(config: Config) -> dict[str, Any]:
    """What is left of a run, times aside."""
    folder, times = config.output, {"images_per_second", "memory_gb", "seconds", "minutes"}
    state = States(folder / "checkpoints").load()[1]
    state["evaluated"] = state["evaluated"][:1]
    records = read_records(folder / "metrics.jsonl")
    records.append(json.loads((folder / "results.json").read_text()))
    return {
        "state": {key: value for key, value in state.items() if key != "elapsed"},
        "model": checkpoint.read_weights(folder / "model.safetensors"),
        "numbers": checkpoint.read_meta(folder / "model.safetensors").metrics,
        "records": [{k: v for k, v in record.items() if k not in times} for record in records],
    }


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def signal_in(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Send SIGTERM while a function is called for that time."""
    original, calls = getattr(owner, name), [0]

    def function(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            signal.raise_signal(signal.SIGTERM)
        return original(*args, **options)

    monkeypatch.setattr(owner, name, function)


@pytest.mark.parametrize(
    ("place", "call"),
    [("step", 1), ("step", 4), ("evaluate", 1), ("evaluate", 2), ("build", 1)],
)
def test_told_to_stop(
    place: str,
    call: int,
    make: Make,
    command: Train,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Between records, within an evaluation, before the first step: all is as if never stopped."""
    whole, halves = make(out="whole"), make(out="halves")
    train(whole)
    owner, name = {
        "step": (train_module, "step"),
        "evaluate": (run_module, "evaluate"),
        "build": (run_module.build, "build_model"),
    }[place]
    with monkeypatch.context() as patch:
        signal_in(patch, owner, name, call)
        assert command(halves, "--resume") == 75
    # a launcher that ends what is left must not change the status
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    told = capsys.readouterr().err
    assert "all is saved; go on with --resume" in told
    assert "Traceback" not in told
    assert not (halves.output / "results.json").exists()
    assert command(halves, "--resume") == 0
    assert_same(outcome(halves), outcome(whole))


@pytest.mark.parametrize("lost", ["publish", "evaluate", "write"])
def test_lost_around_the_best_model(lost: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between checkpoint and best model, log and checkpoint, checkpoint and the next."""
    whole, killed = make(out="whole"), make(out="killed")
    train(whole)

    class Lost(BaseException):
        pass

    original, calls = run_module.Run.evaluate, [0]

    def lose(*args: Any) -> None:
        calls[0] += 1
        if lost == "evaluate":
            original(*args)
        raise Lost

    name = {"publish": "publish", "evaluate": "evaluate", "write": "checkpoint_due"}[lost]
    with monkeypatch.context() as patch:
        patch.setattr(run_module.Run, name, lose)
        with pytest.raises(Lost):
            train(killed)
    assert calls == [1]
    train(killed, resume=True)
    assert_same(outcome(killed), outcome(whole))


def test_random_numbers_follow_from_seed_and_step(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of torch, numpy and Python at each step, and the images, in three lives and in one."""
    seen: dict[str, dict[int, Any]] = {}
    original = train_module.step

    def step(run: Any, batches: Any) -> None:
        states = (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1])
        batch = next(batches)
        seen[run.folder.name][run.step] = (*map(str, states), batch.paths, batch.images.tolist())
        original(run, iter([batch]))

    monkeypatch.setattr(train_module, "step", step)
    whole, halves = make(out="whole"), make(out="halves")
    seen["whole"], seen["halves"] = {}, {}
    train(whole)
    for call in (2, 2):
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            signal_in(patch, train_module, "step", call)
            train(halves, resume=True)
    train(halves, resume=True)
    assert seen["whole"].keys() == set(range(6))
    assert seen["halves"] == seen["whole"]
    assert len({entry[0] for entry in seen["whole"].values()}) == 6


def test_resuming_a_finished_run_changes_nothing(
    make: Make, command: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make("train.steps=2")
    results = train(config)
    before = contents(config.output)
    assert train(config, resume=True) == json.loads((config.output / "results.json").read_text())
    capsys.readouterr()
    assert command(config, "--resume") == 0
    told = capsys.readouterr().err
    assert f"{config.output}: is finished, there is nothing to do: step 2" in told
    assert f"mIoU {results['mIoU']:.4g}" in told
    assert command(config, "--resume", "data.workers=1") == 0
    assert contents(config.output) == before
    assert command(config) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert command(config, "--resume", "train.steps=3") == 0
    assert "train.steps: 2 -> 3  another length" in capsys.readouterr().err
    assert json.loads((config.output / "results.json").read_text())["steps"] == 3


def test_a_finished_run_without_checkpoints_is_left_alone(make: Make, command: Train) -> None:
    config = make("train.steps=2")
    train(config)
    for entry in entries_in(config.output / "checkpoints"):
        entry.unlink()
    before = contents(config.output)
    assert command(config, "--resume") == 0
    with pytest.raises(ValueError, match="without its checkpoints.*train.init=.*model.safetensors"):
        train(make("train.steps=3"), resume=True)
    assert contents(config.output) == before


def test_whatever_is_wrong_with_a_folder_all_processes_are_told(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, told = make(), list[Any]()
    config.output.mkdir(parents=True)
    (config.output / "results.json").write_text("{}")
    (config.output / "config.yaml").write_text("train: {")
    monkeypatch.setattr(Runtime, "agree", lambda _, value: told.append(value) or value)
    with pytest.raises(ConfigError):
        folder.prepare(config, True, Runtime(torch.device("cpu"), 0, 2))
    assert [type(it) for it in told] == [ConfigError]


def test_resuming_what_never_began(
    make: Make, command: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make("train.steps=1", "train.evaluations=1")
    assert command(config, "--resume") == 0
    assert f"{config.output}: holds no run to resume; one starts here" in capsys.readouterr().err
    killed = make("train.steps=1", "train.evaluations=1", out="killed")
    killed.output.mkdir()
    (killed.output / "config.yaml").write_text(dump(killed))
    (killed.output / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    assert command(killed, "--resume") == 0
    assert f"{killed.output}: holds no checkpoint yet; starts from" in capsys.readouterr().err
    assert_same(outcome(killed), outcome(config))


def test_torn_checkpoints(make: Make, command: Train, capsys: pytest.CaptureFixture[str]) -> None:
    whole, torn = make(out="whole"), make(out="torn")
    train(whole)
    train(torn)
    (torn.output / "results.json").unlink()
    before, last = entries_in(torn.output / "checkpoints")
    last.write_bytes(last.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match=f"passed over: {last}: is torn"):
        assert command(torn, "--resume") == 0
    assert_same(outcome(torn), outcome(whole))
    for entry in (before, last):
        entry.write_bytes(b"")
    (torn.output / "results.json").unlink()
    capsys.readouterr()
    with pytest.warns(UserWarning, match="passed over"):
        assert command(torn, "--resume") == 2
    told = capsys.readouterr().err
    assert "error:" in told and "none of the 2 checkpoints is whole" in told
    assert "Traceback" not in told


def test_a_checkpoint_of_another_model(
    make: Make, command: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make("train.steps=2")
    train(config)
    before = contents(config.output)
    changes = ("model.neck.channels=8", "model.head=upernet", "data.workers=1")
    assert command(config, "--resume", *changes) == 2
    told = capsys.readouterr().err
    assert "model.neck.channels: 16 -> 8" in told
    assert "model.head.name: linear -> upernet" in told
    assert "data.workers: 0 -> 1" in told and "no effect on the results" in told
    assert "step_000002.pt: its weights are not this model's: " in told
    assert "go on with the config.yaml beside the checkpoints" in told
    assert "Traceback" not in told
    assert contents(config.output) == before


@pytest.mark.parametrize("file", ["state", "model"])
def test_a_full_disk(
    file: str,
    make: Make,
    command: Train,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, config = make(out="whole"), make(out="full")
    train(whole)
    name = {"state": "write_state", "model": "save_weights"}[file]
    original, calls = getattr(checkpoint, name), [0]

    def full(path: Path, *rest: Any) -> None:
        calls[0] += 1
        if calls[0] >= 2:

            def write(partial: Path) -> None:
                partial.write_bytes(b"half")
                raise OSError(errno.ENOSPC, "No space left on device")

            return write(path) if file == "state" else checkpoint.write_atomic(path, write)
        original(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, name, full)
        assert command(config) == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    where = "checkpoints/step_00000[34].pt" if file == "state" else "model.safetensors"
    pattern = rf"error: .*{where}: cannot be written: No space left on device; .*step_00000"
    assert re.match(pattern, told), told
    assert "is whole: when there is room again, go on from there with --resume" in told
    assert not [path for path in config.output.rglob("*") if path.name.endswith(".partial")]
    assert command(config, "--resume") == 0
    assert_same(outcome(config), outcome(whole))


def test_a_folder_that_cannot_be_written_is_found_first(
    make: Make,
    tmp_path: Path,
    command: Train,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(train_module, "Run", lambda *_: pytest.fail("built a model first"))
    (tmp_path / "file").write_text("")
    below_file = make(out="file/run")
    assert command(below_file) == 2
    told = capsys.readouterr().err
    assert f"error: output: {below_file.output} cannot be written: Not a directory;" in told

    def refuse(**_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    from vitdense.engine import folder

    monkeypatch.setattr(folder.tempfile, "TemporaryFile", refuse)
    assert command(make()) == 2
    told = capsys.readouterr().err
    assert "cannot be written: Read-only file system; make it writable, or write elsewhere" in told
    assert not make().output.exists()


def test_changed_options_of_the_optimizer_hold(make: Make, command: Train) -> None:
    """What it remembers stays with its parameter, in whatever group that now is."""
    config = make("train.steps=2")
    train(config)
    before = States(config.output / "checkpoints").load()[1]["optimizer"]["state"]
    changed = make(
        "train.steps=3",
        "optimizer.weight_decay=0.3",
        "optimizer.betas=[0.8, 0.9]",
        "optimizer.layer_decay=0.5",
        "optimizer.lr=1e-30",
    )
    place = train_module.runtime.start("cpu")
    run = run_module.Run(changed, place)
    run.restore()
    groups = run.optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    assert {tuple(group["betas"]) for group in groups} == {(0.8, 0.9)}
    assert len({group["lr_scale"] for group in groups}) > 1
    for name, parameter in run.model.named_parameters():
        for key, value in before[name].items():
            assert torch.equal(run.optimizer.state[parameter][key], value), (name, key)
    train(changed, resume=True)
    train(make("train.steps=4", "optimizer.name=sgd"), resume=True)
    train(make("train.steps=5", "optimizer.name=adamw", "train.ema=null"), resume=True)
    results = train(make("train.steps=6"), resume=True)
    assert results["steps"] == 6


def test_what_is_being_written_when_a_run_ends_is_waited_for(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """results.json comes last: where it is, all else is whole."""
    config, original = make("train.steps=2"), checkpoint.write_text
    seen = []

    def write_text(path: Path, text: str) -> None:
        if path.name == "results.json":
            seen.append(States(config.output / "checkpoints").load()[1]["evaluated"][0])
            seen.append(checkpoint.read_meta(config.output / "model.safetensors").task)
        original(path, text)

    monkeypatch.setattr(checkpoint, "write_text", write_text)
    train(config)
    assert seen == [2, "semantic"]


def test_another_number_of_images_is_told(
    make: Make, command: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(make("train.steps=2")) == 0
    grown = make("train.steps=3", "data.dataset.images=10", out="run")
    assert command(grown, "--resume") == 0
    told = capsys.readouterr().err
    assert re.search(r"images: 8 -> 10  the training split has another number", told), told
