"""Files that are added to a repository of the Hub: before, during and after their upload."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub
from huggingface_hub.utils.sha import sha_fileobj

from .._utils import strict_json
from ..errors import MachineError, OutputError
from .location import NEVER_STOP, FileInfo
from .retries import RetryPolicy

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

__all__ = [
    "check_listed",
    "check_sent",
    "check_written",
    "file_addition",
    "make_receipt",
    "uploaded_addition",
]

_LISTING_TRIES = 5


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


def check_sent(addition: CommitOperationAdd, file: Path, checksum: str, where: str) -> None:
    """Check that a file was uploaded, and that it is what was written.

    Args:
        addition: What was sent.
        file: The local file.
        checksum: The SHA-256 of what was written to it.
        where: Its name at the Hub in messages.

    Raises:
        OutputError: If the Hub has not taken it.
        MachineError: If it is not what was written.
    """
    if not addition._is_uploaded:
        raise OutputError(
            f"{where}: the Hub does not take it as a large file; remove what .gitattributes "
            "and .gitignore of the repository say of .safetensors"
        )
    _compare(addition.upload_info.sha256.hex(), file, checksum)


def check_written(file: Path, checksum: str) -> None:
    """Read a local file, and check that it is what was written to it.

    Raises:
        MachineError: If it is not.
    """
    with open(file, "rb") as opened:
        _compare(sha_fileobj(opened).hex(), file, checksum)


def _compare(found: str, file: Path, checksum: str) -> None:
    """Check the SHA-256 of a local file."""
    if found != checksum:
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
    listing: Callable[[], Mapping[str, FileInfo]],
    display_path: Callable[[str], str],
) -> None:
    """Check that the Hub lists what was added.

    Args:
        additions: What was added, by name.
        listing: Returns what the Hub lists. It is asked again if that is not what was added: it
            may be of the commit before.
        display_path: Returns the name of a file in messages.

    Raises:
        MachineError: If something is missing, or is not what was sent.
    """
    retries = RetryPolicy(NEVER_STOP, _LISTING_TRIES)
    while (wrong := _find_wrong(additions, listing())) is not None:
        retries.wait(
            MachineError(
                f"{display_path(wrong)}: what the Hub lists is not what was sent; run the same "
                "command again"
            )
        )


def _find_wrong(
    additions: Mapping[str, CommitOperationAdd], listed: Mapping[str, FileInfo]
) -> str | None:
    """Return the first name that is not listed as it was sent, if there is one."""
    for name, addition in additions.items():
        sent, found = addition.upload_info, listed.get(name)
        if (
            found is None
            or found.nbytes != sent.size
            or found.sha256 not in (None, sent.sha256.hex())
        ):
            return name
    return None
