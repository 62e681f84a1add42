"""What stands in a model's state dict for matrices that stay in the checkpoint."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from ..errors import OptionError

__all__ = ["UnsavedMatrix", "refuse_saving"]


def refuse_saving(*_: Any, **__: Any) -> NoReturn:
    """Raise the error for saving a model whose experts are not its parameters."""
    raise OptionError(
        "the experts of this model stay in its checkpoint and are not in its state dict: use "
        "convert to save them"
    )


class UnsavedMatrix(torch.Tensor):
    """Stands in a state dict for a matrix that stays in the checkpoint; using it is an error.

    Without it the state dict would be saved without experts, and nobody would notice. What takes
    only other entries still works, such as PEFT when it saves an adapter.
    """

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> NoReturn:
        refuse_saving()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_saving()

    def to(self, *_: Any, **__: Any) -> UnsavedMatrix:
        """Return the same, which has no dtype and no device: TransformerLens calls this."""
        return self

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return "<stays in the checkpoint>"
