"""Hugging Face's names with each expert in modules of its own, as unsloth's 4-bit models have them.

`gate_up_projs.{e}` is a linear layer whose rows alternate between gate and up, as those of the
stacked tensor do: unsloth-zoo, `temporary_patches/gpt_oss.py`.
"""

from __future__ import annotations

from ..checkpoint.metadata import CheckpointInfo
from ..errors import CheckpointError
from ..model.config import ModelConfig
from ._hugging_face import EXPERTS, FIRST, LAST, LAYER, config_files, is_unquantised, read_model
from ._table import Row, Table

__all__ = ["TABLE", "WARNING", "check", "detect", "files", "read_model"]


def _expert(module: str, kind: str, tensor: str, axes: str) -> Row:
    singular = f"{EXPERTS}{{e}}.{module.removesuffix('s')}.{kind}"
    return Row(f"{EXPERTS}{module}.{{e}}.{kind}", tensor, axes, also=(singular,))


def _router(kind: str, tensor: str, axes: str) -> Row:
    router = LAYER + "mlp.router."
    return Row(f"{router}linear.{kind}", tensor, axes, also=(f"{router}{kind}",))


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
    "only modules of this shape (unsloth's) load hf-unfused: transformers itself would leave the "
    "experts random; --to hf is what it loads"
)


files = config_files


def detect(info: CheckpointInfo) -> str | None:
    """See `Format.detect`: by the names of the first experts."""
    if not is_unquantised(info):
        return None
    singular = EXPERTS.format(l=0) + "0.gate_up_proj.weight"
    if singular in info.tensors:
        raise CheckpointError(
            f"{info.location.display_path(info.tensors[singular].shard)}: tensor {singular!r}: some write under "
            "this name rows that alternate between gate and up, others gate and up as two halves; "
            "where you know that they alternate, add --from hf-unfused"
        )
    if EXPERTS.format(l=0) + "gate_up_projs.0.weight" not in info.tensors:
        return None
    return 'config.json has model_type "gpt_oss", and each expert is a module (gate_up_projs.0)'


def check(model: ModelConfig) -> None:
    """See `Format.check`: the code that loads this format reads the whole configuration."""
