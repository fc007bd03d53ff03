"""What the processes of test_processes_sharding.py do, and the configs that they train."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from vitdense.config import Config, loads
from vitdense.engine import checkpoint, parts, sharding
from vitdense.engine import train as train_module
from vitdense.engine.checkpoint import CheckpointError
from vitdense.engine.peers import FailedProcess
from vitdense.engine.run import Run
from vitdense.engine.runtime import Runtime
from vitdense.engine.states import entries_in
from vitdense.engine.stopping import Stopped, Stopwatch
from vitdense.engine.train import synchronizing, train

TEXT = """
model:
  backbone: {name: timm, model: vit_tiny_patch16_224, img_size: 32, patch_size: 8,
             options: {depth: 2, embed_dim: 16, num_heads: 2}}
  neck: {name: simple_feature_pyramid, channels: 16}
  head: HEAD
data:
  dataset: {name: shapes, task: TASK, images: 14, size: 32}
  root: ROOT
  transforms: {name: TRANSFORM, size: 32}
  workers: 0
train: {steps: 4, batch_size: 2, evaluations: 2, pictures: 1, checkpoint_every: 1, keep: 9,
        observers: []}
optimizer: {lr: 1e-3}
output: OUT
device: cpu
"""
SEMANTIC = {
    "TASK": "semantic",
    "TRANSFORM": "segmentation",
    "HEAD": "{name: linear, norm: batch, dropout: 0}",
}
BOXES = {
    "TASK": "detection",
    "TRANSFORM": "detection",
    "HEAD": "{name: rtdetr, width: 16, heads: 2, encoder_ffn: 16, ffn: 16, queries: 5, blocks: 1, "
    "decoder_layers: 2, denoising: 4, norm: group}",
}


def make(folder: Path, out: str, kind: dict[str, str], *overrides: str) -> Config:
    text = TEXT
    for word, value in {**kind, "ROOT": str(folder / "data"), "OUT": str(folder / out)}.items():
        text = text.replace(word, value)
    return loads(text, "test.yaml", overrides)


def launched(rank: int) -> None:
    """As torchrun would have started this process."""
    names = {"WORLD_SIZE": dist.get_world_size(), "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in names.items()})


def split_runs(rank: int, folder: Path) -> None:
    """The same run, split and not; gone on with in two processes; and one of another head."""
    launched(rank)
    same = ("train.ema=0.9", "train.accumulate=2")
    split = make(folder, "split", SEMANTIC, *same, "train.shard=true")
    train(split)
    train(make(folder, "copied", SEMANTIC, *same))
    if rank == 0:
        shutil.copytree(folder / "split", folder / "again")
        shutil.copytree(folder / "copied", folder / "mixed")
        for name in ("again", "mixed"):
            forget(folder / name, 2)
    dist.barrier()
    train(make(folder, "again", SEMANTIC, *same, "train.shard=true"), resume=True)
    train(make(folder, "mixed", SEMANTIC, *same, "train.shard=true"), resume=True)
    frozen = ("train.shard=true", "optimizer.backbone_scale=0", "train.steps=2")
    train(make(folder, "boxes", BOXES, *frozen))
    sgd = ("train.shard=true", "optimizer.name=sgd", "train.steps=1", "train.precision=fp16")
    train(make(folder, "sgd", BOXES, *sgd))


def forget(run: Path, step: int) -> None:
    """What a run wrote after a step."""
    (run / "results.json").unlink()
    for path in entries_in(run / "checkpoints")[step:]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def talk(rank: int, folder: Path) -> None:
    """What processes say to each other."""
    runtime = Runtime(torch.device("cpu"), rank, 2)
    assert runtime.agree(f"I am {rank}") == "I am 0"
    assert [runtime.anyone(rank == it) for it in (0, 1, 2)] == [True, True, False]
    assert runtime.mean(lambda: {"a": 1.0 + rank, "b": 4.0}) == {"a": 1.5, "b": 4.0}
    assert runtime.mean(lambda: {}) == {}
    check_accumulation(runtime)
    check_faults(runtime)
    check_gathering(rank)
    check_torn_folders(rank, folder)
    check_budget(rank, folder)
    check_told_in_evaluation(folder)


def check_accumulation(runtime: Runtime) -> None:
    """Gradients are sent once in a step."""
    net, sent = runtime.wrap(nn.Linear(2, 2)), []

    def send(state, bucket):  # type: ignore[no-untyped-def]  # torch checks annotations
        sent.append(bucket.index())
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    net.register_comm_hook(None, send)  # type: ignore[operator]
    for last in (False, False, True):
        with synchronizing(SimpleNamespace(net=net), last):  # type: ignore[arg-type]
            net(torch.ones(1, 2) * (1 + runtime.rank)).sum().backward()
    assert sent == [0]
    assert net.module.weight.grad.eq(3 * (1 + 2)).all()


def check_faults(runtime: Runtime) -> None:
    """One that cannot read its numbers is heard by all."""

    def read() -> dict[str, float]:
        if runtime.rank == 1:
            raise ZeroDivisionError("of rank 1")
        return {}

    with pytest.raises((ZeroDivisionError, FailedProcess), match="of rank 1") as error:
        runtime.mean(read)
    assert (error.type is FailedProcess) == (runtime.rank == 0)
    with pytest.raises(ValueError, match=r"^train\.sync_batch_norm: .*on GPUs only.*norm=group"):
        runtime.synchronize_norms(nn.BatchNorm2d(3))


def make_model(rank: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    block = lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))  # noqa: E731
    model.backbone = nn.Sequential(nn.Sequential(block(), block()))
    model.head = nn.Linear(4, 3)
    model.forward = lambda x: model.head(model.backbone(x))  # type: ignore[method-assign]
    model.backbone[0][0][1].running_mean.fill_(rank)
    return model


def check_gathering(rank: int) -> None:
    """A split model answers as a whole one does, however often each process asks."""
    whole, model = make_model(0).eval(), make_model(rank).eval()
    sharding.shard(model)
    units = [it for it in model.modules() if isinstance(it, sharding.FSDPModule)]
    assert len(units) == 3 and sharding.is_sharded(model)
    images = torch.randn(5, 4)
    with torch.no_grad(), sharding.gathered(model):
        for _ in range(1 + rank):
            torch.testing.assert_close(model(images), whole(images))
    assert all(isinstance(it, DTensor) for it in model.parameters())
    assert model.head.weight.to_local().shape[0] == (2, 1)[rank]
    torch.testing.assert_close(model(images), whole(images))
    model(images).sum().backward()
    assert isinstance(model.head.weight.grad, DTensor)


def check_torn_folders(rank: int, folder: Path) -> None:
    """Each missing or cut file is noticed, and no pickle is run."""
    model = make_model(rank)
    sharding.shard(model)
    state = {"step": 3, "model": model.state_dict(), "ema": None, "names": ["a"]}
    path = folder / "step_000003"
    parts.write(path, state, dist.group.WORLD)
    dist.barrier()
    if rank:
        return
    read = parts.read(path)
    assert (read["step"], read["ema"], read["names"]) == (3, None, ["a"])
    assert read["model"].keys() == state["model"].keys()
    assert parts.read(path, wanted=())["model"] == {}
    assert read["model"]["backbone.0.0.1.running_mean"].eq(0).all()
    for file in path.iterdir():
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        for wrong in (b"", content[: len(content) // 2], bytes(flipped)):
            file.write_bytes(wrong)
            with pytest.raises(CheckpointError, match="step_000003"):
                parts.read(path)
        file.write_bytes(content)
    checkpoint.write_state(path / parts.REST, {"step": 3})  # who forges one can forge its sums
    (path / ".metadata").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(CheckpointError, match="os.system is no part of a description"):
        parts.read(path)


def check_budget(rank: int, folder: Path) -> None:
    """Processes whose clocks differ evaluate at the same steps."""
    launched(rank)
    minutes = ("train.steps=null", "train.minutes=0.1", "train.evaluations=3")
    quiet = ("train.checkpoint_every=1000", "train.pictures=0")
    config = make(folder, "budget", SEMANTIC, *minutes, *quiet)
    original, steps = train_module.step, [0]

    def step(*args: Any) -> None:
        original(*args)
        steps[0] += 1

    with pytest.MonkeyPatch.context() as patch:  # a second for each step, or half of one
        patch.setattr(train_module, "step", step)
        patch.setattr(Stopwatch, "elapsed", property(lambda clock: steps[0] / (1 + rank)))
        train(config)
    lines = (config.output / "metrics.jsonl").read_text().splitlines()
    records = [it for it in map(json.loads, lines) if it["kind"] == "evaluation"]
    assert [it["step"] for it in records] == [2, 4, 6]


def check_told_in_evaluation(folder: Path) -> None:
    """A long one is not waited for, as the time that is left is not known."""
    config, evaluate = make(folder, "told", SEMANTIC, "train.pictures=0"), Run.evaluate

    def told(run: Run) -> None:
        signal.raise_signal(signal.SIGTERM)
        evaluate(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "evaluate", told)
        with pytest.raises(Stopped, match="^stopped, all is saved; go on with --resume"):
            train(config)
    assert train(config, resume=True)["steps"] == 4


def numbers(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "results.json").read_text())
    return found
