"""A HookedTransformer of TransformerLens 3.9 whose weights stay in the checkpoint.

The model is built without memory, on torch's meta device. Its parameters are then replaced with
mapped tensors, and its experts, where they have to be decoded, with modules that do so when they
are used. Needs the extra `transformer-lens`.

TransformerLens' weight processing is not applied: `fold_value_biases` assumes that a head's
attention sums to 1, which is not so with gpt-oss's attention sinks.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from math import prod
from typing import TYPE_CHECKING, Any

from .._utils.arguments import whole_number
from .._utils.failures import missing_package
from .._utils.messages import listed
from ..adapters import AdapterLike, as_adapters
from ..checkpoint.small_files import read_config
from ..errors import MissingPackageError, OutputError
from ..formats import transformer_lens
from ..loading.state_dict import StateDict, open_state_dict
from ..model.numbers import NumbersLike, parse_numbers
from ..model.pruning import Pruning
from ..planning.options import ConversionOptions
from ..storage.location import Location, LocationLike
from ..storage.open_location import open_location
from ..tensors.dtypes import KEEP, DTypeLike, dtype_name
from .checkpoint_model import open_checkpoint_model
from .one_dtype import one_dtype
from .tokenizer import load_tokenizer

if TYPE_CHECKING:
    import torch
    from transformer_lens import HookedTransformer

    from .expert_weights import ExpertWeights

__all__ = ["load_hooked_transformer"]


_CONFIG_NAME = "tl_config.json"
_BUFFERS = {name.rpartition(".")[2] for name in transformer_lens.IGNORED}
_LAYER = re.compile(r"blocks\.(\d+)\.")


def load_hooked_transformer(
    source: LocationLike,
    *,
    dtype: DTypeLike | None = None,
    device: str | torch.device = "cpu",
    n_ctx: int | None = None,
    layers: NumbersLike | None = None,
    source_format: str | None = None,
    adapters: AdapterLike | Sequence[AdapterLike] | None = (),
    expert_cache: int | str = 0,
    cache: int | str = 0,
) -> HookedTransformer:
    """Load a checkpoint in any format as a model with hooks, without converting it.

    Opens in seconds. On the CPU, weights that are stored as the model needs them are mapped: they
    are read from the disk when they are used. Experts that are stored otherwise, such as those in
    MXFP4, are decoded when the router picks them, once for all tokens of a pass;
    `model.blocks[3].mlp.experts[5].W_in.weight` decodes one matrix. Parameters need no gradient;
    gradients with respect to activations work, but not gradients of gradients. Saving the model and
    processing its weights is refused if its experts are decoded: use `convert`. See
    `load_hf_model` for files that change.

    Args:
        source: A local folder, a repository of the Hub, or a URL (see `open_location`). If it
            contains a tokenizer, the model has it.
        dtype: Such as "float32" or torch.float32 (see `DTypeLike`); by default as for `convert`.
            All tensors have one: that of most elements, if the checkpoint stores several. Makes
            copies of the weights that are stored in another dtype.
        device: Any device other than the CPU makes copies of the dense weights, and experts are
            copied there when they are used.
        n_ctx: The longest sequence, in tokens; by default the model's own.
        layers: Use only these layers, such as "0-3,7", 5 or range(4). The model
            numbers them from 0.
        source_format: The format of the source; by default it is detected.
        adapters: LoRA adapters to merge, in order: locations, or `Adapter` objects.
        expert_cache: Memory for decoded experts that are kept for later passes, in bytes or as a
            text such as "2GB"; those used longest ago go first. By default none are kept.
        cache: Disk space for what is read of a remote source, in bytes or as a text (see
            `open_state_dict`). By default nothing is kept on the disk.

    Returns:
        The model, in evaluation mode, with its tokenizer if the source has one.

    Raises:
        CheckpointError: If the source cannot be used.
        OutputError: If it is a part of a model, and lacks a tensor.
        OptionError: If an argument cannot be used.
        MachineError: If reading fails.
        MissingPackageError: If TransformerLens 3.9 is not installed.
    """
    torch, library, config_class = _import_packages()
    location = open_location(source)
    merged = as_adapters(adapters)
    length = None if n_ctx is None else whole_number(n_ctx, "n_ctx", 1)
    experts: ExpertWeights | None = None
    if location.has(_CONFIG_NAME) and not merged:
        state_dict, stored_dtype = _open_stored(location, dtype_name(dtype), device, cache)
        config, chosen = _stored_config(location, layers)
        config["dtype"] = stored_dtype
    else:
        options = ConversionOptions(
            "transformer-lens", source_format, dtype, pruning=Pruning.of(layers, None),
            adapters=merged,
        )  # fmt: skip
        opened = open_checkpoint_model(location, options, device, expert_cache, cache)
        state_dict, experts = opened.tensors, opened.experts
        config = opened.config(_CONFIG_NAME)
        chosen = tuple(range(int(config["n_layers"])))
    config |= {
        "dtype": getattr(torch, config["dtype"]),
        "init_weights": False,
        "device": str(device),
        "n_ctx": length or config["n_ctx"],
    }

    def build(config: dict[str, Any], tokenizer: Any = None) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # 4.0 will have no such class
            return library.HookedTransformer(
                config_class(**config), tokenizer, move_to_device=False
            )

    with torch.device("meta"):
        model = build(config, load_tokenizer(location))
    if experts is not None:
        from .hooked_experts import replace_experts

        replace_experts(model, experts)
    names = [name for name, _ in model.named_parameters()]
    model.load_state_dict(_parameters(state_dict, names, chosen), strict=False, assign=True)
    _set_buffers(model, build(_small_config(config)), device)
    values = [*model.named_parameters(), *model.named_buffers()]
    unset = [name for name, tensor in values if tensor.is_meta]
    if unset:
        raise OutputError(f"{location}: no values for {listed(unset)}; run verify")
    return model.requires_grad_(False).eval()


def _import_packages() -> tuple[Any, Any, Any]:
    """Import torch, transformer_lens and the class `HookedTransformerConfig`.

    Raises:
        MissingPackageError: If one is not installed, or has the wrong version.
    """
    try:
        import torch
    except ImportError as error:
        raise missing_package(error, "transformer-lens") from None
    try:
        found = version("transformer-lens")
    except PackageNotFoundError:
        raise missing_package(None, "transformer-lens") from None
    advice = "pip install 'gptoss_stream[transformer-lens]'"
    if int(found.split(".")[0]) > 3:
        raise MissingPackageError(
            f"transformer-lens {found} has no HookedTransformer: {advice}, or convert to the "
            "format hf and use its TransformerBridge"
        )
    import transformer_lens
    from transformer_lens.config import hooked_transformer_config

    config_class = hooked_transformer_config.HookedTransformerConfig
    if "use_attention_sinks" not in {field.name for field in fields(config_class)}:
        raise MissingPackageError(
            f"transformer-lens {found} does not support attention sinks, and its logits would be "
            f"wrong: {advice}"
        )
    return torch, transformer_lens, config_class


def _open_stored(
    location: Location, dtype: str | None, device: str | torch.device, cache: int | str
) -> tuple[StateDict, str]:
    """Open an output in the format `transformer-lens`, as tensors of one dtype.

    Returns:
        The tensors, and their dtype, a torch name: the configuration may name another one.
    """
    cast = None if dtype == KEEP else dtype
    state_dict = open_state_dict(location, dtype=cast, device=device, cache=cache)
    if cast is None:
        names = [name for name in state_dict if name.rpartition(".")[2] not in _BUFFERS]
        dtypes = {name: state_dict.dtype(name) for name in names}
        floats = [
            (str(dtypes[name]).removeprefix("torch."), prod(state_dict.shape(name)))
            for name in names
            if dtypes[name].is_floating_point
        ]
        cast, is_one_of_several = one_dtype(location, floats, dtype)
        if is_one_of_several:
            state_dict.close()
            state_dict = open_state_dict(location, dtype=cast, device=device, cache=cache)
    return state_dict, cast


def _stored_config(
    location: Location, layers: NumbersLike | None
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Read the configuration of an output in the format `transformer-lens`.

    Args:
        location: The output.
        layers: The layers to use; None for all.

    Returns:
        The fields of `HookedTransformerConfig` for the layers, and the layers' numbers.
    """
    config = dict(read_config(location, _CONFIG_NAME))
    try:
        num_layers, kinds, _ = int(config["n_layers"]), [*config["attn_types"]], config["dtype"]
        every = tuple(range(num_layers))
        chosen = every if layers is None else parse_numbers(layers, num_layers, "layer")
        config |= {"n_layers": len(chosen), "attn_types": [kinds[layer] for layer in chosen]}
    except (ValueError, TypeError, KeyError, IndexError):
        raise OutputError(
            f"{location.display_path(_CONFIG_NAME)}: damaged; convert again, or run verify"
        ) from None
    return config, chosen


