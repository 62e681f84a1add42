"""The peer: transformers dequantises, TransformerLens 3.9 converts, safetensors saves.

python benchmarks/peer.py SOURCE OUTPUT
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions.openai import convert_gpt_oss_weights
from transformers import AutoModelForCausalLM, Mxfp4Config


def converted(source: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the HookedTransformer, in bfloat16; the tests' oracle too."""
    model = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=torch.bfloat16,
        quantization_config=Mxfp4Config(dequantize=True),
    )
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
    tensors: dict[str, torch.Tensor] = convert_gpt_oss_weights(model, hooked)
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    tensors = converted(arguments.source)
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, arguments.output)


if __name__ == "__main__":
    main()
