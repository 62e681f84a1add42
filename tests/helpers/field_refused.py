"""The checkpoints of the field that are refused, with what the line must say."""

from __future__ import annotations

import re

import torch
from field_cases import Refused, Source
from field_converted import BIASES, HEAD, ODD, inside, no_head, openai
from field_models import (
    also,
    around_layers,
    before,
    chain,
    each,
    openai_config,
    sub,
    to_hooked,
    transposed,
    without,
)
from independent import to_unfused

U8, I32, F8 = torch.uint8, torch.int32, torch.float8_e4m3fn
ATTENTION = "model.layers.1.self_attn."
EXPERTS = "model.layers.1.mlp.experts."
DOWNLOAD = ("download",)


def part(pattern: str, prefix: str):
    """Put a prefix before the names that a regular expression finds."""
    return lambda tensors: {
        prefix + n if re.search(pattern, n) else n: t for n, t in tensors.items()
    }


def copied(name: str, copy: str):
    """Add another tensor of the same shape under another name."""
    return lambda tensors: {**tensors, copy: tensors[name] + 1}


def config_is(value):
    return lambda _: value


# fmt: off
NAMES = {
    "untied, and no head": Refused(
        Source(no_head), (HEAD, "tie_word_embeddings"), DOWNLOAD),
    "untied, and no head, no model. before names": Refused(
        Source(chain(no_head, sub(r"^model\.", ""))), (HEAD, "tie_word_embeddings"), DOWNLOAD),
    "a wrapper around all but the head": Refused(
        Source(part("^model", "module.")), ("'module.'", "not all", HEAD), DOWNLOAD),
    "a wrapper around one layer": Refused(
        Source(part(r"layers\.1\.", "module.")), ("'module.model.layers.1.",), DOWNLOAD),
    "a wrapper around one tensor": Refused(
        Source(part(r"^model\.norm", "module.")), ("'module.model.norm.weight'",), DOWNLOAD),
    "a wrapper around the embedding": Refused(
        Source(part("embed_tokens", "module.")), ("'module.'", "not all"), DOWNLOAD),
    "no model. before one layer": Refused(
        Source(sub(r"^model\.layers\.1", "layers.1")), ("layer 1", "'layers.1."), DOWNLOAD),
    "every name with and without _orig_mod.": Refused(
        Source(lambda t: {**t, **before("_orig_mod.")(t)}), ("_orig_mod.", "same")),
    "every name with and without module.": Refused(
        Source(lambda t: {**t, **before("module.")(t)}), ("'module.", "same")),
    "one name with and without module.": Refused(
        Source(copied("model.norm.weight", "module.model.norm.weight")),
        ("'module.model.norm.weight'", "same")),
    "one name with and without model.": Refused(
        Source(chain(sub(r"^model\.", ""), copied("norm.weight", "model.norm.weight"))),
        ("'norm.weight'", "'model.norm.weight'", "same")),
    "one name without model., with and without a wrapper": Refused(
        Source(chain(sub(r"^model\.", ""),
                     copied("layers.1.input_layernorm.weight",
                            "other.layers.1.input_layernorm.weight"))),
        ("'other.layers.1.input_layernorm.weight'", "same")),
    "a layer with and without a wrapper in the middle": Refused(
        Source(lambda t: {**t, **around_layers("_checkpoint_wrapped_module.")(t)}), ("same",)),
    "two copies of the model": Refused(
        Source(lambda t: {**before("student.")(t), **before("teacher.")(t)}),
        ("more than one model", "'student.'", "'teacher.'")),
}

