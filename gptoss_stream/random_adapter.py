"""Random LoRA adapters for random checkpoints, in the files that PEFT would save.

They are written like a random checkpoint: planned into a shard, whose elements a reader generates.
Source of names, shapes and configuration: PEFT 0.21, `tuners/lora/config.py`,
`tuners/lora/layer.py` (`ParamWrapper`) and `utils/save_and_load.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from . import __version__
from ._utils import strict_json
from ._utils.arguments import finite_number, texts, whole_number
from .adapters.adapter_file import CONFIG_NAME, WEIGHTS_NAME
from .errors import OptionError
from .formats import hf
from .model.config import ModelConfig
from .model.tensors import matrix_shape
from .planning.shards import plan_shards
from .random_checkpoint import RandomCheckpoint, RandomReader, check_seed, chosen_dimensions
from .tensors.dtypes import DType
from .tensors.raw_tensor import RawTensor
from .transforms.operands import DenseOperand
from .transforms.output_tensor import OutputTensor, Segment
from .transforms.rearrangement import make_rearrangement

__all__ = ["DEFAULT_RANK", "DEFAULT_TARGETS", "TARGETS", "random_adapter"]

TARGETS: Mapping[str, tuple[str, ...]] = {
    "attention": ("q", "k", "v", "o"),
    "router": ("router",),
    "experts": ("gate_up", "down"),
    "lm_head": ("unembed",),
}
"""What an adapter can change: the model tensors of each target."""
DEFAULT_TARGETS = ("attention", "experts")
DEFAULT_RANK = 16

_PREFIX = "base_model.model."
_PARAMETERS = ("router", "gate_up", "down")
"""Model tensors that are parameters of a module which is no linear layer. PEFT finds them by
`target_parameters`, the others by `target_modules`."""
_STACKED = {"gate_up": ".base_layer", "down": ""}
"""Parameters with an adapter for each expert. Both are of one module, so PEFT wraps it twice:
inside for gate and up, outside for down."""
_MAX_RANK = 2**16
_PEFT_VERSION = "0.21.2"


def random_adapter(
    preset: str = "tiny",
    *,
    rank: int = DEFAULT_RANK,
    alpha: float | None = None,
    targets: str | Sequence[str] = DEFAULT_TARGETS,
    seed: int = 0,
    **overrides: int | None,
) -> RandomCheckpoint:
    """Return what `synth_adapter` writes with the same options.

    Raises:
        OptionError: For a rank, an alpha, targets or dimensions that cannot be used.
    """
    dimensions, chosen = chosen_dimensions(preset, overrides), _chosen_targets(targets)
    seed, rank = check_seed(seed), whole_number(rank, "rank")
    if not 1 <= rank <= _MAX_RANK:
        raise OptionError(f"rank {rank}: it must be an integer in 1 to {_MAX_RANK:,}")
    alpha = 2 * rank if alpha is None else finite_number(alpha, "alpha")
    names = [tensor for target in chosen for tensor in TARGETS[target]]
    tensors = sorted(_tensors(dimensions.model(), names, rank), key=lambda tensor: tensor.name)
    # PEFT saves an adapter as one file, however large it is.
    (shard,) = plan_shards(tensors, sum(tensor.nbytes for tensor in tensors))
    return RandomCheckpoint(
        (replace(shard, name=WEIGHTS_NAME),),
        RandomReader(seed),
        {CONFIG_NAME: strict_json.dumps(_config(names, rank, alpha))},
        {
            "tool": "gptoss_stream",
            "version": __version__,
            "made": "synth --adapter",
            "rank": rank,
            "alpha": alpha,
            "targets": chosen,
            "seed": seed,
            "dimensions": asdict(dimensions),
        },
    )


def _chosen_targets(targets: str | Sequence[str]) -> list[str]:
    """Return the targets in the order of `TARGETS`, each once."""
    names = texts(targets, "target", separator=",")
    unknown = [name for name in names if name not in TARGETS]
    if unknown or not names:
        raise OptionError(
            f"{f'unknown target {unknown[0]!r}' if unknown else 'no targets'}; choose some of "
            f"{', '.join(TARGETS)}"
        )
    return [name for name in TARGETS if name in names]


def _parameter_names() -> dict[str, str]:
    """Return each model tensor's name in transformers, with `{l}` for the layer."""
    return {row.tensor: row.stored for row in hf.TABLE}


def _tensors(model: ModelConfig, names: Sequence[str], rank: int) -> Iterator[OutputTensor]:
    """Yield the A and the B of model tensors, in each layer."""
    for tensor in names:
        rows, columns = matrix_shape(tensor, model.sizes)
        ranks = rank * model.num_experts if tensor in _STACKED else rank
        module = _parameter_names()[tensor].rpartition(".")[0] + _STACKED.get(tensor, "")
        for layer in range(model.num_layers) if "{l}" in module else (None,):
            where = f"{_PREFIX}{module.format(l=layer)}"
            yield _tensor(f"{where}.lora_A.weight", (ranks, columns))
            yield _tensor(f"{where}.lora_B.weight", (rows, ranks))


def _tensor(name: str, shape: tuple[int, int]) -> OutputTensor:
    """Return a float32 tensor whose elements are generated."""
    operand = DenseOperand(RawTensor(name, DType.F32, shape, "", 0), 0, shape)
    copy = make_rearrangement(("o", "i"), ("o", "i"), shape)
    return OutputTensor(name, DType.F32, shape, (Segment(operand, copy),))


def _config(names: Sequence[str], rank: int, alpha: float) -> dict[str, Any]:
    """Return adapter_config.json, with all entries that PEFT writes."""
    stored = {tensor: _parameter_names()[tensor].split(".") for tensor in names}
    modules = [path[-2] for tensor, path in stored.items() if tensor not in _PARAMETERS]
    parameters = [".".join(stored[tensor][-3:]) for tensor in names if tensor in _PARAMETERS]
    return {
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "arrow_config": None,
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "kasa_config": None,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": alpha,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "monteclora_config": None,
        "peft_type": "LORA",
        "peft_version": _PEFT_VERSION,
        "qalora_group_size": 16,
        "r": rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": modules or None,
        "target_parameters": parameters or None,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
        "velora_config": None,
    }
