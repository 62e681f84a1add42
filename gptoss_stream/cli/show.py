"""The command `show`: print what single tensors hold."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any

from ._command import Arguments, argument, command
from ._options import json_option, source_argument
from ._printing import print_json
from ._tensor_options import open_tensors, tensor_options

if TYPE_CHECKING:
    from ..loading.checkpoint_tensors import CheckpointTensors

__all__ = ["show"]


@command(
    "show",
    short_help="print shape, statistics and first values of tensors",
    description="Print shape, dtype, statistics and the first values of tensors, without "
    "converting the checkpoint.",
    examples=(
        "gpt-oss-20b blocks.3.mlp.experts.5.W_in.weight",
        "openai/gpt-oss-20b model.norm.weight lm_head.weight --cache 4GB",
    ),
)
@source_argument()
@argument("names", "name of a tensor", nargs=-1, required=True, metavar="NAME...")
@json_option
@tensor_options
def show(arguments: Arguments) -> int:
    """Run the command; return the exit code."""
    tensors = open_tensors(arguments, arguments.names)
    try:
        found = [_describe(tensors, name) for name in dict.fromkeys(arguments.names)]
    finally:
        tensors.loader.close()
    if arguments.json:
        print_json({"tensors": _finite(found)})
        return 0
    for one in found:
        _print(one)
    return 0


def _describe(tensors: CheckpointTensors, name: str) -> dict[str, Any]:
    """Return what is known of a tensor, as JSON types."""
    from ..loading.statistics import corner, statistics

    entry = tensors.entries[name]
    computed, first = statistics(tensors, name), corner(tensors, name)
    return {
        "name": name,
        "dtype": entry.dtype.code,
        "shape": list(entry.shape),
        "statistics": None if computed is None else computed.as_dict(),
        "corner": None if first is None else first.tolist(),
    }


def _print(one: dict[str, Any]) -> None:
    """Print what is known of a tensor."""
    print(f"{one['name']}  {one['dtype']}  {one['shape']}")
    computed = one["statistics"]
    if computed is None:
        print("  no statistics for this dtype")
        return
    if computed["min"] is not None:
        print("  " + "  ".join(f"{key} {computed[key]:.6g}" for key in ("min", "max", "mean")))
        print(f"  norm {computed['norm']:.6g}")
    for key in ("nan", "infinite"):
        if computed[key]:
            print(f"  {computed[key]:,} values are {key}")
    first = one["corner"]
    rows = first if isinstance(first, list) and first and isinstance(first[0], list) else [first]
    for row in rows:
        values = row if isinstance(row, list) else [row]
        print("  " + " ".join(f"{value:>12.6g}" for value in values))


def _finite(values: Any) -> Any:
    """Return JSON types with None for what JSON does not have: NaN and infinities."""
    if isinstance(values, list):
        return [_finite(value) for value in values]
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    return None if isinstance(values, float) and not isfinite(values) else values
