"""Printing for users: messages to stderr, and descriptions that several commands print."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .._utils.messages import counted, listed
from .._utils.platforms import platform_note
from .._utils.strict_json import SCHEMA

if TYPE_CHECKING:
    from ..model.config import ModelConfig
    from ..planning.plan import Plan
    from ..tensors.raw_tensor import RawTensor

__all__ = [
    "describe_format",
    "describe_model",
    "describe_selection",
    "print_encoding",
    "print_json",
    "print_message",
    "print_narrowed",
    "print_platform_note",
    "print_tensors",
    "print_warnings",
    "redirect_messages",
    "show_warnings",
]


def print_message(message: str) -> None:
    """Print a message as one line to stderr; line breaks in it become spaces."""
    text = "gptoss_stream: " + " ".join(message.splitlines())
    write = _write  # another thread may close the bar
    if write is None:
        print(text, file=sys.stderr)
    else:
        write(text)


def redirect_messages(write: Callable[[str], None] | None) -> None:
    """Have messages written by a function, which keeps them apart from a progress bar.

    Args:
        write: Writes a line; None for the usual way.
    """
    global _write
    _write = write


_write: Callable[[str], None] | None = None


class _MessageHandler(logging.Handler):
    """Prints log records as messages."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        print_message(record.getMessage())


def show_warnings(*, verbose: bool = False) -> None:
    """Print what the library warns of, such as long waits.

    Args:
        verbose: Whether to print everything that it logs.
    """
    logger = logging.getLogger("gptoss_stream")
    logger.setLevel(logging.DEBUG if verbose else logging.WARNING)
    logger.handlers = [_MessageHandler()]


def print_platform_note(*, quiet: bool) -> None:
    """Print what writing on this system lacks, to stderr, unless `quiet`."""
    note = platform_note()
    if note is not None and not quiet:
        print_message(f"note: {note}")


def print_warnings(plan: Plan) -> None:
    """Print what the user should know before a conversion, to stderr."""
    for note in plan.notes:
        print_message(f"warning: {note}")
    if plan.warning:
        print_message(f"warning: {plan.warning}")
    if plan.unmapped:
        print_message(
            f"warning: {counted(len(plan.unmapped), 'tensor')} not converted: "
            f"{listed(plan.unmapped, 5)}"
        )


def print_json(value: Mapping[str, Any]) -> None:
    """Print an object as JSON to stdout."""
    print(json.dumps({"schema": SCHEMA, **value}, indent=2))


def print_narrowed(narrowed: Mapping[str, int]) -> None:
    """Print how many tensors lose precision, by dtypes (see `Plan.narrowed`)."""
    for dtypes, count in narrowed.items():
        print(f"precision lost in {counted(count, 'tensor')}: {dtypes}")


def print_encoding(report: Mapping[str, Any]) -> None:
    """Print what encoding to MXFP4 lost: in all, and the three tensors that lost most."""
    print(f"MXFP4 by the rule {report['rule']}: {_describe_loss(report['total'])}")
    tensors = report["tensors"]
    worst = sorted(tensors, key=lambda name: -tensors[name]["relative_error"])[:3]
    if report["unknown"]:
        print(
            f"  not known of {counted(len(report['unknown']), 'tensor')} that were written before"
        )
    for name in worst if report["total"]["relative_error"] else ():
        print(f"  {name}: {_describe_loss(tensors[name])}")


def _describe_loss(loss: Mapping[str, Any]) -> str:
    """Return in words what encoding lost."""
    kept = f"{loss['blocks_kept']} of {loss['blocks']} blocks kept, " if loss["blocks_kept"] else ""
    return (
        f"{kept}relative error {loss['relative_error']:.2%}, {loss['clipped']:.2%} of values "
        f"clipped, {loss['flushed']:.2%} became zero"
    )


def print_tensors(tensors: Mapping[str, RawTensor]) -> None:
    """Print a line for each tensor: name, dtype, shape and shard."""
    width = max(map(len, tensors), default=0)
    for raw in tensors.values():
        print(f"  {raw.name:{width}}  {raw.dtype.code:4}  {list(raw.shape)}  {raw.shard}")


def describe_format(name: str, dtype: str) -> str:
    """Return a format and a dtype (a torch name or "keep") in words."""
    return f"{name} in {'the dtypes of the source' if dtype == 'keep' else dtype}"


def describe_selection(selection: Mapping[str, Any]) -> str:
    """Return a selection in words and in brackets; empty for a selection of everything.

    Args:
        selection: As from `ResolvedSelection.as_dict`.
    """
    chosen = [f"{name} {','.join(map(str, value))}" for name, value in selection.items()]
    return f" ({'; '.join(chosen)})" if chosen else ""


def describe_model(model: ModelConfig) -> str:
    """Return the size of a model in words."""
    count = model.num_parameters
    unit, word = next(
        (one for one in ((1e9, "billion"), (1e6, "million")) if count >= one[0]), (1e3, "thousand")
    )
    return (
        f"{counted(model.num_layers, 'layer')}, {counted(model.num_experts, 'expert')} "
        f"({model.experts_per_token} for each token), {count / unit:.3g} {word} parameters"
    )
