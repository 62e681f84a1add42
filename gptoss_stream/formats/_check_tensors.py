"""A table checked against the tensors that a checkpoint stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import NamedTuple

from .._utils.messages import counted
from ..checkpoint.metadata import CheckpointInfo
from ..errors import TensorError
from ..model.config import ModelConfig
from ..model.tensors import ATTENTION_BIASES
from ..tensors.dtypes import BLOCK_VALUES
from ..tensors.raw_tensor import RawTensor
from ._missing import refuse_missing
from ._table import Row, Table, TensorSpec, stored_shape, table_specs

__all__ = ["AdaptedTable", "check_tensors", "names_present", "read_table"]

_MAX_MISSING = 100_000
"""The most missing tensors that are looked for one by one."""


class AdaptedTable(NamedTuple):
    """A format's table and a model, as a checkpoint stores them."""

    table: Table
    """The table with the names and the orders of axes that the checkpoint uses."""
    model: ModelConfig
    """The model with the tensors that the checkpoint stores."""
    notes: tuple[str, ...]
    """What users should know about how the tensors are read."""
    doubt: str = ""
    """Why it is not certain in which order the values are stored; empty if it is."""


def read_table(table: Table, model: ModelConfig, info: CheckpointInfo) -> AdaptedTable:
    """Adapt a format's table and a model to the stored tensors.

    What is stored counts, whatever the configuration says. With a stored unembedding the
    embeddings are not tied, and with stored attention biases the model has such biases.

    Raises:
        TensorError: If a tensor is stored under two of its names, or if the configuration calls
            for far more tensors than there are.
    """
    _refuse_excess(table, model, info)
    named = tuple(_with_stored_name(row, model, info) for row in table)
    adapted, notes, doubt = _with_stored_axes(named, model, info)
    stored = {
        row.tensor
        for row in adapted
        if not row.optional or _is_stored(row, row.stored, model, info)
    }
    if not model.attention_bias and stored & ATTENTION_BIASES:
        notes += (
            f"{info.config_name} has attention_bias false, and biases are stored: they count, and "
            "the output has attention_bias true",
        )
    model = replace(
        model,
        attention_bias=model.attention_bias or bool(stored & ATTENTION_BIASES),
        tied_embeddings=model.tied_embeddings and "unembed" not in stored,
        unembed_bias="unembed_bias" in stored,
    )
    return AdaptedTable(adapted, model, notes, doubt)


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


def _with_stored_axes(
    table: Table, model: ModelConfig, info: CheckpointInfo
) -> tuple[Table, tuple[str, ...], str]:
    """Return the table with the orders of axes that the shapes show, with notes and a doubt.

    A square matrix shows nothing. It is then taken to be stored as the others are: a program that
    transposes the experts' matrices does it with all of them.
    """
    other = {row: _has_other_axes(row, model, info) for row in table if row.other_axes}
    if True not in other.values():
        return table, (), ""
    turned = [row.stored for row in other if other[row]]
    first = next(iter(other))
    doubt = ""
    if other[first] is None:
        doubt = (
            f"{info.location}: {_short(turned[0])} is transposed, and {_short(first.stored)} is "
            "square, so that nothing shows whether it is; compare it with inspect --against, and "
            "save it again"
        )
    if other[first]:
        turned += [row.stored for row in other if other[row] is None]
    adapted = [
        replace(row, axes=row.other_axes, other_axes="") if row.stored in turned else row
        for row in table
    ]
    names = " and ".join(map(_short, turned))
    return tuple(adapted), (f"{names} are stored transposed, and read so",), doubt


def _short(name: str) -> str:
    """Return the last part of a stored name."""
    return name.rpartition(".")[2]


def _has_other_axes(row: Row, model: ModelConfig, info: CheckpointInfo) -> bool | None:
    """Return whether a row is stored in its other order of axes; None if its shape does not tell.

    Raises:
        TensorError: If layers or experts differ in it.
    """
    expected = stored_shape(row, model.sizes)
    other = stored_shape(replace(row, axes=row.other_axes), model.sizes)
    if expected == other:
        return None
    names = (row.stored.format(l=layer, e=expert) for layer, expert in model.instances(row.stored))
    raws = [info.tensors[name] for name in names if name in info.tensors]
    by_shape = {raw.shape: raw.name for raw in raws}
    if {expected, other} <= by_shape.keys():
        raise TensorError(
            f"{info.location}: tensor {by_shape[other]!r} is transposed, {list(other)}, and "
            f"{by_shape[expected]!r} is not; correct the program that saved them"
        )
    return other in by_shape


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
    missing: dict[str, tuple[int, ...]] = {}
    for spec in table_specs(table, model):
        _refuse_further_layer(spec, model, info)
        for _, name in spec.names(model):
            raw = info.tensors.get(name)
            if raw is None:
                missing[name] = spec.shape
            else:
                _check_tensor(raw, spec, info)
    refuse_missing(missing, table, model, info)


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
    if raw.dtype in spec.dtypes and raw.shape == spec.shape:
        return
    expected = " or ".join(map(str, spec.dtypes))
    message = (
        f"{info.location.display_path(raw.shard)}: tensor {raw.name!r} is {raw.dtype} "
        f"{list(raw.shape)}; {info.config_name} calls for {expected} {list(spec.shape)}"
    )
    is_stack = spec.rows[0].order[:1] == ("e",)
    if is_stack and raw.dtype in spec.dtypes and raw.shape[1:] == spec.shape[1:]:
        message += "; a model whose layers have different numbers of experts cannot be converted"
    raise TensorError(message)
