"""What is no checkpoint of transformers' or OpenAI's: quantized otherwise, or of other programs."""

from __future__ import annotations

import torch
from field_cases import Refused, Source
from field_models import LAYER, also

U8, I32, F8, BF16 = torch.uint8, torch.int32, torch.float8_e4m3fn, torch.bfloat16
DOWNLOAD = ("download",)
Parts = dict[str, tuple[tuple[int, ...], torch.dtype]]


def experts(parts: Parts, each_expert: bool = False):
    """Replace the experts' matrices by other tensors in each layer.

    Args:
        parts: Shape and dtype by name, with `{}` for gate_up_proj and down_proj.
        each_expert: Whether each expert has its own.
    """

    def change(tensors):
        found = {n: t for n, t in tensors.items() if not n.endswith(("gate_up_proj", "down_proj"))}
        for layer in range(2):
            for name in [f"{e}." for e in range(4)] if each_expert else [""]:
                for matrix in ("gate_up_proj", "down_proj"):
                    for part, (shape, dtype) in parts.items():
                        stored = f"{LAYER.format(layer)}mlp.experts.{name}{part.format(matrix)}"
                        found[stored] = torch.ones(shape).to(dtype)
        return found

    return change


def linear(ends: str, dtype: torch.dtype, **parts: torch.dtype):
    """Replace the attention's matrices by a dtype, with other tensors beside each."""

    def change(tensors):
        found = {}
        for name, tensor in tensors.items():
            if name.endswith("_proj.weight"):
                found[name.replace("weight", ends)] = torch.ones(tensor.shape).to(dtype)
                for part, other in parts.items():
                    beside = name.replace("weight", part.replace("__", "."))
                    found[beside] = torch.ones(4).to(other)
            else:
                found[name] = tensor
        return found

    return change


def by(method: str | None = None, **entries: object) -> dict:
    found = {} if method is None else {"quant_method": method}
    return {"quantization_config": {**found, **entries}}


QUARK = experts(
    {
        "{}.weight": ((8, 8), U8),
        "{}.weight_scale": ((8, 2), U8),
        "{}.input_scale": ((), torch.float32),
    },
    each_expert=True,
)
NVFP4 = experts(
    {
        "{}": ((4, 8, 8), U8),
        "{}_weight_scale": ((4, 8, 8), F8),
        "{}_weight_scale_2": ((4,), torch.float32),
        "{}_input_scale": ((4,), torch.float32),
    }
)
NVFP4_PLAIN = experts({"{}": ((4, 8, 8), U8), "{}_weight_scale": ((4, 8, 8), F8)})
PACKED = experts(
    {
        "{}.weight_packed": ((8, 8), U8),
        "{}.weight_scale": ((8, 2), F8),
        "{}.weight_global_scale": ((1,), torch.float32),
    },
    each_expert=True,
)
MLX = experts({"{}.weight": ((4, 8, 8), torch.uint32), "{}.scales": ((4, 8, 2), U8)})
MLX_AFFINE = experts(
    {
        "{}.weight": ((4, 8, 8), torch.uint32),
        "{}.scales": ((4, 8, 2), BF16),
        "{}.biases": ((4, 8, 2), BF16),
    }
)
GPTQ = experts({"{}.qweight": ((8, 8), I32), "{}.scales": ((8,), BF16)}, each_expert=True)
SIDE = {"hf_quant_config.json": {"quantization": {"quant_algo": "NVFP4"}}}
BNB = linear(
    "weight",
    U8,
    weight__absmax=torch.float32,
    weight__quant_map=torch.float32,
    weight__quant_state__bitsandbytes__nf4=U8,
)
GROUPS = {"group_size": 32, "bits": 4, "mode": "mxfp4"}

