"""The tensors of a gpt-oss model by name, with their axes.

Each tensor has one name and one order of axes here. A format says under which names and in which
order of axes it stores them. Gate and up projection are one tensor with an axis of its own, t.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

__all__ = [
    "ABSENT_IS_ZERO",
    "ATTENTION_BIASES",
    "EXPERT_TENSORS",
    "MODEL_TENSORS",
    "matrix_axes",
    "matrix_shape",
]

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
"""Every tensor of the model and its axes; weights are [out, in].

Axes: l layer, e expert, t gate (0) or up (1), n query head, k key/value head, h element of a head,
m hidden size, i intermediate size, v vocabulary. `unembed_bias` is zero in a released model, and
only `transformer-lens` stores it.
"""

EXPERT_TENSORS = frozenset({"gate_up", "gate_up_bias", "down", "down_bias"})
"""Tensors of which each expert has its own."""

ATTENTION_BIASES = frozenset({"q_bias", "k_bias", "v_bias", "o_bias"})

ABSENT_IS_ZERO = ATTENTION_BIASES | {"unembed_bias"}
"""Tensors that a model may lack; it then computes as if they were zero."""

_MATRICES: Mapping[str, tuple[str, str]] = {
    "embed": ("v", "m"),
    "q": ("nh", "m"),
    "k": ("kh", "m"),
    "v": ("kh", "m"),
    "o": ("m", "nh"),
    "router": ("e", "m"),
    "gate_up": ("it", "m"),
    "gate_up_bias": ("it", ""),
    "down": ("m", "i"),
    "unembed": ("v", "m"),
}


def matrix_axes(tensor: str) -> tuple[str, str]:
    """Return the axes of the rows and of the columns of a tensor, of one layer and expert.

    They are those of the linear layers in transformers: rows are outputs, columns are inputs, and
    gate and up alternate. A vector has no axes of columns.

    Args:
        tensor: A name in `MODEL_TENSORS`.
    """
    without = "le" if tensor in EXPERT_TENSORS else "l"
    vector = "".join(axis for axis in MODEL_TENSORS[tensor].split() if axis not in without)
    return _MATRICES.get(tensor, (vector, ""))


def matrix_shape(tensor: str, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Return the numbers of rows and columns of a tensor, of one layer and expert.

    Args:
        tensor: A name in `MODEL_TENSORS`.
        sizes: The size of each axis (see `ModelConfig.sizes`).
    """
    rows, columns = (prod(sizes[axis] for axis in axes) for axes in matrix_axes(tensor))
    return rows, columns
