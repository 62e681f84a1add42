"""The tokenizer of a checkpoint."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ..checkpoint.auxiliary_files import find_auxiliary_files
from ..storage.local_folder import LocalFolder
from ..storage.location import Location

__all__ = ["load_tokenizer"]


def load_tokenizer(location: Location) -> Any:
    """Load the tokenizer of a checkpoint; None if it has none.

    The files of a remote one are copied to a temporary folder first.
    """
    if not location.has("tokenizer.json"):
        return None
    from transformers import AutoTokenizer

    if isinstance(location, LocalFolder):
        return AutoTokenizer.from_pretrained(location.path, local_files_only=True)
    with tempfile.TemporaryDirectory() as folder:
        for file in find_auxiliary_files(location):
            target = Path(folder, file.name)
            target.parent.mkdir(exist_ok=True)
            with target.open("wb") as opened:
                for chunk in file.chunks():
                    opened.write(chunk)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
