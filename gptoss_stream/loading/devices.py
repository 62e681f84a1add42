"""Checks that torch has a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    except (RuntimeError, AssertionError, TypeError) as error:  # torch raises any of them
        reason = str(error).strip().partition("\n")[0]
        raise OptionError(f"device {str(device)!r} cannot be used: {reason}") from None
