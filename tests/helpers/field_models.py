"""Small random models, and the ways in which other programs store them; all of it by torch.

A model is a state dict with the names of transformers' GptOssForCausalLM, unquantized, in bfloat16.
A stored model is a state dict as it is in the files of a checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from rotary_configs import YARN
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], Tensors]

SIZES = {
    "num_hidden_layers": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 67,
}
"""Sizes of which no two axes of a matrix are equal, so that a wrong orientation shows."""

MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""The values of FP4 E2M1 by code (OCP Microscaling Formats v1.0)."""

LAYER = "model.layers.{}."
EXPERT_MATRICES = ("experts.gate_up_proj", "experts.down_proj")


def config(**entries: object) -> dict:
    """Return the config.json of a model; `...` removes an entry."""
    layers = int(str(entries.get("num_hidden_layers", SIZES["num_hidden_layers"])))
    found = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        **SIZES,
        "attention_bias": True,
        "sliding_window": 8,
        "max_position_embeddings": 131072,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "swiglu_limit": 7.0,
        "rope_theta": 150000,
        "rope_scaling": YARN,
        "torch_dtype": "bfloat16",
        **entries,
    }
    return {key: value for key, value in found.items() if value is not ...}


def openai_config() -> dict:
    """Return the same in OpenAI's entries."""
    renamed = {"num_local_experts": "num_experts", "num_experts_per_tok": "experts_per_token"}
    sizes = {renamed.get(key, key): value for key, value in SIZES.items()}
    rest = {"sliding_window": 8, "initial_context_length": 4096, "rope_theta": 150000.0}
    return {**sizes, **rest, "swiglu_limit": 7.0, "rope_scaling_factor": 32.0}


@cache
def _model(seed: int, sizes: tuple[tuple[str, int], ...]) -> Tensors:
    size = {**SIZES, **dict(sizes)}
    hidden, inner, experts = (
        size[key] for key in ("hidden_size", "intermediate_size", "num_local_experts")
    )
    heads, kv_heads, head_dim = (
        size[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) / 4).to(torch.bfloat16)

    tensors = {"model.embed_tokens.weight": rand(size["vocab_size"], hidden)}
    for layer in range(size["num_hidden_layers"]):
        attention = LAYER.format(layer) + "self_attn."
        for x, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            tensors[f"{attention}{x}_proj.weight"] = rand(count * head_dim, hidden)
            tensors[f"{attention}{x}_proj.bias"] = rand(count * head_dim)
        tensors[f"{attention}o_proj.weight"] = rand(hidden, heads * head_dim)
        tensors[f"{attention}o_proj.bias"] = rand(hidden)
        tensors[f"{attention}sinks"] = rand(heads)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{LAYER.format(layer)}{norm}.weight"] = rand(hidden)
        mlp = LAYER.format(layer) + "mlp."
        tensors[f"{mlp}router.weight"] = rand(experts, hidden)
        tensors[f"{mlp}router.bias"] = rand(experts)
        tensors[f"{mlp}experts.gate_up_proj"] = rand(experts, hidden, 2 * inner)
        tensors[f"{mlp}experts.gate_up_proj_bias"] = rand(experts, 2 * inner)
        tensors[f"{mlp}experts.down_proj"] = rand(experts, inner, hidden)
        tensors[f"{mlp}experts.down_proj_bias"] = rand(experts, hidden)
    tensors["model.norm.weight"] = rand(hidden)
    tensors["lm_head.weight"] = rand(size["vocab_size"], hidden)
    return tensors


def model(seed: int = 0, **sizes: int) -> Tensors:
    """Return a random model."""
    return dict(_model(seed, tuple(sorted(sizes.items()))))


def packed(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Return a model with random MXFP4 for its experts' matrices: as stored, and as it is read."""
    generator = torch.Generator().manual_seed(99)
    stored, read = {}, {}
    for name, tensor in tensors.items():
        if not name.endswith(EXPERT_MATRICES):
            stored[name] = read[name] = tensor
            continue
        experts, columns, rows = tensor.shape
        shape = experts, rows, columns // 32
        blocks = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 124, shape, generator=generator, dtype=torch.uint8)
        stored[name + "_blocks"], stored[name + "_scales"] = blocks, scales
        codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(3)  # the low half is first
        values = VALUES[codes.int()] * torch.exp2(scales.float() - 127)[..., None]
        read[name] = values.flatten(2).transpose(1, 2).to(torch.bfloat16).contiguous()
    return stored, read


# --- names --------------------------------------------------------------------------------------


def before(prefix: str) -> Change:
    """Put a prefix before all names."""
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def sub(pattern: str, replacement: str) -> Change:
    """Replace what a regular expression finds in the names."""
    return lambda tensors: {re.sub(pattern, replacement, n): t for n, t in tensors.items()}


