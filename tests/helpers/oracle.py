"""The expected output: transformers dequantises, TransformerLens 3.9 converts, all in memory.

The package is checked against it, so it imports nothing of gptoss_stream.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peer
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformer_lens import HookedTransformer
from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig
from transformer_lens.loading_from_pretrained import convert_hf_model_config
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Mxfp4Config,
    PreTrainedTokenizerFast,
)


def load_model(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return transformers' model of a folder, dequantised."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=Mxfp4Config(dequantize=True)
    )


def hooked_config(folder: Path) -> dict[str, Any]:
    """Return TransformerLens's configuration of the model in a folder."""
    return convert_hf_model_config(str(folder), hf_cfg=AutoConfig.from_pretrained(folder).to_dict())


def state_dict(folder: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Return the HookedTransformer's tensors, which TransformerLens converts from the bfloat16
    model, cast to a dtype."""
    tensors = peer.converted(folder)
    return {name: tensor.detach().to(dtype) for name, tensor in tensors.items()}


def hooked_model(
    folder: Path, dtype: torch.dtype = torch.bfloat16, **settings: Any
) -> HookedTransformer:
    """Return TransformerLens's model of a folder, without weight processing."""
    fields = {k: v for k, v in hooked_config(folder).items() if v is not None} | settings
    fields |= {"dtype": dtype, "init_weights": False, "device": "cpu", "tokenizer_name": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedTransformer(HookedTransformerConfig(**fields))
    tensors = peer.converted(folder, str(dtype).removeprefix("torch."))
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert all(".attn." in name for name in missing)  # buffers
    return model.requires_grad_(False)


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer with the vocabulary of the tiny model, in which `w7` is token 7."""
    words = {"<unk>": 0, "<|return|>": 1, **{f"w{i}": i for i in range(2, 1009)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"bos_token": "<|return|>", "eos_token": "<|return|>", "pad_token": "<unk>"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", **special
    ).save_pretrained(folder)


SMALL = {
    "num_hidden_layers": 2,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 101,
    "sliding_window": 8,
    "max_position_embeddings": 4096,
}
"""Sizes that differ from each other, and a vocabulary of odd size."""


def save_dense(folder: Path, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Path:
    """Save a small random model with transformers; biases, norms and sinks are random too."""
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**SMALL | settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith("bias"):
                parameter.add_(torch.randn(parameter.shape) / 8)
    model.to(dtype).save_pretrained(folder)
    return folder


def save_mxfp4(folder: Path, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Path:
    """Save the same model with its experts replaced by random MXFP4 blocks and scales."""
    save_dense(folder, dtype, **settings)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_blocks"] = blocks
        tensors[f"{name}_scales"] = torch.randint(
            117, 123, (experts, rows, columns // 32), dtype=torch.uint8
        )
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    text = json.loads((folder / "config.json").read_text())
    text["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(text))
    return folder
