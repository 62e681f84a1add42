"""Adapters that other programs save: the files of one that PEFT saved, with rewritten tensors.

Each function writes a new folder with the same deltas in another form, so that what PEFT merges
for the given folder is right for the new one too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Rewrite = Callable[[Path, Path, int], Path]
"""A function of the folder to read, the folder to write, and the number of experts."""


def read(folder: Path) -> tuple[Tensors, dict]:
    """Return the tensors and the configuration of an adapter."""
    config = json.loads((folder / "adapter_config.json").read_text())
    return load_file(folder / "adapter_model.safetensors"), config


def write(folder: Path, tensors: Tensors, config: dict) -> Path:
    """Write an adapter."""
    folder.mkdir(parents=True)
    copies = {n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    save_file(copies, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def factors_of_experts(tensors: Tensors) -> dict[str, list[str]]:
    """Return the names of A and B by layer and parameter; both parameters must be in each layer."""
    found = {}
    for name in tensors:
        if name.endswith(".mlp.experts.lora_A.weight"):
            mlp = name.removesuffix("experts.lora_A.weight")
            for what, inner in (("gate_up_proj", "base_layer."), ("down_proj", "")):
                pair = [f"{mlp}experts.{inner}lora_{x}.weight" for x in "AB"]
                found[f"{mlp}experts.{what}"] = pair
    return found


def one_expert(a: torch.Tensor, b: torch.Tensor, e: int, experts: int) -> list[torch.Tensor]:
    """Return the factors [r, in] and [out, r] of one expert, from PEFT's of all experts."""
    return [a.unflatten(0, (experts, -1))[e], b.unflatten(1, (-1, experts))[..., e]]


def grouped_by_expert(folder: Path, out: Path, experts: int, mark: bool = True) -> Path:
    """Write B's columns expert by expert, as Unsloth has them; new versions say so, old do not."""
    tensors, config = read(folder)
    for name, tensor in tensors.items():
        if ".experts." in name and name.endswith("lora_B.weight"):
            tensors[name] = tensor.unflatten(1, (-1, experts)).transpose(1, 2).flatten(1)
    return write(out, tensors, config | ({"lora_B_layout": "grouped_by_expert"} if mark else {}))


def without_mark(folder: Path, out: Path, experts: int) -> Path:
    """Write B's columns expert by expert, without a word about it."""
    return grouped_by_expert(folder, out, experts, mark=False)


def marked_rank_major(folder: Path, out: Path, experts: int) -> Path:
    """Write PEFT's own order of columns, and say so, as new versions of Unsloth do."""
    tensors, config = read(folder)
    return write(out, tensors, config | {"lora_B_layout": "rank_major"})


def per_expert(folder: Path, out: Path, experts: int) -> Path:
    """Write two matrices for each expert, as Unsloth has them for experts that are Linear modules.

    Gate and up alternate in the rows of B, as in the columns of the model's parameter.
    """
    tensors, config = read(folder)
    for prefix, pair in factors_of_experts(tensors).items():
        a, b = (tensors.pop(name) for name in pair)
        for e in range(experts):
            for kind, matrix in zip("AB", one_expert(a, b, e, experts), strict=True):
                tensors[f"{prefix}s.{e}.lora_{kind}.weight"] = matrix
    numbers = [f"{what}_projs.{e}" for what in ("gate_up", "down") for e in range(experts)]
    targets = [*config["target_modules"], *numbers]
    return write(out, tensors, config | {"target_parameters": None, "target_modules": targets})


def shared(folder: Path, out: Path, experts: int) -> Path:
    """Make the factors on the model's side equal for all experts: A of gate_up, B of down."""
    tensors, config = read(folder)
    for prefix, (a, b) in factors_of_experts(tensors).items():
        if prefix.endswith("gate_up_proj"):
            first = tensors[a].unflatten(0, (experts, -1))[0]
            tensors[a] = first.repeat(experts, 1)
        else:
            first = tensors[b].unflatten(1, (-1, experts))[..., :1]
            tensors[b] = first.expand(-1, -1, experts).flatten(1)
    return write(out, tensors, config)


def tinker(folder: Path, out: Path, experts: int, share: bool = False) -> Path:
    """Write the names and shapes of Tinker: gate, down and up are w1, w2 and w3.

    With `share`, factors that are equal for all experts have a leading axis of 1.
    """
    tensors, config = read(folder)
    for prefix, pair in factors_of_experts(tensors).items():
        factors = [tensors.pop(name) for name in pair]
        each = [one_expert(*factors, e, experts) for e in range(experts)]
        a, b = (torch.stack(matrices) for matrices in zip(*each, strict=True))
        module = prefix.rpartition(".")[0]
        parts = {"w2": b}
        if prefix.endswith("gate_up_proj"):
            a = a[:1] if share else a
            parts = {"w1": b[:, 0::2], "w3": b[:, 1::2]}
        elif share:
            parts = {"w2": b[:1]}
        for name, part in parts.items():
            tensors[f"{module}.{name}.lora_A.weight"] = a
            tensors[f"{module}.{name}.lora_B.weight"] = part
    renamed = {
        name.replace(".self_attn.", ".attn.").replace(".lm_head.", ".model.unembed_tokens."): t
        for name, t in tensors.items()
        if "base_layer" not in name
    }
    kept = {key: config[key] for key in ("base_model_name_or_path", "peft_type", "r", "lora_alpha")}
    return write(out, renamed, kept | {"target_modules": "all-linear"})


def tinker_shared(folder: Path, out: Path, experts: int) -> Path:
    """Write Tinker's names, with the factors on the model's side shared by all experts."""
    return tinker(folder, out, experts, share=True)


def without_version(folder: Path, out: Path, experts: int) -> Path:
    """Leave out what older versions of PEFT do not write."""
    tensors, config = read(folder)
    known = ("peft_type", "r", "lora_alpha", "target_modules", "target_parameters", "bias")
    known += ("rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save", "use_dora")
    return write(out, tensors, {key: config[key] for key in known})


def own_base_layer(folder: Path, out: Path, experts: int) -> Path:
    """Change the base's weights that PEFT saves with LoRA of embeddings: it loads these too."""
    tensors, config = read(folder)
    doubled = {n: 2 * t for n, t in tensors.items() if n.endswith("base_layer.weight")}
    assert doubled
    return write(out, tensors | doubled, config)


def in_bfloat16(folder: Path, out: Path, experts: int) -> Path:
    """Store the adapter in bfloat16: PEFT reads it as float32."""
    tensors, config = read(folder)
    return write(out, {n: t.to(torch.bfloat16) for n, t in tensors.items()}, config)


def in_float16(folder: Path, out: Path, experts: int) -> Path:
    """Store the adapter in float16: PEFT reads it as float32."""
    tensors, config = read(folder)
    return write(out, {n: t.to(torch.float16) for n, t in tensors.items()}, config)
