"""Hugging Face's names with modules for each expert, as in unsloth's 4-bit models.

`gate_up_projs.{e}` is a linear layer whose rows alternate between gate and up, like the columns of
the stacked tensor in `hf`. Source: unsloth-zoo, `temporary_patches/gpt_oss.py`.
"""

from __future__ import annotations

from ..checkpoint.metadata import CheckpointInfo
from ..errors import CheckpointError
from ..model.config import ModelConfig
from ._hugging_face import (
    EXPERTS,
    FIRST,
    LAST,
    LAYER,
    config_files,
    is_hugging_face,
    notes,
    read_model,
)
from ._table import Row, Table

__all__ = ["TABLE", "WARNING", "check", "detect", "files", "notes", "read_model"]


def _expert(module: str, kind: str, tensor: str, axes: str) -> Row:
    """Return the row of an expert's weight or bias, under its plural and its singular name."""
    singular = f"{EXPERTS}{{e}}.{module.removesuffix('s')}.{kind}"
    return Row(f"{EXPERTS}{module}.{{e}}.{kind}", tensor, axes, aliases=(singular,))


def _router(kind: str, tensor: str, axes: str) -> Row:
    """Return the row of the router's weight or bias, with or without the module `linear`."""
    router = LAYER + "mlp.router."
    return Row(f"{router}linear.{kind}", tensor, axes, aliases=(f"{router}{kind}",))


TABLE: Table = (
    *FIRST,
    _router("weight", "router", "e m"),
    _router("bias", "router_bias", "e"),
    _expert("gate_up_projs", "weight", "gate_up", "(i t) m"),
    _expert("gate_up_projs", "bias", "gate_up_bias", "(i t)"),
    _expert("down_projs", "weight", "down", "m i"),
    _expert("down_projs", "bias", "down_bias", "m"),
    *LAST,
)

WARNING = (
    "only code with such modules (unsloth's) loads hf-unfused: transformers itself would leave the "
    "experts random; it loads --to hf"
)

files = config_files


def detect(info: CheckpointInfo) -> str | None:
    """See `Format.detect`: by the names of the first expert."""
    singular = EXPERTS.format(l=0) + "0.gate_up_proj.weight"
    if is_hugging_face(info, (".0.gate_up_proj.weight",)) and singular in info.tensors:
        file = info.location.display_path(info.tensors[singular].shard)
        raise CheckpointError(
            f"{file}: tensor {singular!r}: some programs write under this name rows that alternate "
            "between gate and up, others write gate and up as two halves; if you know that the "
            "rows alternate, add --from hf-unfused"
        )
    if not is_hugging_face(info, ("gate_up_projs.0.weight", "down_projs.0.weight")):
        return None
    return 'config.json has model_type "gpt_oss", and each expert is a module (gate_up_projs.0)'


def check(model: ModelConfig) -> None:
    """See `Format.check`: nothing to refuse, since loaders read the whole configuration."""
