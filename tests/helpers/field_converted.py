"""The checkpoints of the field that are converted."""

from __future__ import annotations

import torch
from field_cases import INDEX, Converted, Source
from field_models import (
    LAYER,
    MXFP4,
    also,
    around_layers,
    before,
    chain,
    each,
    openai_config,
    sub,
    to_hooked,
    transposed,
)
from independent import to_openai, to_unfused

HEAD = "lm_head.weight"
BIASES = ("q_proj.bias", "k_proj.bias")


def no_head(tensors):
    return {name: tensor for name, tensor in tensors.items() if name != HEAD}


def with_equal_head(tensors):
    return {**tensors, HEAD: tensors["model.embed_tokens.weight"]}


def openai(tensors):
    return to_openai(tensors, 2)


TIED = {"tie_word_embeddings": True}
PACKED = {"quantization_config": MXFP4}

# fmt: off
HEADS = {
    "tied, and another head": Converted(
        Source(config=TIED), config={"tie_word_embeddings": False}, same_as_transformers=True),
    "tied, and an equal head": Converted(
        Source(with_equal_head, TIED), without=(HEAD,), same_as_transformers=True),
    "tied, and no head": Converted(
        Source(no_head, TIED), without=(HEAD,), config={"tie_word_embeddings": True},
        same_as_transformers=True),
    "tied, MXFP4 and another head": Converted(
        Source(config={**TIED, "quantization_config": MXFP4}, mxfp4=True),
        config={"tie_word_embeddings": False}),
    "tied, transposed and another head": Converted(
        Source(transposed(), TIED), ("transposed",), config={"tie_word_embeddings": False}),
}

DENIED = {
    "biases that the configuration denies": Converted(
        Source(config={"attention_bias": False}), ("attention_bias false",),
        config={"attention_bias": True}),
}

METHODS = ("mxfp4", "bitsandbytes", "gptq", "awq", "fp8", "compressed-tensors", "quark",
           "modelopt", "auto-round", "torchao", "x" * 200)
STALE = {
    **{f"a configuration of {method[:20]} left over": Converted(
        Source(config={"quantization_config": {"quant_method": method}}), ("out of date",))
       for method in METHODS},
    "MXFP4 left over, as transformers writes it": Converted(
        Source(config={"quantization_config": MXFP4}), ("out of date",)),
    "MXFP4 left over, to be dequantized": Converted(
        Source(config={"quantization_config": {**MXFP4, "dequantize": True}}), ("out of date",)),
    "an empty quantization_config": Converted(Source(config={"quantization_config": {}})),
    "null for quantization_config": Converted(
        Source(config={"quantization_config": None}), same_as_transformers=True),
    "MXFP4 without a quantization_config": Converted(Source(mxfp4=True), ("read as MXFP4",)),
    "MXFP4 to be dequantized": Converted(
        Source(config={"quantization_config": {**MXFP4, "dequantize": True}}, mxfp4=True),
        same_as_transformers=True),
    "MLX's entry left over": Converted(
        Source(config={"quantization": {"group_size": 32, "bits": 4}})),
    "ModelOpt's file left over": Converted(Source(
        files={"hf_quant_config.json": {"quantization": {"quant_algo": "NVFP4"}}})),
    "a buffer of integers, and a configuration left over": Converted(
        Source(also("model.rotary_emb.position_ids", 1, 9, dtype=torch.int64),
               {"quantization_config": {"quant_method": "bitsandbytes"}}), unmapped=1),
}

PREFIXES = ("module.", "_orig_mod.", "base_model.model.", "module._orig_mod.", "_orig_mod.module.",
            "_orig_mod.base_model.model.", "module.base_model.model.", "model.", "language_model.",
            "_fsdp_wrapped_module.", "_fsdp_wrapped_module._orig_mod.", "student.model.llm.")
