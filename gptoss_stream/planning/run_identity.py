"""A conversion in words that can travel, and making a shard of it wherever they arrive.

What other processes need to know is where source and output are and what was asked for: they open
both themselves, with credentials of their own, and plan anew. The plan must come out the same.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from .. import __version__
from .plan import Plan

__all__ = ["run_identity"]


def run_identity(planned: Plan) -> dict[str, Any]:
    """What makes two runs the same run; also the record of how the output was made."""
    location = planned.info.location
    return {
        "tool": "gptoss_stream",
        "version": __version__,
        "source": location.identity,
        **({"source_revision": location.revision} if location.revision else {}),
        "source_files": {s.name: [s.nbytes, s.version] for s in planned.info.shards},
        "source_config": _digest(json.dumps(planned.info.configs, sort_keys=True).encode()),
        "source_format": planned.source_format,
        "format": planned.to,
        "partial": planned.is_partial,
        "selection": planned.selection.as_dict(),
        "dtype": planned.dtype,
        "max_shard_size": planned.max_shard_size,
        "unused": list(planned.unmapped),
        "plan": _digest(
            *(
                f"{raw.shard} {raw.name} {raw.dtype.code} {raw.shape} {raw.offset}\n".encode()
                for raw in planned.info.tensors.values()
            ),
            *(shard.name.encode() + shard.header for shard in planned.shards),
        ),
    }


def _digest(*texts: bytes) -> str:
    return hashlib.sha256(b"".join(texts)).hexdigest()
