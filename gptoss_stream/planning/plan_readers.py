"""Opens the readers of everything that a plan reads."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from ..checkpoint.open_reader import open_readers
from ..checkpoint.reader import Reader
from .plan import Plan

__all__ = ["open_plan_readers"]


def open_plan_readers(plan: Plan, scratch: Path, ahead: int = 0) -> AbstractContextManager[Reader]:
    """Open a reader of a plan's source, reference and adapters.

    Args:
        plan: The plan.
        scratch: Where temporary files for adapters are created, or a folder in it that does not
            exist yet.
        ahead: How many steps the system reads ahead (see `checkpoint.open_reader`).
    """
    adapters = [] if plan.merge is None else plan.merge.infos
    return open_readers(plan.info, plan.reference, adapters, scratch, ahead)
