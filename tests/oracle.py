"""The peer, whole and slow: transformers dequantises, TransformerLens 3.9 converts.

Imports nothing of gptoss_stream: what it says is what the package is held to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config
from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig
from transformer_lens.loading_from_pretrained import convert_hf_model_config
from transformer_lens.pretrained.weight_conversions.openai import convert_gpt_oss_weights


def load_model(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The Hugging Face model, dequantised."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=Mxfp4Config(dequantize=True)
    )


def hooked_config(folder: Path) -> dict[str, Any]:
    """TransformerLens's own configuration of the model in a folder."""
    return convert_hf_model_config(
        str(folder), hf_cfg=AutoConfig.from_pretrained(folder).to_dict()
    )


def state_dict(folder: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Every tensor of the HookedTransformer, converted by TransformerLens from the bfloat16
    model, then cast."""
    model = load_model(folder)
    config = model.config
    hooked = HookedTransformerConfig(
        d_model=config.hidden_size,
        d_head=config.head_dim,
        n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size,
        n_layers=config.num_hidden_layers,
        n_ctx=64,
        d_vocab=config.vocab_size,
        act_fn=config.hidden_act,
        num_experts=config.num_local_experts,
        experts_per_token=config.num_experts_per_tok,
        dtype=torch.bfloat16,
        device="cpu",
    )
    tensors = convert_gpt_oss_weights(model, hooked)
    return {name: tensor.detach().to(dtype) for name, tensor in tensors.items()}
