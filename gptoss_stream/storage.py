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
from .dtypes import DType
from .errors import TensorError
from .model import MODEL_TENSORS, ModelConfig
from .operands import Operand, Packed, Plain

__all__ = ["FLOATS", "Storage", "Stored", "StoredMxfp4", "StoredTable", "bind", "check"]

FLOATS = (DType.BF16, DType.F16, DType.F32)
_BLOCK_VALUES = 32
_BLOCK_NBYTES = 16

Expected: TypeAlias = tuple[str, tuple[DType, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Stored:
    """Floats under one raw name; experts, where there is `{e}`, along its first axis."""

    raw: str
    dtypes: tuple[DType, ...] = FLOATS

    def expected(self, shape: tuple[int, ...]) -> Iterator[Expected]:
        """Raw tensors for a model tensor of `shape`, all experts' together."""
        yield self.raw, self.dtypes, shape

    def bind(
        self, raws: Mapping[str, RawTensor], layer: int, expert: int, shape: tuple[int, ...]
    ) -> Operand:
        """The operand for one expert's matrix of `shape`, or the whole tensor."""
        return Plain(raws[self.raw.format(l=layer)], expert * prod(shape), shape)


@dataclass(frozen=True, slots=True)
class StoredMxfp4:
    """A matrix in MXFP4: blocks [..., rows, columns/32, 16] and scales [..., rows, columns/32]."""

    blocks: str
    scales: str

    def expected(self, shape: tuple[int, ...]) -> Iterator[Expected]:
        """Raw tensors for a model tensor of `shape`, all experts' together."""
        *lead, columns = shape
        groups, rest = divmod(columns, _BLOCK_VALUES)
        if rest:
            raise TensorError(
                f"tensor {self.blocks!r}: rows of {columns} values do not divide into MXFP4 blocks "
                f"of {_BLOCK_VALUES}; check config.json"
            )
        yield self.blocks, (DType.U8,), (*lead, groups, _BLOCK_NBYTES)
        yield self.scales, (DType.U8,), (*lead, groups)

    def bind(
        self, raws: Mapping[str, RawTensor], layer: int, expert: int, shape: tuple[int, ...]
    ) -> Operand:
        """The operand for one expert's matrix of `shape`."""
        rows, columns = shape
        blocks, scales = (raws[name.format(l=layer)] for name in (self.blocks, self.scales))
        return Packed(blocks, scales, expert * rows, (rows, columns))


Storage: TypeAlias = Stored | StoredMxfp4
StoredTable: TypeAlias = Mapping[str, Storage]
"""From each name in `MODEL_TENSORS` to how it is stored."""


def _present(model: ModelConfig, table: StoredTable) -> Iterator[tuple[str, Storage]]:
    for name in MODEL_TENSORS:
        if model.has(name) and not (model.tied_embeddings and name == "lm_head.weight"):
            yield name, table[name]


def check(table: StoredTable, model: ModelConfig, info: CheckpointInfo) -> None:
    """Hold every raw tensor that the table needs against the headers.

    Raises `TensorError` naming file, tensor, what was found and what was expected. Several
    missing tensors are named at once. Tensors of a layer beyond the model's last are refused,
    others that the table does not name are not its business.
    """
    missing: list[str] = []
    for name, storage in _present(model, table):
        shape = model.shape(MODEL_TENSORS[name])
        whole = (model.num_experts, *shape) if "{e}" in name else shape
        for template, dtypes, raw_shape in storage.expected(whole):
            beyond = info.tensors.get(template.format(l=model.num_layers))
            if beyond is not None and "{l}" in template:
                raise TensorError(
                    f"{info.path / beyond.shard}: tensor {beyond.name!r} is of a layer that "
                    f"config.json, with {model.num_layers} layers, has not; check config.json"
                )
            for layer, _ in model.instances(template):
                raw_name = template.format(l=layer)
                raw = info.tensors.get(raw_name)
                if raw is None:
                    missing.append(raw_name)
                else:
                    _check_one(raw, dtypes, raw_shape, info)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise TensorError(
            f"{info.path}: {len(missing)} tensors that config.json calls for are missing: "
            f"{', '.join(map(repr, missing[:3]))}{more}; download the checkpoint again"
        )


def _check_one(
    raw: RawTensor, dtypes: tuple[DType, ...], shape: tuple[int, ...], info: CheckpointInfo
) -> None:
    expected = " or ".join(map(str, dtypes))
    if raw.dtype not in dtypes or raw.shape != shape:
        raise TensorError(
            f"{info.path / raw.shard}: tensor {raw.name!r} is {raw.dtype} {list(raw.shape)}; "
            f"config.json calls for {expected} {list(shape)}"
        )


def bind(
    table: StoredTable,
    model: ModelConfig,
    info: CheckpointInfo,
    name: str,
    layer: int,
    expert: int,
) -> Operand:
    """The operand for one model tensor (a name in `MODEL_TENSORS`) of a checked checkpoint."""
    shape = model.shape(MODEL_TENSORS[name])
    stored = "embed_tokens.weight" if model.tied_embeddings and name == "lm_head.weight" else name
    return table[stored].bind(info.tensors, layer, expert, shape)
