"""Opens the readers of everything that a plan reads."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from ..checkpoint.metadata import CheckpointInfo
from ..checkpoint.open_reader import RandomAccess, open_random_access, open_readers
from ..checkpoint.reader import Reader
from ..storage.block_cache import BlockCache
from .plan import Plan

__all__ = ["open_plan_random_access", "open_plan_readers"]


def open_plan_readers(plan: Plan, scratch: Path, ahead: int = 0) -> AbstractContextManager[Reader]:
    """Open a reader of a plan's source, reference and adapters.

    Args:
        plan: The plan.
        scratch: Where temporary files for adapters are created, or a folder in it that does not
            exist yet.
        ahead: How many steps the system reads ahead (see `checkpoint.open_reader`).
    """
    return open_readers(plan.info, plan.reference, _adapters(plan), scratch, ahead)


def open_plan_random_access(
    plan: Plan, scratch: Path, cache: BlockCache | None = None
) -> AbstractContextManager[RandomAccess]:
    """Open readers of a plan's source and adapters that read in any order, without a schedule.

    Args:
        plan: The plan, without a reference.
        scratch: Where temporary files for adapters are created.
        cache: See `checkpoint.open_reader.open_random_access`.
    """
    return open_random_access(plan.info, _adapters(plan), scratch, cache)


def _adapters(plan: Plan) -> list[CheckpointInfo]:
    """Return the adapters that a plan merges."""
    return [] if plan.merge is None else plan.merge.infos
