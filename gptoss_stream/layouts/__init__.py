"""Output layouts, one file each: a table of target tensors and what each is made of.

A layout is a module with
    ROWS                   a tuple of `Row`, in the order the tensors take in the shards
    check(model)           raises where the layout cannot carry the model's behaviour
    companions(model, …)   small files that the output's users need, as {name: bytes}
The file name is the layout's name, with `_` for `-`: a new file here is a new layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from .. import plugins
from ..dtypes import DType
from ..model import ModelConfig

__all__ = ["Layout", "Row", "ZeroRow", "load", "names"]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a layout: target tensor, model tensor, einops pattern.

    `{l}` and `{e}` stand for each layer and expert. Where only the model tensor has `{e}`, the
    target stacks the experts along a new first axis. `axes` gives the sizes that the pattern
    leaves open, in the letters of `model`; `rows` takes every `step`-th row of the model tensor
    before the pattern. A model tensor that the model lacks (an attention bias, or lm_head where the
    embeddings are tied) becomes zeros, or is the embedding; an `optional` row is left out then.
    """

    target: str
    model_tensor: str
    pattern: str
    axes: Mapping[str, str] = field(default_factory=dict)
    rows: tuple[int, int] = (0, 1)
    optional: bool = False


@dataclass(frozen=True, slots=True)
class ZeroRow:
    """A target that no model tensor gives: zeros of a shape in the letters of `model`, chosen in
    selections together with `model_tensor`."""

    target: str
    shape: str
    model_tensor: str


class Layout(Protocol):
    """What a module of this folder offers."""

    ROWS: tuple[Row | ZeroRow, ...]

    def check(self, model: ModelConfig) -> None:
        """Raise `ConfigError` for a model whose behaviour the layout cannot carry."""

    def companions(
        self, model: ModelConfig, config: Mapping[str, Any], dtype: DType, *, partial: bool
    ) -> dict[str, bytes]:
        """Small files for the output's users; `config` is the source's config.json, and `partial`
        tells of an output that holds but a part of the model's tensors."""
        ...


def names() -> tuple[str, ...]:
    """The layouts there are, from the files of this folder."""
    return plugins.names(__path__)


def load(name: str) -> Layout:
    """The layout of that name; raises `OptionError` for a name that is none."""
    layout: Layout = plugins.load(__name__, __path__, name, "layout")
    return layout