ADAPTERS = {
    f"an adapter: {name.rpartition('1.')[2]}": Refused(
        Source(also(name, 4, 64)), (name, "adapter", "merge"), DOWNLOAD)
    for name in (
        f"{ATTENTION}q_proj.lora_A.default.weight", f"{ATTENTION}q_proj.lora_B.weight",
        f"{ATTENTION}q_proj.lora_magnitude_vector", f"{ATTENTION}q_proj.base_layer.weight",
        f"{EXPERTS}base_layer.lora_A.weight", f"{EXPERTS}lora_B.default.weight",
        f"{EXPERTS}gate_up_projs.0.lora_A.weight", f"{EXPERTS}w1.lora_A",
        "model.layers.1.mlp.router.original_module.weight",
        "model.layers.1.mlp.router.modules_to_save.default.weight",
        "model.embed_tokens.lora_embedding_A.default", f"{ATTENTION}q_proj.lora_a.weight",
        f"{ATTENTION}q_proj.lora_down.weight", f"{ATTENTION}q_proj.lora_A",
        f"{ATTENTION}q_proj.lora_magnitude_vector.default.weight",
    )
} | {
    "an adapter in PEFT's names": Refused(
        Source(chain(sub(r"q_proj\.weight", "q_proj.base_layer.weight"),
                     also(f"{ATTENTION}q_proj.lora_A.default.weight", 4, 64),
                     before("base_model.model."))), ("LoRA adapter", "merge"), DOWNLOAD),
    "an adapter in a vision-language model": Refused(
        Source(chain(also(f"{ATTENTION}q_proj.lora_A.weight", 4, 64), before("language_model.")),
               outer=inside("llm_config")), ("LoRA adapter", "merge"), DOWNLOAD),
}

MATRIX = "0.mlp.experts.down_proj"
SHAPES = {
    "one layer transposed": Refused(
        Source(transposed("1.mlp.experts.down_proj")), ("1.mlp.experts.down_proj' is transposed",)),
    "the first layer transposed": Refused(
        Source(transposed(MATRIX)), (f"{MATRIX}' is transposed",)),
    "all transposed, and nothing tells of gate_up_proj": Refused(
        Source(transposed(), sizes=ODD), ("gate_up_proj is square", "nothing shows")),
    "down_proj transposed, and nothing tells of gate_up_proj": Refused(
        Source(transposed("down_proj"), sizes=ODD), ("gate_up_proj is square", "nothing shows")),
    "blocks with the groups first": Refused(
        Source(each("_blocks", lambda b: b.transpose(1, 2)), mxfp4=True), ("_blocks'", "U8 [4,")),
    "blocks with the bytes before the groups": Refused(
        Source(each("_blocks", lambda b: b.transpose(2, 3)), mxfp4=True), ("_blocks'", "U8 [4,")),
    "blocks of the transposed matrices": Refused(
        Source(chain(each("gate_up_proj_blocks", lambda b: b.reshape(4, 64, 6, 16)),
                     each("gate_up_proj_scales", lambda s: s.reshape(4, 64, 6))), mxfp4=True),
        ("gate_up_proj_", "U8 [4, 64, 6")),
    "flat blocks, transposed": Refused(
        Source(each("_blocks", lambda b: b.flatten(2).transpose(1, 2)), mxfp4=True), ("_blocks'",)),
    "flat blocks of all experts": Refused(
        Source(each("_blocks", lambda b: b.flatten(0, 1)), mxfp4=True), ("_blocks'",)),
    "scales with the groups first": Refused(
        Source(each("_scales", lambda s: s.transpose(1, 2)), mxfp4=True), ("_scales'",)),
    "scales as F32": Refused(
        Source(each("_scales", lambda s: s.float()), mxfp4=True), ("_scales'", "F32")),
    "blocks as I8": Refused(
        Source(each("_blocks", lambda b: b.view(torch.int8)), mxfp4=True), ("_blocks'", "I8")),
    "other numbers of experts in a layer": Refused(
        Source(each("1.mlp.experts.down_proj", lambda t: t[:2])),
        ("1.mlp.experts.down_proj'", "different numbers of experts")),
}


def named(value):
    """A file that config.json names, beside a whole model.safetensors."""
    return Source(config={"transformers_weights": value})


