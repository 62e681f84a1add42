"""How users name an adapter, and what they say about it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from .._utils.arguments import check_choice, finite_number
from .._utils.messages import short_call, short_repr
from ..errors import OptionError
from ..storage.location import Location, LocationLike
from ..storage.open_location import open_location

__all__ = [
    "B_LAYOUTS",
    "ORIENTATIONS",
    "Adapter",
    "AdapterLike",
    "as_adapters",
    "open_adapters",
    "recorded_adapters",
]

B_LAYOUTS = ("rank_major", "grouped_by_expert")
"""How the columns of an expert `lora_B` are ordered: column j belongs to expert j mod E (PEFT), or
to expert j div rank (unsloth until September 2026). The names are those of unsloth's
`lora_B_layout`."""

ORIENTATIONS = ("normal", "swapped")
"""Whether `lora_A` of the experts is along the inputs and `lora_B` along the outputs, or the other
way round, as some versions of PEFT with some versions of transformers save them."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter to merge.

    Args:
        location: A folder with adapter_config.json, a repository of the Hub, or a URL (see
            `open_location`).
        scale: Multiplies what the adapter adds; tensors that it stores whole are taken as they are.
        b_layout: How the columns of an expert's `lora_B` are ordered, where nothing in the adapter
            says it: "rank_major" or "grouped_by_expert".
        orientation: Which way round the experts' `lora_A` and `lora_B` are, where nothing shows it:
            "normal" or "swapped".

    Raises:
        OptionError: For a value that cannot be used.
    """

    location: LocationLike
    scale: float = 1.0
    b_layout: str | None = None
    orientation: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", finite_number(self.scale, "adapter scale"))
        for what, value, choices in (
            ("layout of lora_B", self.b_layout, B_LAYOUTS),
            ("orientation of an adapter", self.orientation, ORIENTATIONS),
        ):
            if value is not None:
                check_choice(value, what, choices)

    def __repr__(self) -> str:
        return short_call("Adapter", {"location": str(self.location), **self.as_dict()})

    def at(self, location: Location) -> Adapter:
        """Return it with another location, such as its own one opened."""
        return replace(self, location=location)

    def by_name(self) -> Adapter:
        """Return it with the name of its location, for other processes."""
        if isinstance(self.location, (str, os.PathLike)):
            return self
        return replace(self, location=self.location.identity)

    def as_dict(self) -> dict[str, Any]:
        """Return what the user says about it as JSON types, without its location."""
        said = {"b_layout": self.b_layout, "orientation": self.orientation}
        return {"scale": self.scale, **{key: value for key, value in said.items() if value}}


AdapterLike: TypeAlias = "LocationLike | Adapter"
"""How callers name an adapter: its location, or an `Adapter`."""


def as_adapters(adapters: AdapterLike | Sequence[AdapterLike] | None) -> tuple[Adapter, ...]:
    """Return adapters as `Adapter` objects; one alone need not be in a sequence, None is none.

    Raises:
        OptionError: For anything else.
    """
    kinds = (str, os.PathLike, Adapter, Location)
    if adapters is None:
        return ()
    found: Any = (adapters,) if isinstance(adapters, kinds) else adapters
    if not isinstance(found, Sequence) or not all(isinstance(one, kinds) for one in found):
        raise OptionError(
            f"adapters {short_repr(adapters)}: give a location, an Adapter, or a list of them"
        )
    return tuple(one if isinstance(one, Adapter) else Adapter(one) for one in found)


def open_adapters(
    adapters: Sequence[Adapter], state: Mapping[str, Any] | None
) -> tuple[Adapter, ...]:
    """Open the locations of adapters, at the commits that an unfinished run began to read.

    Args:
        adapters: The adapters.
        state: The state of the unfinished run, if there is one.

    Raises:
        CheckpointError: If there is no such location.
        MachineError: If a server does not answer.
    """
    recorded = state.get("adapters") if state is not None else None
    earlier = recorded if isinstance(recorded, list) else []
    opened = []
    for number, adapter in enumerate(adapters):
        of_run = earlier[number] if number < len(earlier) else None
        location = open_location(adapter.location)
        if isinstance(of_run, dict):
            read = {"source": of_run.get("adapter"), "source_revision": of_run.get("revision")}
            location = location.pinned_to(read)
        opened.append(adapter.at(location))
    return tuple(opened)


def recorded_adapters(
    sources: Sequence[Mapping[str, Any]], merged: Mapping[str, Any]
) -> tuple[Adapter, ...]:
    """Return the adapters that an output's record names (see `Merge.sources`, `Merge.identity`).

    Raises:
        KeyError, TypeError, OptionError: If the record is damaged.
    """
    return tuple(
        Adapter(
            str(source["adapter"]),
            **{key: said[key] for key in ("scale", "b_layout", "orientation") if key in said},
        )
        for source, said in zip(sources, merged.values(), strict=True)
    )