def around_layers(part: str) -> Change:
    """Put a part into the names of all layers: `model.layers.0.{part}self_attn.sinks`."""
    return sub(r"(layers|block|blocks)\.(\d+)\.", rf"\1.\2.{part}")


def chain(*changes: Change) -> Change:
    """Apply changes one after another."""

    def apply(tensors: Tensors) -> Tensors:
        for change in changes:
            tensors = change(tensors)
        return tensors

    return apply


def without(*parts: str) -> Change:
    """Remove the tensors whose names have one of some parts."""
    return lambda tensors: {n: t for n, t in tensors.items() if not any(p in n for p in parts)}


def adding(**tensors: torch.Tensor) -> Change:
    """Add tensors. In the keywords, two underscores are for a point."""
    return lambda found: {**found, **{n.replace("__", "."): t for n, t in tensors.items()}}


def also(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Change:
    """Add a tensor of ones."""
    return lambda found: {**found, name: torch.ones(shape, dtype=dtype)}


def each(ends: str | tuple[str, ...], change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Change the tensors whose names end in some way."""
    return lambda found: {n: change(t) if n.endswith(ends) else t for n, t in found.items()}


def transposed(*ends: str) -> Change:
    """Transpose each expert's matrix in stacked tensors."""
    return each(ends or EXPERT_MATRICES, lambda tensor: tensor.transpose(1, 2))


def to_hooked(tensors: Tensors) -> Tensors:
    """Return a model as TransformerLens's HookedTransformer has it."""
    heads, head_dim = SIZES["num_attention_heads"], SIZES["head_dim"]
    out = {
        "embed.W_E": tensors["model.embed_tokens.weight"],
        "ln_final.w": tensors["model.norm.weight"],
        "unembed.W_U": tensors["lm_head.weight"].T,
        "unembed.b_U": torch.zeros(len(tensors["lm_head.weight"]), dtype=torch.bfloat16),
    }
    for layer in range(SIZES["num_hidden_layers"]):
        hf, block = LAYER.format(layer), f"blocks.{layer}."
        out[f"{block}ln1.w"] = tensors[f"{hf}input_layernorm.weight"]
        out[f"{block}ln2.w"] = tensors[f"{hf}post_attention_layernorm.weight"]
        for x, theirs in (("Q", "q"), ("_K", "k"), ("_V", "v")):
            weight = tensors[f"{hf}self_attn.{theirs}_proj.weight"]
            bias = tensors[f"{hf}self_attn.{theirs}_proj.bias"]
            name = f"{block}attn.W_{x}" if x == "Q" else f"{block}attn.{x[0]}W{x}"
            out[name] = weight.unflatten(0, (-1, head_dim)).transpose(1, 2)
            out[name.replace("W_", "b_")] = bias.unflatten(0, (-1, head_dim))
        o_proj = tensors[f"{hf}self_attn.o_proj.weight"]
        out[f"{block}attn.W_O"] = o_proj.T.unflatten(0, (heads, head_dim))
        out[f"{block}attn.b_O"] = tensors[f"{hf}self_attn.o_proj.bias"]
        out[f"{block}attn.sinks"] = tensors[f"{hf}self_attn.sinks"]
        for kind in ("weight", "bias"):
            out[f"{block}mlp.W_gate.{kind}"] = tensors[f"{hf}mlp.router.{kind}"]
        for e in range(SIZES["num_local_experts"]):
            for kind, end in (("weight", ""), ("bias", "_bias")):
                both = tensors[f"{hf}mlp.experts.gate_up_proj{end}"][e]
                down = tensors[f"{hf}mlp.experts.down_proj{end}"][e]
                expert = f"{block}mlp.experts.{e}."
                out[f"{expert}W_gate.{kind}"] = both[..., 0::2].T if end == "" else both[0::2]
                out[f"{expert}W_in.{kind}"] = both[..., 1::2].T if end == "" else both[1::2]
                out[f"{expert}W_out.{kind}"] = down.T if end == "" else down
    return out


# --- files --------------------------------------------------------------------------------------


def save(file: Path, tensors: Tensors) -> None:
    """Write a safetensors file. Its tensors must be contiguous and share no memory."""
    copies = {n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    save_file(copies, file, {"format": "pt"})


def save_shards(folder: Path, tensors: Tensors, count: int, name: str = "model") -> dict:
    """Write tensors to several files; return the index."""
    weight_map = {}
    for number in range(count):
        file = f"{name}-{number + 1:05}-of-{count:05}.safetensors"
        part = {key: tensors[key] for key in [*tensors][number::count]}
        save(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    return {"metadata": {}, "weight_map": weight_map}


def write(folder: Path, files: dict[str, object]) -> None:
    """Write files by name: bytes as they are, and other values as JSON."""
    for name, value in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        (folder / name).write_bytes(data)
