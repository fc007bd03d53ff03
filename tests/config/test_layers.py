"""Bases and overrides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vitdense.config import layers, nodes


def merged(base: str, over: str) -> Any:
    return layers.merge(nodes.parse(base, "base"), nodes.parse(over, "over")).plain()


@pytest.mark.parametrize(
    ("base", "over", "result"),
    [
        ("{a: {b: 1, c: 2}}", "{a: {c: 3}}", {"a": {"b": 1, "c": 3}}),
        ("{a: [1, 2]}", "{a: [3]}", {"a": [3]}),
        ("{a: {b: 1}}", "{a: null}", {"a": None}),
        ("{a: null}", "{a: {b: 1}}", {"a": {"b": 1}}),
        ("{h: {name: x, w: 1}}", "{h: {name: y}}", {"h": {"name": "y"}}),
        ("{h: {name: x, w: 1}}", "{h: {name: x, v: 2}}", {"h": {"name": "x", "w": 1, "v": 2}}),
        ("{h: {name: x, w: 1}}", "{h: y}", {"h": {"name": "y"}}),
        ("{h: {name: x, w: 1}}", "{h: x}", {"h": {"name": "x", "w": 1}}),
        ("{h: x}", "{h: {w: 1}}", {"h": {"name": "x", "w": 1}}),
        ("{h: x}", "{h: y}", {"h": "y"}),
        ("{h: {w: 1}}", "{h: x}", {"h": {"name": "x", "w": 1}}),
        ("{model: {head: x}}", "{model: other}", {"model": {"name": "other"}}),
        ("{model: {head: x}}", "{model: pyramid}", {"model": {"head": "x", "name": "pyramid"}}),
        ("{schedule: {final: 1}}", "{schedule: poly}", {"schedule": {"name": "poly"}}),
        (
            "{train: {steps: 3, ema: 0}}",
            "{train: {minutes: 2}}",
            {"train": {"ema": 0, "minutes": 2}},
        ),
        ("{train: {steps: 3}}", "{train: {ema: 0}}", {"train": {"steps": 3, "ema": 0}}),
    ],
)
def test_merge(base: str, over: str, result: object) -> None:
    assert merged(base, over) == result


@pytest.mark.parametrize(
    ("overrides", "result"),
    [
        (["train.steps=2000"], {"train": {"steps": 2000}, "model": {"head": "x"}}),
        (["model.head=y"], {"train": {"epochs": 1}, "model": {"head": "y"}}),
        (
            ["model.head=y", "model.head.size=[256, 384]"],
            {"train": {"epochs": 1}, "model": {"head": {"name": "y", "size": [256, 384]}}},
        ),
        (
            ["model.head.size=1", "model.head=y"],
            {"train": {"epochs": 1}, "model": {"head": {"name": "y", "size": 1}}},
        ),
        (
            ["train.steps=3", "train.minutes=4"],
            {"train": {"steps": 3, "minutes": 4}, "model": {"head": "x"}},
        ),
        (["a=1", "a=2"], {"train": {"epochs": 1}, "model": {"head": "x"}, "a": 2}),
        (["a="], {"train": {"epochs": 1}, "model": {"head": "x"}, "a": None}),
        (["a=b=c"], {"train": {"epochs": 1}, "model": {"head": "x"}, "a": "b=c"}),
    ],
)
def test_override(overrides: list[str], result: object) -> None:
    tree = nodes.parse("{train: {epochs: 1}, model: {head: x}}", "f")
    assert layers.override(tree, overrides).plain() == result


def test_a_base_has_a_base(write: Callable[..., Path]) -> None:
    write("a: 1\nb: 1\nc: 1\n", "deep/lowest.yaml")
    write("base: deep/lowest.yaml\nb: 2\nc: 2\n", "middle.yaml")
    path = write("base: ../middle.yaml\nc: 3\n", "configs/top.yaml")
    tree = layers.read(path)
    assert tree.plain() == {"a": 1, "b": 2, "c": 3}
    assert [node.mark.file for node in tree.value.values()] == [
        "deep/lowest.yaml",
        "middle.yaml",
        "configs/top.yaml",
    ]
