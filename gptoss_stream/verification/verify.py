"""Holds an output against its source: every byte made again and compared. Or against its sums.

Trusts neither record nor state of the run that made the output. Headers, index, names, dtypes and
shapes first; then the data, segment by segment, in bounded memory. Writes nothing.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable

from .._utils.failures import machine_error
from .._utils.thread_pool import count_workers, run_steps
from ..checkpoint.open_reader import open_reader
from ..checkpoint.reader import LocalReader
from ..errors import OptionError, OutputError
from ..model.selection import Selection
from ..planning.plan import plan
from ..storage.location import LocationLike
from ..storage.open_location import local_path
from ..writing.checksums import CHECKSUMS_NAME, parse_checksums
from ..writing.executor import CHUNK_NBYTES
from .data import DataComparison
from .differences import Difference, Verification
from .structure import (
    compare_auxiliary_files,
    compare_index,
    compare_names,
    compare_record,
    is_comparable,
    read_output,
    read_record,
)

__all__ = ["verify", "verify_checksums"]


def verify(
    source: LocationLike,
    output: str | os.PathLike[str],
    *,
    to: str | None = None,
    source_format: str | None = None,
    selection: Selection | None = None,
    sample: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    on_plan: Callable[[int], None] = lambda nbytes: None,
    on_bytes: Callable[[int], None] = lambda nbytes: None,
) -> Verification:
    """Compare an output folder with what its source gives, byte for byte.

    The dtype is that of most of the output's floats, or each tensor's own where the output's record
    says "keep" (without a record, where the tensors differ in it). `to` (the format) and
    `selection` are, where they are not given, what the record says; the result repeats them.
    `sample` compares the data of that many tensors, chosen at random by `seed`, instead of all;
    names, dtypes, shapes, index and the small files beside the weights are compared in any case.
    `on_plan` is told how many bytes will be compared, `on_bytes`, from any thread, how many have
    been. Raises `CheckpointError` for a source and `OutputError` for an output that is none,
    `OptionError` for an argument that cannot be meant, `MachineError` where reading fails,
    `MissingPackageError` where an extra is not installed. Differences are not raised but returned.
    """
    threads = count_workers(workers)
    folder = local_path(output)
    try:
        found, differences = read_output(folder)
        recorded = read_record(folder, found)
        planned = plan(
            source,
            to=to or recorded["to"],
            source_format=source_format,
            dtype=recorded["dtype"],
            selection=selection or recorded["selection"],
        )
        expected = {tensor.name: tensor for s in planned.shards for tensor in s.tensors}
        differences += compare_names(found.tensors, expected)
        differences += compare_index(folder, found.tensors)
        differences += compare_auxiliary_files(folder, planned)
        comparable = [t for t in expected.values() if is_comparable(t, found.tensors)]
        if sample is not None:
            if sample < 1:
                raise OptionError(f"a sample of {sample} tensors: there must be at least one")
            chosen = random.Random(seed).sample(comparable, min(sample, len(comparable)))
            comparable = sorted(chosen, key=lambda tensor: tensor.name)
        nbytes = sum(tensor.nbytes for tensor in comparable)
        on_plan(nbytes)
        with open_reader(planned.info) as source_files, LocalReader(found) as output_files:
            comparison = DataComparison(source_files, output_files, on_bytes)
            comparison.take(comparable, found.tensors)
            run_steps(comparison.tasks(), threads, CHUNK_NBYTES, comparison.stop)
            source_files.check_unchanged()
            output_files.check_unchanged()
    except OSError as error:
        raise machine_error(error, f"verifying {folder}") from error
    differences += sorted(comparison.differences.values(), key=lambda d: d.name)
    return Verification(
        str(folder),
        planned.to,
        planned.selection.as_dict(),
        len(comparable),
        0,
        nbytes,
        tuple(differences),
    )


def verify_checksums(
    output: str | os.PathLike[str],
    *,
    on_plan: Callable[[int], None] = lambda nbytes: None,
    on_bytes: Callable[[int], None] = lambda nbytes: None,
) -> Verification:
    """Hold the files of an output folder against its own `SHA256SUMS`, without the source.

    Finds what has changed since the folder was written; whether it was right then, only `verify`
    can tell. `on_plan` and `on_bytes` as there. Raises `OutputError` for a folder without sums,
    `OptionError` for a URL, `MachineError` where reading fails. Differences are not raised but
    returned.
    """
    folder = local_path(output)
    differences: list[Difference] = []
    nbytes = 0
    try:
        if not (folder / CHECKSUMS_NAME).is_file():
            raise OutputError(
                f"{folder}: no {CHECKSUMS_NAME} in it; convert --checksums writes one"
            )
        try:
            sums = parse_checksums((folder / CHECKSUMS_NAME).read_bytes())
        except ValueError as error:
            sums = {}
            differences.append(
                Difference(
                    "checksum", CHECKSUMS_NAME, expected="a sum on each line", found=str(error)
                )
            )
        present = {name: folder / name for name in sums if (folder / name).is_file()}
        differences += [Difference("missing", name) for name in sums if name not in present]
        differences += [
            Difference("unexpected", file.name)
            for file in sorted(folder.glob("*.safetensors"))
            if file.name not in sums
        ]
        on_plan(sum(file.stat().st_size for file in present.values()))
        for name, file in present.items():
            digest = hashlib.sha256()
            with open(file, "rb", buffering=0) as opened:
                while chunk := opened.read(CHUNK_NBYTES):
                    digest.update(chunk)
                    nbytes += len(chunk)
                    on_bytes(len(chunk))
            if digest.hexdigest() != sums[name]:
                differences.append(Difference("checksum", name, "", digest.hexdigest(), sums[name]))
        differences += compare_record(folder)
    except OSError as error:
        raise machine_error(error, f"verifying {folder}") from error
    return Verification(str(folder), "", {}, 0, len(present), nbytes, tuple(differences))
