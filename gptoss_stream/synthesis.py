"""Random checkpoints with the released models' shapes, for tests, benchmarks and trying out.

A random checkpoint goes the way of a conversion: its raw tensors are planned into shards and made
by the executor, from a reader that makes up the elements. Each element depends only on the seed,
the tensor's name and its place, so the bytes are the same whatever the shards and threads.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .checkpoint import Extent, RawTensor
from .dtypes import DType
from .errors import ConfigError, OptionError, user_path
from .model import MODEL_TENSORS
from .operands import Plain
from .patterns import rearrangement
from .planner import parse_size, shards
from .recipe import OutputTensor, Part
from .sources import hf_mxfp4

if TYPE_CHECKING:
    import numpy as np

__all__ = ["PRESETS", "Dimensions", "synth"]


@dataclass(frozen=True, slots=True)
class Dimensions:
    """The sizes of a random model, in the words of a Hugging Face config.json."""

    layers: int
    experts: int
    hidden_size: int = 2880
    intermediate_size: int = 2880
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    head_dim: int = 64
    vocab_size: int = 201_088
    experts_per_token: int = 4
    sliding_window: int = 128
    context: int = 131_072

    def config(self) -> dict[str, Any]:
        """The config.json of such a model, as the released ones have it."""
        kinds = ("sliding_attention", "full_attention")
        return {
            "architectures": ["GptOssForCausalLM"],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "eos_token_id": self.vocab_size - 1,
            "pad_token_id": self.vocab_size - 1,
            "experts_per_token": self.experts_per_token,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initial_context_length": 4096,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "layer_types": [kinds[layer % 2] for layer in range(self.layers)],
            "max_position_embeddings": self.context,
            "model_type": "gpt_oss",
            "num_attention_heads": self.num_attention_heads,
            "num_experts_per_tok": self.experts_per_token,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.num_key_value_heads,
            "num_local_experts": self.experts,
            "output_router_logits": False,
            "quantization_config": {
                "modules_to_not_convert": [
                    "model.layers.*.self_attn",
                    "model.layers.*.mlp.router",
                    "model.embed_tokens",
                    "lm_head",
                ],
                "quant_method": "mxfp4",
            },
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "rope_type": "yarn",
                "truncate": False,
            },
            "rope_theta": 150000,
            "router_aux_loss_coef": 0.9,
            "sliding_window": self.sliding_window,
            "swiglu_limit": 7.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }


PRESETS = {
    # No two sizes of the tiny model are equal, so that no mistaken axis goes unseen.
    "tiny": Dimensions(
        layers=4,
        experts=5,
        hidden_size=96,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=1009,
        experts_per_token=2,
        sliding_window=16,
        context=4096,
    ),
    "20b": Dimensions(layers=24, experts=32),
    "120b": Dimensions(layers=36, experts=128),
}


class _RandomReader:
    """Makes up the elements of any raw tensor (see `operands.Reader`)."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    @contextmanager
    def read(
        self, tensor: RawTensor, first: int, shape: tuple[int, ...]
    ) -> Iterator[np.ndarray[Any, Any]]:
        import numpy as np

        count = prod(shape)
        kind = np.uint8 if tensor.dtype is DType.U8 else np.uint16
        words = tensor.dtype.itemsize * first // 32  # a Philox counter gives 32 bytes
        skip = first - words * 32 // tensor.dtype.itemsize
        key = np.array([self._seed, zlib.crc32(tensor.name.encode())], np.uint64)
        generator = np.random.Philox(key=key, counter=words)
        raw = generator.random_raw(-(-(skip + count) * tensor.dtype.itemsize // 8))
        bits = raw.astype("<u8", copy=False).view(kind)[skip : skip + count]
        yield _values(tensor, bits).reshape(shape)

    def prefetch(self, extent: Extent) -> None:
        """Nothing to read."""

    def release(self, extent: Extent) -> None:
        """Nothing to forget."""

    def check_unchanged(self) -> None:
        """Nothing that could change."""


def _values(tensor: RawTensor, bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Random bits made into values of a size that a trained model's have."""
    if tensor.name.endswith("_scales"):
        return bits % 6 + 117  # 2^-10 to 2^-5
    if tensor.dtype is DType.U8:
        return bits
    if "norm" in tensor.name:
        return (bits & 0x00FF) | 0x3F00  # 0.5 to 2
    # Sign and mantissa as they come; exponents of 2^-12 to 2^-5.
    return (bits & 0x807F) | (((bits >> 7) & 7) + 115) << 7


def synth(
    output: str | os.PathLike[str],
    preset: str = "tiny",
    *,
    seed: int = 0,
    max_shard_size: int | str = "5GB",
    workers: int | None = None,
    overwrite: bool = False,
    on_plan: Callable[[int, int], None] = lambda nbytes, resumed: None,
    on_bytes: Callable[[int], None] = lambda nbytes: None,
    **overrides: int | None,
) -> Path:
    """Write a random gpt-oss checkpoint in MXFP4 into a folder, deterministic by seed.

    `preset` is one of `PRESETS`; `overrides` replace its `Dimensions` (layers, experts,
    hidden_size, …). Raises `OptionError` for dimensions that no model can have, `OutputError` and
    `MachineError` as `convert` does.
    """
    from .output import Contents, make_output
    from .workers import count_workers

    if preset not in PRESETS:
        raise OptionError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    chosen = {key: value for key, value in overrides.items() if value is not None}
    dimensions = replace(PRESETS[preset], **chosen)
    if dimensions.experts_per_token > dimensions.experts and "experts_per_token" not in chosen:
        dimensions = replace(dimensions, experts_per_token=dimensions.experts)
    if dimensions.layers > 1024:
        raise OptionError(f"{dimensions.layers} layers: there may be 1024 at most")
    if not 0 <= seed < 2**64:
        raise OptionError(f"seed {seed}: it must lie in 0 to 2^64 - 1")
    planned = shards(_raw_tensors(dimensions), parse_size(max_shard_size), first_number=0)
    nbytes = sum(shard.nbytes for shard in planned)
    folder = user_path(output)
    small = {
        "config.json": _json(dimensions.config()),
        "generation_config.json": _json({"eos_token_id": dimensions.vocab_size - 1}),
    }
    identity = {
        "tool": "gptoss_stream",
        "version": __version__,
        "made": "synth",
        "seed": seed,
        "dimensions": dimensions.config(),
        "max_shard_size": parse_size(max_shard_size),
    }
    make_output(
        folder,
        Contents(identity, planned, small),
        _RandomReader(seed),
        overwrite=overwrite,
        workers=count_workers(workers),
        on_start=lambda resumed: on_plan(nbytes, resumed),
        on_bytes=on_bytes,
    )
    return folder


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _raw_tensors(dimensions: Dimensions) -> list[OutputTensor]:
    """The raw tensors of the checkpoint, in the released ones' order: layers as strings sort."""
    try:
        model = hf_mxfp4.read_config(dimensions.config())
    except ConfigError as error:
        raise OptionError(str(error).replace("config.json: ", "")) from None
    for name in ("hidden_size", "intermediate_size"):
        if getattr(model, name) % 32:
            raise OptionError(
                f"{name} {getattr(model, name)}: MXFP4 needs a multiple of 32, the values that "
                "share a scale"
            )
    tensors = []
    for name, storage in hf_mxfp4.TENSORS.items():
        shape = model.shape(MODEL_TENSORS[name])
        whole = (model.num_experts, *shape) if "{e}" in name else shape
        for template, dtypes, raw_shape in storage.expected(whole):
            for layer, _ in model.instances(template):
                tensors.append(_copied(template.format(l=layer), dtypes[0], raw_shape))
    return sorted(tensors, key=lambda tensor: tensor.name)


def _copied(name: str, dtype: DType, shape: tuple[int, ...]) -> OutputTensor:
    """An output tensor that is its raw tensor unchanged, taken as rows of at most two axes."""
    rows = (prod(shape),) if len(shape) == 1 else (prod(shape[:2]), prod(shape[2:]))
    if len(shape) == 2:
        rows = shape
    raw = RawTensor(name, dtype, shape, "", 0)
    pattern = "a -> a" if len(rows) == 1 else "a b -> a b"
    return OutputTensor(
        name, dtype, shape, (Part(Plain(raw, 0, rows), rearrangement(pattern, rows)),)
    )
