"""What a pair of formats cannot convert, found before any data is moved."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

from .. import formats
from .._utils.messages import listed
from ..adapters import Merge
from ..checkpoint.metadata import CheckpointInfo
from ..checkpoint.zero_check import is_zero
from ..errors import OptionError, TensorError
from ..formats import SourceModel, Table, mxfp4_tensors, table_specs
from ..formats._table import stored_shape
from ..model.config import ModelConfig
from ..model.pruning import ResolvedPruning
from ..model.selection import GROUPS, ResolvedSelection
from ..model.tensors import ABSENT_IS_ZERO
from ..tensors.dtypes import BLOCK_VALUES, KEEP, DType, torch_name
from ..tensors.mxfp4_rules import DEFAULT_RULE
from ..tensors.raw_tensor import RawTensor
from ..transforms.output_tensor import OutputTensor
from .options import ConversionOptions
from .quantization import Quantization, refuse_reference

__all__ = [
    "choose_dtype",
    "choose_quantization",
    "pruned_tensors",
    "refuse_cut_stacks",
    "refuse_unmappable",
    "replaced_tensors",
    "smaller_model_notes",
    "unmapped_tensors",
]

_HARMLESS = re.compile(
    r"rotary_emb\.|rotary_(sin|cos)$|(^|[._])inv_freq$"  # follow from the configuration
    r"|(^|[._])([kvq]|kv|kv_cache|prob)_scale$|[kv]_(cache|bmm)_quantizer\._amax$"
    r"|input_(scale|quantizer\._amax)$|output_scale$"  # activations and KV cache, when served
)
"""Names of tensors that do not change the weights."""
_SIGNIFICANT = re.compile(
    r"scales?(_\w*)?$|zeros?$|_blocks$|\.blocks$|lora_|absmax|quant|qweight|g_idx|weight_packed"
    r"|experts|attn|attention|router"
)
"""Parts of names without which the other tensors cannot have been read rightly."""


def choose_dtype(dtype: str | None, source_format: str, to: str) -> str:
    """Return the dtype to write, a torch name or "keep".

    Args:
        dtype: The dtype that was asked for, or None for the default.
        source_format: The format that is read.
        to: The format that is written.

    Raises:
        OptionError: If the format cannot be written in the dtype.
    """
    bfloat16, has_mxfp4 = torch_name(DType.BF16), bool(mxfp4_tensors(formats.load(to).TABLE))
    if dtype is None:
        if to == source_format:
            return KEEP
        return bfloat16 if has_mxfp4 else formats.default_dtype(formats.load(source_format))
    if has_mxfp4 and dtype not in (KEEP, bfloat16):
        raise OptionError(
            f"dtype {dtype!r}: {to} has its experts in MXFP4 and all else in bfloat16; choose "
            "bfloat16 or keep"
        )
    return dtype


def choose_quantization(
    options: ConversionOptions,
    source: SourceModel,
    reference: SourceModel | None,
    target: Table,
    merge: Merge | None,
) -> Quantization | None:
    """Return how floats become MXFP4; None if none do.

    Args:
        options: The options of the conversion.
        source: The source.
        reference: The checkpoint that `--reference` names, if any.
        target: The table of the format that is written.
        merge: The adapters to be merged, if any.

    Raises:
        OptionError: If there is nothing to encode, and an option says how.
    """
    packed = mxfp4_tensors(target)
    merged = {tensor for tensor in packed if merge is not None and merge.touches(tensor)}
    if merged or packed - mxfp4_tensors(source.table):
        _refuse_widths(options.to, target, source.model)
        if reference is not None:
            refuse_reference(reference, source.model)
        return Quantization(options.mxfp4_rule or DEFAULT_RULE, reference)
    for option, value in (("--mxfp4-rule", options.mxfp4_rule), ("--reference", reference)):
        if value is not None:
            reason = (
                "the source's experts are in MXFP4 already, and are copied byte for byte"
                if packed
                else f"{options.to} holds no MXFP4"
            )
            raise OptionError(f"{option} is for floats that become MXFP4: {reason}; remove it")
    return None


def _refuse_widths(to: str, target: Table, model: ModelConfig) -> None:
    """Refuse sizes that do not divide into the blocks of a format."""
    for row in target:
        width = stored_shape(row, model.sizes)[-1]
        if row.tensor in mxfp4_tensors(target) and width % BLOCK_VALUES:
            raise OptionError(
                f"format {to} has MXFP4 blocks of {BLOCK_VALUES} values, into which rows of "
                f"{width} values do not divide; choose another format"
            )


def refuse_unmappable(
    source: SourceModel, target: Table, info: CheckpointInfo, to: str
) -> set[str]:
    """Refuse to leave out a tensor, unless it is a bias that may be absent and is zero.

    Returns:
        The names of the raw tensors that are left out.

    Raises:
        TensorError: If the target has no row for a tensor that counts.
    """
    kept = {row.tensor for row in target}
    names: set[str] = set()
    for row in source.table:
        if row.tensor in kept or not row.is_in(source.model):
            continue
        for layer, expert in source.model.instances(row.stored):
            raw = info.tensors[row.stored.format(l=layer, e=expert)]
            if row.tensor not in ABSENT_IS_ZERO or not is_zero(info, raw):
                reason = "is not zero, and" if row.tensor in ABSENT_IS_ZERO else "is one that"
                raise TensorError(
                    f"{info.location.display_path(raw.shard)}: tensor {raw.name!r} {reason} the "
                    f"format {to} cannot hold: the output would compute something else"
                )
            names.add(raw.name)
    return names


def pruned_tensors(source: SourceModel, pruning: ResolvedPruning) -> set[str]:
    """Return the stored names of tensors of layers and experts that are not kept."""
    names = set()
    for spec in table_specs(source.table, source.model):
        axes = spec.rows[0].axes_in_name
        for layer, expert in source.model.instances(spec.name) if "l" in axes else ():
            if not pruning.keeps(layer, expert if "e" in axes else None):
                names.add(source.info.tensors[spec.name.format(l=layer, e=expert)].name)
    return names


def replaced_tensors(source: SourceModel, merge: Merge) -> set[str]:
    """Return the stored names of tensors that an adapter stores instead."""
    replaced = {(place.tensor, place.layer) for place in merge.replaced()}
    names = set()
    for spec in table_specs(source.table, source.model):
        of_layer = "l" in spec.rows[0].axes_in_name
        for layer, expert in source.model.instances(spec.name):
            number = layer if of_layer else None
            if all((row.tensor, number) in replaced for row in spec.rows):
                names.add(source.info.tensors[spec.name.format(l=layer, e=expert)].name)
    return names


def unmapped_tensors(
    source: SourceModel, used: Collection[str], left_out: Collection[str]
) -> tuple[str, ...]:
    """Return the stored tensors that no output tensor reads, if they change nothing.

    Args:
        source: The source.
        used: The stored names of tensors that are read.
        left_out: Those that the output cannot hold and need not.

    Raises:
        TensorError: If a tensor is within the model or belongs to a quantization or an adapter:
            then the model was not understood.
    """
    layers = range(source.model.num_layers)
    ignored = {name.format(l=layer) for name in formats.ignored(source.format) for layer in layers}
    roots = {row.stored.partition(".")[0] for row in source.table}
    stored = {**source.info.tensors, **{raw.name: raw for raw in source.info.tensors.values()}}
    unmapped = []
    for name, raw in source.info.tensors.items():
        if raw.name in used or raw.name in left_out or name in ignored:
            continue
        _refuse_copy(source, name, stored)
        is_within = name.partition(".")[0] in roots
        if not _HARMLESS.search(name) and (is_within or _SIGNIFICANT.search(name)):
            raise TensorError(
                f"{source.info.location.display_path(raw.shard)}: tensor {raw.name!r} has no place "
                f"in the format {source.name}: without it the output would be another model; check "
                "whether the checkpoint is in another format, quantized, or with an adapter"
            )
        unmapped.append(raw.name)
    return tuple(sorted([*unmapped, *source.outside]))


def _refuse_copy(source: SourceModel, name: str, stored: Mapping[str, RawTensor]) -> None:
    """Refuse a tensor whose name is that of another with something before it.

    Args:
        source: The source.
        name: The tensor's name.
        stored: All tensors, both by their names in the format and by those that are stored.
    """
    raw = source.info.tensors[name]
    for parts in (name.split("."), raw.name.split(".")):
        ends = (".".join(parts[number:]) for number in range(1, len(parts)))
        one = next((stored[end] for end in ends if end in stored), raw)
        if one is not raw:
            raise TensorError(
                f"{source.info.location}: tensor {raw.name!r} is the same as {one.name!r} but for "
                "what is before its name; remove the one that does not count"
            )


def refuse_cut_stacks(
    tensors: Iterable[OutputTensor], selection: ResolvedSelection, to: str
) -> None:
    """Refuse to select experts of a tensor that stacks them: they would lose their numbers.

    Raises:
        OptionError: Naming such a tensor.
    """
    if selection.experts is None:
        return
    for tensor in tensors:
        name, _, expert = tensor.origin
        if (
            name in GROUPS["experts"]
            and expert is None
            and selection.matches(tensor.name, *tensor.origin)
        ):
            raise OptionError(
                f"format {to} stacks the experts in one tensor ({tensor.name}), in which "
                "some would lose their numbers; take all experts, or another format"
            )


def smaller_model_notes(source: SourceModel, model: ModelConfig) -> Iterator[str]:
    """Yield what users should know about a smaller model; nothing about the whole one."""
    if model.experts_per_token < source.model.experts_per_token:
        yield (
            f"each token went to {source.model.experts_per_token} experts and goes to "
            f"{model.experts_per_token}, as many as are kept"
        )
    stale = [] if model is source.model else formats.stale_entries(source.info.config, model)
    if stale:
        yield (
            f"the configuration is written without {listed(stale)}, which may be about single "
            "layers or experts of the source"
        )
