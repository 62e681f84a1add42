"""Writers and readers of each format, independent of the package: they import nothing of it.

They are those of transformers, or a few lines in this file. A model is a state dict with the names
of transformers' GptOssForCausalLM, unquantised.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import oracle
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

Tensors = dict[str, torch.Tensor]
EXPERTS = "model.layers.{}.mlp.experts."


def load_folder(folder: Path) -> Tensors:
    """Return every tensor of a folder as it is stored; no name may occur twice."""
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        loaded = load_file(file)
        assert not found.keys() & loaded.keys()
        found |= loaded
    return found


def save(folder: Path, tensors: Tensors, **configs: dict) -> Path:
    """Write tensors to one file, and configuration files next to it."""
    folder.mkdir(parents=True)
    # save_file needs tensors that are contiguous and share no memory.
    contiguous = {
        name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()
    }
    save_file(contiguous, folder / "model.safetensors", {"format": "pt"})
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(config, default=str))
    return folder


def config_of(folder: Path) -> dict:
    """Return the config.json of a folder, without its quantization."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    return config


# hf-unfused: rows alternate between gate and up, as in the MXFP4 blocks.


def to_unfused(model: Tensors) -> Tensors:
    out = {}
    for name, tensor in model.items():
        if ".experts." in name:
            prefix, what = name.rsplit(".", 1)
            kind = "bias" if what.endswith("_bias") else "weight"
            for e, one in enumerate(tensor):
                stored = f"{prefix}.{what.removesuffix('_bias')}s.{e}.{kind}"
                out[stored] = one if kind == "bias" else one.T
        else:
            out[name.replace(".router.", ".router.linear.")] = tensor
    return out


def from_unfused(stored: Tensors) -> Tensors:
    out, experts = {}, {}
    for name, tensor in stored.items():
        if ".experts." in name:
            prefix, what, number, kind = name.rsplit(".", 3)
            fused = f"{prefix}.{what.removesuffix('s')}{'_bias' if kind == 'bias' else ''}"
            experts.setdefault(fused, {})[int(number)] = tensor if kind == "bias" else tensor.T
        else:
            out[name.replace(".router.linear.", ".router.")] = tensor
    for name, by_number in experts.items():
        assert sorted(by_number) == list(range(len(by_number)))
        out[name] = torch.stack([by_number[e] for e in range(len(by_number))])
    return out


# openai: q, k and v in one tensor, experts in MXFP4 under other names.

RENAMED = {
    "model.embed_tokens.weight": "embedding.weight",
    "lm_head.weight": "unembedding.weight",
    "model.norm.weight": "norm.scale",
    "self_attn.sinks": "attn.sinks",
    "self_attn.o_proj.weight": "attn.out.weight",
    "self_attn.o_proj.bias": "attn.out.bias",
    "input_layernorm.weight": "attn.norm.scale",
    "post_attention_layernorm.weight": "mlp.norm.scale",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.bias": "mlp.gate.bias",
    "mlp.experts.gate_up_proj_blocks": "mlp.mlp1_weight.blocks",
    "mlp.experts.gate_up_proj_scales": "mlp.mlp1_weight.scales",
    "mlp.experts.gate_up_proj_bias": "mlp.mlp1_bias",
    "mlp.experts.down_proj_blocks": "mlp.mlp2_weight.blocks",
    "mlp.experts.down_proj_scales": "mlp.mlp2_weight.scales",
    "mlp.experts.down_proj_bias": "mlp.mlp2_bias",
}