FILES = {
    "a file named by config.json that is missing": Refused(
        named("gone.safetensors"), ("'gone.safetensors'", "no such file")),
    "a path out of the folder": Refused(
        named("../gone.safetensors"), ("'../gone.safetensors'", "same folder"), DOWNLOAD),
    "an absolute path": Refused(
        named("/tmp/gone.safetensors"), ("'/tmp/gone.safetensors'", "same folder"), DOWNLOAD),
    "a path into a folder": Refused(named("a/b.safetensors"), ("same folder",), DOWNLOAD),
    "a hidden file": Refused(named(".safetensors"), ("transformers_weights",), DOWNLOAD),
    "a line break": Refused(named("a\nb.safetensors"), ("transformers_weights",), DOWNLOAD),
    "a PyTorch file": Refused(
        named("pytorch_model.bin"), ("transformers_weights", "neither a safetensors"), DOWNLOAD),
    **{f"{value!r} for a file": Refused(
        named(value), ("transformers_weights", "neither a safetensors"), DOWNLOAD)
       for value in (3, True, [], {}, "", ["model.safetensors"])},
    "an index named by config.json that is missing": Refused(
        named("gone.safetensors.index.json"), ("no such file",)),
    "a whole file without tensors": Refused(
        Source(lambda t: {}), ("no tensors",)),
    "shards without tensors": Refused(
        Source(lambda t: {}, shards=2), ("weight_map",)),
}

INSIDE = {
    "two inner models": Refused(
        Source(before("language_model."), outer=lambda c: {
            "model_type": "pair", "text_config": c, "draft_config": c}),
        ("'pair'", "gpt-oss is inside")),
    "inside, without its configuration": Refused(
        Source(chain(before("language_model."), also("vision.x.weight", 3)),
               outer=config_is({"model_type": "internvl_chat"})),
        ("'internvl_chat'", "gpt-oss is inside")),
    "another vision-language model": Refused(
        Source(lambda t: {"language_model.model.embed_tokens.weight": torch.ones(2),
                          "vision.x": torch.ones(2)}, outer=config_is({"model_type": "llava"})),
        ("'llava'", "only gpt_oss")),
    "an encoder and a decoder": Refused(
        Source(lambda t: {"encoder.embed_tokens.weight": torch.ones(2),
                          "decoder.embed_tokens.weight": torch.ones(2)},
               outer=config_is({"model_type": "t5"})), ("'t5'", "only gpt_oss")),
    "inside, two heads": Refused(
        Source(chain(before("language_model."), also(HEAD, 67, 64)), outer=inside("llm_config")),
        (f"'{HEAD}'", f"'language_model.{HEAD}'", "same")),
}

LEFT = {
    f"left over: {name}": Refused(Source(also(name, 4, dtype=dtype)), (f"'{name}'",), DOWNLOAD)
    for name, dtype in {
        f"{EXPERTS}down_proj_scales": U8, f"{EXPERTS}down_proj_weight_scale": torch.bfloat16,
        f"{EXPERTS}down_proj_weight_scale_inv": torch.float32,
        f"{ATTENTION}q_proj.weight_scale": torch.bfloat16, f"{ATTENTION}o_proj.qweight": I32,
        f"{ATTENTION}q_proj.weight.absmax": torch.float32, "lm_head.weight_scale": torch.bfloat16,
        f"{EXPERTS}gate_up_proj_blocks_extra": U8, f"{EXPERTS}4.w1.weight": torch.bfloat16,
        f"{EXPERTS}gate_proj": torch.bfloat16, f"{ATTENTION}q_norm.weight": torch.bfloat16,
        f"{ATTENTION}qkv_proj.weight": torch.bfloat16, "lm_head.bias": torch.bfloat16,
        "model.layers.1.mlp.router.e_score_correction_bias": torch.bfloat16,
        "model.layers.1.mlp.shared_expert.weight": torch.bfloat16,
        "model.norm.bias": torch.bfloat16, "model.embed_positions.weight": torch.bfloat16,
        "mtp.layers.0.self_attn.q_proj.weight": torch.bfloat16,
        "mtp.experts.0.weight": torch.bfloat16, "extra.router.weight": torch.bfloat16,
        "model.layers.2.input_layernorm.weight": torch.bfloat16,
        "model.layers.7.x": torch.bfloat16,
    }.items()
} | {
    "dense experts beside MXFP4": Refused(
        Source(also(f"{EXPERTS}down_proj", 4, 96, 64), mxfp4=True), ("down_proj_blocks'", "same")),
    "blocks beside dense experts": Refused(
        Source(also(f"{EXPERTS}down_proj_blocks", 4, 64, 3, 16, dtype=U8)), ("down_proj_blocks'",)),
}

