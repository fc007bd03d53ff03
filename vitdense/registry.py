"""Named parts: backbones, necks, heads, models, data sets, transform policies, metrics."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
import traceback
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar, cast

from pydantic import Field

from vitdense import declarations
from vitdense.declarations import Declaration

if TYPE_CHECKING:
    from vitdense.backbones.base import Backbone
    from vitdense.data.base import Dataset, Policy
    from vitdense.heads.base import Head
    from vitdense.metrics.base import Metric
    from vitdense.models.base import Model
    from vitdense.necks.base import Neck

T = TypeVar("T")
C = TypeVar("C", bound=type)

Builder = Callable[..., T]
"""An option that is itself a part: called with the facts it needs, it returns the built part."""

Fraction = Annotated[float, Field(ge=0, le=1)]
"""A number in 0..1."""

Span = int | float | str
"""A part of a run: 0.05 of it, 500 steps, or "2 epochs"."""


class Registry(Generic[T]):
    """Parts of one kind by name, known from their source before anything is imported.

    Args:
        kind: what the parts are, for messages.
        package: where the built-in ones live.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._classes: dict[str, type[T]] = {}
        self._declared: dict[str, Declaration] | None = None

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator that gives a part its name; raises ValueError if it is taken."""
        if not isinstance(name, str) or not name:
            what = getattr(name, "__name__", repr(name))
            raise ValueError(f'give the {self.kind} a name, as in register("mine"), not {what}')

        def decorate(cls: C) -> C:
            # The built-in ones are checked against each other when their source is read.
            if not cls.__module__.startswith(self.package + "."):
                self.check_free(declarations.sketch(cls, self.kind, name))
            self._classes[name] = cls
            return cls

        return decorate

    def get(self, name: str) -> type[T]:
        """The class registered under a name, imported on first use; raises LookupError.

        For backbones, any timm name gives the `timm` backbone with that model.
        """
        import_users()
        if name in self._classes:
            return self._classes[name]
        declaration, options = self.resolve(name)
        if declaration.name not in self._classes:
            _import(declaration.module)
        cls = self._classes[declaration.name]
        return cast("type[T]", partial(cls, **options)) if options else cls

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted({*self._known(), *self._classes})

    def resolve(self, name: str) -> tuple[Declaration, dict[str, Any]]:
        """The declaration behind a name, and the options that the name itself implies.

        Raises LookupError for an unknown name and ValueError for a faulty class.
        """
        if name not in self._known() and name not in self._classes:
            if self.kind == "backbone" and is_timm_name(name):
                return self.resolve("timm")[0], {"model": name}
            if _dynamic:
                import_users()
            if name not in self._classes:
                raise LookupError(self._unknown(name))
        declaration = self._known().get(name)
        if declaration is None or declaration.inherits:
            cls = self._classes[name] if declaration is None else self.get(name)
            declaration = declarations.of_class(cls, self.kind, name)
            self._known()[name] = declaration
        if declaration.fault:
            raise ValueError(declaration.fault)
        return declaration, {}

    def check_free(self, new: Declaration) -> None:
        """Raise ValueError if another class, or a timm model, already has the name."""
        self._check_single(new)
        if self.kind == "backbone" and is_timm_name(new.name):
            raise ValueError(f"backbone {new.name!r} at {new.place} has the name of a timm model")

    def declare(self, declaration: Declaration) -> None:
        """Make a class known that was read from source."""
        self._known()[declaration.name] = declaration

    def _known(self) -> dict[str, Declaration]:
        if self._declared is None:
            self._declared = {}
            for new in declarations.read_module(self.package).declarations:
                if new.kind == self.kind:
                    self._check_single(new)
                    self._declared[new.name] = new
        return self._declared

    def _check_single(self, new: Declaration) -> None:
        old = self._known().get(new.name)
        if old is None and new.name in self._classes:
            old = declarations.sketch(self._classes[new.name], self.kind, new.name)
        if old is not None and not new.same_class(old):
            raise ValueError(
                f"two classes are registered as {self.kind} {new.name!r}: {old.qualname} at "
                f"{old.place} and {new.qualname} at {new.place}; rename one"
            )

    def _unknown(self, name: str) -> str:
        names = self.names()
        near = suggest(name, [*names, *timm_names()] if self.kind == "backbone" else names)
        also = ", and every timm model" if self.kind == "backbone" else ""
        known = ", ".join(names) or "none"
        text = f"no {self.kind} is called {name!r}.{near}"
        for other in REGISTRIES.values():
            if other is not self and name in other._known():
                text += f" A {other.kind} is: {other._known()[name].place}."
        if _empty:
            text += f" ({', '.join(sorted(_empty))} under imports registers no part.)"
        return f"{text} Known: {known}{also}"


_users: dict[str, bool] = {}
_dynamic: set[str] = set()
_empty: set[str] = set()


def add_module(name: str) -> None:
    """Make the parts of a user's module known; it is imported when a part is first built.

    Raises ModuleNotFoundError, SyntaxError, and ValueError for a name that is taken.
    """
    source = declarations.read_module(name)
    for new in source.declarations:
        REGISTRIES[new.kind].check_free(new)
        REGISTRIES[new.kind].declare(new)
    _users.setdefault(name, False)
    _empty.discard(name)
    if source.dynamic:
        _dynamic.add(name)
    elif not source.declarations:
        _empty.add(name)


def import_users() -> None:
    """Import the users' modules that are not imported yet: they may do more than register.

    Raises ValueError if one cannot be imported; names its line.
    """
    for name in [name for name, done in _users.items() if not done]:
        _users[name] = True
        try:
            _import(name)
        except ValueError:
            _users[name] = False
            raise


def _import(module: str) -> None:
    """Import a module; raises ValueError with the line in it that the error went through."""
    try:
        importlib.import_module(module)
    except Exception as error:
        if module.startswith("vitdense."):
            raise
        where = line_of(error, (file for file, _ in declarations.module_files(module))) or module
        what = f"{type(error).__name__}: {error}".removeprefix("ValueError: ")
        raise ValueError(f"imports: {where}: {what}") from error


def line_of(error: Exception, files: Iterable[Path]) -> str | None:
    """The deepest line, as `file:line`, of these files that an error went through."""
    names = {str(file) for file in files}
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in names]
    return f"{declarations.short_path(frames[-1].filename)}:{frames[-1].lineno}" if frames else None


def suggest(word: str, words: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the nearest of the words, or nothing if none is near."""
    near = nearest(word, words)
    return f" Did you mean {near!r}?" if near else ""


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The word that is most like this one, if any is like it."""
    return next(iter(difflib.get_close_matches(word, list(words), n=1)), None)


@cache
def timm_names() -> frozenset[str]:
    """Names of timm's models, read from its source: importing timm imports torch."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        return frozenset()
    files = (Path(spec.origin).parent / "models").glob("*.py")
    texts = (file.read_text(encoding="utf-8") for file in files)
    return frozenset(n for text in texts for n in re.findall(r"@register_model\s+def (\w+)", text))


def is_timm_name(name: str) -> bool:
    """Whether timm has a model of this name; a tag of weights may follow a dot."""
    return name.partition(".")[0] in timm_names()


BACKBONES: Registry[Backbone] = Registry("backbone", "vitdense.backbones")
NECKS: Registry[Neck] = Registry("neck", "vitdense.necks")
HEADS: Registry[Head] = Registry("head", "vitdense.heads")
MODELS: Registry[Model] = Registry("model", "vitdense.models")
DATASETS: Registry[Dataset] = Registry("dataset", "vitdense.data")
TRANSFORMS: Registry[Policy] = Registry("transform", "vitdense.data")
METRICS: Registry[Metric] = Registry("metric", "vitdense.metrics")

REGISTRIES: dict[str, Registry[Any]] = {
    registry.kind: registry
    for registry in (BACKBONES, NECKS, HEADS, MODELS, DATASETS, TRANSFORMS, METRICS)
}