def to_openai(stored: Tensors, layers: int) -> Tensors:
    """Return hf-mxfp4's tensors as openai's."""
    out = {}
    for name, tensor in stored.items():
        if name in RENAMED:
            out[RENAMED[name]] = tensor
        elif (rest := name.split(".", 3)[3]) in RENAMED:
            out[f"block.{name.split('.')[2]}.{RENAMED[rest]}"] = tensor
    for layer in range(layers):
        for kind in ("weight", "bias"):
            qkv = [stored[f"model.layers.{layer}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            out[f"block.{layer}.attn.qkv.{kind}"] = torch.cat(qkv)
    return out


def from_openai(stored: Tensors, config: dict) -> Tensors:
    """Return openai's tensors as hf-mxfp4's."""
    back = {theirs: ours for ours, theirs in RENAMED.items()}
    nh, nk = (config[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    rows = [heads * config["head_dim"] for heads in (nh, nk, nk)]
    out = {}
    for name, tensor in stored.items():
        _, layer, rest = name.split(".", 2) if name.startswith("block.") else ("", "", name)
        if rest.startswith("attn.qkv."):
            for x, tensor_rows in zip("qkv", tensor.split(rows), strict=True):
                kind = rest.rsplit(".", 1)[1]
                out[f"model.layers.{layer}.self_attn.{x}_proj.{kind}"] = tensor_rows
        else:
            out[f"model.layers.{layer}.{back[rest]}" if layer else back[rest]] = tensor
    return out


def dequantised(stored: Tensors) -> Tensors:
    """Return hf-mxfp4's tensors, dequantised by the function of transformers."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    out = {n: t for n, t in stored.items() if not n.endswith(("_blocks", "_scales"))}
    for name, blocks in stored.items():
        if name.endswith("_blocks"):
            scales = stored[name.replace("_blocks", "_scales")]
            out[name.removesuffix("_blocks")] = convert_moe_packed_tensors(blocks, scales)
    return out


OPENAI_CONFIG = {
    "num_hidden_layers": "num_hidden_layers",
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "experts_per_token",
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "head_dim": "head_dim",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "sliding_window": "sliding_window",
    "swiglu_limit": "swiglu_limit",
}


def openai_config(config: dict) -> dict:
    """Return openai's configuration for one of hf's."""
    rope = config["rope_parameters"]
    return {
        **{theirs: config.get(ours, 7.0) for ours, theirs in OPENAI_CONFIG.items()},
        "initial_context_length": rope["original_max_position_embeddings"],
        "rope_theta": rope["rope_theta"],
        "rope_scaling_factor": rope["factor"],
        "rope_ntk_alpha": rope["beta_slow"],
        "rope_ntk_beta": rope["beta_fast"],
    }


def complete(model: Tensors) -> Tensors:
    """Return the model with the head and the biases that some formats always store."""
    zeros = {
        name.replace(".weight", ".bias"): tensor.new_zeros(len(tensor))
        for name, tensor in model.items()
        if name.endswith("_proj.weight")
    }
    return {"lm_head.weight": model["model.embed_tokens.weight"], **zeros, **model}


# Writers: a random model in each format.


def write_hf(folder: Path, mxfp4: bool, dtype: torch.dtype, **settings) -> Path:
    """Write a model with transformers, dense or with its experts replaced by random MXFP4."""
    if mxfp4:
        return oracle.save_mxfp4(folder, dtype=dtype, **settings)
    return oracle.save_dense(folder, dtype=dtype, **settings)


def write_source(name: str, folder: Path, dtype: torch.dtype, **settings) -> tuple[Path, Tensors]:
    """Write a random model in a format; return its folder and the model."""
    mxfp4 = name in ("hf-mxfp4", "openai")
    base = write_hf(folder / "hf", mxfp4, dtype, **settings)
    stored, config = load_folder(base), config_of(base)
    model = dequantised(stored) if mxfp4 else stored
    if name in ("hf", "hf-mxfp4"):
        return base, model
    if name == "hf-unfused":
        return save(folder / name, to_unfused(model), config=config), model
    model = complete(model)
    if name == "openai":
        renamed = to_openai(complete(stored), config["num_hidden_layers"])
        return save(folder / name, renamed, config=openai_config(config)), model
    hooked = oracle.hooked_model(base, dtype)
    fields = hooked.cfg.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
    return save(folder / name, hooked.state_dict(), tl_config=fields), model


# Readers: the model in a folder of each format.


def read_hf(folder: Path) -> Tensors:
    """Load a folder with transformers, which must detect the format and find every tensor."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def read_hf_mxfp4(folder: Path) -> Tensors:
    """Load and dequantise a folder with transformers."""
    dtype = getattr(torch, json.loads((folder / "config.json").read_text())["dtype"])
    return {n: t.detach() for n, t in oracle.load_model(folder, dtype).state_dict().items()}


def read_hf_unfused(folder: Path) -> Tensors:
    return from_unfused(load_folder(folder))


def read_openai(folder: Path) -> Tensors:
    config = json.loads((folder / "config.json").read_text())
    return dequantised(from_openai(load_folder(folder), config))


READERS: dict[str, Callable[[Path], Tensors]] = {
    "hf": read_hf,
    "hf-mxfp4": read_hf_mxfp4,
    "hf-unfused": read_hf_unfused,
    "openai": read_openai,
}
