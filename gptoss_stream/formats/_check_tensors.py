"""A table checked against the tensors that a checkpoint stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from .._utils.messages import counted, listed
from ..checkpoint.metadata import CheckpointInfo
from ..errors import TensorError
from ..model.config import ModelConfig
from ..model.tensors import ATTENTION_BIASES
from ..tensors.dtypes import BLOCK_VALUES
from ..tensors.raw_tensor import RawTensor
from ._table import Row, Table, TensorSpec, rows_by_name, tensor_specs

__all__ = ["check_tensors", "names_present", "read_table"]

_MAX_MISSING = 100_000
"""The most missing tensors that are looked for one by one."""


def read_table(table: Table, model: ModelConfig, info: CheckpointInfo) -> tuple[Table, ModelConfig]:
    """Adapt a format's table and a model to the names of the stored tensors.

    What is stored counts, whatever the configuration says. With a stored unembedding the
    embeddings are not tied, and with stored attention biases the model has such biases.

    Returns:
        The table with the names that the checkpoint uses, and the model with the tensors that it
        stores.

    Raises:
        TensorError: If a tensor is stored under two of its names, or if the configuration calls
            for far more tensors than there are.
    """
    _refuse_excess(table, model, info)
    adapted = tuple(_with_stored_name(row, model, info) for row in table)
    stored = {
        row.tensor
        for row in adapted
        if not row.optional or _is_stored(row, row.stored, model, info)
    }
    return adapted, replace(
        model,
        attention_bias=model.attention_bias or bool(stored & ATTENTION_BIASES),
        tied_embeddings=model.tied_embeddings and "unembed" not in stored,
        unembed_bias="unembed_bias" in stored,
    )


def _refuse_excess(table: Table, model: ModelConfig, info: CheckpointInfo) -> None:
    """Refuse a configuration for so many tensors that looking for each would take too long."""
    count = sum(prod(model.sizes[axis] for axis in row.axes_in_name) for row in table)
    if count > len(info.tensors) + _MAX_MISSING:
        raise TensorError(
            f"{info.location}: {info.config_name} calls for {counted(count, 'tensor')}, and there "
            f"are {len(info.tensors)}; check {info.config_name}"
        )


def _with_stored_name(row: Row, model: ModelConfig, info: CheckpointInfo) -> Row:
    """Return a row with the one of its names that the checkpoint uses, and without aliases."""
    if not row.aliases:
        return row
    found = [name for name in (row.stored, *row.aliases) if _is_stored(row, name, model, info)]
    if len(found) > 1:
        raise TensorError(
            f"{info.location}: tensors are stored as {found[0]!r} and as {found[1]!r}; "
            "remove one of them"
        )
    return replace(row, stored=found[0], aliases=()) if found else row


def _is_stored(row: Row, name: str, model: ModelConfig, info: CheckpointInfo) -> bool:
    """Return whether a row is stored under a name for any layer and expert."""
    name = _first_component(row, name)
    return any(
        name.format(l=layer, e=expert) in info.tensors for layer, expert in model.instances(name)
    )


def _first_component(row: Row, name: str) -> str:
    """Return the name of the first component that is stored for a row."""
    return name + row.encoding.components((BLOCK_VALUES,))[0].suffix


def names_present(table: Table, tensors: Mapping[str, RawTensor]) -> set[str]:
    """Return which names of a table, for the first layer and expert, are among the tensors."""
    names = {
        _first_component(row, name).format(l=0, e=0)
        for row in table
        for name in (row.stored, *row.aliases)
    }
    return names & tensors.keys()


def check_tensors(table: Table, model: ModelConfig, info: CheckpointInfo) -> None:
    """Check the dtype and shape of every stored tensor that a table names.

    Tensors that the table does not name are not checked, unless they belong to a layer after the
    model's last.

    Raises:
        TensorError: If a tensor has another dtype or shape, if some are missing, or if there is
            one of a further layer.
    """
    missing: dict[str, None] = {}
    for rows in rows_by_name(row for row in table if row.is_in(model)).values():
        for spec in tensor_specs(rows, model.sizes):
            _refuse_further_layer(spec, model, info)
            for layer, expert in model.instances(spec.name):
                name = spec.name.format(l=layer, e=expert)
                raw = info.tensors.get(name)
                if raw is None:
                    missing[name] = None
                else:
                    _check_tensor(raw, spec, info)
    if missing:
        raise TensorError(
            f"{info.location}: {counted(len(missing), 'tensor')} missing that {info.config_name} "
            f"calls for: {listed([*map(repr, missing)])}; download the checkpoint again"
        )


def _refuse_further_layer(spec: TensorSpec, model: ModelConfig, info: CheckpointInfo) -> None:
    """Refuse a tensor of the layer after the model's last: the configuration must be wrong."""
    raw = info.tensors.get(spec.name.format(l=model.num_layers, e=0))
    if raw is not None and "{l}" in spec.name:
        raise TensorError(
            f"{info.location.display_path(raw.shard)}: tensor {raw.name!r} is of a layer that "
            f"{info.config_name}, with {model.num_layers} layers, does not have; check "
            f"{info.config_name}"
        )


def _check_tensor(raw: RawTensor, spec: TensorSpec, info: CheckpointInfo) -> None:
    """Check the dtype and shape of a stored tensor."""
    if raw.dtype not in spec.dtypes or raw.shape != spec.shape:
        expected = " or ".join(map(str, spec.dtypes))
        raise TensorError(
            f"{info.location.display_path(raw.shard)}: tensor {raw.name!r} is {raw.dtype} "
            f"{list(raw.shape)}; {info.config_name} calls for {expected} {list(spec.shape)}"
        )
