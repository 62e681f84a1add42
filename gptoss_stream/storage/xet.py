"""Bounds the memory of `hf_xet`, by which huggingface_hub uploads.

hf_xet keeps up to 128 MiB for each upload of a block that is under way, and runs up to 64 of them;
each of its threads keeps more. Source of the names: hf_xet 1.8, and the documentation of Tokio's
runtime. They are read when hf_xet is first imported.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

from huggingface_hub import constants

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

__all__ = ["XET_NBYTES", "bound_memory", "send_large_file", "uses_xet"]

XET_NBYTES = 300_000_000
"""Memory that hf_xet takes within these bounds, its code included."""

_BOUNDS = {
    "HF_XET_CLIENT_AC_INITIAL_UPLOAD_CONCURRENCY": "1",
    "HF_XET_CLIENT_AC_MAX_UPLOAD_CONCURRENCY": "2",
    "HF_XET_DATA_MAX_CONCURRENT_FILE_INGESTION": "1",
    "TOKIO_WORKER_THREADS": "1",
}
_OF_USERS = ("HF_XET_HIGH_PERFORMANCE", "HF_XET_FIXED_UPLOAD_CONCURRENCY")
"""Settings that say how many uploads are under way: then none is changed."""


def bound_memory() -> None:
    """Set how many uploads are under way, unless the user has; before hf_xet is imported."""
    if not any(name in os.environ for name in _OF_USERS):
        for name, value in _BOUNDS.items():
            os.environ.setdefault(name, value)


def uses_xet() -> bool:
    """Return whether huggingface_hub uploads large files by hf_xet."""
    return not constants.HF_HUB_DISABLE_XET and importlib.util.find_spec("hf_xet") is not None


def send_large_file(api: HfApi, repo: str, addition: CommitOperationAdd) -> None:
    """Upload a large file, without a commit; raise what the Hub refuses as huggingface_hub does.

    hf_xet raises a ConnectionError for every answer. The Hub is asked again for what it was.

    Args:
        api: The client, with the token to use.
        repo: The repository.
        addition: The file.
    """
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    try:
        api.preupload_lfs_files(repo, [addition])
    except ConnectionError:
        url = f"{constants.ENDPOINT}/api/models/{repo}/xet-write-token/{constants.DEFAULT_REVISION}"
        headers = build_hf_headers(token=api.token, library_name="gptoss_stream")
        hf_raise_for_status(get_session().get(url, headers=headers))
        raise
