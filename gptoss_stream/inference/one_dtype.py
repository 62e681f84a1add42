"""The one dtype of a model whose checkpoint stores several.

torch multiplies no matrices of different dtypes. As in transformers, which casts all tensors to the
dtype of the configuration, a model has one dtype.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable

from ..errors import OptionError
from ..storage.location import Location
from ..tensors.dtypes import KEEP

__all__ = ["one_dtype"]

_log = logging.getLogger(__name__)


def one_dtype(
    location: Location, tensors: Iterable[tuple[str, int]], asked: str | None
) -> tuple[str, bool]:
    """Return the dtype that most elements of a model have, and whether others have another one.

    Args:
        location: The checkpoint, for messages.
        tensors: The dtype of each tensor of floats, a torch name, and its number of elements.
        asked: The dtype that the user asked for; None for the default.

    Raises:
        OptionError: If each tensor is to keep its dtype, and there are several.
    """
    counts: Counter[str] = Counter()
    for dtype, elements in tensors:
        counts[dtype] += elements
    most = max(counts, key=lambda dtype: counts[dtype], default="bfloat16")
    if len(counts) > 1:
        found = f"{location}: its tensors would be {' and '.join(sorted(counts))}"
        if asked == KEEP:
            raise OptionError(f"{found}, and a model has one dtype: name it instead of {KEEP!r}")
        _log.warning("%s, and a model has one dtype: all become %s", found, most)
    return most, len(counts) > 1
