"""A process that ends takes the others with it, soon, and they say which one it was."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine import sharded
from tests.engine.worlds import ROOT, torchrun
from vitdense.config import dump
from vitdense.engine.checkpoint import CheckpointError
from vitdense.engine.peers import is_broken
from vitdense.engine.states import entries_in

FATAL = """
import os, signal
import torch.distributed as dist
from vitdense.data.base import DataError
from vitdense.engine import parts, train
from vitdense.engine.run import Run

step, write, evaluate = train.step, parts.write, Run.evaluate

def fatal(run, batches):
    rank, how = os.environ["FATAL"].split()
    if how in ("killed", "faulty", "told") and run.step == 2 and run.runtime.rank == int(rank):
        run.states.wait()
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "told":  # torchrun is, which tells all
            os.kill(os.getppid(), signal.SIGTERM)
        else:
            raise DataError("a.jpg: is faulty")
    step(run, batches)

def left(run):
    rank, how = os.environ["FATAL"].split()
    if how == "leaves" and dist.get_rank() == int(rank):
        os.kill(os.getpid(), signal.SIGTERM)
    evaluate(run)

def torn(path, state, group):
    rank, how = os.environ["FATAL"].split()
    if how == "writes" and state["step"] == 2 and dist.get_rank() == int(rank):
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, state, group)

train.step, parts.write, Run.evaluate = fatal, torn, left
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run in which one process ends in step 2, as FATAL says."""
    (tmp_path / "fatal_step.py").write_text(FATAL)
    checked = sharded.make(tmp_path, "run", sharded.SEMANTIC, "train.pictures=0")
    path = tmp_path / "config.yaml"
    path.write_text(dump(checked).replace("imports: []", "imports: [fatal_step]"))
    return path


def fatal(config: Path, how: str) -> dict[str, str]:
    python = os.pathsep.join([str(config.parent), str(ROOT)])
    return {"FATAL": how, "PYTHONPATH": python}


def test_torchrun_ends_with_the_cause(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in fatal(config, "1 killed").items():
        monkeypatch.setenv(name, value)
    running = torchrun("train", str(config))
    _, said = running.communicate(timeout=600)
    assert running.returncode
    name = socket.gethostname()
    assert f"error: rank 0 of 2 ({name}, process " in said, said
    assert f"must end too: rank 1 ({name}, process " in said
    assert "is lost: it says nothing, as one that hangs, or was killed" in said
    assert "go on from it with --resume" in said
    kept = entries_in(config.parent / "run" / "checkpoints")
    assert [path.name for path in kept] == ["step_000001.pt", "step_000002.pt"]


def test_a_lost_connection_may_hide_behind_a_checkpoint() -> None:
    closed = RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]")
    failed, told = CheckpointError("runs/nccl: cannot be written"), CheckpointError("when there is")
    assert is_broken(closed) and not is_broken(failed)
    failed.__cause__, told.__cause__ = closed, failed
    assert is_broken(told)
    failed.__cause__ = OSError("No space left on device, broken pipe")
    assert not is_broken(told)


@pytest.mark.slow
def test_torchrun_is_told_to_stop(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It tells every process, those that read images too; the step that is under way is saved."""
    for name, value in fatal(config, "1 told").items():
        monkeypatch.setenv(name, value)
    longer = ("train.steps=9999", "train.checkpoint_every=9999", "data.workers=1")
    _, said = torchrun("train", str(config), *longer).communicate(timeout=600)
    told = re.search(r"stopped after step (\d+), all is saved; go on with --resume", said)
    assert told and int(told[1]) >= 3, said
    (kept,) = entries_in(config.parent / "run" / "checkpoints")
    assert kept.name == f"step_{int(told[1]):06d}.pt"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "status", "words"),
    [
        ("1 killed", 75, "rank 1 .* is lost: it says nothing"),
        ("0 killed", 75, "rank 0 .* is lost: it kept the store"),
        ("1 leaves", 75, "rank 1 .* is lost: Stopped: stopped, all is saved"),
        ("1 writes", 75, "rank 1 .* is lost: it says nothing"),
        ("1 faulty", 75, "rank 1 .* is lost: DataError: a.jpg: is faulty"),
    ],
)
def test_without_a_launcher(config: Path, how: str, status: int, words: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, **fatal(config, how), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shard = ["train.shard=true"] if "writes" in how else []
    command = [sys.executable, "-m", "vitdense", "train", str(config), *shard]
    running = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [it.communicate(timeout=600)[1] for it in running]
    other = 1 - int(how[0])
    assert running[other].returncode == status, said[other]
    assert re.search(words, said[other]), said[other]
