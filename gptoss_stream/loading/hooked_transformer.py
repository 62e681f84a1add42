"""A HookedTransformer of TransformerLens 3.9 whose weights are memory-mapped.

The model is built without memory, on torch's meta device, and its parameters are then replaced with
the tensors of a `StateDict`. Needs the extra `transformer-lens`.

TransformerLens' weight processing is not applied: `fold_value_biases` assumes that a head's
attention sums to 1, which is not so with gpt-oss's attention sinks.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._utils import strict_json
from .._utils.failures import machine_error, missing_package
from .._utils.messages import listed
from ..errors import MissingPackageError, OutputError
from ..model.selection import parse_numbers
from ..storage.open_location import local_path
from .state_dict import StateDict, open_state_dict

if TYPE_CHECKING:
    import torch
    from transformer_lens import HookedTransformer

__all__ = ["load_hooked_transformer"]


_LAYER = re.compile(r"blocks\.(\d+)\.")


def load_hooked_transformer(
    path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    device: str | torch.device = "cpu",
    n_ctx: int | None = None,
    layers: str | None = None,
) -> HookedTransformer:
    """Load a converted output in the format `transformer-lens` as a model with hooks.

    Opens in seconds: on the CPU and in the output's own dtype, weights are read from the disk
    when they are used. Parameters need no gradient. The network is not used.

    Args:
        path: A local output folder. If it contains a tokenizer, the model has it.
        dtype: A torch name such as "float32"; makes copies of the weights.
        device: Any device other than the CPU makes copies of the weights.
        n_ctx: The longest sequence, in tokens; by default the model's own.
        layers: Use only these layers, such as "0-3,7". The model numbers them from 0.

    Raises:
        OutputError: If the folder is not a finished output in this format, or lacks a tensor.
        OptionError: If the dtype is unknown, or the model has no such layers.
        MachineError: If reading fails.
        MissingPackageError: If TransformerLens 3.9 is not installed.
    """
    torch, transformer_lens, config_class = _import_packages()
    folder = local_path(path)
    state_dict = open_state_dict(folder, dtype=dtype, device=device)
    config = _read_config(folder)
    num_layers = int(config["n_layers"])
    chosen = (
        tuple(range(num_layers)) if layers is None else parse_numbers(layers, num_layers, "layer")
    )
    config |= {
        "n_layers": len(chosen),
        "attn_types": [config["attn_types"][layer] for layer in chosen],
        "dtype": getattr(torch, dtype or config["dtype"]),
        "init_weights": False,
        "device": str(device),
    }
    if n_ctx is not None:
        config["n_ctx"] = n_ctx

    def build(config: dict[str, Any], tokenizer: Any = None) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # 4.0 will have no such class
            return transformer_lens.HookedTransformer(
                config_class(**config), tokenizer, move_to_device=False
            )

    with torch.device("meta"):
        model = build(config, _load_tokenizer(folder))
    names = [name for name, _ in model.named_parameters()]
    model.load_state_dict(_parameters(state_dict, names, chosen), strict=False, assign=True)
    _set_buffers(model, build(_small_config(config)), device)
    unset = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if unset:
        raise OutputError(f"{folder}: no values for {listed(unset)}; run verify")
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


def _read_config(folder: Path) -> dict[str, Any]:
    """Read the fields of `HookedTransformerConfig` from an output's tl_config.json."""
    file = folder / "tl_config.json"
    try:
        config = strict_json.loads(file.read_bytes())
        int(config["n_layers"]), list(config["attn_types"]), str(config["dtype"])
    except FileNotFoundError:
        raise OutputError(
            f"{file}: missing; a HookedTransformer needs an output in the format transformer-lens"
        ) from None
    except OSError as error:
        raise machine_error(error, f"reading {file}") from error
    except (ValueError, TypeError, KeyError):
        raise OutputError(f"{file}: damaged; convert again, or run verify") from None
    return dict(config)


def _load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of an output; None if it has none."""
    if not (folder / "tokenizer.json").is_file():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


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
