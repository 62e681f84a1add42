"""Objects with threads or locks, which a forked child must not use as its parent left them."""

from __future__ import annotations

import os
import weakref
from typing import Protocol

__all__ = ["begin_again_after_fork"]


class _Restartable(Protocol):
    """An object that can be made as it was at first."""

    def begin_again(self) -> None:
        """Forget all threads and locks, and what they have under way."""


_objects: weakref.WeakSet[_Restartable] = weakref.WeakSet()


def begin_again_after_fork(restartable: _Restartable) -> None:
    """Let an object begin again in every forked child, as long as it exists."""
    _objects.add(restartable)


def _begin_again() -> None:
    for restartable in _objects:
        restartable.begin_again()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_again)