MIDDLE = {
    "a checkpoint wrapper": around_layers("_checkpoint_wrapped_module."),
    "axolotl's checkpoint wrapper": sub(r"\.mlp\.", "._checkpoint_wrapped_model.mlp."),
    "FSDP": chain(around_layers("_fsdp_wrapped_module."), before("_fsdp_wrapped_module.")),
    "FSDP's older name": chain(around_layers("_fpw_module."), before("_fpw_module.")),
    "FSDP around a checkpoint wrapper":
        around_layers("_fsdp_wrapped_module._checkpoint_wrapped_module."),
    "compiled layers": around_layers("_orig_mod."),
    "compiled layers within DDP": chain(around_layers("_orig_mod."), before("module.")),
    "one compiled layer": sub(r"layers\.1\.", "layers.1._orig_mod."),
    "a wrapped embedding and a wrapped head":
        sub(r"(embed_tokens|lm_head|embedding|unembedding)\.", r"\1._orig_mod."),
}
WRAPPED = {
    **{f"names after {prefix}": Converted(Source(before(prefix)), (repr(prefix)[-8:],))
       for prefix in PREFIXES},
    **{f"names within {name}": Converted(Source(change), ("read without",))
       for name, change in MIDDLE.items()},
    **{f"{name} around MXFP4": Converted(Source(change, mxfp4=True), ("read without",))
       for name, change in {"DDP": before("module."), **MIDDLE}.items()},
    **{f"{name} around OpenAI's names": Converted(
        Source(chain(openai, change), mxfp4=True, outer=lambda _: openai_config()),
        ("read without",))
       for name, change in {"DDP": before("module."), "FSDP": MIDDLE["FSDP"],
                            "compiled layers": MIDDLE["compiled layers"]}.items()},
    **{f"{name} around TransformerLens's names": Converted(
        Source(chain(to_hooked, change)), ("read without",))
       for name, change in {"DDP": before("module."), "FSDP": MIDDLE["FSDP"],
                            "compiled layers": MIDDLE["compiled layers"]}.items()},
    "compiled, in shards": Converted(Source(before("_orig_mod."), shards=3), ("_orig_mod.",)),
    "no model. before names, tied": Converted(
        Source(chain(no_head, sub(r"^model\.", "")), TIED), ("'model.'",), (HEAD,),
        same_as_transformers=True),
    "no model. before names, with a head": Converted(
        Source(sub(r"^model\.", "")), ("'model.'",), same_as_transformers=True),
    "no model. before names, MXFP4": Converted(
        Source(sub(r"^model\.", ""), mxfp4=True), ("'model.'",)),
    "no model. before names, after module.": Converted(
        Source(chain(sub(r"^model\.", ""), before("module."))), ("'module.'", "'model.'")),
    "PEFT around a model without a head": Converted(
        Source(chain(no_head, sub(r"^model\.", ""), before("base_model.model.")), TIED),
        ("base_model",), (HEAD,)),
}

ROUTERS = {
    "separate experts": Converted(Source(to_unfused)),
    "separate experts in shards, in any order": Converted(
        Source(lambda t: dict(reversed(to_unfused(t).items())), shards=5)),
    "separate experts after module., one layer compiled": Converted(
        Source(chain(to_unfused, sub(r"layers\.1\.", "layers.1._orig_mod."), before("module."))),
        ("'module.'", "'_orig_mod.'")),
    "the router as with separate experts": Converted(Source(sub(r"router\.", "router.linear."))),
    "the router as with separate experts, MXFP4": Converted(
        Source(sub(r"router\.", "router.linear."), PACKED, mxfp4=True)),
}

ODD = {"hidden_size": 64, "intermediate_size": 32}
SQUARE = {"hidden_size": 96, "intermediate_size": 96}
TRANSPOSED = {
    "experts transposed": Converted(
        Source(transposed()), ("gate_up_proj and down_proj are stored transposed",)),
    "only down_proj transposed": Converted(
        Source(transposed("experts.down_proj")), ("down_proj are stored transposed",)),
    "only gate_up_proj transposed": Converted(
        Source(transposed("experts.gate_up_proj")), ("gate_up_proj are stored transposed",)),
    "square down_proj follows gate_up_proj": Converted(
        Source(transposed(), sizes=SQUARE), ("gate_up_proj and down_proj",)),
    "square, not transposed": Converted(Source(sizes=SQUARE), same_as_transformers=True),
    "square gate_up_proj, not transposed": Converted(
        Source(sizes=ODD), same_as_transformers=True),
    "experts transposed, after module., in shards": Converted(
        Source(chain(transposed(), before("module.")), shards=4), ("transposed", "'module.'")),
}


