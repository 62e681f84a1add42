"""Small random models, and LoRA adapters for them that PEFT makes and saves.

An adapter folder is what `save_pretrained` of PEFT writes. Nothing here imports the package.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import oracle
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

SIZES = {"num_local_experts": 4, "num_experts_per_tok": 2}
"""All other sizes are those of `oracle.SMALL`: H = 64, I = 96, 4 heads of 24, 2 for k and v."""
BASES: dict[str, dict[str, Any]] = {
    "plain": SIZES,
    "one expert": {"num_local_experts": 1, "num_experts_per_tok": 1},
    "square": {**SIZES, "intermediate_size": 64},
    "no biases": {**SIZES, "attention_bias": False},
}
"""Settings of models. In the square one `down_proj` shows no orientation."""

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
ROUTER = "mlp.router.weight"
EXPERTS = {"target_modules": [], "target_parameters": [GATE_UP, DOWN]}

ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION},
    "q and v of one layer": {
        "r": 1,
        "lora_alpha": 2,
        "target_modules": ["q_proj", "v_proj"],
        "layers_to_transform": [1],
    },
    "gate_up": {"r": 3, "lora_alpha": 5, **EXPERTS, "target_parameters": [GATE_UP]},
    "down": {"r": 1, "lora_alpha": 2, **EXPERTS, "target_parameters": [DOWN]},
    "experts": {"r": 3, "lora_alpha": 6, **EXPERTS},
    "experts, listed in reverse": {"r": 4, "lora_alpha": 8, **EXPERTS}
    | {"target_parameters": [DOWN, GATE_UP]},
    "experts, as many ranks as experts": {"r": 4, "lora_alpha": 4, **EXPERTS},
    "attention and experts": {
        "r": 8,
        "lora_alpha": 8,
        "target_modules": ATTENTION,
        "target_parameters": [GATE_UP, DOWN],
    },
    "attention, experts and head": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": [*ATTENTION, "lm_head"],
        "target_parameters": [GATE_UP, DOWN],
    },
    "gate_up of one layer": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": [],
        "target_parameters": [f"1.{GATE_UP}"],
    },
    # The same key, mlp.experts.lora_A.weight, is of another parameter in each layer.
    "down of one layer, gate_up of the other": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": [],
        "target_parameters": [f"0.{DOWN}", f"1.{GATE_UP}"],
    },
    "experts of one layer, down of the other": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": [],
        "target_parameters": [f"0.{GATE_UP}", f"0.{DOWN}", f"1.{DOWN}"],
    },
    "router": {"r": 3, "lora_alpha": 6, "target_modules": [], "target_parameters": [ROUTER]},
    "router and experts": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": [],
        "target_parameters": [ROUTER, GATE_UP, DOWN],
        "rank_pattern": {r"0\.mlp\.router\.weight": 1, "router.weight": 2},
        "alpha_pattern": {r".*experts.*": 2},
    },
    "router and head saved": {
        "r": 1,
        "lora_alpha": 2,
        "target_modules": ["k_proj"],
        "modules_to_save": ["router", "lm_head"],
    },
    "norms and embedding saved": {
        "r": 1,
        "lora_alpha": 2,
        "target_modules": ["o_proj"],
        "modules_to_save": ["input_layernorm", "norm", "embed_tokens"],
    },
    "experts saved": {
        "r": 1,
        "lora_alpha": 2,
        "target_modules": ["v_proj"],
        "modules_to_save": ["experts"],
    },
    # PEFT rounds what it merges into a parameter twice, also where the module is a Linear.
    "q_proj as a parameter": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": [],
        "target_parameters": ["self_attn.q_proj.weight"],
    },
    "head": {"r": 8, "lora_alpha": 4, "target_modules": ["lm_head"]},
    "embedding": {"r": 3, "lora_alpha": 4, "target_modules": ["embed_tokens"]},
    "embedding and head": {
        "r": 3,
        "lora_alpha": 4,
        "target_modules": ["embed_tokens", "lm_head", "q_proj"],
    },
    "tokens": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["q_proj"],
        "trainable_token_indices": [100, 3, 7],
    },
    "tokens of embedding and head": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [5, 2], "lm_head": [9, 1, 0]},
    },
    "rsLoRA": {
        "r": 3,
        "lora_alpha": 4,
        "target_modules": ATTENTION,
        "use_rslora": True,
        "target_parameters": [GATE_UP, DOWN],
    },
    "patterns": {
        "r": 8,
        "lora_alpha": 8,
        "target_modules": ATTENTION,
        "target_parameters": [GATE_UP, DOWN],
        "rank_pattern": {
            r"layers\.1\.self_attn\.q_proj": 1,
            "q_proj": 3,
            "experts.gate_up_proj": 2,
            "o_proj|k_proj": 5,
        },
        "alpha_pattern": {r"0\.mlp\.experts\.down_proj": 3, "gate_up_proj": 5, "v_proj": 32},
    },
    "patterns with rsLoRA": {
        "r": 8,
        "lora_alpha": 8,
        "target_modules": ["o_proj"],
        "use_rslora": True,
        "target_parameters": [GATE_UP, DOWN],
        "rank_pattern": {"o_proj": 2, GATE_UP: 1, DOWN: 3},
        "alpha_pattern": {r"model\.layers\.1\.mlp\.experts\.gate_up_proj": 7},
    },
    "DoRA": {"r": 3, "lora_alpha": 6, "target_modules": ATTENTION, "use_dora": True},
    "DoRA of head": {"r": 3, "lora_alpha": 6, "target_modules": ["lm_head"], "use_dora": True},
    "DoRA of embedding": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["embed_tokens"],
        "use_dora": True,
    },
    "lora_bias": {"r": 3, "lora_alpha": 6, "target_modules": ATTENTION, "lora_bias": True},
    "all biases": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], "bias": "all"},
    "all biases, with a router": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["q_proj"],
        "target_parameters": [ROUTER, DOWN],
        "bias": "all",
    },
    "biases of LoRA": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "o_proj"],
        "bias": "lora_only",
    },
}
"""Arguments of `LoraConfig`, by a name of the adapter."""


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what PEFT warns of in these small models, where it is expected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def save_base(folder: Path, dtype: torch.dtype, **settings: Any) -> Path:
    """Save a small random model with transformers: the same values in each dtype, but rounded."""
    return oracle.save_dense(folder, dtype, **SIZES | settings)


def load(folder: Path, dtype: torch.dtype | str, as_other_versions: bool = False) -> Any:
    """Load a model.

    With `as_other_versions`, without the mark that its experts' parameters are `[E, in, out]`:
    pairs of versions of PEFT and transformers that know no such mark, or read it the other way
    round, make and read adapters as this pair does for a model without it.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if as_other_versions:
        for layer in model.model.layers:
            layer.mlp.experts.is_transposed = False
    return model.eval()


def fill(model: torch.nn.Module, seed: int) -> None:
    """Set all parameters that would be trained to random values, of about the base's size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            random = torch.randn(parameter.shape, generator=generator)
            if "lora_A" in name or "lora_embedding_A" in name:
                parameter.copy_(random / 8)
            elif "lora_B" in name or "lora_embedding_B" in name:
                parameter.copy_(random / 24)
            elif "magnitude" in name:
                parameter.mul_(1 + random / 8)
            else:  # trained as a whole
                parameter.add_(random / 16)


def save_adapter(
    folder: Path, base: Path, seed: int = 1, as_other_versions: bool = False, **config: Any
) -> Path:
    """Make an adapter of a model with PEFT, set it to random values, and save it with PEFT.

    The model is in the dtype of its files. PEFT saves LoRA's tensors in float32 all the same, and
    all others in the model's dtype.
    """
    with quiet():
        model = load(base, "auto", as_other_versions)
        peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
        fill(peft, seed)
        peft.save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change entries of an adapter's configuration; `...` removes one."""
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return folder
