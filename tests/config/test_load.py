"""Valid configs: defaults, names, spans, parts, and the way out and in again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitdense import HEADS, Head, config
from vitdense.config import ConfigError, Part
from vitdense.config.loader import config_name
from vitdense.config.types import parse_span
from vitdense.structures import Level

Write = Callable[..., Path]


def test_parts_get_their_defaults(good: str) -> None:
    loaded = config.loads(good)
    model = loaded.model
    assert (model.kind, model.name, model.options["neck"]) == ("model", "pyramid", None)
    backbone, head = model.options["backbone"], model.options["head"]
    assert backbone.name == "timm"
    assert backbone.options["model"] == "vit_tiny_patch16_224"
    assert backbone.options["pretrained"] is False
    assert head.options["channels"] == 64
    assert head.path == "model.head"
    assert loaded.train.steps == 10
    assert loaded.schedule.name == "cosine"
    assert loaded.metric is None


def test_a_bare_name_is_a_curve_or_an_optimizer_with_its_defaults(good: str) -> None:
    loaded = config.loads(good + "schedule: poly\noptimizer: sgd\n")
    assert (loaded.schedule.name, loaded.schedule.power) == ("poly", 0.9)
    assert (loaded.optimizer.name, loaded.optimizer.momentum) == ("sgd", 0.9)
    for overrides in (["schedule=poly"], "schedule=poly"):  # one string is one override
        assert config.loads(good, overrides=overrides).schedule.name == "poly"


def test_a_timm_name_and_its_long_form_are_equal(good: str) -> None:
    short = good.replace("vit_tiny_patch16_224", "{name: vit_tiny_patch16_224, img_size: 256}")
    long = short.replace("{name: vit", "{name: timm, model: vit")
    assert config.loads(short) == config.loads(long)
    assert config.loads(short) != config.loads(good)


def test_lists_become_tuples_where_the_option_is_one(good: str) -> None:
    loaded = config.loads(good, overrides=["model.backbone.img_size=[256, 384]"])
    assert loaded.model.options["backbone"].options["img_size"] == (256, 384)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("configs/demo/detection.yaml", "demo/detection"),
        ("/x/configs/y/configs/demo.yaml", "demo"),
        ("elsewhere/own.v2.yaml", "own.v2"),
        ("own.yaml", "own"),
    ],
)
def test_name(path: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert config_name(Path(path)) == name


def test_output_follows_the_name(write: Write, good: str) -> None:
    path = write(good, "configs/demo/own.yaml")
    assert config.load(path).output == Path("runs/demo/own")
    assert config.load(path).name == "demo/own"
    assert config.load(path, ["output=here"]).output == Path("here")


@pytest.mark.parametrize(
    ("value", "span"),
    [
        (0.05, 0.05),
        (1.0, 1.0),
        (0, 0),
        (500, 500),
        ("5 %", 0.05),
        ("5%", 0.05),
        ("500 steps", 500),
        ("1 step", 1),
        ("2 epochs", "2 epochs"),
        ("1 epoch", "1 epochs"),
        ("0.5 epochs", "0.5 epochs"),
    ],
)
def test_span(value: Any, span: Any) -> None:
    parsed = parse_span(value)
    assert (parsed, type(parsed)) == (span, type(span))
    assert parse_span(parsed) == parsed


@pytest.mark.parametrize(
    "value",
    [1.5, -1, -0.1, True, None, "2", "", "x", "2 weeks", "101 %", "1.5 steps", [1], "nan %"],
)
def test_what_is_no_span(value: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        parse_span(value)


@pytest.mark.parametrize(("value", "decay"), [("true", 0.999), ("false", None), ("0.9", 0.9)])
def test_ema(good: str, value: str, decay: float | None) -> None:
    assert config.loads(good, overrides=[f"train.ema={value}"]).train.ema == decay


OVERRIDES = {
    "train.epochs": st.integers(1, 99) | st.floats(0.1, 99),
    "train.ema": st.none() | st.floats(0, 0.999),
    "train.clip": st.none() | st.floats(1e-8, 1e8),
    "optimizer.lr": st.floats(1e-12, 1.0),
    "schedule.warmup": st.integers(0, 10**6) | st.floats(0, 1) | st.just("3 epochs"),
    "schedule.name": st.sampled_from(["cosine", "poly", "multistep", "constant"]),
    "data.root": st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1),
    "data.train": st.text(),
    "data.workers": st.integers(0, 9) | st.just("auto"),
    "model.neck": st.sampled_from([None, "simple_feature_pyramid", {"name": "none"}]),
    "model.head": st.sampled_from(["linear", "detr", {"name": "upernet", "dropout": 1e-5}]),
    "model.backbone.img_size": st.integers(1, 999)
    | st.lists(st.integers(1, 9), min_size=2, max_size=2),
    "model.backbone.options": st.none() | st.dictionaries(st.text(), st.text() | st.floats(0, 1)),
    "metric": st.none() | st.sampled_from(["miou", "coco"]),
    "seed": st.integers(0, 2**63 - 1),
}


@settings(deadline=None, max_examples=60)
@given(st.fixed_dictionaries({}, optional=OVERRIDES))
def test_what_is_dumped_loads_to_an_equal_config(changes: dict[str, Any]) -> None:
    from vitdense.config.nodes import dump

    good = (
        "{model: {backbone: vit_tiny_patch16_224, head: upernet}, train: {steps: 1},"
        " data: {dataset: coco, root: x, transforms: detection}}"
    )
    overrides = [f"{key}={dump(value)}" for key, value in changes.items()]
    loaded = config.loads(good, overrides=overrides)
    again = config.loads(config.dump(loaded), "elsewhere")
    assert again == loaded
    assert config.dump(again) == config.dump(loaded)


def test_the_config_of_the_docs_is_valid() -> None:
    text = (Path(__file__).parents[2] / "docs/config.md").read_text(encoding="utf-8")
    loaded = config.loads(text.split("```yaml\n")[1].split("```")[0], "docs/config.md")
    assert loaded.schedule.warmup == 0.05


def test_the_dump_has_every_option_and_no_alias(good: str) -> None:
    text = config.dump(config.loads(good))
    assert "name: timm\n    model: vit_tiny_patch16_224\n" in text
    assert "output: runs/config\n" in text
    assert "lr: 0.0002\n" in text
    # Only keys of the schedule that it uses.
    assert "gamma" not in text


def test_a_part_builds_its_object() -> None:
    part = Part("head", "linear", {"dropout": 0.5})
    head = part([Level(8, 4)], 3)
    assert isinstance(head, HEADS.get("linear"))
    assert (head.num_classes, head.levels) == (3, [Level(8, 4)])


FUSSY = '''
from vitdense import HEADS, Head


@HEADS.register("users_fussy")
class Fussy(Head):
    """Refuses most widths."""

    def __init__(self, levels, num_classes, *, width: int = 4, sizes: list[int] = [1]) -> None:
        super().__init__(levels, num_classes)
        sizes.append(2)
        self.sizes = sizes
        if width % 2:
            raise ValueError(f"width: must be even, got {width}; take {width + 1}")
        if width == 0:
            raise ValueError("nothing to do")

    def forward(self, features, targets=None): ...
    def loss(self, outputs, targets): ...
    def predict(self, outputs, frames): ...

    task = "semantic"
'''


def fussy(write: Write, good: str, width: int) -> Part:
    write(FUSSY, "users_fussy_module.py")
    text = good.replace("{name: upernet, channels: 64}", f"{{name: users_fussy, width: {width}}}")
    loaded = config.load(write(text + "imports: [users_fussy_module]\n"))
    return loaded.model.options["head"]


def test_a_constructor_that_refuses_is_a_problem_of_the_config(write: Write, good: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fussy(write, good, 3)([Level(8, 4)], 2)
    assert str(caught.value) == (
        "config.yaml:3: model.head.width: must be even, got 3; take 4\n"
        "    head: {name: users_fussy, width: 3}"
    )
    message = r"^config.yaml:3: model.head: nothing to do \(users_fussy_module.py:16\)\n"
    with pytest.raises(ConfigError, match=message):
        fussy(write, good, 0)([Level(8, 4)], 2)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def loss", "def losses", "has no method loss; every head has forward, loss, predict"),
        ("task =", "tsak =", "does not set `task`; do so in __init__, or call super().__init__"),
        ('"semantic"', '"segmentation"', "has the task 'segmentation'; it must be one of "),
        ("Fussy(Head)", "Fussy", "must derive from vitdense.heads.base.Head"),
    ],
)
def test_a_part_that_lacks_what_its_kind_has(
    write: Write, good: str, monkeypatch: pytest.MonkeyPatch, old: str, new: str, message: str
) -> None:
    text = FUSSY.replace(old, new)
    if "must derive" in message:
        text = text.replace("super().__init__(levels, num_classes)", "pass")
    monkeypatch.setattr(sys.modules[__name__], "FUSSY", text)
    with pytest.raises(ConfigError) as caught:
        fussy(write, good, 2)([Level(8, 4)], 2)
    where = "config.yaml:3: model.head: Fussy at users_fussy_module.py:5 "
    assert str(caught.value).startswith(where + message)


def test_a_users_head_is_built_and_gets_its_own_defaults(write: Write, good: str) -> None:
    part = fussy(write, good, 2)
    assert "users_fussy_module" not in sys.modules
    heads = [part([Level(8, 4)], 2) for _ in range(2)]
    assert isinstance(heads[0], Head)
    assert [head.sizes for head in heads] == [[1, 2], [1, 2]]


def test_a_module_is_found_beside_the_config(write: Write, good: str) -> None:
    write(FUSSY, "project/users_beside.py")
    text = good.replace("{name: upernet, channels: 64}", "users_fussy")
    loaded = config.load(write(text + "imports: [users_beside]\n", "project/config.yaml"))
    assert loaded.model.options["head"].name == "users_fussy"


def test_a_part_that_only_running_the_module_registers(write: Write, good: str) -> None:
    text = FUSSY.replace('@HEADS.register("users_fussy")\n', "")
    write(text + '\n\nHEADS.register("users_made")(Fussy)\n', "users_dynamic.py")
    text = good.replace("{name: upernet, channels: 64}", "{name: users_made, width: 8}")
    loaded = config.load(write(text + "imports: [users_dynamic]\n"))
    assert loaded.model.options["head"].options == {"width": 8, "sizes": [1]}


def test_checking_a_config_imports_no_torch(write: Write, good: str) -> None:
    write(FUSSY, "users_static.py")
    path = write(good.replace("upernet", "uppernet") + "imports: [users_static]\n")
    code = (
        "import sys, vitdense\n"
        "from vitdense import config\n"
        f"try: config.load({str(path)!r})\n"
        "except config.ConfigError as error: print(error)\n"
        "print({'torch', 'timm', 'users_static'} & set(sys.modules))"
    )
    env = {"PYTHONPATH": str(Path(config.__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert "Did you mean 'upernet'?" in run.stdout
    assert run.stdout.endswith("set()\n"), run.stdout + run.stderr
