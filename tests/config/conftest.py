"""A valid config to break, and modules of a user."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vitdense import registry

GOOD = """\
model:
  backbone: vit_tiny_patch16_224
  head: {name: upernet, channels: 64}
data:
  dataset: coco
  root: data
  transforms: detection
train: {steps: 10}
"""


@pytest.fixture
def good() -> str:
    """Text of a valid config."""
    return GOOD


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Write a file into an empty working folder."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "config.yaml") -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget the parts and modules of users that a test made known."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(registry, "_users", {})
    monkeypatch.setattr(registry, "_dynamic", set())
    monkeypatch.setattr(registry, "_empty", set())
    yield
    for parts in registry.REGISTRIES.values():
        for name in [name for name in parts.names() if name.startswith("users_")]:
            parts._classes.pop(name, None)
            parts._known().pop(name, None)
    for name in [name for name in sys.modules if name.startswith("users_")]:
        del sys.modules[name]
