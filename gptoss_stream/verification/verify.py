"""The public functions `verify` and `verify_checksums`. They write nothing.

>>> import gptoss_stream
>>> gptoss_stream.verify("gpt-oss-20b", "gpt-oss-20b-tl").equal  # doctest: +SKIP
True
"""

from __future__ import annotations

import logging
import random
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from .._utils.arguments import whole_number
from .._utils.failures import machine_error
from .._utils.messages import counted, sized
from .._utils.progress import OnProgress, check_callbacks, progress_callbacks
from .._utils.thread_pool import count_workers, run_steps
from ..adapters import Adapter, AdapterLike, as_adapters, check_values
from ..checkpoint.metadata import CheckpointInfo
from ..checkpoint.open_reader import open_reader
from ..errors import CheckpointError, OutputError
from ..model.selection import SelectionLike
from ..planning.plan import Plan, plan
from ..planning.plan_readers import open_plan_readers
from ..storage.local_folder import LocalFolder
from ..storage.location import Location, LocationLike
from ..storage.open_location import open_location
from ..transforms.output_tensor import OutputTensor
from ..writing.executor import CHUNK_NBYTES
from ..writing.run_state import RECORD_NAME
from .checksums import compare_checksums, compare_file_names, describe_files, read_checksums
from .data import DataComparison
from .differences import Difference, Verification
from .stored_output import (
    as_output_errors,
    open_output,
    parse,
    read_file,
    read_output,
    recorded_files,
)
from .structure import compare_record, compare_structure, is_comparable, recorded_options

__all__ = ["verify", "verify_checksums"]

_log = logging.getLogger(__name__)


def verify(
    source: LocationLike,
    output: LocationLike,
    *,
    to: str | None = None,
    source_format: str | None = None,
    selection: SelectionLike | None = None,
    sample: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    mxfp4_rule: str | None = None,
    reference: LocationLike | None = None,
    adapters: AdapterLike | Sequence[AdapterLike] | None = (),
    merge_like_peft: bool | None = None,
    on_start: Callable[[int, int], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
    progress: bool = False,
) -> Verification:
    """Convert a source again, in bounded memory, and compare every byte with an output.

    Names, dtypes, shapes, index and the small files beside the shards are compared too. What is
    remote is read by byte range, each byte once.

    Args:
        source: A folder, a Hub repository, or a URL (see `open_location`).
        output: The output: a folder, a Hub repository, or a URL.
        to: The format of the output; by default as recorded in the output.
        source_format: The format of the source; by default it is detected.
        selection: The tensors that should be in the output; by default as recorded in the output.
        sample: Compare the data of this many random tensors only.
        seed: Random seed of the sample.
        workers: Number of threads; by default one more than processors, at most 8.
        mxfp4_rule: How floats became MXFP4; by default as recorded in the output.
        reference: The checkpoint whose MXFP4 blocks were kept; by default as recorded, too.
        adapters: The LoRA adapters that were merged; by default as recorded, too.
        merge_like_peft: Whether merged values were rounded as PEFT does; by default as recorded.
        on_start: Called with the bytes to compare, and 0.
        on_progress: Called with the bytes compared since the last call, from any thread.
        progress: Whether to show a progress bar.

    Returns:
        The differences and how much was compared. The dtype that the data are compared in is the
        most frequent float dtype of the output, or each tensor's own if it was converted with
        dtype "keep".

    Raises:
        OptionError: If an argument is invalid.
        CheckpointError: If the source is not a valid checkpoint.
        OutputError: If there is no output, if it is unfinished, or if it is of another format.
        MachineError: If reading fails.
        MissingPackageError: If an optional package is not installed.
    """
    threads = count_workers(workers)
    seed = whole_number(seed, "seed")
    if sample is not None:
        sample = whole_number(sample, "sample", 1)
    check_callbacks(on_start=on_start, on_progress=on_progress)
    location = open_output(output)
    try:
        stored, differences = read_output(location)
        found = stored.info
        options = recorded_options(stored)
        options["to"] = options["to"] if to is None else to
        options["selection"] = options["selection"] if selection is None else selection
        options["mxfp4_rule"] = options["mxfp4_rule"] if mxfp4_rule is None else mxfp4_rule
        if reference is None and options["reference"] is not None:
            reference = _recorded("reference", options["reference"])
        options["reference"] = reference
        options["adapters"] = _with_recorded(adapters, options["adapters"])
        if merge_like_peft is not None:
            options["merge_like_peft"] = merge_like_peft
        planned = plan(source, source_format=source_format, **options)
        expected = {tensor.name: tensor for shard in planned.shards for tensor in shard.tensors}
        if selection is None and found.tensors and not found.tensors.keys() & expected.keys():
            raise OutputError(
                f"{location}: none of its tensors is one of {planned.to}; "
                f"{'leave out' if to else 'give its format with'} --to, or name the source first "
                "and the converted output second"
            )
        differences += compare_structure(stored, expected, planned)
        tensors = [t for t in expected.values() if is_comparable(t, found.tensors)]
        if sample is not None:
            tensors = _sample(tensors, sample, seed)
        nbytes = sum(tensor.nbytes for tensor in tensors)
        with progress_callbacks("verifying", progress, on_start, on_progress) as (start, advance):
            _log.info(
                "verifying %s: %s, %s", location, counted(len(tensors), "tensor"), sized(nbytes)
            )
            start(nbytes, 0)
            differences += _compare_data(planned, found, tensors, threads, advance)
    except OSError as error:
        raise machine_error(error, f"verifying {location}") from error
    return Verification(
        output=str(location),
        format=planned.to,
        selection=planned.selection.as_dict(),
        tensors=len(tensors),
        files=0,
        nbytes=nbytes,
        differences=tuple(differences),
    )


def _recorded(what: str, name: str) -> Location:
    """Open the reference or the adapter that an output's record names."""
    try:
        location = open_location(name)
        location.check()
        return location
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; the output's record names it as the {what}: if it has moved, give it "
            f"with --{what}"
        ) from None


