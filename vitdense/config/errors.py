"""Problems of a config: where, what, and what instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a file, lines from 1, or on the command line, which has line 0."""

    file: str
    line: int = 0
    text: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, at one place; `path` is the dotted key, or empty."""

    mark: Mark
    path: str
    message: str

    def __str__(self) -> str:
        head = ": ".join(part for part in (str(self.mark), self.path, self.message) if part)
        return f"{head}\n    {self.mark.text.strip()}" if self.mark.text.strip() else head


class ConfigError(Exception):
    """All that is wrong with a config; its text is made for the user."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = list(problems)

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[Problem]]]:
        return ConfigError, (self.problems,)
