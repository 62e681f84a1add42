"""The options of LoRA adapters, and the objects that they stand for."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..errors import OptionError
from ._options import open_other

if TYPE_CHECKING:
    from ..adapters import AdapterLike

__all__ = ["add_adapters", "open_adapters"]


def add_adapters(parser: argparse.ArgumentParser) -> None:
    """Add `--adapter` and the options about it."""
    group = parser.add_argument_group("LoRA adapters")
    group.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="ADAPTER",
        help="LoRA adapter to merge: a folder with adapter_config.json, a Hub repository "
        "(hf://user/name@revision for a revision), or a URL; may be repeated, merged in order",
    )
    group.add_argument(
        "--adapter-scale",
        action="append",
        type=float,
        default=[],
        metavar="S",
        help="multiplies what an adapter adds (default: 1; of verify: as recorded); once for all, "
        "or once for each",
    )
    group.add_argument(
        "--merge-like-peft",
        action="store_true",
        default=None,
        help="round merged values as PEFT does, up to twice, instead of once",
    )
    group.add_argument(
        "--lora-b-layout",
        metavar="LAYOUT",
        help="order of the columns of the experts' lora_B in an adapter of unsloth that does not "
        "say it: rank_major (as PEFT has it) or grouped_by_expert (unsloth until September 2026)",
    )
    group.add_argument(
        "--lora-orientation",
        metavar="WAY",
        help="way round of the experts' lora_A and lora_B where no shape shows it: normal or "
        "swapped",
    )


def open_adapters(arguments: argparse.Namespace) -> tuple[AdapterLike, ...]:
    """Return the adapters, opened; print where remote ones are read from.

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
    for option, is_given in given.items():
        if is_given and not names:
            raise OptionError(f"{option} is for adapters; name one with --adapter, or remove it")
    if len(scales) not in (0, 1, len(names)):
        raise OptionError(
            f"{len(scales)} times --adapter-scale for {len(names)} adapters; give it once for all "
            "of them, or once for each, in order"
        )
    adapters: list[AdapterLike] = []
    for number, name in enumerate(names):
        scale = scales[min(number, len(scales) - 1)] if scales else 1.0
        # Checked before any network is asked.
        adapter = Adapter(name, scale, arguments.lora_b_layout, arguments.lora_orientation)
        location = open_other(name, arguments, "merging")
        # A bare location says nothing, so that verify takes the rest from the record.
        adapters.append(
            location if adapter == Adapter(name) and not scales else adapter.at(location)
        )
    return tuple(adapters)