# fmt: off
QUANTIZED = {
    "Quark": Refused(Source(QUARK, by("quark", quant_mode="eager_mode")), ("Quark",)),
    "NVFP4": Refused(Source(NVFP4, by("modelopt", quant_algo="NVFP4")), ("ModelOpt", "NVFP4")),
    "NVFP4 by its tensors": Refused(Source(NVFP4), ("NVFP4",)),
    "NVFP4 by a side file": Refused(Source(NVFP4_PLAIN, files=SIDE), ("ModelOpt", "NVFP4")),
    "a side file that is an array": Refused(
        Source(NVFP4_PLAIN, files={"hf_quant_config.json": []}), ("hf_quant_config.json",)),
    "a side file with a string": Refused(
        Source(NVFP4_PLAIN, files={"hf_quant_config.json": {"quantization": "x"}}), ("ModelOpt",)),
    "compressed-tensors": Refused(
        Source(PACKED, by("compressed-tensors")), ("compressed-tensors",)),
    "MLX": Refused(Source(MLX, {"quantization": GROUPS, **by(**GROUPS)}), ("MLX",)),
    "MLX by quantization_config alone": Refused(Source(MLX, by(**GROUPS)), ("MLX",)),
    "MLX by its tensors": Refused(Source(MLX_AFFINE), ("MLX",)),
    "bitsandbytes, 4 bits": Refused(
        Source(BNB, by("bitsandbytes", load_in_4bit=True)), ("bitsandbytes",)),
    "bitsandbytes, 8 bits": Refused(
        Source(linear("weight", torch.int8, SCB=torch.float32), by("bitsandbytes")),
        ("bitsandbytes",)),
    "bitsandbytes without its configuration": Refused(Source(BNB), ("bitsandbytes",)),
    "GPTQ": Refused(Source(GPTQ, by("gptq", bits=4)), ("GPTQ",)),
    "AWQ": Refused(
        Source(linear("qweight", I32, qzeros=I32, scales=torch.float16), by("awq")), ("AWQ",)),
    "FP8": Refused(
        Source(linear("weight", F8, weight_scale_inv=torch.float32), by("fp8")), ("fp8",)),
    "FP8 without its configuration": Refused(
        Source(linear("weight", F8, weight_scale_inv=torch.float32)), ("F8_E4M3",)),
    "Puzzle": Refused(
        Source(also("model.layers.0.self_attn.k_scale"),
               outer=lambda c: {**c, "model_type": "gpt_oss_puzzle"}),
        ("'gpt_oss_puzzle'", "different numbers of experts")),
    "an adapter beside a checkpoint": Refused(
        Source(files={"adapter_config.json": {"peft_type": "LORA"}}), ("LoRA adapter",)),
    "no config.json": Refused(Source(outer=lambda c: None), ("config.json", "missing")),
}


def folder(*names: str, config_json: bool = True) -> Source:
    """A folder with files of some names, and no checkpoint."""
    return Source(file="", files=dict.fromkeys(names, b"\x80"),
                  outer=(lambda c: c) if config_json else (lambda c: None))


OTHER = {
    "an adapter": (("adapter_config.json", "adapter_model.safetensors"), "LoRA adapter"),
    "an adapter in a pickle": (("adapter_config.json", "adapter_model.bin"), "LoRA adapter"),
    "an adapter without its configuration": (("adapter_model.safetensors",), "LoRA adapter"),
    "DCP": ((".metadata", "__0_0.distcp"), "torch.distributed.checkpoint"),
    "a part of DCP": (("__3_0.distcp",), "distributed checkpoint"),
    "only DCP's metadata": ((".metadata",), "distributed checkpoint"),
    "FSDP of verl": (("model_world_size_8_rank_0.pt", "optim_world_size_8_rank_0.pt"), "verl"),
    "Megatron": (("common.pt", "metadata.json"), "Megatron"),
    "Megatron's folder above": (("latest_checkpointed_iteration.txt",), "Megatron"),
    "DeepSpeed": (("zero_to_fp32.py", "latest"), "DeepSpeed"),
    "DeepSpeed's inner folder": (("mp_rank_00_model_states.pt",), "DeepSpeed"),
    "FSDP of accelerate": (("pytorch_model_fsdp_0",), "DCP or FSDP"),
    "verl's folder above": (("global_step_100",), "verl"),
    "Megatron's folder of one step": (("iter_0000100",), "Megatron"),
    "DeepSpeed's folder above": (("global_step100",), "DeepSpeed"),
    "PyTorch": (("pytorch_model.bin",), "PyTorch"),
    "PyTorch in shards": (("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"),
                          "PyTorch"),
    "GGUF": (("gpt-oss-20b-mxfp4.gguf",), "GGUF"),
    "NumPy": (("weights.npz",), "another program"),
}
FOLDERS = {
    f"{name}{' and no config.json' if not has_config else ''}": Refused(
        folder(*names, config_json=has_config), (words, names[-1] if len(names) < 2 else ""))
    for name, (names, words) in OTHER.items()
    for has_config in (True, False)
    if not (name.startswith("an adapter") and has_config)
}
# fmt: on

KINDS: dict[str, Refused] = {
    name: Refused(case.source, case.words, (*case.never, *DOWNLOAD))
    for name, case in {**QUANTIZED, **FOLDERS}.items()
}
"""By name: a checkpoint, and what the line must say."""
