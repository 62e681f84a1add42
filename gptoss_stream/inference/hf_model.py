"""transformers' GptOssForCausalLM whose weights stay in the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .._utils.failures import missing_package
from .._utils.messages import listed
from ..adapters import AdapterLike, as_adapters
from ..checkpoint.small_files import read_config
from ..errors import CheckpointError, MissingPackageError
from ..model.numbers import NumbersLike
from ..model.pruning import Pruning
from ..planning.options import ConversionOptions
from ..storage.location import LocationLike
from ..storage.open_location import open_location
from ..tensors.dtypes import DTypeLike, torch_name
from .checkpoint_model import CheckpointModel, open_checkpoint_model

if TYPE_CHECKING:
    import torch
    from transformers import GptOssForCausalLM

__all__ = ["load_hf_model"]

_MAJOR_VERSION = 5
"""Of transformers. Version 4 gives experts the weights of all experts, 5 those of the picked."""

_GENERATION_NAME = "generation_config.json"


def load_hf_model(
    source: LocationLike,
    *,
    dtype: DTypeLike | None = None,
    device: str | torch.device = "cpu",
    layers: NumbersLike | None = None,
    source_format: str | None = None,
    adapters: AdapterLike | Sequence[AdapterLike] | None = (),
    expert_cache: int | str = 0,
    cache: int | str = 0,
) -> GptOssForCausalLM:
    """Load a checkpoint in any format as transformers' own model, without converting it.

    Opens in seconds. On the CPU, weights that are stored as the model needs them are mapped: they
    are read from the disk when they are used. Experts that are stored otherwise, such as those in
    MXFP4, are decoded when the router picks them, once for all tokens of a pass. Parameters need no
    gradient; gradients with respect to activations work, but not gradients of gradients.

    Such experts are no parameters. To save the model, use `convert`: saving it in another way is
    refused, as is pickling. PEFT trains, loads and saves adapters that change no experts (its
    `target_parameters` finds none, and it warns); those that do come by `adapters`. Do not write to
    the checkpoint while it is used: a decoded expert of a changed file is refused, but mapped pages
    are not checked, and a truncated file kills the process (SIGBUS).

    Args:
        source: A local folder, a repository of the Hub, or a URL (see `open_location`).
        dtype: Such as "float32" or torch.float32 (see `DTypeLike`); by default as for `convert`.
            All tensors have one: that of most elements, if the checkpoint stores several.
        device: Where the model computes. Any device other than the CPU makes copies of the dense
            weights, and experts are copied there when they are used.
        layers: Use only these layers, such as "0-3,7", 5 or range(4). The model
            numbers them from 0.
        source_format: The format of the source; by default it is detected.
        adapters: LoRA adapters to merge, in order: locations, or `Adapter` objects.
        expert_cache: Memory for decoded experts that are kept for later passes, in bytes or as a
            text such as "2GB"; those used longest ago go first. By default none are kept.
        cache: Disk space for what is read of a remote source, in bytes or as a text (see
            `open_state_dict`). By default nothing is kept on the disk.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: If the source cannot be used.
        OptionError: If an argument cannot be used.
        MachineError: If reading fails.
        MissingPackageError: If transformers is not installed, or is too old or too new.
    """
    torch, transformers = _import_packages()
    options = ConversionOptions(
        "hf", source_format, dtype, pruning=Pruning.of(layers, None), adapters=as_adapters(adapters)
    )
    location = open_location(source)
    opened = open_checkpoint_model(location, options, device, expert_cache, cache)
    config = transformers.GptOssConfig.from_dict(opened.config("config.json"))
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # others multiply with whole stacks of experts
    config._name_or_path = str(location)  # PEFT notes it in adapters that it saves
    config.dtype = getattr(torch, torch_name(opened.plan.main_dtype))
    with torch.device("meta"):
        model = transformers.GptOssForCausalLM(config)
    if location.has(_GENERATION_NAME):
        settings = read_config(location, _GENERATION_NAME)
        model.generation_config = transformers.GenerationConfig.from_dict(dict(settings))
    _set_weights(model, opened)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config).to(device)
    model.lm_head.register_forward_pre_hook(_copy_inputs)
    return model.requires_grad_(False).eval()


def _import_packages() -> tuple[Any, Any]:
    """Import torch and transformers.

    Raises:
        MissingPackageError: If one is not installed, or has the wrong version.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise missing_package(error, "transformers") from None
    found = transformers.__version__
    major = int(found.split(".")[0])
    if major != _MAJOR_VERSION:
        raise MissingPackageError(
            f"transformers {found} is too {'old' if major < _MAJOR_VERSION else 'new'}: run: "
            "pip install 'gptoss_stream[transformers]'"
        )
    return torch, transformers


def _set_weights(model: Any, opened: CheckpointModel) -> None:
    """Set the parameters of a model on the meta device to the tensors of a checkpoint."""
    tensors = opened.tensors
    if opened.experts is not None:
        from .hf_experts import HfExperts
        from .unsaved_matrix import refuse_saving

        # It would write config.json before it asks for the state dict, which refuses too.
        model.save_pretrained = refuse_saving

        for number, layer in enumerate(model.model.layers):
            layer.mlp.experts = HfExperts(layer.mlp.experts, opened.experts, number)
    names = [name for name, _ in model.named_parameters() if name in tensors]
    model.load_state_dict({name: tensors[name] for name in names}, strict=False, assign=True)
    model.tie_weights()
    unset = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if unset:
        raise CheckpointError(f"{tensors.location}: no values for {listed(unset)}")


def _copy_inputs(module: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Copy the last positions, which transformers slices out of all, to memory of their own.

    With the strides of the slice, torch 2.13 multiplies bfloat16 on a CPU 60 times as slowly.
    """
    return (inputs[0].clone(),)
