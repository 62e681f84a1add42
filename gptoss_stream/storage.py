"""How a checkpoint format stores model tensors: the words that `sources/` tables are written in.

A format is a table from model tensor to `Stored`, `StoredMxfp4` or another of these. From the
table and the model's numbers follow the raw tensors that must be there, with dtype and shape
(`expected`), and the operand for each model tensor (`bind`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

from .checkpoint import CheckpointInfo, RawTensor
from .dtypes import BLOCK_NBYTES, BLOCK_VALUES, DType
from .errors import TensorError, counted, listed
from .model import MODEL_TENSORS, ModelConfig
from .operands import Operand, Packed, Plain, Zeros

__all__ = [
    "FLOATS",
    "Storage",
    "Stored",
    "StoredMxfp4",
    "StoredRows",
    "StoredTable",
    "StoredTransposed",
    "bind",
    "check",
    "expected",
]

FLOATS = (DType.BF16, DType.F16, DType.F32)

Expected: TypeAlias = tuple[str, tuple[DType, ...], tuple[int, ...]]
Raws: TypeAlias = Mapping[str, RawTensor]


@dataclass(frozen=True, slots=True)
class Stored:
    """Floats under one raw name; experts, where there is `{e}`, along its first axis."""

    raw: str

    def expected(self, model: ModelConfig, shape: tuple[int, ...]) -> Iterator[Expected]:
        """Raw tensors for a model tensor of `shape`, all experts' together."""
        yield self.raw, FLOATS, shape

    def bind(
        self, model: ModelConfig, raws: Raws, layer: int, expert: int, shape: tuple[int, ...]
    ) -> Operand:
        """The operand for one expert's matrix of `shape`, or the whole tensor."""
        return Plain(raws[self.raw.format(l=layer)], expert * prod(shape), shape)


@dataclass(frozen=True, slots=True)
class StoredTransposed:
    """Matrices of floats, `[…, columns, rows]`; experts along the first axis."""

    raw: str

    def expected(self, model: ModelConfig, shape: tuple[int, ...]) -> Iterator[Expected]:
        """Raw tensors for a model tensor of `shape`, all experts' together."""
        *lead, rows, columns = shape
        yield self.raw, FLOATS, (*lead, columns, rows)

    def bind(
        self, model: ModelConfig, raws: Raws, layer: int, expert: int, shape: tuple[int, ...]
    ) -> Operand:
        """The operand for one expert's matrix of `shape`."""
        rows, columns = shape
        first = expert * rows * columns
        return Plain(raws[self.raw.format(l=layer)], first, (columns, rows), is_transposed=True)


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Floats that lie in a fused tensor, as its `which`-th run of rows.

    `runs` gives the rows of each run, as products of the letters of `model`.
    """

    raw: str
    runs: tuple[str, ...]
    which: int

    def expected(self, model: ModelConfig, shape: tuple[int, ...]) -> Iterator[Expected]:
        """The fused tensor for a model tensor of `shape`."""
        yield self.raw, FLOATS, (sum(map(model.size, self.runs)), *shape[1:])

    def bind(
        self, model: ModelConfig, raws: Raws, layer: int, expert: int, shape: tuple[int, ...]
    ) -> Operand:
        """The operand for the tensor of `shape`."""
        first = sum(map(model.size, self.runs[: self.which])) * prod(shape[1:])
        return Plain(raws[self.raw.format(l=layer)], first, shape)


@dataclass(frozen=True, slots=True)
class StoredMxfp4:
    """A matrix in MXFP4: blocks [..., rows, columns/32, 16] and scales [..., rows, columns/32]."""

    blocks: str
    scales: str

    def expected(self, model: ModelConfig, shape: tuple[int, ...]) -> Iterator[Expected]:
        """Raw tensors for a model tensor of `shape`, all experts' together."""
        *lead, columns = shape
        groups, rest = divmod(columns, BLOCK_VALUES)
        if rest:
            raise TensorError(
                f"tensor {self.blocks!r}: rows of {columns} values do not divide into MXFP4 blocks "
                f"of {BLOCK_VALUES}; check config.json"
            )
        yield self.blocks, (DType.U8,), (*lead, groups, BLOCK_NBYTES)
        yield self.scales, (DType.U8,), (*lead, groups)

    def bind(
        self, model: ModelConfig, raws: Raws, layer: int, expert: int, shape: tuple[int, ...]
    ) -> Operand:
        """The operand for one expert's matrix of `shape`."""
        rows, columns = shape
        blocks, scales = (raws[name.format(l=layer)] for name in (self.blocks, self.scales))
        return Packed(blocks, scales, expert * rows, (rows, columns))


Storage: TypeAlias = Stored | StoredTransposed | StoredRows | StoredMxfp4
StoredTable: TypeAlias = Mapping[str, Storage]
"""From each name in `MODEL_TENSORS` to how it is stored."""


def expected(table: StoredTable, model: ModelConfig) -> Iterator[Expected]:
    """The raw tensors that a model's checkpoint has by a table, with `{l}` for each layer; a fused
    one comes once for each tensor in it."""
    for name, letters in MODEL_TENSORS.items():
        if model.has(name):
            shape = model.shape(letters)
            whole = (model.num_experts, *shape) if "{e}" in name else shape
            yield from table[name].expected(model, whole)


def check(table: StoredTable, model: ModelConfig, info: CheckpointInfo) -> None:
    """Hold every raw tensor that the table needs against the headers.

    Raises `TensorError` naming file, tensor, what was found and what was expected. Several
    missing tensors are named at once. Tensors of a layer beyond the model's last are refused,
    others that the table does not name are not its business.
    """
    missing: dict[str, None] = {}
    for template, dtypes, shape in expected(table, model):
        beyond = info.tensors.get(template.format(l=model.num_layers))
        if beyond is not None and "{l}" in template:
            raise TensorError(
                f"{info.place.at(beyond.shard)}: tensor {beyond.name!r} is of a layer that "
                f"config.json, with {model.num_layers} layers, has not; check config.json"
            )
        for layer, _ in model.instances(template):
            raw_name = template.format(l=layer)
            raw = info.tensors.get(raw_name)
            if raw is None:
                missing[raw_name] = None
            else:
                _check_one(raw, dtypes, shape, info)
    if missing:
        raise TensorError(
            f"{info.place}: {counted(len(missing), 'tensor')} missing that config.json calls for: "
            f"{listed([*map(repr, missing)])}; download the checkpoint again"
        )


def _check_one(
    raw: RawTensor, dtypes: tuple[DType, ...], shape: tuple[int, ...], info: CheckpointInfo
) -> None:
    expected = " or ".join(map(str, dtypes))
    if raw.dtype not in dtypes or raw.shape != shape:
        raise TensorError(
            f"{info.place.at(raw.shard)}: tensor {raw.name!r} is {raw.dtype} {list(raw.shape)}; "
            f"config.json calls for {expected} {list(shape)}"
        )


def bind(
    table: StoredTable, model: ModelConfig, raws: Raws, name: str, layer: int, expert: int
) -> Operand:
    """The operand for one model tensor (a name in `MODEL_TENSORS`) of a checked checkpoint; one
    that the model lacks is zero, but tied embeddings serve as `lm_head` too."""
    shape = model.shape(MODEL_TENSORS[name])
    if not model.has(name) and name != "lm_head.weight":
        return Zeros(shape)
    stored = name if model.has(name) else "embed_tokens.weight"
    return table[stored].bind(model, raws, layer, expert, shape)
