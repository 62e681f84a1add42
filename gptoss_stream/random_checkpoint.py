"""Random checkpoints with the released models' shapes, for tests, benchmarks and trying out.

A random checkpoint is written like a conversion: its raw tensors are planned into shards, and the
executor reads them from a reader that generates the elements. Each element depends only on the
seed, the tensor's name and its index, so the bytes do not depend on shards and threads.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from . import __version__, formats
from ._utils import strict_json
from ._utils.arguments import check_choice, whole_number
from .checkpoint.reader import Reader
from .errors import ConfigError, OptionError
from .formats import hf_mxfp4, table_specs
from .model.config import ModelConfig, alternating_layers
from .planning.mapping import output_tensors
from .planning.shards import DEFAULT_SHARD_SIZE, PlannedShard, parse_size, plan_shards
from .tensors.dtypes import DType
from .tensors.raw_tensor import RawTensor
from .transforms.materialize import materialize, materialize_rows

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "DEFAULT_FORMAT",
    "PRESETS",
    "Dimensions",
    "RandomCheckpoint",
    "RandomReader",
    "check_seed",
    "chosen_dimensions",
    "random_checkpoint",
]


@dataclass(frozen=True, slots=True)
class Dimensions:
    """The sizes of a random model, named as in a Hugging Face config.json."""

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
    initial_context: int = 4096  # positions before YaRN scales them

    def model(self) -> ModelConfig:
        """Return a model of these dimensions, with all other settings as released.

        Raises:
            OptionError: If no model can have these dimensions.
        """
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
_FACTOR = 32.0  # of YaRN

PRESETS = {
    # No two sizes of the tiny model are equal, so that a mistaken axis is always seen.
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
        initial_context=512,  # OpenAI's code cannot scale 128
    ),
    "20b": Dimensions(layers=24, experts=32),
    "120b": Dimensions(layers=36, experts=128),
}


def chosen_dimensions(preset: str, overrides: Mapping[str, int | None]) -> Dimensions:
    """Return the sizes of a preset, with those that replace them.

    Args:
        preset: A name in `PRESETS`.
        overrides: Sizes by name; None leaves that of the preset.

    Raises:
        OptionError: For an unknown preset or dimension, and a size that is no integer.
    """
    check_choice(preset, "preset", PRESETS)
    for name in overrides:
        check_choice(name, "dimension", [field.name for field in fields(Dimensions)])
    chosen = {
        key: whole_number(value, key) for key, value in overrides.items() if value is not None
    }
    dimensions = replace(PRESETS[preset], **chosen)
    if dimensions.experts_per_token > dimensions.experts and "experts_per_token" not in chosen:
        dimensions = replace(dimensions, experts_per_token=dimensions.experts)
    return dimensions


def check_seed(seed: int) -> int:
    """Return a seed that the generator can take.

    Raises:
        OptionError: For another one.
    """
    number = whole_number(seed, "seed")
    if not 0 <= number < 2**64:
        raise OptionError(f"seed {number}: it must be in 0 to 2^64 - 1")
    return number


class RandomReader(Reader):
    """Generates the elements of any raw tensor."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    @contextmanager
    def read(
        self, tensor: RawTensor, first: int, shape: tuple[int, ...]
    ) -> Iterator[np.ndarray[Any, Any]]:
        """See `Reader`."""
        import numpy as np

        count = prod(shape)
        kind = {DType.U8: np.uint8, DType.F32: np.int32}.get(tensor.dtype, np.uint16)
        words = tensor.dtype.itemsize * first // 32  # a Philox counter gives 32 bytes
        skip = first - words * 32 // tensor.dtype.itemsize
        key = np.array([self._seed, zlib.crc32(tensor.name.encode())], np.uint64)
        generator = np.random.Philox(key=key, counter=words)
        raw = generator.random_raw(-(-(skip + count) * tensor.dtype.itemsize // 8))
        bits = raw.astype("<u8", copy=False).view(kind)[skip : skip + count]
        yield _values(tensor, bits).reshape(shape)


def _values(tensor: RawTensor, bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Turn random bits into values of about the size of a trained model's."""
    import numpy as np

    if tensor.name.endswith("_scales"):
        return bits % 6 + 117  # 2^-10 to 2^-5
    if tensor.dtype is DType.U8:
        return bits
    if tensor.dtype is DType.F32:  # an adapter's
        return (bits >> 8).astype(np.float32) * np.float32(2**-29)  # exact, -2^-6 to 2^-6
    if "norm" in tensor.name:
        return (bits & 0x00FF) | 0x3F00  # 0.5 to 2
    # Sign and mantissa are random; exponents of 2^-12 to 2^-5.
    return (bits & 0x807F) | (((bits >> 7) & 7) + 115) << 7


@dataclass(frozen=True, slots=True)
class RandomCheckpoint:
    """A random checkpoint or adapter that is not written yet."""

    shards: Sequence[PlannedShard]
    reader: Reader
    """Generates the elements of the raw tensors that the shards are made of."""
    files: Mapping[str, bytes]
    """The configuration files, by name."""
    identity: Mapping[str, Any]
    """The identity of a run that writes it."""

    def read(self, shard: PlannedShard, begin: int, end: int) -> bytes:
        """Return bytes `begin … end` of a shard's file, generated by this call."""
        import numpy as np

        out = np.empty(end - begin, np.uint8)
        header = shard.header[begin:end]
        out[: len(header)] = np.frombuffer(header, np.uint8)
        for tensor, low, high, offset in shard.overlapping(begin, end):
            part = out[offset - begin : offset - begin + high - low]
            materialize(tensor, low, high, part, partial(materialize_rows, reader=self.reader))
        return out.tobytes()


def random_checkpoint(
    preset: str = "tiny",
    *,
    format: str = DEFAULT_FORMAT,  # noqa: A002 (as on the command line)
    seed: int = 0,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    **overrides: int | None,
) -> RandomCheckpoint:
    """Return what `synth` writes with the same options.

    Raises:
        OptionError: For dimensions that no model can have.
    """
    dimensions, target = chosen_dimensions(preset, overrides), formats.load(format)
    seed = check_seed(seed)
    model, limit = dimensions.model(), parse_size(max_shard_size)
    raws = _raws(model)
    tensors = [*output_tensors(hf_mxfp4.TABLE, target.TABLE, model, raws, DType.BF16)]
    if format in _AS_RELEASED:
        tensors.sort(key=lambda tensor: tensor.name)
    files = target.files(model, {}, DType.BF16, partial=False)
    config = strict_json.loads(files.get("config.json", b"{}"))
    if "model_type" in config:  # Hugging Face's; any token can be the one that ends a text
        last = model.vocab_size - 1
        tokens = {"eos_token_id": last, "pad_token_id": last, **config}
        files["config.json"] = strict_json.dumps({**config, **tokens})
        generation = {"eos_token_id": tokens["eos_token_id"]}
        files["generation_config.json"] = strict_json.dumps(generation)
    return RandomCheckpoint(
        plan_shards(tensors, limit, **_AS_RELEASED.get(format, {})),
        RandomReader(seed),
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
"""The formats that OpenAI has released, and how their shards are named. Their tensors are sorted by
name, with layer numbers as text."""


def _raws(model: ModelConfig) -> dict[str, RawTensor]:
    """Return the raw tensors of the model in Hugging Face's MXFP4 format, which are in no file."""
    return {
        name: RawTensor(name, spec.dtypes[0], spec.shape, "", 0)
        for spec in table_specs(hf_mxfp4.TABLE, model)
        for _, name in spec.names(model)
    }
