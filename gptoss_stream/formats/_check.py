"""How a checkpoint format stores the model's tensors: what the tables in `formats/` are made of.

A table is a tuple of `Row`; each says which stored tensor holds which tensor of the model, in which
order of axes. The same table reads a checkpoint and writes one. For example

    Row("model.layers.{l}.mlp.experts.gate_up_proj", "gate_up", "e m (i t)")

is a stored tensor of each layer with the shape [experts, hidden, 2 * intermediate], in whose last
axis gate and up alternate, and

    Row("blocks.{l}.mlp.experts.{e}.W_in.weight", "gate_up", "i m", {"t": 1})

is the up projection of one expert, [intermediate, hidden].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from .._utils.messages import counted, listed
from ..checkpoint.metadata import CheckpointInfo, RawTensor
from ..errors import TensorError
from ..model.config import ModelConfig
from ..model.tensors import ATTENTION_BIASES
from ..tensors.dtypes import BLOCK_VALUES
from ._table import Row, Table, rows_by_name, tensor_specs

__all__ = ["check_tensors", "names_present", "read_table"]


_MOST_MISSING = 100_000  # that are looked for one by one


def read_table(table: Table, model: ModelConfig, info: CheckpointInfo) -> tuple[Table, ModelConfig]:
    """Decide by stored names alone how a checkpoint is read.

    What is stored counts, whatever the configuration says: a stored output embedding is one of its
    own, and stored attention biases are the model's.

    Returns:
        The table in the spelling of the checkpoint, and the model with what is stored.

    Raises:
        TensorError: If a tensor is stored under two spellings of its name, or if the configuration
            calls for far more tensors than there are.
    """
    count = sum(prod(model.sizes[axis] for axis in row.named) for row in table)
    if count > len(info.tensors) + _MOST_MISSING:
        raise TensorError(
            f"{info.location}: {info.config_name} calls for {counted(count, 'tensor')}, and there are "
            f"{len(info.tensors)}; check {info.config_name}"
        )

    def is_stored(row: Row, name: str) -> bool:
        name = _first_name(row, name)
        return any(
            name.format(l=layer, e=expert) in info.tensors
            for layer, expert in model.instances(name)
        )

    spelled = []
    for row in table:
        found = [name for name in (row.stored, *row.also) if row.also and is_stored(row, name)]
        if len(found) > 1:
            raise TensorError(
                f"{info.location}: tensors are stored as {found[0]!r} and as {found[1]!r}; "
                "remove one of them"
            )
        spelled.append(replace(row, stored=found[0], also=()) if found else row)
    stored = {row.tensor for row in spelled if not row.optional or is_stored(row, row.stored)}
    return tuple(spelled), replace(
        model,
        attention_bias=model.attention_bias or bool(stored & ATTENTION_BIASES),
        tied_embeddings=model.tied_embeddings and "unembed" not in stored,
        unembed_bias="unembed_bias" in stored,
    )


def names_present(table: Table, tensors: Mapping[str, RawTensor]) -> set[str]:
    """Return which of a table's names, of the first layer and expert, tensors have."""
    names = {
        _first_name(row, name).format(l=0, e=0) for row in table for name in (row.stored, *row.also)
    }
    return names & tensors.keys()


def _first_name(row: Row, stored: str) -> str:
    """The name of the first stored tensor of a row."""
    return stored + row.encoding.tensor_specs((BLOCK_VALUES,))[0].suffix


def check_tensors(table: Table, model: ModelConfig, info: CheckpointInfo) -> None:
    """Check every stored tensor that a table needs against the headers.

    Tensors of a layer beyond the model's last are refused; others that the table does not name
    are not looked at.

    Raises:
        TensorError: Naming file, tensor, what was found and what was expected; several missing
            tensors are named at once.
    """
    missing: dict[str, None] = {}
    config = info.config_name
    for rows in rows_by_name(row for row in table if row.is_in(model)).values():
        for stored in tensor_specs(rows, model.sizes):
            beyond = info.tensors.get(stored.name.format(l=model.num_layers, e=0))
            if beyond is not None and "{l}" in stored.name:
                raise TensorError(
                    f"{info.location.display_path(beyond.shard)}: tensor {beyond.name!r} is of a layer that "
                    f"{config}, with {model.num_layers} layers, has not; check {config}"
                )
            for layer, expert in model.instances(stored.name):
                name = stored.name.format(l=layer, e=expert)
                raw = info.tensors.get(name)
                if raw is None:
                    missing[name] = None
                elif raw.dtype not in stored.dtypes or raw.shape != stored.shape:
                    expected = " or ".join(map(str, stored.dtypes))
                    raise TensorError(
                        f"{info.location.display_path(raw.shard)}: tensor {name!r} is {raw.dtype} "
                        f"{list(raw.shape)}; {config} calls for {expected} {list(stored.shape)}"
                    )
    if missing:
        raise TensorError(
            f"{info.location}: {counted(len(missing), 'tensor')} missing that {config} calls for: "
            f"{listed([*map(repr, missing)])}; download the checkpoint again"
        )
