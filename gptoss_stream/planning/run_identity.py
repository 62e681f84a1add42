"""What identifies a run: two runs with the same identity write the same bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from .. import __version__
from ..checkpoint.auxiliary_files import find_auxiliary_files
from ..checkpoint.metadata import CheckpointInfo
from ..storage.hub_commits import listings_of
from ..storage.location import NEVER_STOP, FileInfo, Location
from .plan import Plan

__all__ = ["encoding_identity", "run_identity"]

_NUM_SAMPLES = 16
_SAMPLE_NBYTES = 1024


def run_identity(plan: Plan) -> dict[str, Any]:
    """Return the identity of a run, which is also the record of how the output was written.

    Returns:
        JSON values: tool version, source with its files and configuration, options, and a hash of
        all tensors that are read and all headers that are written. `source` is for users to read:
        the same files under another path are the same source.
    """
    location = plan.info.location
    return {
        "tool": "gptoss_stream",
        "version": __version__,
        "source": location.identity,
        **({"source_revision": location.revision} if location.revision else {}),
        "source_files": _files(plan.info),
        "copied_files": _copied_files(plan),
        "source_config": _digest(json.dumps(plan.info.configs, sort_keys=True).encode()),
        "source_format": plan.source_format,
        "format": plan.to,
        "partial": plan.is_partial,
        "selection": plan.selection.as_dict(),
        "dtype": plan.dtype,
        "max_shard_size": plan.max_shard_size,
        **({} if plan.pruning is None else {"pruning": plan.pruning}),
        **_encoding(plan),
        **_merge(plan),
        "unused": list(plan.unmapped),
        **_listings(plan),
        "plan": _digest(
            *(
                f"{raw.shard} {raw.name} {raw.dtype.code} {raw.shape} {raw.offset}\n".encode()
                for raw in plan.info.tensors.values()
            ),
            *(shard.name.encode() + shard.header for shard in plan.shards),
        ),
    }


def encoding_identity(identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the rule and the reference by which floats become MXFP4; None if none do."""
    if "mxfp4_rule" not in identity:
        return None
    return {"rule": identity["mxfp4_rule"], "reference": identity.get("reference")}


def _encoding(plan: Plan) -> dict[str, Any]:
    """Return what identifies how floats become MXFP4, if any do."""
    if plan.mxfp4_rule is None:
        return {}
    found: dict[str, Any] = {"mxfp4_rule": plan.mxfp4_rule}
    if plan.reference is not None:
        found["reference"] = plan.reference.location.identity
        found["reference_files"] = _files(plan.reference)
    return found


def _merge(plan: Plan) -> dict[str, Any]:
    """Return what identifies the adapters that are merged, if any are."""
    if plan.merge is None:
        return {}
    rounding = {"merge_like_peft": True} if plan.merge.like_peft else {}
    return {"adapters": plan.merge.sources(), "merged": plan.merge.identity(), **rounding}


def _listings(plan: Plan) -> dict[str, Any]:
    """Return the files of the commits of the Hub that are read, for other processes of the run."""
    infos = [plan.info, *([plan.reference] if plan.reference else [])]
    infos += [] if plan.merge is None else plan.merge.infos
    found = listings_of(info.location.identity for info in infos)
    return {"listings": found} if found else {}


def _files(info: CheckpointInfo) -> dict[str, list[Any]]:
    """Return size and version of each shard of a checkpoint, and samples of a local one."""
    return {
        shard.name: [shard.nbytes, shard.version, *_samples(info.location, shard)]
        for shard in info.shards
    }


def _samples(location: Location, shard: FileInfo) -> list[str]:
    """Return a hash of bytes throughout a local file.

    Its version is its time, which some archives and package managers set to the same for all files.
    """
    if not location.is_local:
        return []
    digest, sample = hashlib.sha256(), bytearray(min(_SAMPLE_NBYTES, shard.nbytes))
    with closing(location.open(shard.name)) as file:
        for number in range(_NUM_SAMPLES):
            begin = (shard.nbytes - len(sample)) * number // (_NUM_SAMPLES - 1)
            file.read_into(memoryview(sample), begin, NEVER_STOP)
            digest.update(sample)
    return [digest.hexdigest()]


def _copied_files(plan: Plan) -> dict[str, list[Any]]:
    """Return the size and the version of each file that is copied from the source."""
    return {
        file.name: [file.info.nbytes, file.info.version]
        for file in find_auxiliary_files(plan.info.location)
        if file.info is not None
    }


def _digest(*texts: bytes) -> str:
    return hashlib.sha256(b"".join(texts)).hexdigest()
