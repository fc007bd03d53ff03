"""The command line: what it prints, where, and its exit status."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vitdense import HEADS, cli, registry
from vitdense.data.base import DataError

ROOT = Path(__file__).parents[1]

CONFIG = """\
model:
  backbone: vit_tiny_patch16_224
  head: upernet
data: {dataset: coco, root: data, transforms: detection}
train: {steps: 10}
"""


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = Path("config.yaml")
    path.write_text(CONFIG)
    return path


def fake(monkeypatch: pytest.MonkeyPatch, module: str, name: str, answer: Any = None) -> list[Any]:
    """Replace a function by one that notes its calls, and raises `answer` if it is an error."""
    calls: list[Any] = []

    def function(*args: Any, **options: Any) -> Any:
        calls.append((args, options))
        if isinstance(answer, Exception):
            raise answer
        return answer

    stand_in = ModuleType(module)
    setattr(stand_in, name, function)
    monkeypatch.setitem(sys.modules, module, stand_in)
    return calls


def test_train(monkeypatch: pytest.MonkeyPatch, config_file: Path) -> None:
    calls = fake(monkeypatch, "vitdense.engine.train", "train")
    words = ["train", "config.yaml", "train.steps=3", "--resume", "optimizer.lr=1e-3", "seed=1"]
    assert cli.main(words) == 0
    ((config,), options) = calls[0]
    assert (config.train.steps, config.optimizer.lr, config.seed) == (3, 1e-3, 1)
    assert options == {"resume": True}


def test_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake(monkeypatch, "vitdense.inference.tools", "evaluate")
    words = ["eval", "m.safetensors", "--weights", "w", "data.root=x", "--json", "o.json", "seed=1"]
    assert cli.main(words) == 0
    assert calls == [
        (
            ("m.safetensors",),
            {
                "weights": Path("w"),
                "overrides": ["data.root=x", "seed=1"],
                "json_path": Path("o.json"),
            },
        )
    ]


def test_predict(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake(monkeypatch, "vitdense.inference.tools", "predict")
    assert cli.main(["predict", "m.safetensors", "a.jpg", "folder", "--out", "o"]) == 0
    assert calls == [
        (
            (Path("m.safetensors"), [Path("a.jpg"), Path("folder")]),
            {
                "out": Path("o"),
                "threshold": 0.3,
                "batch_size": 1,
                "device": "auto",
                "overrides": [],
            },
        )
    ]


def test_predict_with_overrides_among_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake(monkeypatch, "vitdense.inference.tools", "predict")
    words = ["a.jpg", "inference.window=[64, 32]", "--out", "o", "inference.flip=true", "x=1.png"]
    assert cli.main(["predict", "m", *words]) == 0
    ((_, images), options) = calls[0]
    assert images == [Path("a.jpg"), Path("x=1.png")]
    assert options["overrides"] == ["inference.window=[64, 32]", "inference.flip=true"]


def test_convert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = fake(monkeypatch, "vitdense.convert.conversion", "convert", "what it did")
    assert cli.main(["convert", "owner/model", "--out", "m.safetensors", "--partial"]) == 0
    assert calls == [(("owner/model", Path("m.safetensors")), {"partial": True})]
    assert capsys.readouterr().out == "what it did\n"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (DataError("a.json: is no JSON"), 1),
        (ValueError("device: cuda:7 is not here"), 2),
        (ValueError("set/images/a-1.jpg: the prediction is of size [8, 8]"), 2),
        (FileNotFoundError("m.safetensors: not found"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_for_the_user_have_no_traceback(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    config_file: Path,
    error: BaseException,
    status: int,
) -> None:
    def train(*args: Any, **options: Any) -> None:
        raise error

    stand_in = ModuleType("vitdense.engine.train")
    stand_in.train = train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vitdense.engine.train", stand_in)
    assert cli.main(["train", "config.yaml"]) == status
    text = capsys.readouterr()
    assert text.out == ""
    assert text.err == ("interrupted\n" if status == 130 else f"error: {error}\n")


def test_our_own_faults_keep_their_traceback(
    monkeypatch: pytest.MonkeyPatch, config_file: Path
) -> None:
    fake(monkeypatch, "vitdense.engine.train", "train", ValueError("too many values to unpack"))
    with pytest.raises(ValueError, match="too many values"):
        cli.main(["train", "config.yaml"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["chek", "x"], "error: there is no command 'chek'. Did you mean 'check'? Known: train,"),
        (
            ["train", "config.yaml", "--resme"],
            "unknown argument '--resme'. Did you mean '--resume'?",
        ),
        (["list", "head", "seed=1"], "error: unknown argument 'seed=1'."),
        (["train", "x.yaml", "--data.root=a"], "Keys have no dashes: data.root=a"),
        (["predict", "m", "a.jpg", "--out", "x", "--treshold=0.5"], "Did you mean '--threshold'?"),
        (["predict", "m", "a.jpg"], "error: the following arguments are required: --out"),
        ([], "error: the following arguments are required: COMMAND"),
        (["train"], "error: the following arguments are required: CONFIG\n"),
    ],
)
def test_bad_calls(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_bad_config(capsys: pytest.CaptureFixture[str], config_file: Path) -> None:
    assert cli.main(["check", "config.yaml", "train.stepz=3"]) == 2
    message = "error: command line: train.stepz: train has no key 'stepz' (got 3). Did you mean"
    assert capsys.readouterr().err.startswith(message)


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    text = capsys.readouterr().out
    assert "\nhead\n" in text
    assert "  upernet  " in text
    assert "  and every timm model by its own name (" in text
    assert cli.main(["list", "heads"]) == 0
    assert capsys.readouterr().out.startswith("head\n  deformable_detr")
    assert cli.main(["list", "haed"]) == 2
    assert "there is no 'haed'. Did you mean 'head'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        (
            "head.upernet",
            [
                "head.upernet: UPerNet",
                "vitdense/heads/segmentation/upernet.py:",
                "vitdense supplies: levels, num_classes",
                "\n  channels = 512\n      a positive whole number\n      ",
            ],
        ),
        (
            "backbone.swin_tiny_patch4_window7_224",
            [
                "is backbone.timm with model: swin_tiny_patch4_window7_224",
                "  model (required)\n      a string\n",
                "img_size = null\n      a positive whole number, a list of 2 (each a positive",
            ],
        ),
        ("model.pyramid", ["  neck = null\n      the name of a neck, or a mapping"]),
        ("train", ["train: How long", "vitdense/config/schema.py:", "  clip = 0.1\n"]),
        ("config", ["  train: a section\n", "  seed = 0\n"]),
        ("seed", ["  seed = 0\n      a whole number from 0\n"]),
        ("metrics", ["metric\n  coco"]),
        ("data", ["  train = train\n      a string\n      split to learn from\n"]),
        ("train.steps", ["  steps = null\n      a positive whole number or null\n"]),
        ("imports", ["  imports = []\n"]),
        ("output", ["  output = runs/<config name>\n"]),
    ],
)
def test_show(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    parts: list[str],
) -> None:
    monkeypatch.chdir(ROOT)
    assert cli.main(["show", what]) == 0
    text = capsys.readouterr().out
    for part in parts:
        assert part in text


def test_show_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "head.uppernet"]) == 2
    assert "no head is called 'uppernet'. Did you mean 'upernet'?" in capsys.readouterr().err
    assert cli.main(["show", "trian"]) == 2
    assert "there is no 'trian'. Did you mean 'train'?" in capsys.readouterr().err
    assert cli.main(["show", "upernet"]) == 2
    assert "there is no 'upernet'. Did you mean 'head.upernet'?" in capsys.readouterr().err
    assert cli.main(["show", "train.stps"]) == 2
    assert "train has no key 'stps'. Did you mean 'steps'? Known: s" in capsys.readouterr().err


def test_parts_of_ones_own_are_listed_and_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(registry, "_users", {})
    monkeypatch.chdir(ROOT)
    imports = ["--imports", "examples.wide_linear", "--imports", "examples.conv_stages"]
    assert cli.main(["show", "head.wide_linear", *imports]) == 0
    text = capsys.readouterr().out
    assert "examples/wide_linear.py:" in text
    assert "  width = 256\n      a whole number\n      channels after the concatenation\n" in text
    assert cli.main(["list", *imports]) == 0
    text = capsys.readouterr().out
    assert "  wide_linear " in text and "  conv_stages " in text
    source = (ROOT / "examples/wide_linear.py").read_text().replace("width: int", "width")
    (tmp_path / "broken_head.py").write_text(source.replace("wide_linear", "users_broken"))
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.main(["list", "head", "--imports", "broken_head"]) == 0
    assert "users_broken     (cannot be used: " in capsys.readouterr().out
    HEADS._known().pop("users_broken")
    assert cli.main(["list", "--imports", "examples.none"]) == 2
    assert "imports: no module named 'examples.none'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [["-m", "vitdense", "train"], ["tools/train.py"], ["tools/eval.py"], ["tools/predict.py"]],
)
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    words = [sys.executable, "-X", "importtime", *command, "--help"]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("usage: vitdense ")
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "timm", "pydantic", "numpy", "yaml"}


def test_a_broken_pipe_is_silent() -> None:
    words = f"{sys.executable} -m vitdense list | head -1"
    run = subprocess.run(words, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("backbone\n", "")
