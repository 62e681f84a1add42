"""Checks that torch has a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._utils.messages import shortened
from ..errors import OptionError

if TYPE_CHECKING:
    import torch

__all__ = ["check_device"]


def check_device(device: str | torch.device | None) -> None:
    """Check that tensors can be made on a device, before anything is read.

    Args:
        device: The device; None is allowed.

    Raises:
        OptionError: If torch does not know it, or cannot use it.
    """
    import torch

    try:
        torch.empty(0, device=device)
    # torch raises any of them
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        name = shortened(" ".join(str(device).split()))
        raise OptionError(f"device {name!r} cannot be used: {reason}") from None
