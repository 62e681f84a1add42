"""What the formats of Hugging Face share: all tensors except those of the experts.

Their configuration is in `_hugging_face_config`. Source of names and shapes: transformers,
`models/gpt_oss/modeling_gpt_oss.py`.
"""

from __future__ import annotations

from ..checkpoint.metadata import CheckpointInfo
from ..model.config import ModelConfig
from ._hugging_face_config import config_files, config_notes, parse_config
from ._table import Row, Table

__all__ = [
    "EXPERTS",
    "EXPERT_BIASES",
    "FIRST",
    "LAST",
    "LAYER",
    "LIBRARY",
    "LOADING",
    "ROUTER",
    "config_files",
    "is_hugging_face",
    "notes",
    "read_model",
]

LAYER = "model.layers.{l}."
_ATTENTION = LAYER + "self_attn."
EXPERTS = LAYER + "mlp.experts."

# fmt: off
FIRST: Table = (
    Row("model.embed_tokens.weight", "embed", "v m"),
    Row(LAYER + "input_layernorm.weight", "attn_norm", "m"),
    Row(_ATTENTION + "q_proj.weight", "q", "(n h) m"),
    Row(_ATTENTION + "q_proj.bias", "q_bias", "(n h)", optional=True),
    Row(_ATTENTION + "k_proj.weight", "k", "(k h) m"),
    Row(_ATTENTION + "k_proj.bias", "k_bias", "(k h)", optional=True),
    Row(_ATTENTION + "v_proj.weight", "v", "(k h) m"),
    Row(_ATTENTION + "v_proj.bias", "v_bias", "(k h)", optional=True),
    Row(_ATTENTION + "o_proj.weight", "o", "m (n h)"),
    Row(_ATTENTION + "o_proj.bias", "o_bias", "m", optional=True),
    Row(_ATTENTION + "sinks", "sinks", "n"),
    Row(LAYER + "post_attention_layernorm.weight", "mlp_norm", "m"),
)
"""The rows before the router."""

_ROUTER = LAYER + "mlp.router."
ROUTER: Table = (
    Row(_ROUTER + "weight", "router", "e m", aliases=(_ROUTER + "linear.weight",)),
    Row(_ROUTER + "bias", "router_bias", "e", aliases=(_ROUTER + "linear.bias",)),
)
"""The router's rows. With experts of their own modules, the router's is a module in it too."""

EXPERT_BIASES: Table = (
    Row(EXPERTS + "gate_up_proj_bias", "gate_up_bias", "e (i t)"),
    Row(EXPERTS + "down_proj_bias", "down_bias", "e m"),
)
"""The biases of the experts of a layer, stacked in one tensor for gate and up and one for down."""

LAST: Table = (
    Row("model.norm.weight", "final_norm", "m"),
    Row("lm_head.weight", "unembed", "v m", optional=True),
)
"""The rows after the experts."""
# fmt: on

LIBRARY = "transformers"
LOADING = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(folder)"""


def is_hugging_face(info: CheckpointInfo, experts: tuple[str, ...]) -> bool:
    """Return whether a checkpoint has a gpt-oss's config.json and certain experts' tensors.

    Args:
        info: The checkpoint.
        experts: Ends of names, of which one must be there in any layer.
    """
    if info.config.get("model_type") != "gpt_oss" or info.config_name != "config.json":
        return False
    return any(name.endswith(experts) and ".mlp.experts." in name for name in info.tensors)


def read_model(info: CheckpointInfo) -> ModelConfig:
    """See `Format.read_model`."""
    return parse_config(info.config)


def notes(info: CheckpointInfo) -> list[str]:
    """See `Format.notes`."""
    return config_notes(info.config)
