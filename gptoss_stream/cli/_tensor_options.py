"""The options of commands that read single tensors, and the tensors that they name."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

from .._utils.messages import listed
from ..errors import CheckpointError, GptOssStreamError, MachineError, OptionError
from ._adapter_options import adapter_options, named_adapters, open_adapters
from ._command import Arguments, Decorator, combined, option
from ._locations import open_source
from ._options import quiet_option, remote_source_options, source_format_option
from ._printing import print_message
from ._values import DTYPES, FORMATS, SIZE_OR_ZERO

if TYPE_CHECKING:
    from ..adapters import AdapterLike
    from ..formats import SourceModel
    from ..loading.checkpoint_tensors import CheckpointTensors

__all__ = ["open_tensors", "tensor_options"]


tensor_options: Decorator = combined(
    (
        option(
            "--to",
            type=FORMATS,
            metavar="FORMAT",
            help="format whose names and tensors NAME is about: {choices} (default: as SOURCE "
            "stores them, or else the format that has all of NAME)",
        ),
        source_format_option,
        option(
            "--dtype",
            type=DTYPES,
            metavar="DTYPE",
            help="{choices} (default: as stored, or as convert writes --to)",
        ),
        option(
            "--cache",
            type=SIZE_OR_ZERO,
            default="0",
            metavar="SIZE",
            help="disk space to keep what is read of a remote SOURCE, such as 4GB (default: 0)",
        ),
        quiet_option("results and errors"),
        adapter_options,
        remote_source_options(),
    )
)


def open_tensors(arguments: Arguments, names: Sequence[str]) -> CheckpointTensors:
    """Open SOURCE as tensors by name, and check that it has some.

    Args:
        arguments: The parsed arguments.
        names: The names that it must have.

    Raises:
        OptionError: If it lacks one, in any format.
    """
    from .. import formats
    from ..loading.checkpoint_tensors import read_finished, stored_tensors
    from ..tensors.dtypes import output_dtype

    named = named_adapters(arguments)
    if named and arguments.to is None:
        raise OptionError("adapters change the tensors of a format; add --to, such as --to hf")
    adapters = open_adapters(named, arguments)
    info = read_finished(open_source(arguments))
    if arguments.to is not None:
        to = arguments.to
        source = formats.read_source(info, arguments.source_format)
        tensors = _planned(arguments, source, to, adapters)
        _check(tensors, names, f"in the format {to}")
        return tensors
    dtype = None if arguments.dtype is None else output_dtype(arguments.dtype)
    tensors = stored_tensors(info, dtype, arguments.cache)
    if all(name in tensors.entries for name in names):
        return tensors
    known = {*tensors.entries}
    try:
        source = formats.read_source(info, arguments.source_format)
    except CheckpointError as error:
        first = next(name for name in names if name not in known)
        where = f"in {info.location}, which has only the names that it stores ({error})"
        raise OptionError(_unknown(first, known, where)) from None
    for to in formats.names():
        try:
            others = _planned(arguments, source, to)
        except MachineError:
            raise
        except GptOssStreamError:
            continue  # SOURCE cannot be converted to this format
        known |= {*others.entries}
        if all(name in others.entries for name in names):
            if not arguments.quiet:
                print_message(f"as in the format {to}")
            return others
    unknown = [name for name in names if name not in known]
    if unknown:
        raise OptionError(_unknown(unknown[0], known, f"in {info.location}, in any format"))
    raise OptionError(f"{listed(list(names))}: no format has all of them; name those of one format")


def _planned(
    arguments: Arguments,
    source: SourceModel,
    to: str,
    adapters: tuple[AdapterLike, ...] = (),
) -> CheckpointTensors:
    """Return the tensors of a format that SOURCE gives."""
    from ..adapters import as_adapters
    from ..loading.checkpoint_tensors import planned_tensors
    from ..planning.options import ConversionOptions
    from ..planning.plan import plan_conversion, read_adapters

    options = ConversionOptions(
        to,
        arguments.source_format,
        arguments.dtype,
        adapters=as_adapters(adapters),
        merge_like_peft=bool(arguments.merge_like_peft),
    )
    plan = plan_conversion(source, options, None, read_adapters(options))
    return planned_tensors(plan, arguments.cache)


def _check(tensors: CheckpointTensors, names: Sequence[str], where: str) -> None:
    """Check that there are tensors of some names."""
    for name in names:
        if name not in tensors.entries:
            raise OptionError(_unknown(name, {*tensors.entries}, where))


def _unknown(name: str, known: set[str], where: str) -> str:
    """Return the message for a name that no tensor has."""
    near = get_close_matches(name, sorted(known), 3, 0.6)
    advice = f"; did you mean {listed(near)}?" if near else "; inspect --json lists the names"
    return f"there is no tensor {name[:200]!r} {where}{advice}"
