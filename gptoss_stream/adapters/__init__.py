"""LoRA adapters: what is in their files, and what they change in a model.

Does: read adapters, check them against a model, say what each changes in each tensor.
May import: formats, transforms, checkpoint, storage, model, tensors, errors, _utils.
Must not know: how a model's tensors are converted and written.
"""

from __future__ import annotations

from .adapter import Adapter, AdapterLike, as_adapters, open_adapters, recorded_adapters
from .adapter_file import AdapterFile, is_adapter, read_adapter
from .description import describe
from .merge import Merge, check_values, merge_adapters
from .parts import Saved

__all__ = [
    "Adapter",
    "AdapterFile",
    "AdapterLike",
    "Merge",
    "Saved",
    "as_adapters",
    "check_values",
    "describe",
    "is_adapter",
    "merge_adapters",
    "open_adapters",
    "read_adapter",
    "recorded_adapters",
]


def __dir__() -> list[str]:
    return __all__
