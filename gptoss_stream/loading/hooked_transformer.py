"""A HookedTransformer whose weights stay on the disk: built without memory, given mapped tensors.

For transformer-lens 3.9 (extra `transformer-lens`). No weight processing is applied:
`fold_value_biases` relies on a head's attention adding up to one, which gpt-oss's sinks break.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._utils import strict_json
from .._utils.failures import machine_error, missing_package
from .._utils.messages import listed
from ..errors import MissingPackageError, OutputError
from ..model.selection import parse_numbers
from .state_dict import StateDict, open_state_dict

if TYPE_CHECKING:
    import torch
    from transformer_lens import HookedTransformer

__all__ = ["load_hooked_transformer"]


_BLOCK = re.compile(r"blocks\.(\d+)\.")


def load_hooked_transformer(
    path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    device: str | torch.device = "cpu",
    n_ctx: int | None = None,
    layers: str | None = None,
) -> HookedTransformer:
    """The model in a folder of the format `transformer-lens`, ready for hooks and `generate`.

    Opens in seconds whatever the size: on the CPU and in the folder's own dtype, a weight comes
    from the disk when it is used. `dtype` (a torch name) and `device` make copies; `n_ctx` is the
    longest sequence (by default the model's own); `layers`, such as "0-3,7", makes a model of
    these layers only, numbered anew from 0. Weights need no gradient. The tokenizer is the
    folder's, where it has one; nothing is asked of the network.

    Raises `OutputError` for a folder of another format or which lacks a tensor, `OptionError` for
    layers that are not there and a dtype that is none, `MachineError` where reading fails,
    `MissingPackageError` without TransformerLens 3.9.
    """
    torch, lens, config_class = _packages()
    state = open_state_dict(path, dtype=dtype, device=device)
    settings = _settings(state.path)
    whole = int(settings["n_layers"])
    chosen = tuple(range(whole)) if layers is None else parse_numbers(layers, whole, "layer")
    settings["n_layers"] = len(chosen)
    settings["attn_types"] = [settings["attn_types"][layer] for layer in chosen]
    settings["dtype"] = getattr(torch, dtype or settings["dtype"])
    if n_ctx is not None:
        settings["n_ctx"] = n_ctx
    settings |= {"init_weights": False, "device": str(device)}

    def build(settings: dict[str, Any], tokenizer: Any = None) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # 4.0 will have no such class
            return lens.HookedTransformer(config_class(**settings), tokenizer, move_to_device=False)

    with torch.device("meta"):
        model = build(settings, _tokenizer(state.path))
    parameters = [name for name, _ in model.named_parameters()]
    model.load_state_dict(_chosen(state, parameters, chosen), strict=False, assign=True)
    # Buffers (rotary tables, masks) are computed, and depend on none of these sizes.
    small = dict.fromkeys(("d_model", "d_mlp", "d_vocab", "d_vocab_out"), 8)
    small |= dict.fromkeys(("n_heads", "n_key_value_heads", "num_experts", "experts_per_token"), 1)
    for name, buffer in build({**settings, **small}).named_buffers():
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, buffer.to(device))
    left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if left:
        raise OutputError(f"{state.path}: no values for {listed(left)}; run verify")
    return model.requires_grad_(False).eval()


def _packages() -> tuple[Any, Any, Any]:
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
            f"transformer-lens {found} knows no attention sinks, and its logits would be wrong: "
            f"{advice}"
        )
    return torch, transformer_lens, config_class


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "tl_config.json"
    try:
        settings = strict_json.loads(file.read_bytes())
        int(settings["n_layers"]), list(settings["attn_types"]), str(settings["dtype"])
    except FileNotFoundError:
        raise OutputError(
            f"{file}: missing; a HookedTransformer is made of the format transformer-lens"
        ) from None
    except OSError as error:
        raise machine_error(error, f"reading {file}") from error
    except (ValueError, TypeError, KeyError):
        raise OutputError(f"{file}: damaged; convert again, or run verify") from None
    return dict(settings)


def _tokenizer(folder: Path) -> Any:
    if not (folder / "tokenizer.json").is_file():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _chosen(
    state: StateDict, parameters: list[str], layers: tuple[int, ...]
) -> Mapping[str, torch.Tensor]:
    """The tensors for a model's parameters, those of its layer k from layer `layers[k]`."""
    names = {
        name: _BLOCK.sub(lambda match: f"blocks.{layers[int(match[1])]}.", name, count=1)
        for name in parameters
    }
    missing = [name for name in names.values() if name not in state]
    if missing:
        there = sorted({int(match[1]) for name in state if (match := _BLOCK.match(name))})
        raise OutputError(
            f"{state.path}: it lacks {len(missing)} tensors of the model, such as {missing[0]!r}; "
            f"it holds tensors of the layers {', '.join(map(str, there)) or 'none'}: choose "
            "complete ones with layers=, or convert what is missing"
        )
    return {name: state[stored] for name, stored in names.items()}
