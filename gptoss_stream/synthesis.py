"""Random checkpoints with the released models' shapes, for tests, benchmarks and trying out.

A random checkpoint goes the way of a conversion: its raw tensors are planned into shards and made
by the executor, from a reader that makes up the elements. Each element depends only on the seed,
the tensor's name and its place, so the bytes are the same whatever the shards and threads.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__, formats
from ._utils import strict_json
from .checkpoint.metadata import RawTensor
from .checkpoint.reader import Reader
from .errors import ConfigError, OptionError
from .formats import hf_mxfp4
from .formats._table import rows_by_name, tensor_specs
from .model.config import ModelConfig, alternating_layers
from .planning.mapping import output_tensors
from .planning.shards import DEFAULT_SHARD_SIZE, PlannedShard, parse_size, plan_shards
from .storage.open_location import local_path
from .tensors.dtypes import DType
from .transforms.materialize import materialize, materialize_rows

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "DEFAULT_FORMAT",
    "PRESETS",
    "Dimensions",
    "RandomCheckpoint",
    "random_checkpoint",
    "synth",
]


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
    initial_context: int = 4096  # stretched by the rope's factor

    def model(self) -> ModelConfig:
        """The model of these dimensions, with all other numbers as released; raises
        `OptionError`."""
        try:
            model = ModelConfig(
                num_layers=self.layers,
                num_experts=self.experts,
                experts_per_token=self.experts_per_token,
                vocab_size=self.vocab_size,
                hidden_size=self.hidden_size,
                intermediate_size=self.intermediate_size,
                num_heads=self.num_attention_heads,
                num_kv_heads=self.num_key_value_heads,
                head_dim=self.head_dim,
                layer_types=alternating_layers(self.layers),
                sliding_window=self.sliding_window,
                max_position_embeddings=self.initial_context * round(_FACTOR),
                rope_theta=150_000,
                rope={
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "factor": _FACTOR,
                    "original_max_position_embeddings": self.initial_context,
                    "rope_type": "yarn",
                    "truncate": False,
                },
            )
        except ConfigError as error:
            raise OptionError(str(error).replace("config.json: ", "")) from None
        for name in ("hidden_size", "intermediate_size"):
            if getattr(model, name) % 32:
                raise OptionError(
                    f"{name} {getattr(model, name)}: MXFP4 needs a multiple of 32, the values that "
                    "share a scale"
                )
        return model


DEFAULT_FORMAT = "hf-mxfp4"


_FACTOR = 32.0  # of the rope's YaRN


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
        initial_context=512,  # OpenAI's code cannot stretch 128
    ),
    "20b": Dimensions(layers=24, experts=32),
    "120b": Dimensions(layers=36, experts=128),
}


class _RandomReader(Reader):
    """Makes up the elements of any raw tensor."""

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
    format: str = DEFAULT_FORMAT,  # noqa: A002 (the word of the command line)
    seed: int = 0,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    workers: int | None = None,
    overwrite: bool = False,
    on_plan: Callable[[int, int], None] = lambda nbytes, resumed: None,
    on_bytes: Callable[[int], None] = lambda nbytes: None,
    **overrides: int | None,
) -> Path:
    """Write a random gpt-oss checkpoint into a folder, deterministic by seed.

    `preset` is one of `PRESETS`; `overrides` replace its `Dimensions` (layers, experts,
    hidden_size, …). `format` is one of `formats.names`: the same seed gives the same model in
    each. `max_shard_size` is in bytes or a text, as in `plan`. `on_plan` is told how many bytes
    there will be and how many were there before, `on_bytes`, from any thread, of bytes written.
    Returns the folder. Raises `OptionError` for dimensions that no model can have, `OutputError`
    and `MachineError` as `convert` does.
    """
    from ._utils.thread_pool import count_workers
    from .writing.executor import Threads
    from .writing.output import OutputSpec, write_output

    made = random_checkpoint(
        preset, format=format, seed=seed, max_shard_size=max_shard_size, **overrides
    )
    nbytes = sum(shard.nbytes for shard in made.shards)
    folder = local_path(output)
    write_output(
        folder,
        OutputSpec(made.identity, made.shards, made.files),
        Threads(made.reader, count_workers(workers)),
        overwrite=overwrite,
        on_start=lambda resumed: on_plan(nbytes, resumed),
        on_bytes=on_bytes,
    )
    return folder


@dataclass(frozen=True, slots=True)
class RandomCheckpoint:
    """A random checkpoint that is not written yet: its shards, what makes up their elements, and
    its small files but for the index."""

    shards: Sequence[PlannedShard]
    reader: Reader
    files: Mapping[str, bytes]
    identity: Mapping[str, Any]

    def read(self, shard: PlannedShard, begin: int, end: int) -> bytes:
        """Bytes `begin … end` of a shard's file, made as they are asked for."""
        import numpy as np

        out = np.empty(end - begin, np.uint8)
        header = shard.header[begin:end]
        out[: len(header)] = np.frombuffer(header, np.uint8)
        for tensor, low, high, at in shard.overlapping(begin, end):
            segment = out[at - begin : at - begin + high - low]
            materialize(tensor, low, high, segment, partial(materialize_rows, reader=self.reader))
        return out.tobytes()


