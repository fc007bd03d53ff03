"""Weights on their way from the names of a source to ours, with a record of where each went."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Rules = Iterable[tuple[str, str | Callable[[re.Match[str]], str]]]
"""Patterns and replacements for `re.sub`, applied to a name one after the other.

If a new name is `qkv[1].weight`, the tensor is the second of those that are joined along their
first axis into `qkv.weight`. If it is `{query,key,value}.weight`, it is split along that axis.
"""


class Weights:
    """A source's tensors; those that are neither renamed nor dropped are left over, and reported.

    Attributes:
        left: not yet taken, by the source's names.
        found: by our names.
        origin: of each of our names, the source's names that it came from.
        dropped: why each of the source's names is of no use to us.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.left = dict(tensors)
        self.found: dict[str, Tensor] = {}
        self.origin: dict[str, list[str]] = {}
        self.dropped: dict[str, str] = {}

    def drop(self, pattern: str, why: str) -> None:
        """Leave out every name that the pattern is found in."""
        for name in [name for name in self.left if re.search(pattern, name)]:
            del self.left[name]
            self.dropped[name] = why

    def rename(self, rules: Rules, within: str = "", into: str = "") -> None:
        """Take all names that begin with `within`; `into` replaces it, and rules see the rest.

        Raises:
            ValueError: two tensors that differ come to have one name.
        """
        rules = list(rules)
        taken = [name for name in self.left if name.startswith(within)]
        for name in taken:
            new = into + renamed(name.removeprefix(within), rules)
            for each, tensor in _split(new, self.left.pop(name)):
                self._put(each, tensor, name)
        self._join()

    def change(self, pattern: str, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a function to every tensor whose new name the pattern is found in."""
        for name in self.found:
            if re.search(pattern, name):
                self.found[name] = function(self.found[name])

    def copy(self, name: str, other: str) -> None:
        """Give the tensor of `name` to `other` too, unless that has one."""
        if other not in self.found:
            self.found[other], self.origin[other] = self.found[name], self.origin[name]

    def _put(self, name: str, tensor: Tensor, origin: str) -> None:
        other = self.found.get(name)
        if other is not None and not (other.shape == tensor.shape and torch.equal(other, tensor)):
            raise ValueError(
                f"{origin} and {self.origin[name][0]} both are {name}, but they differ"
            )
        self.found[name] = tensor
        self.origin.setdefault(name, []).append(origin)

    def _join(self) -> None:
        parts: dict[str, dict[int, str]] = {}
        for name in self.found:
            if match := re.search(r"\[(\d+)\]", name):
                parts.setdefault(name.replace(match[0], ""), {})[int(match[1])] = name
        for whole, names in parts.items():
            ordered = [names[i] for i in sorted(names)]
            self.origin[whole] = [old for name in ordered for old in self.origin.pop(name)]
            self.found[whole] = torch.cat([self.found.pop(name) for name in ordered])


def renamed(name: str, rules: Rules) -> str:
    """The name after all rules."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def rename(tensors: dict[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """All tensors under the names that the rules give them, as `Weights.rename` does it."""
    weights = Weights(tensors)
    weights.rename(rules)
    return weights.found


def count_layers(names: Iterable[str], within: str) -> int:
    """How many layers `within` has, from names such as `within.3.weight`."""
    start = f"{within}."
    ends = [name.removeprefix(start) for name in names if name.startswith(start)]
    return max((int(end.partition(".")[0]) for end in ends), default=-1) + 1


def _split(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    match = re.search(r"\{(.*?)\}", name)
    if match is None:
        return [(name, tensor)]
    words = match[1].split(",")
    return [
        (name.replace(match[0], word), part)
        for word, part in zip(words, tensor.chunk(len(words)), strict=True)
    ]
