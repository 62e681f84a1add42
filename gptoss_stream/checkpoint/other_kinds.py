"""Says what a folder is if it has no safetensors checkpoint: the formats of other programs."""

from __future__ import annotations

import re

from ..storage.location import Location

__all__ = ["describe_other_kind"]

_KINDS = (
    (
        re.compile(r"adapter_(config\.json|model\.(safetensors|bin))"),
        "a LoRA adapter ({name}), not a checkpoint; name its base model instead, and the adapter "
        "with --adapter",
    ),
    (
        re.compile(r".*\.distcp|\.metadata|pytorch_model_fsdp.*"),
        "a distributed checkpoint of PyTorch (DCP or FSDP, {name}); convert it to safetensors with "
        "the program that wrote it, or with torch.distributed.checkpoint.format_utils and "
        "save_pretrained",
    ),
    (
        re.compile(r"model_world_size_\d+_rank_\d+\.pt|fsdp_config\.json|global_step_\d+"),
        "a distributed checkpoint (FSDP shards of verl, {name}); merge it to safetensors with "
        "python -m verl.model_merger",
    ),
    (
        re.compile(r"latest_checkpointed_iteration\.txt|common\.pt|iter_\d+"),
        "a distributed checkpoint of Megatron ({name}); export it to Hugging Face's format with "
        "Megatron-Bridge",
    ),
    (
        re.compile(r"zero_to_fp32\.py|global_step\d+|mp_rank_\d+_model_states\.pt|.*_optim_.*\.pt"),
        "a distributed checkpoint of DeepSpeed ({name}); convert it with its zero_to_fp32.py "
        "--safe_serialization",
    ),
    (
        re.compile(r"(pytorch_)?model.*\.bin\.index\.json|pytorch_model.*\.bin|.*\.(pt|pth|ckpt)"),
        "a PyTorch checkpoint ({name}), and no .safetensors file; pickles are not opened: load it "
        "with transformers and save it again with save_pretrained",
    ),
    (
        re.compile(r".*\.gguf"),
        "a GGUF file ({name}), which is not read; take the safetensors checkpoint it was made from",
    ),
    (
        re.compile(r".*\.(npz|h5|msgpack|onnx|onnx_data|pdparams)"),
        "a checkpoint of another program ({name}), and no .safetensors file; take the safetensors "
        "checkpoint it was made from",
    ),
)
"""Names of files, and what a folder with such a file is. The first match counts."""


def describe_other_kind(location: Location) -> str | None:
    """Return a message that says what a folder is, or None if nothing is recognized.

    Locations that cannot list their files are asked for the most telling ones.
    """
    names = location.names() or [
        name
        for name in ("adapter_config.json", ".metadata", "pytorch_model.bin")
        if location.has(name)
    ]
    for pattern, description in _KINDS:
        found = next((name for name in names if pattern.fullmatch(name)), None)
        if found is not None:
            return f"{location}: {description.format(name=found)}"
    return None