def random_checkpoint(
    preset: str = "tiny",
    *,
    format: str = DEFAULT_FORMAT,  # noqa: A002 (the word of the command line)
    seed: int = 0,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    **overrides: int | None,
) -> RandomCheckpoint:
    """What `synth` writes with the same options; raises `OptionError`."""
    if preset not in PRESETS:
        raise OptionError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    target = formats.load(format)
    chosen = {key: value for key, value in overrides.items() if value is not None}
    dimensions = replace(PRESETS[preset], **chosen)
    if dimensions.experts_per_token > dimensions.experts and "experts_per_token" not in chosen:
        dimensions = replace(dimensions, experts_per_token=dimensions.experts)
    if not 0 <= seed < 2**64:
        raise OptionError(f"seed {seed}: it must lie in 0 to 2^64 - 1")
    model, limit = dimensions.model(), parse_size(max_shard_size)
    raws = _raws(model)
    mapped = output_tensors(hf_mxfp4.TABLE, target.TABLE, model, raws, DType.BF16)
    tensors = [one.tensor for one in mapped]
    if format in _AS_RELEASED:
        tensors.sort(key=lambda tensor: tensor.name)
    files = target.files(model, {}, DType.BF16, partial=False)
    config = strict_json.loads(next(iter(files.values())))
    if "eos_token_id" in config:
        generation = {"eos_token_id": config["eos_token_id"]}
        files["generation_config.json"] = strict_json.dumps(generation)
    return RandomCheckpoint(
        plan_shards(tensors, limit, **_AS_RELEASED.get(format, {})),
        _RandomReader(seed),
        files,
        {
            "tool": "gptoss_stream",
            "version": __version__,
            "made": "synth",
            "format": format,
            "seed": seed,
            "dimensions": asdict(dimensions),
            "max_shard_size": limit,
        },
    )


_AS_RELEASED: Mapping[str, Mapping[str, Any]] = {
    "hf-mxfp4": {"first_number": 0},
    "openai": {"stem": "model-"},
}
"""The formats that OpenAI has released, and how the shards are named in each: there tensors are
sorted by name, layers as strings."""


def _raws(model: ModelConfig) -> dict[str, RawTensor]:
    """The raw tensors of the model in Hugging Face's MXFP4 format, which lie nowhere."""
    return {
        (name := stored.name.format(l=layer)): RawTensor(
            name, stored.dtypes[0], stored.shape, "", 0
        )
        for rows in rows_by_name(hf_mxfp4.TABLE).values()
        for stored in tensor_specs(rows, model.sizes)
        for layer, _ in model.instances(stored.name)
    }
