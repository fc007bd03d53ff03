"""Weights & Biases and MLflow: what they are told, by stand-ins for their libraries."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vitdense.engine.observers import Mlflow, Wandb
from vitdense.engine.observers.trackers import flatten
from vitdense.engine.pictures import picture_path

SETTINGS = {"train": {"steps": 4, "clip": None}, "data": {"root": "x", "options": {}}}
TRAINING = {"kind": "train", "step": 2, "loss": 0.5, "memory_gb": None}
EVALUATION = {"kind": "evaluation", "step": 4, "AP": 0.25, "APs": math.nan, "AP/a:b": 0.5}
RESULTS = {"AP": 0.25, "APs": None, "step": 4, "steps": 4, "stopped_early": False}


class FakeWandb(ModuleType):
    """Takes what a run logs."""

    def __init__(self, **settings: Any) -> None:
        super().__init__("wandb")
        unset = ("api_key", "project", "run_id", "run_name")
        given = dict.fromkeys(unset) | {"mode": "online", "base_url": "http://none.invalid"}
        self.settings = SimpleNamespace(**(given | settings))
        self.logged: list[tuple[dict, int]] = []
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None

    def setup(self) -> SimpleNamespace:
        return SimpleNamespace(settings=self.settings)

    def init(self, **options: Any) -> Any:
        self.options = options
        return SimpleNamespace(log=self.log, finish=self.finish, summary=self.summary)

    def Image(self, path: str) -> tuple[str, str]:
        return "image", Path(path).name

    def log(self, values: dict, step: int) -> None:
        self.logged.append((values, step))

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "60")
    return fake


def test_wandb_has_numbers_pictures_and_results(tmp_path: Path, wandb: FakeWandb) -> None:
    wandb.settings.api_key, wandb.settings.project = "key", "mine"
    picture_path(tmp_path, 4).parent.mkdir()
    picture_path(tmp_path, 4).touch()
    run = Wandb(tmp_path, "demo/boxes", SETTINGS)
    run.start()
    for record in (TRAINING, EVALUATION):
        run.log(record)
    run.finish(RESULTS)
    run.close()
    assert wandb.logged == [
        ({"train/loss": 0.5}, 2),
        (
            {
                "evaluation/AP": 0.25,
                "evaluation/AP/a:b": 0.5,
                "predictions": ("image", "step_000004.jpg"),
            },
            4,
        ),
    ]
    assert wandb.summary == RESULTS and wandb.exit_code == 0
    told = {key: wandb.options[key] for key in ("project", "name", "mode", "resume", "config")}
    assert told == {
        "project": "mine",
        "name": "demo/boxes",
        "mode": None,
        "resume": "allow",
        "config": SETTINGS,
    }


def test_wandb_without_a_key_asks_nobody(
    tmp_path: Path, wandb: FakeWandb, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Wandb(tmp_path, "demo", SETTINGS)
    run.start()
    run.close()
    assert wandb.options["mode"] == "offline" and wandb.exit_code == 1
    said = capsys.readouterr().err
    assert "nobody is logged in" in said and str(tmp_path / "wandb") in said


def test_wandb_finds_the_key_of_a_login(
    tmp_path: Path, wandb: FakeWandb, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "netrc").write_text("machine none.invalid login user password key\n")
    Wandb(tmp_path, "demo", SETTINGS).start()
    assert wandb.options["mode"] is None and capsys.readouterr().err == ""


def test_wandb_follows_a_mode_that_is_asked_for(
    tmp_path: Path, wandb: FakeWandb, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb.settings.mode = "disabled"
    Wandb(tmp_path, "demo", SETTINGS).start()
    assert wandb.options["mode"] is None and capsys.readouterr().err == ""


def test_wandb_goes_on_with_its_run(tmp_path: Path, wandb: FakeWandb) -> None:
    def identity(step: int) -> str:
        Wandb(tmp_path, "demo", SETTINGS, step).start()
        return wandb.options["id"]

    first = identity(0)
    assert identity(2) == first
    assert identity(0) != first


class FakeClient:
    """One experiment, and what its runs were told."""

    runs: dict[str, dict[str, Any]] = {}

    def get_experiment_by_name(self, name: str) -> None:
        return None

    def create_experiment(self, name: str) -> str:
        return f"experiment of {name}"

    def create_run(self, experiment: str, run_name: str) -> Any:
        identity = f"run-{len(self.runs)}"
        new = {"experiment": experiment, "name": run_name, "params": {}, "metrics": []}
        self.runs[identity] = new
        return SimpleNamespace(info=SimpleNamespace(run_id=identity))

    def log_batch(self, identity: str, metrics: list = [], params: list = []) -> None:  # noqa: B006
        assert len(metrics) <= 1000 and len(params) <= 100
        self.runs[identity]["metrics"] += [(key, value, step) for key, value, _, step in metrics]
        self.runs[identity]["params"] |= dict(params)

    def update_run(self, identity: str, status: str) -> None:
        self.runs[identity]["status"] = status

    set_terminated = update_run


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    fake: Any = ModuleType("mlflow")
    fake.MlflowClient = type("Client", (FakeClient,), {"runs": {}})
    fake.entities = SimpleNamespace(Param=lambda *values: values, Metric=lambda *values: values)
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    for name in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    return fake.MlflowClient.runs


def test_mlflow_has_parameters_numbers_and_results(
    tmp_path: Path, mlflow: dict[str, dict[str, Any]]
) -> None:
    run = Mlflow(tmp_path, "demo", SETTINGS)
    run.start()
    for record in (TRAINING, EVALUATION):
        run.log(record)
    run.finish(RESULTS)
    run.close()
    assert mlflow["run-0"] == {
        "experiment": "experiment of vitdense",
        "name": "demo",
        "params": {
            "train.steps": "4",
            "train.clip": "None",
            "data.root": "x",
            "data.options": "{}",
        },
        "metrics": [
            ("train/loss", 0.5, 2),
            ("evaluation/AP", 0.25, 4),
            ("evaluation/AP.a_b", 0.5, 4),
            ("results/AP", 0.25, 4),
            ("results/steps", 4, 4),
            ("results/stopped_early", 0, 4),
        ],
        "status": "FINISHED",
    }


def test_mlflow_goes_on_with_its_run(tmp_path: Path, mlflow: dict[str, dict[str, Any]]) -> None:
    first = Mlflow(tmp_path, "demo", SETTINGS)
    first.start()
    first.close()
    assert mlflow["run-0"]["status"] == "KILLED"
    again = Mlflow(tmp_path, "demo", SETTINGS, step=2)
    again.start()
    assert mlflow["run-0"]["status"] == "RUNNING" and len(mlflow) == 1
    Mlflow(tmp_path, "demo", SETTINGS).start()
    assert len(mlflow) == 2


def test_mlflow_takes_many_numbers_in_parts(
    tmp_path: Path, mlflow: dict[str, dict[str, Any]]
) -> None:
    run = Mlflow(tmp_path, "demo", {f"key{index}": "x" * 900 for index in range(250)})
    run.start()
    run.log({"kind": "evaluation", "step": 1} | {f"AP/{index}": 0.5 for index in range(2500)})
    assert len(mlflow["run-0"]["metrics"]) == 2500
    values = mlflow["run-0"]["params"].values()
    assert len(values) == 250 and {len(value) for value in values} == {500}


@pytest.mark.parametrize(("kind", "name"), [(Wandb, "wandb"), (Mlflow, "mlflow")])
def test_a_library_that_is_missing_says_how_to_get_it(
    kind: type, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"pip install 'vitdense\[{name}\]'"):
        kind(tmp_path, "demo", SETTINGS)


def test_settings_become_dotted_names() -> None:
    assert dict(flatten({"a": {"b": {"c": 1}}, "d": [1, {"e": 2}]})) == {
        "a.b.c": 1,
        "d": [1, {"e": 2}],
    }
