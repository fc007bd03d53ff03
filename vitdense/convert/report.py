"""What became of each tensor, to be read by people."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from vitdense.convert.classes import Classes
from vitdense.engine.checkpoint import shorten


@dataclass(slots=True)
class Report:
    """What a conversion did.

    Attributes:
        mapped: our names, with the count of numbers in each.
        dropped: the source's names that are of no use, with the reason.
        unknown: the source's names that found no place, with the reason.
        fresh: our names that the source cannot have, with the reason.
        missing: our names that it should have.
    """

    source: str = ""
    family: str = ""
    out: str = ""
    classes: Classes | None = None
    mapped: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    fresh: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def faults(self) -> bool:
        """Whether something is left over or missing that should not be."""
        return bool(self.unknown or self.missing)

    def faults_text(self) -> str:
        """The names that are left over, and those that are missing."""
        rows = [*_reasons("left over", self.unknown), *_names("missing", self.missing)]
        return "\n".join(rows)

    def __str__(self) -> str:
        rows = [f"{self.source} ({self.family}) -> {self.out}", *self._mapped()]
        rows += self._classes()
        rows += _reasons("left out", self.dropped | self.unknown)
        rows += _reasons("re-initialised", self.fresh)
        rows += _names("re-initialised", self.missing)
        if not self.fresh and not self.missing:
            rows.append("re-initialised  nothing")
        return "\n".join(rows)

    def _mapped(self) -> Iterator[str]:
        parts: dict[str, list[int]] = defaultdict(list)
        for name, count in self.mapped.items():
            parts[name.partition(".")[0]].append(count)
        for part, counts in parts.items():
            yield f"mapped          {part}: {len(counts)} tensors, {sum(counts) / 1e6:.2f} M"

    def _classes(self) -> Iterator[str]:
        if self.classes is not None:
            names = ", ".join(self.classes.names[:5])
            more = ", ..." if len(self.classes.names) > 5 else ""
            unused = self.classes.count - len(self.classes.rows)
            cut = f"; {unused} rows without a class left out" if unused else ""
            yield f"classes         {len(self.classes.names)}: {names}{more}{cut}"


def _reasons(title: str, names: dict[str, str]) -> Iterator[str]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name, why in names.items():
        groups[why].append(name)
    for why, those in groups.items():
        yield f"{title:<16}{'; '.join(shorten(those))}: {why}"


def _names(title: str, names: Iterable[str]) -> Iterator[str]:
    short = shorten(names)
    if short:
        yield f"{title:<16}{'; '.join(short)}"
