"""Files that are added to a repository of the Hub: before, during and after their upload."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub

from .._utils import strict_json
from ..errors import MachineError
from .location import FileInfo

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

__all__ = ["check_listed", "check_sent", "file_addition", "make_receipt", "uploaded_addition"]


def file_addition(path: str, data: Path | bytes, checksum: str | None) -> CommitOperationAdd:
    """Return the addition of a file.

    Args:
        path: Its path in the repository.
        data: A local file, or bytes.
        checksum: Its SHA-256, if it is known; then the file need not be read for it.
    """
    addition = huggingface_hub.CommitOperationAdd(
        path, data if isinstance(data, bytes) else str(data)
    )
    if checksum is not None:
        addition.upload_info.sha256 = bytes.fromhex(checksum)
    return addition


def check_sent(addition: CommitOperationAdd, file: Path, checksum: str) -> None:
    """Check that what was uploaded of a file is what was written to it.

    Raises:
        MachineError: If it is not.
    """
    if addition.upload_info.sha256.hex() != checksum:
        raise MachineError(
            f"{file}: it is not what was written to it; check the disk, delete the folder "
            f"{file.parent} and run the same command again"
        )


def make_receipt(addition: CommitOperationAdd) -> bytes:
    """Return what `uploaded_addition` needs of a file that is uploaded and not committed."""
    info = addition.upload_info
    sample = base64.b64encode(info.sample).decode()
    return strict_json.dumps({"sha256": info.sha256.hex(), "size": info.size, "sample": sample})


def uploaded_addition(path: str, receipt: bytes) -> CommitOperationAdd:
    """Return the addition of a file that is uploaded, perhaps by a process that has ended."""
    content = strict_json.loads(receipt)
    addition = file_addition(path, b"", content["sha256"])
    addition.upload_info.size = content["size"]
    addition.upload_info.sample = base64.b64decode(content["sample"])
    # As `HfApi.preupload_lfs_files` leaves an addition.
    addition._upload_mode, addition._should_ignore, addition._is_uploaded = "lfs", False, True
    return addition


def check_listed(
    additions: Mapping[str, CommitOperationAdd],
    listed: Mapping[str, FileInfo],
    display_path: Callable[[str], str],
) -> None:
    """Check that the Hub lists what was added.

    Args:
        additions: What was added, by name.
        listed: What the Hub lists.
        display_path: Returns the name of a file in messages.

    Raises:
        MachineError: If something is missing, or is not what was sent.
    """
    for name, addition in additions.items():
        sent, found = addition.upload_info, listed.get(name)
        if (
            found is None
            or found.nbytes != sent.size
            or found.sha256 not in (None, sent.sha256.hex())
        ):
            raise MachineError(
                f"{display_path(name)}: what the Hub lists is not what was sent; run the same "
                "command again"
            )