GONE = {
    "a layer missing at the end": Refused(
        Source(without("layers.1.")), ("layer 1 missing",), DOWNLOAD),
    "a layer missing at the beginning": Refused(
        Source(without("layers.0.")), ("layer 0 missing",), DOWNLOAD),
    "layers missing in the middle": Refused(
        Source(without("layers.1.", "layers.2.", "layers.4."), sizes={"num_hidden_layers": 6}),
        ("layers 1 to 2, 4 missing",), DOWNLOAD),
    "a layer of MXFP4 missing": Refused(
        Source(without("layers.0."), mxfp4=True), ("layer 0 missing",), DOWNLOAD),
    "the first layer of OpenAI's names missing": Refused(
        Source(chain(without("layers.0."), lambda t: openai_part(t, 1)), mxfp4=True,
               outer=config_is(openai_config())), ("layer 0 missing",), DOWNLOAD),
    "OpenAI's names, a tensor missing": Refused(
        Source(chain(openai, without("0.attn.qkv.weight")), mxfp4=True,
               outer=config_is(openai_config())), ("'block.0.attn.qkv.weight'",), DOWNLOAD),
    "one of the separate experts missing": Refused(
        Source(chain(to_unfused, without("1.mlp.experts.down_projs.2.weight"))),
        ("1 tensor missing that config.json calls for: ",
         "'model.layers.1.mlp.experts.down_projs.2.weight'"), DOWNLOAD),
    "separate experts in a name of two meanings": Refused(
        Source(chain(to_unfused, sub(r"(gate_up|down)_projs\.(\d)", r"\2.\1_proj"))),
        ("'model.layers.0.mlp.experts.0.gate_up_proj.weight'", "--from hf-unfused"), DOWNLOAD),
    "a layer of separate experts missing": Refused(
        Source(chain(to_unfused, without("layers.0."))), ("layer 0 missing",), DOWNLOAD),
    "TransformerLens's names, a layer missing": Refused(
        Source(chain(to_hooked, without("blocks.1."))), ("layer 1 missing",), DOWNLOAD),
    "shards without an index, a layer missing": Refused(
        Source(without("layers.1.", "model.norm"), file="a.safetensors",
               files={"b.safetensors": b"\x10\0\0\0\0\0\0\0{}              "}),
        ("layer 1 and 1 tensor missing", "'model.norm.weight'")),
    **{f"missing: {name}": Refused(Source(without(name)), (name,), DOWNLOAD)
       for name in ("model.embed_tokens.weight", "model.norm.weight", f"{ATTENTION}sinks",
                    f"{EXPERTS}gate_up_proj_bias", "0.mlp.router.bias")},
    "after module., the embedding missing": Refused(
        Source(chain(without("embed_tokens"), before("module."))), ("'module.",), DOWNLOAD),
    "a tensor under another name": Refused(
        Source(sub(r"1\.mlp\.router\.weight", "1.mlp.gate.weight")),
        ("1.mlp.router.weight'", "'model.layers.1.mlp.gate.weight'"), DOWNLOAD),
    "a classifier": Refused(
        Source(chain(no_head, also("score.weight", 2, 64))), ("is a classifier",), DOWNLOAD),
    "some biases missing": Refused(
        Source(without(*BIASES)), ("q_proj.bias'",), DOWNLOAD),
    "names of another architecture": Refused(
        Source(lambda t: {n.replace("mlp.experts", "block_sparse_moe").replace("self_attn", "attn")
                          .replace("layernorm", "norm").replace("router", "gate"): x
                          for n, x in t.items()}),
        ("names", "'model.layers.0.", "nearest known format is hf"), DOWNLOAD),
}
# fmt: on


def openai_part(tensors: dict, layer: int) -> dict:
    """Return one layer's tensors, and those outside of layers, in OpenAI's names."""
    other = {
        name.replace(f"layers.{layer}.", f"layers.{1 - layer}."): tensor
        for name, tensor in tensors.items()
    }
    both = openai({**other, **tensors})
    return {n: t for n, t in both.items() if not n.startswith(f"block.{1 - layer}.")}


REFUSED: dict[str, Refused] = {
    **NAMES,
    **ADAPTERS,
    **SHAPES,
    **FILES,
    **INSIDE,
    **LEFT,
    **GONE,
}
"""By name: a checkpoint, and what the line must say."""
