"""The choice of output tensors: by layer, expert, group and name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ..errors import OptionError
from .config import ModelConfig
from .tensors import ATTENTION_BIASES, EXPERT_TENSORS

__all__ = ["GROUPS", "ResolvedSelection", "Selection", "numbers_in", "parse_numbers"]

GROUPS: Mapping[str, frozenset[str]] = {
    "attention": frozenset({"q", "k", "v", "o", "sinks"}) | ATTENTION_BIASES,
    "experts": EXPERT_TENSORS,
    "router": frozenset({"router", "router_bias"}),
    "embeddings": frozenset({"embed", "unembed", "unembed_bias"}),
    "norms": frozenset({"attn_norm", "mlp_norm", "final_norm"}),
}
"""The groups of tensors that `Selection.only` names (see `MODEL_TENSORS`)."""

_RANGE = re.compile(r"(-?\d{1,9})(?:-(-?\d{1,9}))?")


@dataclass(frozen=True, slots=True)
class Selection:
    """A choice of output tensors. A tensor must match every field that is given.

    Args:
        layers: Layer numbers such as "0-3,7"; -1 is the last. Tensors of no layer match too.
        experts: Expert numbers, likewise. Tensors of no expert match too.
        only: Groups of tensors: "attention", "experts", "router", "embeddings", "norms".
        include: Patterns with `*`, `?` and `[…]`, one of which the name of the output tensor
            must match.
        exclude: Patterns that it must not match.
    """

    layers: str | None = None
    experts: str | None = None
    only: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Selection:
        """Return the selection that `ResolvedSelection.as_dict` describes."""
        fields: dict[str, Any] = {
            key: ",".join(map(str, value)) if key in ("layers", "experts") else tuple(value)
            for key, value in record.items()
        }
        return cls(**fields)

    def resolve(self, model: ModelConfig) -> ResolvedSelection:
        """Return the selection with the layer and expert numbers of a model.

        Raises:
            OptionError: For a number that the model does not have, and an unknown group.
        """
        for group in self.only:
            if group not in GROUPS:
                raise OptionError(f"unknown group {group!r}; choose among {', '.join(GROUPS)}")
        return ResolvedSelection(
            _parse_or_none(self.layers, model.num_layers, "layer"),
            _parse_or_none(self.experts, model.num_experts, "expert"),
            tuple(sorted(set(self.only))),
            tuple(self.include),
            tuple(self.exclude),
        )


@dataclass(frozen=True, slots=True)
class ResolvedSelection:
    """A `Selection` with the layer and expert numbers of one model; None for all of them."""

    layers: tuple[int, ...] | None
    experts: tuple[int, ...] | None
    only: tuple[str, ...]
    include: tuple[str, ...]
    exclude: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that are given, as JSON types; empty for a selection of everything."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {name: list(value) for name, value in fields.items() if value not in (None, ())}

    def matches(self, name: str, model_tensor: str, layer: int | None, expert: int | None) -> bool:
        """Return whether an output tensor is selected.

        Args:
            name: The output tensor's name.
            model_tensor: The model tensor that it holds (see `MODEL_TENSORS`).
            layer: Its layer; None if it belongs to none.
            expert: Its expert; None if it belongs to none or holds all.
        """
        return (
            (layer is None or self.layers is None or layer in self.layers)
            and (expert is None or self.experts is None or expert in self.experts)
            and (not self.only or any(model_tensor in GROUPS[group] for group in self.only))
            and (not self.include or _matches_any(name, self.include))
            and not _matches_any(name, self.exclude)
        )


def _matches_any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _parse_or_none(text: str | None, count: int, noun: str) -> tuple[int, ...] | None:
    return None if text is None else parse_numbers(text, count, noun)


def parse_numbers(text: str, count: int, noun: str) -> tuple[int, ...]:
    """Return the numbers in a text such as "0-3,7", sorted.

    Args:
        text: Numbers and ranges, separated by commas; -1 is the last.
        count: The number of layers or experts.
        noun: "layer" or "expert", for messages.

    Raises:
        OptionError: For another text, and for numbers beyond the last.
    """
    return tuple(sorted(set(numbers_in(text, count, noun))))


def numbers_in(text: str, count: int, noun: str) -> list[int]:
    """Return the numbers in a text as they are written; takes and raises as `parse_numbers`."""
    numbers: list[int] = []
    for item in text.split(","):
        match = _RANGE.fullmatch(item.strip())
        if match is None:
            raise OptionError(
                f"{text!r} names no {noun}s; write them as 0-3,7 or -1 for the last one"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        for number in (first, last):
            if not -count <= number < count:
                raise OptionError(f"{noun} {number}: there are {noun}s 0 to {count - 1}")
        first, last = first % count, last % count
        if first > last:
            raise OptionError(f"{item.strip()!r}: the first {noun} comes after the last")
        numbers += range(first, last + 1)
    return numbers
