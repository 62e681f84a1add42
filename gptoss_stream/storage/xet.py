"""Bounds the memory of `hf_xet`, by which huggingface_hub uploads.

hf_xet keeps up to 128 MiB for each upload of a block that is under way, and runs up to 64 of them.
Source of the names: hf_xet 1.8. They are read when hf_xet is first imported.
"""

from __future__ import annotations

import os

__all__ = ["bound_memory"]

_BOUNDS = {
    "HF_XET_CLIENT_AC_INITIAL_UPLOAD_CONCURRENCY": "1",
    "HF_XET_CLIENT_AC_MAX_UPLOAD_CONCURRENCY": "2",
    "HF_XET_DATA_MAX_CONCURRENT_FILE_INGESTION": "1",
}
_OF_USERS = ("HF_XET_HIGH_PERFORMANCE", "HF_XET_FIXED_UPLOAD_CONCURRENCY")
"""Settings that say how many uploads are under way: then none is changed."""


def bound_memory() -> None:
    """Set how many uploads are under way, unless the user has; before hf_xet is imported."""
    if not any(name in os.environ for name in _OF_USERS):
        for name, value in _BOUNDS.items():
            os.environ.setdefault(name, value)