def fixed_groups(ends: str, k: int):
    """Blocks with a k-th of the groups: k times the rows of gate_up, k times the bytes of down."""
    def change(blocks):
        experts, rows, groups, nbytes = blocks.shape
        if ends.startswith("gate_up"):
            return blocks.reshape(experts, k * rows, groups // k, nbytes)
        return blocks.reshape(experts, rows, groups // k, nbytes * k)
    return each(ends, change)


E8M0 = each("_scales", lambda scales: scales.view(torch.float8_e8m0fnu))
FLAT = each("_blocks", lambda blocks: blocks.flatten(2))
HARD = chain(fixed_groups("gate_up_proj_blocks", 2), fixed_groups("down_proj_blocks", 3))
BLOCKS = {
    "MXFP4 as transformers saves it": Converted(
        Source(config=PACKED, mxfp4=True), same_as_transformers=True),
    "flat blocks": Converted(Source(FLAT, PACKED, mxfp4=True)),
    "flat blocks of one matrix": Converted(
        Source(each("down_proj_blocks", lambda b: b.flatten(2)), PACKED, mxfp4=True)),
    "flat blocks of one layer": Converted(
        Source(each("1.mlp.experts.down_proj_blocks", lambda b: b.flatten(2)), PACKED, mxfp4=True)),
    "blocks with a fixed number of groups": Converted(Source(HARD, PACKED, mxfp4=True)),
    "blocks with a fixed number of groups, the other way": Converted(
        Source(chain(fixed_groups("down_proj_blocks", 3),
                     each("gate_up_proj_blocks", lambda b: b.reshape(4, 192, 1, 32))),
               PACKED, mxfp4=True)),
    "scales as F8_E8M0": Converted(Source(E8M0, PACKED, mxfp4=True)),
    "flat blocks, scales as F8_E8M0, DDP": Converted(
        Source(chain(FLAT, E8M0, before("module.")), PACKED, mxfp4=True), ("'module.'",)),
    "flat blocks in OpenAI's names": Converted(
        Source(chain(openai, each(".blocks", lambda b: b.flatten(2))), mxfp4=True,
               outer=lambda _: openai_config())),
}

FILES = {
    "a whole file beside a stale index": Converted(
        Source(files={INDEX: {"weight_map": {"x": "model-00001-of-00003.safetensors"}}}),
        ("model.safetensors is read",), same_as_transformers=True),
    "a whole file beside another model and its index": Converted(
        Source(foreign=("model-00001-of-00001.safetensors",),
               files={INDEX: {"weight_map": dict.fromkeys(
                   [HEAD], "model-00001-of-00001.safetensors")}}),
        ("model.safetensors is read",), same_as_transformers=True),
    "a whole file beside an index that is not JSON": Converted(
        Source(files={INDEX: b"<html>"}), ("model.safetensors is read",),
        same_as_transformers=True),
    "a whole file beside other files": Converted(
        Source(foreign=("consolidated.safetensors", "optimizer.safetensors")),
        same_as_transformers=True),
    "a file named by config.json": Converted(
        Source(config={"transformers_weights": "mine.safetensors"}, file="mine.safetensors",
               foreign=("model.safetensors",)),
        ("mine.safetensors (transformers_weights)",), same_as_transformers=True),
    "a file named by config.json beside an index": Converted(
        Source(config={"transformers_weights": "mine.safetensors"}, file="mine.safetensors",
               files={INDEX: {"weight_map": {"x": "gone.safetensors"}}}),
        ("mine.safetensors (transformers_weights)",), same_as_transformers=True),
    "an index named by config.json": Converted(
        Source(config={"transformers_weights": INDEX}, shards=3), same_as_transformers=True),
    "shards without an index": Converted(
        Source(shards=0, file="a-00001.safetensors")),
}


def inside(*keys: str, **outer):
    """Put the configuration into another model's, below some keys."""
    def change(found):
        for key in reversed(keys):
            found = {key: found}
        return {"model_type": "internvl_chat", "architectures": ["InternVLChatModel"], **outer,
                **found}
    return change


VISION = also("vision_model.encoder.layers.0.self_attn.q_proj.weight", 3, 5)
V5 = chain(sub(r"^model\.", "model.language_model."), also("model.vision_tower.x.weight", 3))
INSIDE = {
    "inside InternVL": Converted(
        Source(chain(before("language_model."), VISION), outer=inside("llm_config")),
        ("the gpt-oss inside is read: llm_config", "1 tensor beside it not"), unmapped=1,
        config={"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"]}),
    "inside, as transformers 5 names it": Converted(
        Source(V5, outer=inside("text_config")), ("text_config", "1 tensor beside"), unmapped=1),
    "inside, nested deeper": Converted(
        Source(chain(before("thinker.language_model."), VISION),
               outer=inside("thinker_config", "text_config")),
        ("thinker_config.text_config",), unmapped=1),
    "inside, MXFP4": Converted(
        Source(chain(before("language_model."), VISION), mxfp4=True,
               outer=inside("llm_config", quantization_config=MXFP4)), ("llm_config",), unmapped=1),
    "inside, the head at the top": Converted(
        Source(chain(sub(r"^model\.", "language_model.model."), VISION),
               outer=inside("text_config")), ("text_config",), unmapped=1),
    "inside, tied": Converted(
        Source(chain(no_head, before("language_model."), VISION), TIED,
               outer=inside("text_config")), ("text_config",), (HEAD,), unmapped=1),
    "inside, after module.": Converted(
        Source(chain(before("module.language_model."), sub("^vision", "module.vision")),
               outer=inside("llm_config")), ("llm_config",)),
    "inside, a vision tower that is quantized": Converted(
        Source(chain(before("language_model."),
                     also("vision_model.q_proj.weight", 4, dtype=torch.uint8),
                     also("vision_model.q_proj.weight.absmax", 4)),
               outer=inside("llm_config")), ("2 tensors beside",), unmapped=2),
    "inside, at the top": Converted(
        Source(also("visual.blocks.0.attn.qkv.weight", 3), outer=inside("text_config")),
        ("1 tensor beside",), unmapped=1),
    "inside, a vision tower with an embedding": Converted(
        Source(chain(before("language_model."), also("vision_model.position.embedding.weight", 3)),
               outer=inside("llm_config")), ("1 tensor beside",), unmapped=1),
}

CONFIG_KEYS = {
    "entries of other programs": Converted(
        Source(config={"architectures": ["FSDPGptOssForCausalLM"], "auto_map": {"AutoModel": "x.y"},
                       "unsloth_version": "2026.1", "unsloth_fixed": True, "quantization": None,
                       "eos_token_id": 5}),
        config={"architectures": ["GptOssForCausalLM"], "eos_token_id": 5}),
    "num_experts for num_local_experts": Converted(
        Source(config={"num_local_experts": ..., "num_experts": 4}),
        config={"num_local_experts": 4}),
}

ATTENTION = "model.layers.1.self_attn."
HARMLESS = {
    f"{name.rpartition('.')[2]} of {name.split('.')[-2]}": Converted(
        Source(also(name, *shape)), unmapped=1)
    for name, shape in {
        f"{ATTENTION}rotary_emb.inv_freq": (12,), "model.rotary_emb.inv_freq": (12,),
        f"{ATTENTION}k_scale": (), f"{ATTENTION}v_scale": (), f"{ATTENTION}attn.q_scale": (),
        f"{ATTENTION}k_proj.k_scale": (), f"{ATTENTION}kv_scale": (),
        f"{ATTENTION}q_proj.input_scale": (), "score.weight": (1, 64),
        f"{LAYER.format(0)}mlp.experts.down_proj_input_scale": (4,),
        f"{ATTENTION}attn.kv_cache_scale": (),
    }.items()
}
# fmt: on

CONVERTED: dict[str, Converted] = {
    **HEADS,
    **DENIED,
    **STALE,
    **WRAPPED,
    **ROUTERS,
    **TRANSPOSED,
    **BLOCKS,
    **FILES,
    **INSIDE,
    **CONFIG_KEYS,
    **HARMLESS,
}
"""By name: a checkpoint, and what is right for it."""
