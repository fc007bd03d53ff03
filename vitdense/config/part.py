"""A mapping in a config is a call."""

from __future__ import annotations

import copy
import inspect
import re
from dataclasses import dataclass, field
from typing import Any

from vitdense.config import contract
from vitdense.config.errors import ConfigError, Mark, Problem
from vitdense.registry import REGISTRIES, line_of


@dataclass(frozen=True)
class Part:
    """A named part with its options; called with the facts it needs, it builds the part.

    Attributes:
        kind, name: which part, as in `HEADS.get(name)`.
        options: all of its options, with their defaults; parts among them are callables too.
        path: where it stands in the config, as `model.head`.
        marks: file and line of the part ("") and of its options.
    """

    kind: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    path: str = field(default="", compare=False)
    marks: dict[str, Mark] = field(default_factory=dict, compare=False, repr=False)

    @property
    def type(self) -> type[Any]:
        """The class, imported on first use."""
        return REGISTRIES[self.kind].get(self.name)

    def takes(self, fact: str) -> bool:
        """Whether its constructor has a parameter of this name."""
        return fact in inspect.signature(self.type).parameters

    def __call__(self, *facts: Any) -> Any:
        """Build it; raises ConfigError at its place if it refuses, or lacks what its kind has."""
        options = {
            name: value if isinstance(value, Part) else copy.deepcopy(value)
            for name, value in self.options.items()
        }
        try:
            part = self.type(*facts, **options)
        except (ValueError, FileNotFoundError) as error:
            raise ConfigError([self._problem(error)]) from error
        if message := contract.fault(self.kind, part):
            raise ConfigError([Problem(self._mark, self.path, message)])
        return part

    @property
    def _mark(self) -> Mark:
        return self.marks.get("", Mark(f"{self.kind} {self.name!r}"))

    def _problem(self, error: Exception) -> Problem:
        """A constructor's message begins with the name of the option that it refuses.

        Any other in a part of one's own may come from anywhere below it: it gets its line.
        """
        message = str(error)
        name, _, rest = message.partition(":")
        mark = self._mark
        if re.fullmatch(r"\w+", name) and name in self.options and rest:
            path = f"{self.path}.{name}" if self.path else name
            return Problem(self.marks.get(name, mark), path, rest.strip())
        declaration = REGISTRIES[self.kind].resolve(self.name)[0]
        own = not declaration.module.startswith("vitdense.")
        line = line_of(error, [declaration.file]) if own else None
        return Problem(mark, self.path, f"{message} ({line})" if line else message)
