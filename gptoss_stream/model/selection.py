"""Which tensors of an output are wanted: all, or those of some layers, experts, groups, names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ..errors import OptionError
from .config import ModelConfig
from .tensors import ATTENTION_BIASES

__all__ = ["GROUPS", "Selection", "parse_numbers"]


GROUPS: Mapping[str, frozenset[str]] = {
    "attention": frozenset({"q", "k", "v", "o", "sinks"}) | ATTENTION_BIASES,
    "experts": frozenset({"gate_up", "gate_up_bias", "down", "down_bias"}),
    "router": frozenset({"router", "router_bias"}),
    "embeddings": frozenset({"embed", "unembed", "unembed_bias"}),
    "norms": frozenset({"attn_norm", "mlp_norm", "final_norm"}),
}
"""What `only` chooses among: names in `model.MODEL_TENSORS`."""


_RANGE = re.compile(r"(-?\d{1,9})(?:-(-?\d{1,9}))?")


@dataclass(frozen=True, slots=True)
class Selection:
    """A choice of output tensors; each field restricts only what it speaks of.

    `layers` and `experts` are numbers as in "0-3,7", -1 being the last; tensors of no layer, or
    of no expert, stay. `only` names groups (`GROUPS`). `include` and `exclude` are globs on the
    names of output tensors: some of the first, if there are any, must match, and none of the
    second.
    """

    layers: str | None = None
    experts: str | None = None
    only: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Selection:
        """The selection that `ResolvedSelection.as_dict` told of."""
        fields: dict[str, Any] = {
            key: ",".join(map(str, value)) if key in ("layers", "experts") else tuple(value)
            for key, value in record.items()
        }
        return cls(**fields)

    def resolve(self, model: ModelConfig) -> ResolvedSelection:
        """The selection in a model's own numbers; raises `OptionError` for numbers and groups
        that it does not have."""
        for group in self.only:
            if group not in GROUPS:
                raise OptionError(f"unknown group {group!r}; choose among {', '.join(GROUPS)}")
        return ResolvedSelection(
            None if self.layers is None else parse_numbers(self.layers, model.num_layers, "layer"),
            None
            if self.experts is None
            else parse_numbers(self.experts, model.num_experts, "expert"),
            tuple(sorted(set(self.only))),
            tuple(self.include),
            tuple(self.exclude),
        )


@dataclass(frozen=True, slots=True)
class ResolvedSelection:
    """A `Selection` in the numbers of one model."""

    layers: tuple[int, ...] | None
    experts: tuple[int, ...] | None
    only: tuple[str, ...]
    include: tuple[str, ...]
    exclude: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """What is restricted, as JSON types; empty for a selection of everything."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {name: list(value) for name, value in fields.items() if value not in (None, ())}

    def takes(self, target: str, model_tensor: str, layer: int | None, expert: int | None) -> bool:
        """Whether an output tensor, made of a model tensor's layer and expert, is chosen."""
        return (
            (layer is None or self.layers is None or layer in self.layers)
            and (expert is None or self.experts is None or expert in self.experts)
            and (not self.only or any(model_tensor in GROUPS[group] for group in self.only))
            and (not self.include or _matches(target, self.include))
            and not _matches(target, self.exclude)
        )


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def parse_numbers(text: str, count: int, what: str) -> tuple[int, ...]:
    """The numbers in a text such as "0-3,7", of `count` that there are, -1 being the last.

    Raises `OptionError`, speaking of `what`, for another text and for numbers beyond the last.
    """
    numbers: set[int] = set()
    for item in text.split(","):
        match = _RANGE.fullmatch(item.strip())
        if match is None:
            raise OptionError(f"{text!r} names no {what}s; write them as 0-3,7 or -1 for the last")
        first, last = int(match[1]), int(match[2] or match[1])
        for number in (first, last):
            if not -count <= number < count:
                raise OptionError(f"{what} {number}: there are {what}s 0 to {count - 1}")
        first, last = first % count, last % count
        if first > last:
            raise OptionError(f"{item.strip()!r}: the first {what} comes after the last")
        numbers.update(range(first, last + 1))
    return tuple(sorted(numbers))
