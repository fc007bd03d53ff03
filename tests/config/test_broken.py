"""Broken configs: one clear message each, with file, line, value and the near name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vitdense import config

Write = Callable[..., Path]

HEAD = "head: {name: upernet, channels: 64}"

CASES = {
    "typo in a section": (
        ("train: {", "trian: {"),
        "config.yaml:8: trian: the config has no key 'trian' (got {'steps': 10}). "
        "Did you mean 'train'?\n    trian: {steps: 10}",
    ),
    "a part is missing": (
        ("model:\n  backbone: vit_tiny_patch16_224\n  " + HEAD + "\n", ""),
        "config.yaml: model: the config needs the key 'model': what is trained;",
    ),
    "number that is a name": (
        ("root: data", "root: 2024"),
        'config.yaml:6: data.root: expected a path, got 2024. Put it in quotes: "2024"\n',
    ),
    "typo in the name of a curve": (
        ("train: {", "schedule: cosin\ntrain: {"),
        "config.yaml:8: schedule.name: expected 'cosine', 'flat_cosine', 'poly', 'multistep' or "
        "'constant', got 'cosin'. Did you mean 'cosine'?",
    ),
    "typo in a key": (
        ("steps", "stepz"),
        "config.yaml:8: train.stepz: train has no key 'stepz' (got 10). Did you mean 'steps'?",
    ),
    "key that is like nothing": (
        ("root: data", "root: data\n  zzz: 1"),
        "config.yaml:7: data.zzz: data has no key 'zzz' (got 1). Known: dataset, root, train, val,",
    ),
    "typo in a part's name": (
        ("upernet", "uppernet"),
        "config.yaml:3: model.head: no head is called 'uppernet'. Did you mean 'upernet'? Known: ",
    ),
    "typo in a timm name": (
        ("vit_tiny_patch16_224", "vit_tiny_pach16_224"),
        "config.yaml:2: model.backbone: no backbone is called 'vit_tiny_pach16_224'. "
        "Did you mean 'vit_tiny_patch16_224'?",
    ),
    "typo in an option": (
        ("channels", "chanels"),
        "config.yaml:3: model.head.chanels: head 'upernet' has no option 'chanels' (got 64). "
        "Did you mean 'channels'?\n    head: {name: upernet, chanels: 64}",
    ),
    "option of another head": (
        ("channels: 64", "queries: 100"),
        "config.yaml:3: model.head.queries: head 'upernet' has no option 'queries' (got 100). "
        "It belongs to head 'deformable_detr', 'detr', 'dino'. Known: channels,",
    ),
    "wrong type": (
        ("channels: 64", "channels: wide"),
        "config.yaml:3: model.head.channels: expected a positive whole number, got 'wide'",
    ),
    "option of windows without windows": (
        ("train: {", "inference: {overlap: 0.5}\ntrain: {"),
        "config.yaml:8: inference.overlap: is for windows; set inference.window too, or remove it",
    ),
    "number where a boolean belongs": (
        ("vit_tiny_patch16_224", "{name: vit_tiny_patch16_224, pretrained: 1}"),
        "config.yaml:2: model.backbone.pretrained: expected true or false, got 1",
    ),
    "YAML 1.1 boolean": (
        ("vit_tiny_patch16_224", "{name: vit_tiny_patch16_224, pretrained: yes}"),
        "config.yaml:2: model.backbone.pretrained: expected true or false, got 'yes'",
    ),
    "value out of range": (
        ("channels: 64", "channels: 0"),
        "config.yaml:3: model.head.channels: expected a positive whole number, got 0",
    ),
    "value not among the choices": (
        ("steps: 10", "steps: 10, precision: bf_16"),
        "config.yaml:8: train.precision: expected 'auto', 'fp32', 'bf16' or 'fp16', got 'bf_16'. "
        "Did you mean 'bf16'?",
    ),
    "list of a wrong length": (
        ("train:", "optimizer: {betas: [0.9]}\ntrain:"),
        "config.yaml:8: optimizer.betas: expected a list of 2 (each a number from 0 to below 1), "
        "got [0.9]",
    ),
    "a decay of 1": (
        ("train:", "optimizer: {name: sgd, momentum: 1}\ntrain:"),
        "config.yaml:8: optimizer.momentum: expected a number from 0 to below 1, got 1",
    ),
    "scalar for a section": (
        ("{steps: 10}", "10"),
        "config.yaml:8: train: expected a mapping of its keys, got 10",
    ),
    "missing required option": (
        ("  " + HEAD + "\n", ""),
        "config.yaml:1: model.head: model 'pyramid' needs the option 'head': reads the pyramid",
    ),
    "missing root": (
        ("  root: data\n", ""),
        "config.yaml:4: data.root: data needs the key 'root': folder of the data set",
    ),
    "part without a name": (
        ("name: upernet, ", ""),
        "config.yaml:3: model.head: which head? Give the name of one: deformable_detr, detr,",
    ),
    "number of classes": (
        ("channels: 64", "num_classes: 3"),
        "config.yaml:3: model.head.num_classes: the data set supplies num_classes; remove it",
    ),
    "number of classes in the data": (
        ("root: data", "root: data\n  num_classes: 3"),
        "config.yaml:7: data.num_classes: the data set supplies num_classes; remove it",
    ),
    "levels": (
        ("channels: 64", "levels: 3"),
        "model.head.levels: the backbone and the neck supply levels; remove it",
    ),
    "root of the data set part": (
        ("dataset: coco", "dataset: {name: coco, root: here}"),
        "data.dataset.root: vitdense supplies root; set data.root instead",
    ),
    "two lengths": (
        ("steps: 10", "steps: 10, minutes: 3"),
        "config.yaml:8: train: give exactly one of steps, epochs and minutes, "
        "got steps and minutes",
    ),
    "no length": (
        ("{steps: 10}", "{batch_size: 2}"),
        "config.yaml:8: train: give exactly one of steps, epochs and minutes, got none",
    ),
    "option of another schedule": (
        ("train:", "schedule:\n  power: 2\ntrain:"),
        "config.yaml:9: schedule.power: schedule 'cosine' has no option 'power'; remove it",
    ),
    "no span": (
        ("train:", "schedule: {warmup: 5 weeks}\ntrain:"),
        "config.yaml:8: schedule.warmup: expected a fraction of the run as 0.05 or 5 %, "
        "steps as 500, or epochs as '2 epochs', got '5 weeks'",
    ),
    "model said twice": (
        ("vit_tiny_patch16_224", "{name: vit_tiny_patch16_224, model: other}"),
        "config.yaml:2: model.backbone.model: the name 'vit_tiny_patch16_224' says it already",
    ),
    "bad YAML": (
        (HEAD, "head: {name: upernet"),
        "config.yaml:4: is no YAML: while parsing a flow mapping, expected ',' or '}'",
    ),
    "duplicate key": (
        ("root: data", "root: data\n  root: other"),
        "config.yaml:7: key 'root' is given twice, first in line 6\n    root: other",
    ),
    "unsafe tag": (
        ("root: data", "root: !!python/object/apply:os.system [ls]"),
        "config.yaml:6: tag:yaml.org,2002:python/object/apply:os.system is not allowed here",
    ),
    "alias that contains itself": (
        ("root: data", "root: &x [*x]"),
        "config.yaml:6: an alias that contains itself",
    ),
    "unknown module": (
        ("train:", "imports: [users_nowhere.head]\ntrain:"),
        "config.yaml:8: imports: no module named 'users_nowhere'; it was sought on Python's path,",
    ),
    "a path of a module": (
        ("train:", "imports: [users/head.py]\ntrain:"),
        "beside the config (PYTHONPATH adds folders). Name it as Python does: users.head\n",
    ),
    "imports that are no list": (
        ("train:", "imports: my_head\ntrain:"),
        "config.yaml:8: imports: expected a list (each a string), got 'my_head'",
    ),
    "missing base": (
        ("train:", "base: bse.yaml\ntrain:"),
        "config.yaml:8: base: there is no file bse.yaml",
    ),
    "a list": (("model:\n", "- model:\n"), "config.yaml:4: is no YAML: while parsing a block"),
}


def message_of(path: Path | str, *overrides: str) -> str:
    with pytest.raises(config.ConfigError) as caught:
        config.load(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(("change", "message"), CASES.values(), ids=CASES.keys())
def test_one_fault_gives_one_clear_message(
    write: Write, good: str, change: tuple[str, str], message: str
) -> None:
    assert change[0] in good
    with pytest.raises(config.ConfigError) as caught:
        config.load(write(good.replace(*change)))
    assert message in str(caught.value)
    assert len(caught.value.problems) == 1


def test_all_problems_are_reported_at_once(write: Write, good: str) -> None:
    text = good.replace("channels", "chanels").replace("steps: 10", "steps: -1")
    lines = message_of(write(text), "data.rot=x").splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [
        "config.yaml:3: model.head.chanels: head 'upernet' has no option 'chanels' (got 64). "
        "Did you mean 'channels'?",
        "config.yaml:8: train.steps: expected a positive whole number or null, got -1",
        "command line: data.rot: data has no key 'rot' (got 'x'). Did you mean 'root'?",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", "command line: train.stepz: train has no key 'stepz' (got 3). Did you"),
        ("train.steps", "command line: expected key=value, as train.steps=2000, got 'train.steps'"),
        ("train.steps=a", "command line: train.steps: expected a positive whole number or null"),
        ("data.root=1", "got 1. Put it in quotes: data.root='\"1\"'\n    data.root=1"),
        ("data.root=[a", "command line: is no YAML: while parsing a flow sequence"),
        ("model.head.queries=3", "model.head.queries: head 'upernet' has no option 'queries'"),
    ],
)
def test_bad_override(write: Write, good: str, override: str, message: str) -> None:
    assert message in message_of(write(good), override)


def test_bases_that_form_a_circle(write: Write, good: str) -> None:
    write("base: b.yaml\n" + good, "a.yaml")
    path = write("base: a.yaml\n", "b.yaml")
    assert "a.yaml:1: base: the bases form a circle: b.yaml -> a.yaml -> b.yaml" in message_of(path)


def test_a_problem_of_the_base_stands_in_the_base(write: Write, good: str) -> None:
    write(good.replace("channels: 64", "chanels: 64"), "base.yaml")
    path = write("base: base.yaml\ntrain: {steps: x}\n")
    message = message_of(path)
    assert "base.yaml:3: model.head.chanels" in message
    assert "config.yaml:2: train.steps" in message


def test_an_option_left_for_another_head(write: Write, good: str) -> None:
    write(good, "base.yaml")
    path = write("base: base.yaml\nmodel:\n  head: {name: linear, channels: 32}\n")
    message = message_of(path)
    assert "config.yaml:3: model.head.channels: head 'linear' has no option 'channels'" in message


def test_a_missing_file_suggests_its_neighbours(write: Write, good: str) -> None:
    write(good, "configs/demo/detection.yaml")
    message = message_of("configs/demo/detecton.yaml")
    assert message == (
        "configs/demo/detecton.yaml: there is no such file. "
        "Did you mean configs/demo/detection.yaml?"
    )
    assert "is a folder" in message_of("configs/demo")


def test_text_that_is_no_utf8(write: Write, good: str) -> None:
    path = write(good)
    path.write_bytes(b"\xff\xfe\x00")
    assert message_of(path).startswith("config.yaml: cannot be read: 'utf-8' codec")


HEAD_MODULE = '''
from vitdense import HEADS, Head


@HEADS.register("{name}")
class Mine(Head):
    """Mine."""

    def __init__(self, levels, num_classes, *, {option}) -> None:
        super().__init__(levels, num_classes)
'''


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            HEAD_MODULE.format(name="upernet", option="width: int = 3"),
            "config.yaml:9: imports: two classes are registered as head 'upernet': UPerNetHead at ",
        ),
        (
            HEAD_MODULE.replace("def", "dfe"),
            "config.yaml:9: imports: users_head.py:9: invalid syntax",
        ),
        (
            HEAD_MODULE.format(name="users_two", option="width: int = 3")
            + HEAD_MODULE.format(name="users_two", option="size: int = 3").replace("Mine", "Yours"),
            "imports: two classes are registered as head 'users_two': Mine at users_head.py:6 and "
            "Yours at users_head.py:16; rename one",
        ),
    ],
)
def test_faulty_module(write: Write, good: str, module: str, message: str) -> None:
    write(module, "users_head.py")
    path = write(good + "imports: [users_head]\n")
    assert message in message_of(path)


def test_a_module_in_another_encoding(write: Write, good: str) -> None:
    path = write(good + "imports: [users_latin]\n")
    text = HEAD_MODULE.format(name="users_own", option='title: str = "é"')
    Path("users_latin.py").write_bytes(text.encode("latin1"))
    assert "config.yaml:9: imports: users_latin.py" in message_of(path)
    Path("users_latin.py").write_bytes(f"# coding: latin1\n{text}".encode("latin1"))
    assert config.load(path, ["model.head=users_own"]).model.options["head"].options["title"] == "é"


def test_modules_that_cannot_be_found_hide_no_other_fault_and_make_none(
    write: Write, good: str
) -> None:
    """What is registered in them is not called unknown, and each fault is told once."""
    text = good.replace("upernet", "users_own").replace("steps: 10", "steps: -1")
    path = write(text + "imports: [users_none.head, users_none.neck]\n")
    with pytest.raises(config.ConfigError) as caught:
        config.load(path)
    assert [problem.path for problem in caught.value.problems] == ["train.steps", "imports"]


REGISTERED_OTHERWISE = {
    "not at all": (
        '@HEADS.register("{name}")',
        "",
        "(users_head under imports registers no part.)",
    ),
    "as another kind": ("HEADS", "NECKS", "A neck is: users_head.py:6."),
    "without a name": (
        '.register("{name}")',
        ".register",
        'imports: users_head.py:5: give the head a name, as in register("mine"), not Mine',
    ),
    "with a number": (
        '"{name}"',
        "5",
        'imports: users_head.py:5: give the head a name, as in register("mine"), not 5',
    ),
}


@pytest.mark.parametrize(
    ("old", "new", "message"), REGISTERED_OTHERWISE.values(), ids=REGISTERED_OTHERWISE.keys()
)
def test_a_class_that_is_not_registered_as_it_is_named(
    write: Write, good: str, old: str, new: str, message: str
) -> None:
    module = HEAD_MODULE.replace(old, new).format(name="users_own", option="width: int = 3")
    write(module, "users_head.py")
    path = write(good + "imports: [users_head]\n")
    assert message in message_of(path, "model.head=users_own")


def test_a_module_that_cannot_be_imported_names_its_line(write: Write, good: str) -> None:
    module = HEAD_MODULE.format(name="users_own", option="width: int = 3") + "\n\n1 / 0\n"
    write(module, "users_fails.py")
    path = write(good + "imports: [users_fails]\n")
    part = config.load(path, ["model.head=users_own"]).model.options["head"]
    for _ in range(2):  # it is not taken for imported the second time
        with pytest.raises(config.ConfigError) as caught:
            part([], 3)
        assert "imports: users_fails.py:13: ZeroDivisionError: division by" in str(caught.value)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("width: Size = 3", "'Size' is no plain type: options are int, float,"),
        ("width=3", "users_head.py:9: Mine: option 'width' has no type annotation"),
        ("width: int = max(1, 2)", "Mine: the default of option 'width' is not a literal"),
        ("width: int = 3, **more", "Mine: **more hides its options: name each one"),
        ("width: int = 0.5", "Mine: option 'width': its default 0.5 is not a whole number\n"),
        (
            "width: int = None",
            "users_head.py:6: Mine: option 'width': its default None is not a whole number; "
            "write int | None\n",
        ),
        ("name: str = 'x'", "Mine: option 'name': `name` says in a config which part it is;"),
    ],
)
def test_option_that_cannot_be_read(write: Write, good: str, option: str, message: str) -> None:
    write(HEAD_MODULE.format(name="users_own", option=option), "users_head.py")
    text = good.replace("{name: upernet, channels: 64}", "users_own")
    path = write(text + "imports: [users_head]\n")
    assert message in message_of(path)


def test_an_option_left_of_the_star(write: Write, good: str) -> None:
    module = HEAD_MODULE.format(name="users_own", option="").replace("*, )", "width=3)")
    write(module, "users_head.py")
    path = write(good + "imports: [users_head]\n")
    message = message_of(path, "model.head={name: users_own, width: 4}")
    assert (
        "users_head.py:9: Mine: width stands left of `*`, the place of what vitdense supplies "
        "(levels, num_classes); an option belongs to the right of it"
    ) in message


def test_a_constructor_without_its_facts(write: Write, good: str) -> None:
    module = HEAD_MODULE.format(name="users_own", option="width: int = 3")
    write(module.replace(" num_classes, *", " *"), "users_head.py")
    path = write(good + "imports: [users_head]\n")
    message = message_of(path, "model.head=users_own")
    assert "Mine: a head is built with levels, num_classes: take them first" in message


def test_a_near_module_is_suggested(write: Write, good: str) -> None:
    write("", "users_haed.py")
    message = message_of(write(good + "imports: [users_head]\n"))
    assert "no module named 'users_head'" in message
    assert "Did you mean 'users_haed'?" in message
