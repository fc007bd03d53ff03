"""YAML 1.2 in and out, with places."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitdense.config import ConfigError, nodes


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E3", 1e3),
        ("-.5", -0.5),
        ("1.", 1.0),
        (".inf", math.inf),
        ("-.Inf", -math.inf),
        ("12", 12),
        ("-007", -7),
        ("0x1F", 31),
        ("0o17", 15),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("y", "y"),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("2026-11-21", "2026-11-21"),
        ("'1'", "1"),
        ('"true"', "true"),
        ("!!str 1", "1"),
        ("!!float 1", 1.0),
        ("=", "="),
        ("<<", "<<"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    got = nodes.parse(f"key: {text}", "file.yaml").plain()["key"]
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize("text", ["!!int x", "!!timestamp 2026-11-21", "!!set {a}", "!own 1"])
def test_other_tags_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"file.yaml:2: .* is not allowed here: write plain YAML"):
        nodes.parse(f"a: 1\nkey: {text}", "file.yaml")


def test_every_value_knows_its_line() -> None:
    tree = nodes.parse("a:\n  b: [1,\n    2]\n  c: {d: 3,\n    e: 4}\n", "file.yaml")
    a = tree.value["a"]
    assert str(a.mark) == "file.yaml:1"
    assert [item.mark.line for item in a.value["b"].value] == [2, 3]
    assert a.value["c"].value["e"].mark.line == 5
    assert a.value["c"].value["e"].mark.text == "    e: 4}"


def test_aliases_are_copies() -> None:
    assert nodes.parse("a: &x [1]\nb: *x", "f").plain() == {"a": [1], "b": [1]}


@pytest.mark.parametrize("text", ["a: 1\n---\nb: 2", "a: 'b", "\ta: 1", "a: b: c", "{a: 1"])
def test_bad_yaml_names_the_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^f:[123]: is no YAML: "):
        nodes.parse(text, "f")


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.sampled_from(["no", "1e4", "1:30", "0o7", "", "~", " x ", "- a", "a: b", "#", "1_0", "="])
)


@settings(deadline=None)
@given(
    st.recursive(
        SCALARS,
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.text() | st.integers() | st.booleans(), inner, max_size=4)
        ),
        max_leaves=10,
    )
)
def test_what_is_dumped_is_read_again(value: object) -> None:
    text = nodes.dump({"key": value})
    assert repr(nodes.parse(text, "f").plain()["key"]) == repr(value)
