"""The peers: other code that converts to a format, with the whole model in memory.

    python benchmarks/peer.py transformer-lens SOURCE OUTPUT
    python benchmarks/peer.py peft SOURCE OUTPUT --adapter ADAPTER

`transformer-lens`: transformers dequantizes, TransformerLens 3.9 converts, safetensors saves.
`transformers`: transformers dequantizes and saves. `gpt-oss`: the reader of OpenAI's package
dequantizes each tensor of its own format, safetensors saves them all. `modelopt`: transformers
loads floats, nvidia-modelopt encodes each expert to MXFP4, safetensors saves. `peft`: transformers
dequantizes, PEFT merges an adapter, transformers saves.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Packages are imported where they are used, so that each peer loads only its own.


def load_model(source: Path, dtype: str = "bfloat16") -> Any:
    """Load the Hugging Face model in a dtype, dequantized if it is in MXFP4."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    return AutoModelForCausalLM.from_pretrained(
        source,
        dtype=dtype,
        quantization_config=Mxfp4Config(dequantize=True),
    )


def converted(source: Path, dtype: str = "bfloat16") -> dict[str, torch.Tensor]:
    """Return every tensor of the HookedTransformer; the tests use it as their oracle."""
    import torch
    from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions.openai import convert_gpt_oss_weights

    model = load_model(source, dtype)
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
        dtype=getattr(torch, dtype),
        device="cpu",
    )
    tensors: dict[str, torch.Tensor] = convert_gpt_oss_weights(model, hooked)
    return tensors


def with_transformer_lens(source: Path, output: Path) -> None:
    tensors = converted(source)
    _save({name: t.detach().contiguous() for name, t in tensors.items()}, output)


def with_transformers(source: Path, output: Path) -> None:
    # By default transformers 5.23 saves dequantized tensors under the names of MXFP4 tensors, and
    # then loads random experts from them without an error.
    load_model(source).save_pretrained(output, save_original_format=False)


def with_peft(source: Path, output: Path, adapter: Path) -> None:
    from peft import PeftModel

    merged: Any = PeftModel.from_pretrained(load_model(source), str(adapter))
    merged.merge_and_unload().save_pretrained(output, save_original_format=False)


def with_gpt_oss(source: Path, output: Path) -> None:
    import torch
    from gpt_oss.torch.weights import Checkpoint

    reader = Checkpoint(str(source), torch.device("cpu"))
    # The reader takes an MXFP4 tensor by the name that its blocks and scales have in common.
    stored = reader.tensor_name_to_file
    names = sorted({name.removesuffix(".scales").removesuffix(".blocks") for name in stored})
    _save({name: reader.get(name) for name in names}, output)


def with_modelopt(source: Path, output: Path) -> None:
    """Do what NVIDIA's example for gpt-oss does, but on the CPU and expert by expert."""
    import torch
    from modelopt.torch.quantization.qtensor.mxfp4_tensor import MXFP4QTensor
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype="bfloat16")
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = tensor.contiguous()
            continue
        blocks, scales = [], []
        for expert in tensor:
            rows = expert.T.contiguous()
            encoded, scale = MXFP4QTensor.quantize(rows, 32)
            scales.append(scale.reshape(len(rows), -1))
            blocks.append(encoded._quantized_data.reshape(*scales[-1].shape, 16))
        tensors[f"{name}_blocks"] = torch.stack(blocks)
        tensors[f"{name}_scales"] = torch.stack(scales)
    _save(tensors, output)


def _save(tensors: Mapping[str, torch.Tensor], output: Path) -> None:
    from safetensors.torch import save_file

    output.mkdir()
    save_file(dict(tensors), output / "model.safetensors")


PEERS = {
    "transformer-lens": with_transformer_lens,
    "transformers": with_transformers,
    "gpt-oss": with_gpt_oss,
    "modelopt": with_modelopt,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=[*PEERS, "peft"])
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path, help="a folder to create")
    parser.add_argument("--adapter", type=Path, help="for peft: the adapter to merge")
    arguments = parser.parse_args()
    if (arguments.peer == "peft") != (arguments.adapter is not None):
        parser.error("peft, and no other peer, needs --adapter")
    if arguments.adapter is not None:
        with_peft(arguments.source, arguments.output, arguments.adapter)
        return
    PEERS[arguments.peer](arguments.source, arguments.output)


if __name__ == "__main__":
    main()
