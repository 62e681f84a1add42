"""The choice of output tensors: by layer, expert, group and name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from .._utils.arguments import texts
from .._utils.messages import short_call, short_repr
from ..errors import OptionError
from .config import ModelConfig
from .numbers import NumbersLike, numbers_text, parse_numbers
from .tensors import ATTENTION_BIASES, EXPERT_TENSORS

__all__ = [
    "GROUPS",
    "ResolvedSelection",
    "Selection",
    "SelectionLike",
]

GROUPS: Mapping[str, frozenset[str]] = {
    "attention": frozenset({"q", "k", "v", "o", "sinks"}) | ATTENTION_BIASES,
    "experts": EXPERT_TENSORS,
    "router": frozenset({"router", "router_bias"}),
    "embeddings": frozenset({"embed", "unembed", "unembed_bias"}),
    "norms": frozenset({"attn_norm", "mlp_norm", "final_norm"}),
}
"""The groups of tensors that `Selection.only` names (see `MODEL_TENSORS`)."""


@dataclass(frozen=True, slots=True)
class Selection:
    """A choice of output tensors. A tensor must match every field that is given.

    Args:
        layers: Layer numbers: a text such as "0-3,7", a number, or numbers, such as [0, 2] or
            range(4); -1 is the last. Tensors of no layer match too.
        experts: Expert numbers, likewise. Tensors of no expert match too.
        only: Groups of tensors: "attention", "experts", "router", "embeddings", "norms"; a list, or
            a text with commas.
        include: Patterns with `*`, `?` and `[…]`, one of which the name of the output tensor
            must match; a list, or one text.
        exclude: Patterns that it must not match, likewise.

    The attributes have one type each, whatever was given: `layers` and `experts` are a text or
    None, the others tuples.

    Raises:
        OptionError: For a value of another type.
    """

    layers: NumbersLike | None = None
    experts: NumbersLike | None = None
    only: str | Iterable[str] = ()
    include: str | Iterable[str] = ()
    exclude: str | Iterable[str] = ()

    def __post_init__(self) -> None:
        for name, value in {
            "layers": numbers_text(self.layers, "layer"),
            "experts": numbers_text(self.experts, "expert"),
            "only": texts(self.only, "group of tensors", separator=","),
            "include": texts(self.include, "pattern"),
            "exclude": texts(self.exclude, "pattern"),
        }.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return short_call("Selection", {key: v for key, v in given.items() if v not in (None, ())})

    @classmethod
    def of(cls, selection: SelectionLike | None) -> Selection:
        """Return a selection: of everything for None.

        Args:
            selection: A `Selection`, or its fields by name, as from `ResolvedSelection.as_dict`.

        Raises:
            OptionError: For anything else.
        """
        if isinstance(selection, Selection):
            return selection
        if isinstance(selection, ResolvedSelection):
            selection = selection.as_dict()
        found: Any = {} if selection is None else selection
        names = [field.name for field in fields(cls)]
        if not isinstance(found, Mapping) or not all(name in names for name in found):
            raise OptionError(
                f"{short_repr(selection)} is no selection; give a Selection, or a dict with some "
                f"of {', '.join(names)}"
            )
        return cls(**found)

    def resolve(self, model: ModelConfig) -> ResolvedSelection:
        """Return the selection with the layer and expert numbers of a model.

        Raises:
            OptionError: For a number that the model does not have, and an unknown group.
        """
        only, include, exclude = map(tuple, (self.only, self.include, self.exclude))
        for group in only:
            if group not in GROUPS:
                raise OptionError(f"unknown group {group!r}; choose among {', '.join(GROUPS)}")
        return ResolvedSelection(
            _parse_or_none(self.layers, model.num_layers, "layer"),
            _parse_or_none(self.experts, model.num_experts, "expert"),
            tuple(sorted(set(only))),
            include,
            exclude,
        )


@dataclass(frozen=True, slots=True)
class ResolvedSelection:
    """A `Selection` with the layer and expert numbers of one model; None for all of them."""

    layers: tuple[int, ...] | None
    """The layers' numbers, sorted."""
    experts: tuple[int, ...] | None
    """The experts' numbers, sorted."""
    only: tuple[str, ...]
    """Groups of tensors (see `Selection`); empty for all."""
    include: tuple[str, ...]
    """Patterns one of which a name must match; empty for all names."""
    exclude: tuple[str, ...]
    """Patterns that a name must not match."""

    def __repr__(self) -> str:
        return short_call("ResolvedSelection", self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that are given, as JSON types; empty for a selection of everything."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {name: list(value) for name, value in fields.items() if value not in (None, ())}

    def no_match(self, to: str) -> str:
        """Return the message for a selection that matches no tensor of a format."""
        advice = ""
        if self.include and not any("*" in pattern for pattern in self.include):
            advice = f"; --include matches whole names: try '*{self.include[0]}*'"
        return f"the selection {self.as_dict()} matches no tensor of {to}{advice}"

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


SelectionLike: TypeAlias = "Selection | ResolvedSelection | Mapping[str, Any]"
"""How callers give a selection: as a `Selection`, or as a dict of its arguments."""


def _matches_any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _parse_or_none(value: NumbersLike | None, count: int, noun: str) -> tuple[int, ...] | None:
    return None if value is None else parse_numbers(value, count, noun)