def _parameters(
    state_dict: StateDict, names: Iterable[str], layers: tuple[int, ...]
) -> Mapping[str, torch.Tensor]:
    """Return the parameters of a model whose layer k is layer `layers[k]` of the output.

    Raises:
        OutputError: If the output lacks one.
    """
    stored_names = {
        name: _LAYER.sub(lambda match: f"blocks.{layers[int(match[1])]}.", name, count=1)
        for name in names
    }
    missing = [name for name in stored_names.values() if name not in state_dict]
    if missing:
        present = sorted({int(match[1]) for name in state_dict if (match := _LAYER.match(name))})
        raise OutputError(
            f"{state_dict.location}: it lacks {len(missing)} tensors of the model, such as "
            f"{missing[0]!r}; it contains tensors of the layers "
            f"{', '.join(map(str, present)) or 'none'}: choose complete layers with layers=, or "
            "convert what is missing"
        )
    return {name: state_dict[stored] for name, stored in stored_names.items()}


def _small_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with tiny parameters and the same buffers.

    Buffers (rotary tables, masks) are computed from the context length and the size of a head.
    """
    sizes = dict.fromkeys(("d_model", "d_mlp", "d_vocab", "d_vocab_out"), 8)
    counts = dict.fromkeys(("n_heads", "n_key_value_heads", "num_experts", "experts_per_token"), 1)
    return {**config, **sizes, **counts}


def _set_buffers(model: Any, other: Any, device: str | torch.device) -> None:
    """Copy the buffers of another model, which has them all, to a model."""
    for name, buffer in other.named_buffers():
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, buffer.to(device))