def _with_recorded(
    adapters: AdapterLike | Sequence[AdapterLike] | None, recorded: Sequence[Adapter]
) -> tuple[Adapter, ...]:
    """Return the adapters that are given, or else those of an output's record.

    Where as many are given, as locations alone, the record says the rest.
    """
    given = as_adapters(adapters)
    is_said = isinstance(adapters, Adapter) or (
        isinstance(adapters, Sequence) and any(isinstance(one, Adapter) for one in adapters)
    )
    if not given:
        opened = [_recorded("adapter", str(one.location)) for one in recorded]
        return tuple(replace(one, location=at) for one, at in zip(recorded, opened, strict=True))
    if len(given) != len(recorded) or is_said:
        return given
    pairs = zip(recorded, given, strict=True)
    return tuple(replace(one, location=other.location) for one, other in pairs)


def _sample(tensors: list[OutputTensor], count: int, seed: int) -> list[OutputTensor]:
    """Return a random sample of tensors, in order of their names."""
    chosen = random.Random(seed).sample(tensors, min(count, len(tensors)))
    return sorted(chosen, key=lambda tensor: tensor.name)


def _compare_data(
    planned: Plan,
    output: CheckpointInfo,
    tensors: Iterable[OutputTensor],
    threads: int,
    on_progress: OnProgress,
) -> list[Difference]:
    """Compare the data of tensors.

    Raises:
        CheckpointError: If a file changes meanwhile.
    """
    location, temporary = output.location, Path(tempfile.gettempdir())
    scratch = location.path if isinstance(location, LocalFolder) else temporary
    copies = None if location.is_local else temporary
    with (
        open_plan_readers(planned, scratch) as source_reader,
        open_reader(output) as output_reader,
    ):
        if planned.merge is not None:
            check_values(planned.merge, source_reader)
        with DataComparison(
            source_reader, output_reader, tensors, output.tensors, on_progress, copies
        ) as comparison:
            run_steps(comparison.steps(), threads, CHUNK_NBYTES, comparison.stop)
        source_reader.check_unchanged()
        output_reader.check_unchanged()
    return comparison.differences()


def verify_checksums(
    output: LocationLike,
    *,
    on_start: Callable[[int, int], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
    progress: bool = False,
) -> Verification:
    """Compare the files of an output with its `SHA256SUMS`, without the source.

    This finds what has changed since the output was written. Whether it was written correctly is
    what `verify` finds out. Large files on the Hub are not read: the checksums that it lists are
    compared.

    Args:
        output: An output converted with checksums: a folder, a Hub repository, or a URL.
        on_start: Called with the bytes to compare, and 0.
        on_progress: Called with the bytes compared since the last call, from any thread.
        progress: Whether to show a progress bar.

    Returns:
        The differences and how much was compared.

    Raises:
        OutputError: If there is no output, if it is unfinished, or if it has no `SHA256SUMS`.
        OptionError: If `output` cannot be the name of a location.
        MachineError: If reading fails.
        MissingPackageError: If an optional package is not installed.
    """
    check_callbacks(on_start=on_start, on_progress=on_progress)
    location = open_output(output)
    try:
        checksums, differences = read_checksums(location)
        record = read_file(location, RECORD_NAME)
        recorded = recorded_files(parse(record)) if checksums else []
        differences += compare_file_names(location, checksums, recorded)
        files, unreadable = describe_files(location, checksums)
        nbytes = sum(file.nbytes for file in files)
        with (
            as_output_errors(),
            progress_callbacks("verifying", progress, on_start, on_progress) as (start, advance),
        ):
            _log.info("verifying %s: %s, %s", location, counted(len(files), "file"), sized(nbytes))
            start(nbytes, 0)
            differences += compare_checksums(location, files, checksums, advance)
        differences += unreadable
        differences += compare_record(location, record)
    except OSError as error:
        raise machine_error(error, f"verifying {location}") from error
    return Verification(
        output=str(location),
        format="",
        selection={},
        tensors=0,
        files=len(files),
        nbytes=nbytes,
        differences=tuple(differences),
        unread=sum(file.sha256 is not None for file in files),
    )
