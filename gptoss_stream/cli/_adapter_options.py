"""The options of LoRA adapters, and the objects that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .._utils.messages import counted
from ..errors import OptionError
from ._command import Arguments, Decorator, OptionGroup, combined, option
from ._locations import open_other
from ._values import LORA_B_LAYOUTS, LORA_ORIENTATIONS, PATH

if TYPE_CHECKING:
    from ..adapters import Adapter, AdapterLike

__all__ = ["adapter_options", "named_adapters", "open_adapters"]

_GROUP = OptionGroup("LoRA adapters")

adapter_options: Decorator = combined(
    (
        option(
            "--adapter",
            type=PATH,
            multiple=True,
            metavar="ADAPTER",
            group=_GROUP,
            help="LoRA adapter to merge: a folder with adapter_config.json, a Hub repository "
            "(hf://user/name@revision for a revision), or a URL; may be repeated, merged in order",
        ),
        option(
            "--adapter-scale",
            type=float,
            multiple=True,
            metavar="S",
            group=_GROUP,
            help="multiplies what an adapter adds (default: 1; of verify: as recorded); once for "
            "all, or once for each",
        ),
        option(
            "--merge-like-peft",
            is_flag=True,
            default=None,
            group=_GROUP,
            help="round merged values as PEFT does, up to twice, instead of once",
        ),
        option(
            "--lora-b-layout",
            type=LORA_B_LAYOUTS,
            metavar="LAYOUT",
            group=_GROUP,
            help="order of the columns of the experts' lora_B in an adapter of unsloth that does "
            "not say it: {choices} (PEFT has rank_major, unsloth until September 2026 "
            "grouped_by_expert)",
        ),
        option(
            "--lora-orientation",
            type=LORA_ORIENTATIONS,
            metavar="WAY",
            group=_GROUP,
            help="which way round the experts' lora_A and lora_B are where no shape shows it: "
            "{choices}",
        ),
    )
)


def named_adapters(arguments: Arguments) -> tuple[Adapter, ...]:
    """Return the adapters that are named, and check what is said about them.

    Raises:
        OptionError: For options that do not fit together.
    """
    from ..adapters import Adapter

    names, scales = arguments.adapter, arguments.adapter_scale
    given = {
        "--adapter-scale": bool(scales),
        "--merge-like-peft": bool(arguments.merge_like_peft),
        "--lora-b-layout": arguments.lora_b_layout is not None,
        "--lora-orientation": arguments.lora_orientation is not None,
    }
    for name, is_given in given.items():
        if is_given and not names:
            raise OptionError(f"{name} is for adapters; name one with --adapter, or remove it")
    if len(scales) not in (0, 1, len(names)):
        raise OptionError(
            f"{len(scales)} times --adapter-scale for {counted(len(names), 'adapter')}; "
            "give it once for all of them, or once for each, in order"
        )
    return tuple(
        Adapter(
            name,
            scales[min(number, len(scales) - 1)] if scales else 1.0,
            arguments.lora_b_layout,
            arguments.lora_orientation,
        )
        for number, name in enumerate(names)
    )


def open_adapters(named: Sequence[Adapter], arguments: Arguments) -> tuple[AdapterLike, ...]:
    """Return the adapters, opened; print where remote ones are read from."""
    from ..adapters import Adapter

    adapters: list[AdapterLike] = []
    for adapter in named:
        location = open_other(str(adapter.location), arguments, "merging")
        # A bare location says nothing, so that verify takes the rest from the record.
        is_bare = adapter == Adapter(adapter.location) and not arguments.adapter_scale
        adapters.append(location if is_bare else adapter.at(location))
    return tuple(adapters)
