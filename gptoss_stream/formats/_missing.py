"""Refuses checkpoints that lack tensors, with the likely reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count, groupby

from .._utils.messages import counted, listed
from ..checkpoint.metadata import CheckpointInfo
from ..checkpoint.small_files import RECORD_NAME, read_config
from ..errors import TensorError
from ..model.config import ModelConfig
from ..tensors.safetensors_header import INDEX_NAME, SINGLE_NAME
from ._registry import load, names
from ._table import Table, table_specs
from ._unknown import describe_other_names

__all__ = ["is_partial_output", "refuse_missing"]


def refuse_missing(
    missing: Mapping[str, tuple[int, ...]], table: Table, model: ModelConfig, info: CheckpointInfo
) -> None:
    """Refuse a checkpoint that lacks tensors.

    Args:
        missing: The shapes of the missing tensors by name; without any, nothing is refused.
        table: The table of the format.
        model: The model.
        info: The checkpoint.

    Raises:
        TensorError: If there are names. It says which layers are missing if whole ones are, and
            which other names there are that the missing tensors may have.
    """
    if not missing:
        return
    lacking = missing.keys()
    of_layers = _names_by_layer(table, model)
    whole = [n for n, needed in enumerate(of_layers) if needed and needed <= lacking]
    is_partial = is_partial_output(info)
    if len(whole) == model.num_layers and not is_partial:
        tables: Mapping[str, Table] = {name: load(name).TABLE for name in names()}
        raise TensorError(f"{info.location}: {describe_other_names(info, tables)}")
    others = set(lacking).difference(*(of_layers[layer] for layer in whole))
    parts = []
    if whole:
        parts.append(f"{'layer' if len(whole) == 1 else 'layers'} {_ranges(whole)}")
    if others:
        parts.append(counted(len(others), "tensor"))
    shown = listed([repr(name) for name in missing if name in others])
    known = {row.stored for row in table if "{l}" not in row.stored}.union(*of_layers)
    shapes = {*missing.values()}
    instead = [
        raw.name for n, raw in info.tensors.items() if n not in known and raw.shape in shapes
    ]
    advice = _advice(others, info, is_partial=is_partial)
    if instead:
        advice = (
            f"; they may be there under other names: {listed([*map(repr, instead)])}; save the "
            "model again with all names alike"
        )
    raise TensorError(
        f"{info.location}: {' and '.join(parts)} missing that {info.config_name} calls for"
        f"{': ' if others else ''}{shown}{advice}"
    )


def is_partial_output(info: CheckpointInfo) -> bool:
    """Return whether a checkpoint is an output of this package with some of the tensors only."""
    if not info.location.has(RECORD_NAME):
        return False
    return read_config(info.location, RECORD_NAME).get("partial") is True


def _names_by_layer(table: Table, model: ModelConfig) -> list[set[str]]:
    """Return the names of all tensors of each layer."""
    found: list[set[str]] = [set() for _ in range(model.num_layers)]
    for spec in table_specs((row for row in table if "{l}" in row.stored), model):
        for layer, name in spec.names(model):
            found[layer].add(name)
    return found


def _ranges(numbers: Sequence[int]) -> str:
    """Return numbers as text, such as "3, 19 to 23"."""
    counter = count()
    runs = [[*run] for _, run in groupby(numbers, lambda number: number - next(counter))]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


def _advice(missing: set[str], info: CheckpointInfo, *, is_partial: bool) -> str:
    """Return what to do. Only an incomplete download is mended by another one."""
    if is_partial:
        return "; this is a part of a model, converted with a selection: convert the whole model"
    if missing == {"lm_head.weight"} and "score.weight" in info.tensors:
        return "; the model is a classifier (score.weight) and has no unembedding to convert"
    if missing == {"lm_head.weight"}:
        return "; if the unembedding is the embedding, set tie_word_embeddings to true there"
    has_index = info.location.has(INDEX_NAME)
    if len(info.shards) > 1 and not has_index:
        return "; if a shard is missing, download it"
    if has_index and [shard.name for shard in info.shards] == [SINGLE_NAME]:
        return (
            f"; {SINGLE_NAME} was read, as by transformers, and {INDEX_NAME} beside it was not: "
            "remove the one that is out of date"
        )
    return (
        "; the files are complete, so they were saved without: save the model again, or check "
        f"{info.config_name}"
    )
