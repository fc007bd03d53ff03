"""Names, places and what the source says, against the live classes."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vitdense
from vitdense import BACKBONES, HEADS, NECKS
from vitdense.config import types
from vitdense.declarations import Declaration, of_class, read_file
from vitdense.heads.base import Head
from vitdense.registry import REGISTRIES, timm_names

PARTS = [(kind, name) for kind, parts in REGISTRIES.items() for name in parts.names()]


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Forget the parts of a test; built-in modules register theirs only once."""
    yield
    for parts in REGISTRIES.values():
        for name in [name for name in parts._classes if name.startswith("users_")]:
            del parts._classes[name]
            parts._known().pop(name, None)


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_the_source_says_what_the_live_signature_says(kind: str, name: str) -> None:
    declaration = REGISTRIES[kind].resolve(name)[0]
    cls = REGISTRIES[kind].get(name)
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    options = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert declaration.facts == tuple(p.name for p in parameters if p not in options)
    assert list(declaration.options) == [option.name for option in options]
    for option in options:
        ours = declaration.options[option.name]
        assert ours.required == (option.default is option.empty)
        assert ours.required or ours.default == option.default
    assert (declaration.module, declaration.qualname) == (cls.__module__, cls.__qualname__)


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_every_option_has_a_plain_type_and_a_meaning(kind: str, name: str) -> None:
    declaration = REGISTRIES[kind].resolve(name)[0]
    assert declaration.doc
    for option in declaration.options.values():
        assert option.meaning, f"{declaration.place}: {option.name} has no comment"
        kind_of = types.evaluate(option.annotation)
        if not option.required and types.part_kind(kind_of) is None:
            types.validator(kind_of)(option.default)


@pytest.mark.parametrize("kind", REGISTRIES)
def test_every_kind_has_parts(kind: str) -> None:
    assert REGISTRIES[kind].names()


def test_a_backbone_in_one_line() -> None:
    build = BACKBONES.get("timm")
    backbone: Any = build(model="swin_tiny_patch4_window7_224", pretrained=False, img_size=(64, 96))
    assert [level.stride for level in backbone.levels] == [4, 8, 16, 32]


def test_timm_names_are_backbones() -> None:
    import timm

    assert timm_names() == set(timm.list_models())
    make: Any = BACKBONES.get("vit_tiny_patch16_224.augreg_in21k")
    assert make.func is BACKBONES.get("timm")
    assert make.keywords == {"model": "vit_tiny_patch16_224.augreg_in21k"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swin_tiny_patch4_windw7_224", "Did you mean 'swin_tiny_patch4_window7_224'?"),
        ("tim", "Did you mean 'timm'?"),
        ("qqqqqq", "timm, and every timm model"),
    ],
)
def test_unknown_backbone(name: str, message: str) -> None:
    with pytest.raises(LookupError) as caught:
        BACKBONES.get(name)
    assert message in str(caught.value)


def test_unknown_neck_lists_the_known() -> None:
    with pytest.raises(LookupError, match="no neck is called 'qq'. Known: feature2pyramid, "):
        NECKS.get("qq")


class Plain(Head):
    """A head of this file."""

    def __init__(self, levels: Any, num_classes: int, *, width: int = 3) -> None:  # of it all
        super().__init__(levels, num_classes)


def test_a_class_registered_at_run_time() -> None:
    HEADS.register("users_plain")(Plain)
    assert HEADS.get("users_plain") is Plain
    assert "users_plain" in HEADS.names()
    declaration, implied = HEADS.resolve("users_plain")
    assert implied == {}
    assert declaration.facts == ("levels", "num_classes")
    assert declaration.options["width"].default == 3
    assert declaration.doc == "A head of this file."
    assert declaration.file == Path(__file__)
    line = Path(__file__).read_text().splitlines()[declaration.line - 1]
    assert line == "class Plain(Head):"


def test_registering_the_same_class_again_is_fine() -> None:
    for _ in range(2):
        assert HEADS.register("users_plain")(Plain) is Plain


def test_a_name_of_two_classes_is_an_error_that_names_both_places() -> None:
    class Other(Head):
        """Another."""

    HEADS.register("users_plain")(Plain)
    with pytest.raises(ValueError) as caught:
        HEADS.register("users_plain")(Other)
    message = str(caught.value)
    assert "two classes are registered as head 'users_plain': Plain at " in message
    assert message.count(f"{Path(__file__).name}:") == 2


def test_a_built_in_name_cannot_be_taken() -> None:
    with pytest.raises(ValueError, match=r"'upernet': UPerNetHead at .*upernet.py:\d+ and Plain"):
        HEADS.register("upernet")(Plain)
    with pytest.raises(ValueError, match="has the name of a timm model"):
        BACKBONES.register("resnet50")(Plain)


def test_a_class_without_a_constructor_has_its_parents_options() -> None:
    class Child(Plain):
        """A child."""

    HEADS.register("users_child")(Child)
    declaration = HEADS.resolve("users_child")[0]
    assert list(declaration.options) == ["width"]
    assert declaration.options["width"].meaning == "of it all"
    assert declaration.doc == "A child."


SOURCE = '''
import vitdense
from vitdense import HEADS as H


@vitdense.HEADS.register("one")
@vitdense.NECKS.register("two")
class Both:
    """First line.

    Second line.
    """

    def __init__(
        self,
        levels,
        *,
        size: "int | None" = None,  # größe, with "# quotes
        tail: list[str] = ["a#b"],  # after a list
        needed: int,
    ) -> None: ...


@H.register("three")
class Three: ...
'''


def test_what_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "users.py"
    file.write_text(SOURCE, encoding="utf-8")
    source = read_file(file, "users")
    assert [(d.kind, d.name, d.line) for d in source.declarations] == [
        ("head", "one", 8),
        ("neck", "two", 8),
    ]
    assert source.dynamic
    options = source.declarations[0].options
    assert options["size"].annotation == "int | None"
    assert options["size"].meaning == 'größe, with "# quotes'
    assert (options["tail"].default, options["tail"].meaning) == (["a#b"], "after a list")
    assert options["needed"].required
    assert [option.line for option in options.values()] == [18, 19, 20]
    assert source.declarations[0].doc == "First line."


def test_a_class_in_a_function_is_read_too() -> None:
    class Inner(Head):
        """Inside."""

        def __init__(
            self,
            levels: Any,
            *,
            depth: int = 2,  # of the inner
        ) -> None: ...

    declaration: Declaration = of_class(Inner, "head", "inner")
    assert declaration.options["depth"].meaning == "of the inner"
    line = Path(__file__).read_text().splitlines()[declaration.options["depth"].line - 1]
    assert line.strip().startswith("depth: int = 2")


def test_the_package_offers_its_names_lazily() -> None:
    for name in vitdense.__all__:
        assert name in dir(vitdense)
        if name != "__version__":
            assert getattr(vitdense, name) is getattr(
                importlib.import_module(vitdense._HOMES[name]), name
            )
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = vitdense.nothing


def test_importing_vitdense_imports_nothing_heavy() -> None:
    code = (
        "import sys, vitdense; vitdense.__version__;"
        "print({'torch', 'timm', 'pydantic', 'numpy'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
