"""The command line: parses, calls the library, prints. Exit codes: 0 done; 1 verify found
differences; 2 bad usage or input; 3 the machine failed; 130 interrupted (143 by SIGTERM).

Nothing heavy is imported before a command runs, so that --help and usage errors come at once.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .._utils.messages import counted, listed

if TYPE_CHECKING:
    from ..checkpoint.metadata import RawTensor
    from ..planning.plan import Plan

__all__ = [
    "format_line",
    "model_line",
    "print_narrowed",
    "print_tensors",
    "say",
    "selection_line",
    "warn",
]


def say(message: str) -> None:
    """One line to stderr, whatever the message holds."""
    print("gptoss_stream: " + " ".join(message.splitlines()), file=sys.stderr)


def warn(planned: Plan) -> None:
    if planned.warning:
        say(f"warning: {planned.warning}")
    if planned.unmapped:
        shown = listed(planned.unmapped, 5)
        say(f"warning: {counted(len(planned.unmapped), 'tensor')} not converted: {shown}")


def print_narrowed(narrowed: Mapping[str, int]) -> None:
    for dtypes, count in narrowed.items():
        print(f"narrowed {counted(count, 'tensor')} from {dtypes}")


def format_line(name: str, dtype: str) -> str:
    """A format and a dtype in words."""
    return f"{name} in {'the dtypes of the source' if dtype == 'keep' else dtype}"


def selection_line(selection: Mapping[str, Any]) -> str:
    """A selection in words; nothing for all."""
    chosen = [f"{name} {','.join(map(str, value))}" for name, value in selection.items()]
    return f" ({'; '.join(chosen)})" if chosen else ""


def model_line(model: Any) -> str:
    return (
        f"{counted(model.num_layers, 'layer')}, {counted(model.num_experts, 'expert')} "
        f"({model.experts_per_token} for each token), "
        f"{model.num_parameters / 1e9:.3g} billion parameters"
    )


def print_tensors(tensors: Mapping[str, RawTensor]) -> None:
    width = max(map(len, tensors), default=0)
    for raw in tensors.values():
        print(f"  {raw.name:{width}}  {raw.dtype.code:4}  {list(raw.shape)}  {raw.shard}")
