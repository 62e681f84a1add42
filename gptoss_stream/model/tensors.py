"""A gpt-oss model: its configuration, and its tensors by name and axes.

Each tensor has one name and one order of axes here; `formats/` says how each checkpoint format
stores it. Gate and up projection are one tensor, with an axis of their own.

Axes: l layer, e expert, t gate (0) or up (1), n query head, k key/value head, h element of a head,
m hidden size, i intermediate size, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["ABSENT_IS_ZERO", "ATTENTION_BIASES", "MODEL_TENSORS"]


MODEL_TENSORS: Mapping[str, str] = {
    "embed": "v m",
    "attn_norm": "l m",
    "q": "l n h m",
    "q_bias": "l n h",
    "k": "l k h m",
    "k_bias": "l k h",
    "v": "l k h m",
    "v_bias": "l k h",
    "sinks": "l n",
    "o": "l m n h",
    "o_bias": "l m",
    "mlp_norm": "l m",
    "router": "l e m",
    "router_bias": "l e",
    "gate_up": "l e t i m",
    "gate_up_bias": "l e t i",
    "down": "l e m i",
    "down_bias": "l e m",
    "final_norm": "m",
    "unembed": "v m",
    "unembed_bias": "v",
}
"""Every tensor of the model and its axes; weights are [out, in]. `unembed_bias` is zero, and only
`transformer-lens` stores it."""


ATTENTION_BIASES = frozenset({"q_bias", "k_bias", "v_bias", "o_bias"})


ABSENT_IS_ZERO = ATTENTION_BIASES | {"unembed_bias"}
"""What a model that lacks it computes as if it were zero."""
