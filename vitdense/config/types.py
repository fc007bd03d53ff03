"""The plain types that options may have, and how messages call them."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Optional, Union, get_args, get_origin

from pydantic import Field, PlainValidator, Strict, TypeAdapter

from vitdense.config.part import Part


@dataclass(frozen=True, slots=True)
class Words:
    """What a message calls a type, in the singular with its article."""

    text: str


@dataclass(frozen=True, slots=True)
class PartOf:
    """An option that names a part of this kind."""

    kind: str


Str = Annotated[str, Strict(), Words("a string")]
Bool = Annotated[bool, Strict(), Words("true or false")]
Int = Annotated[int, Strict(), Words("a whole number")]
PositiveInt = Annotated[Int, Field(gt=0), Words("a positive whole number")]
NonNegativeInt = Annotated[Int, Field(ge=0), Words("a whole number from 0")]
Float = Annotated[float, Strict(), Field(allow_inf_nan=False), Words("a number")]
PositiveFloat = Annotated[Float, Field(gt=0), Words("a positive number")]
NonNegativeFloat = Annotated[Float, Field(ge=0), Words("a number from 0")]
Fraction = Annotated[Float, Field(ge=0, le=1), Words("a number in 0..1")]


def parse_span(value: Any) -> int | float | str:
    """A span of a run in its plainest form: int steps, float fraction, or `N epochs`."""
    number, unit = value, ""
    if isinstance(value, str):
        text = value.replace("%", " %")
        number, unit = (text.split(maxsplit=1) + [""])[:2]
        number = float(number)
    if isinstance(number, bool) or not isinstance(number, int | float) or not number >= 0:
        raise ValueError(value)
    match unit.strip():
        case "" if isinstance(value, int):
            return value
        case "" if isinstance(value, float) and value <= 1:
            return value
        case "%" if number <= 100:
            return number / 100
        case "step" | "steps" if number == int(number):
            return int(number)
        case "epoch" | "epochs" if number != float("inf"):
            return f"{number:g} epochs"
    raise ValueError(value)


Span = Annotated[
    int | float | str,
    PlainValidator(parse_span),
    Words("a fraction of the run as 0.05 or 5 %, steps as 500, or epochs as '2 epochs'"),
]


class _Builder:
    """Stands for `Builder` in annotations: `Builder[Head]` is a part of kind head."""

    def __getitem__(self, kind: str) -> Any:
        return Annotated[Part, PartOf(kind)]


_NAMES: dict[str, Any] = {
    "int": Int,
    "float": Float,
    "str": Str,
    "bool": Bool,
    "list": list,
    "tuple": tuple,
    "dict": dict,
    "Any": Any,
    "Literal": Literal,
    "Optional": Optional,
    "Union": Union,
    "PositiveInt": PositiveInt,
    "NonNegativeInt": NonNegativeInt,
    "PositiveFloat": PositiveFloat,
    "NonNegativeFloat": NonNegativeFloat,
    "Fraction": Fraction,
    "Span": Span,
    "Builder": _Builder(),
    "Backbone": "backbone",
    "Neck": "neck",
    "Head": "head",
    "Model": "model",
    "Dataset": "dataset",
    "Policy": "transform",
    "Metric": "metric",
}


@cache
def evaluate(annotation: str) -> Any:
    """The type that an option's annotation says; raises ValueError for others than plain ones."""
    try:
        return eval(annotation, {"__builtins__": {}}, _NAMES)
    except Exception:
        raise ValueError(
            f"{annotation!r} is no plain type: options are int, float, str, bool, None, list, "
            "tuple, dict, Literal, PositiveInt, NonNegativeInt, PositiveFloat, NonNegativeFloat, "
            "Fraction, Span or Builder"
        ) from None


@cache
def validator(kind: Any) -> Callable[[Any], Any]:
    """The function that checks and converts values of a type; raises pydantic's error."""
    return TypeAdapter(kind).validate_python


def part_kind(kind: Any) -> str | None:
    """The kind of part that a type names, perhaps optionally, or None if it names none."""
    for option in _alternatives(kind):
        for note in getattr(option, "__metadata__", ()):
            if isinstance(note, PartOf):
                return note.kind
    return None


def allows_none(kind: Any) -> bool:
    """Whether null is a value of the type."""
    return type(None) in _alternatives(kind)


def literals(kind: Any) -> list[str]:
    """The strings that a type names outright."""
    options = [option for option in _alternatives(kind) if get_origin(option) is Literal]
    return [value for option in options for value in get_args(option) if isinstance(value, str)]


def describe(kind: Any) -> str:
    """What a message calls a type."""
    if part := part_kind(kind):
        return f"the name of a {part}, or a mapping with its name and options" + (
            ", or null" if allows_none(kind) else ""
        )
    options = [option for option in _alternatives(kind) if option is not type(None)]
    words = [_describe_one(option) for option in options]
    if len(options) < len(_alternatives(kind)):
        words.append("null")
    return _or(words)


def _describe_one(kind: Any) -> str:
    notes = [note.text for note in getattr(kind, "__metadata__", ()) if isinstance(note, Words)]
    if notes:
        return notes[-1]
    arguments = [argument for argument in get_args(kind) if argument is not Ellipsis]
    match get_origin(kind) or kind:
        case origin if origin is Literal:
            return _or([repr(value) for value in arguments])
        case origin if origin in (list, tuple):
            count = f" of {len(arguments)}" if len(arguments) > 1 else ""
            return f"a list{count}" + _each(arguments)
        case origin if origin is dict:
            return "a mapping" + _each(arguments[1:])
    return "any value" if kind is Any else getattr(kind, "__name__", str(kind))


def _each(kinds: list[Any]) -> str:
    words = dict.fromkeys(describe(kind) for kind in kinds if kind is not Any)
    return f" (each {', '.join(words)})" if words else ""


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _or(words: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
