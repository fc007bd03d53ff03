"""FSDP2 on CPUs: a split run is the run that it would be, and any number of processes goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine import sharded
from tests.engine.worlds import run_world
from vitdense.engine import build, checkpoint, runtime
from vitdense.engine.evaluate import evaluate
from vitdense.engine.run import finite
from vitdense.engine.states import States, entries_in
from vitdense.engine.train import train

WORKER = "tests.engine.sharded"


def test_processes_agree_and_gather(tmp_path: Path) -> None:
    run_world(WORKER, "talk", tmp_path)


def last(run: Path) -> dict[str, Any]:
    _, state = States(run / "checkpoints").load()
    return state


def flat(state: Any, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return {name: state}
    items = state.items() if isinstance(state, dict) else ()
    return {key: it for k, value in items for key, it in flat(value, f"{name}/{k}").items()}


@pytest.mark.slow
def test_split_runs(tmp_path: Path) -> None:
    run_world(WORKER, "split_runs", tmp_path, timeout=900)
    split, copied = flat(last(tmp_path / "split")), flat(last(tmp_path / "copied"))
    assert split.keys() == copied.keys() > {"/model/head.norms.0.running_mean"}
    for name, value in split.items():
        torch.testing.assert_close(value, copied[name], rtol=1e-3, atol=1e-4, msg=name)
    again = flat(last(tmp_path / "again"))
    assert all(torch.equal(value, again[name]) for name, value in split.items())
    for name in ("copied", "mixed", "again"):
        ours, theirs = sharded.numbers(tmp_path / "split"), sharded.numbers(tmp_path / name)
        assert ours["mIoU"] == pytest.approx(theirs["mIoU"], abs=1e-3), name
    assert len(entries_in(tmp_path / "split" / "checkpoints")) == 4
    for name in ("boxes", "sgd"):
        assert "AP" in sharded.numbers(tmp_path / name)
    weights = {name: it for name, it in flat(last(tmp_path / "boxes")).items() if "/model" in name}
    before = flat(States(tmp_path).read(entries_in(tmp_path / "boxes/checkpoints")[0]))
    learnt = {name for name, it in weights.items() if not torch.equal(it, before[name])}
    assert learnt and not any("backbone" in name for name in learnt)

    evaluate_alone(tmp_path)
    sharded.forget(tmp_path / "split", 2)
    config = sharded.make(tmp_path, "split", sharded.SEMANTIC, "train.ema=0.9", "train.shard=true")
    assert train(config, resume=True)["steps"] == 4
    assert (config.output / "checkpoints" / "step_000004.pt").is_file()


def evaluate_alone(folder: Path) -> None:
    """The file that the processes wrote has the numbers that they measured."""
    config = sharded.make(folder, "split", sharded.SEMANTIC)
    model, meta = checkpoint.load_model(config.output / "model.safetensors")
    data, place = build.build_data(config), runtime.start("cpu")
    loader = build.evaluation_loader(config, data, model, place)
    metric = build.build_metric(config, model.task, meta.classes)
    found = finite(evaluate(model, loader, metric, place.device))
    kept = sharded.numbers(config.output)
    assert found == pytest.approx({name: kept[name] for name in found}, abs=1e-9)
