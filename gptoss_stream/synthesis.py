"""Writes random checkpoints and adapters, for tests, benchmarks and trying things."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ._utils.messages import sized
from ._utils.progress import OnProgress, OnStart, check_callbacks, progress_callbacks
from .planning.shards import DEFAULT_SHARD_SIZE
from .random_adapter import DEFAULT_RANK, DEFAULT_TARGETS, random_adapter
from .random_checkpoint import DEFAULT_FORMAT, RandomCheckpoint, random_checkpoint
from .storage.open_location import local_path

__all__ = ["synth", "synth_adapter"]

_log = logging.getLogger(__name__)


def synth(
    output: str | os.PathLike[str],
    preset: str = "tiny",
    *,
    format: str = DEFAULT_FORMAT,  # noqa: A002 (as on the command line)
    seed: int = 0,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    workers: int | None = None,
    overwrite: bool = False,
    on_start: Callable[[int, int], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
    on_shard: Callable[[int, int], None] | None = None,
    progress: bool = False,
    **overrides: int | None,
) -> Path:
    """Write a random gpt-oss checkpoint to a folder.

    The same seed gives the same model in each format.

    Args:
        output: The folder, which must be local.
        preset: "tiny", "20b" or "120b".
        format: The format to write (see `formats.names`).
        seed: Decides the values of all tensors.
        max_shard_size: In bytes, or a text such as "5GB" (decimal units).
        workers: The number of threads, by default one more than there are processors, at most 8.
        overwrite: Whether to delete what an earlier run of this tool wrote to `output`.
        on_start: Called with the bytes to write, and how many of them were finished before.
        on_progress: Called with the bytes written since the last call, from any thread.
        on_shard: Called with the number of finished shards and of all (see `convert`).
        progress: Whether to show a progress bar.
        **overrides: Dimensions that replace those of the preset: layers, experts, hidden_size,
            intermediate_size, num_attention_heads, num_key_value_heads, head_dim, vocab_size,
            experts_per_token, sliding_window, initial_context.

    Returns:
        The folder.

    Raises:
        OptionError: For dimensions that no model can have.
        OutputError: For an output that cannot be used.
        MachineError: If writing fails.
    """
    checkpoint = random_checkpoint(
        preset, format=format, seed=seed, max_shard_size=max_shard_size, **overrides
    )
    with progress_callbacks("writing", progress, on_start, on_progress) as callbacks:
        return _write(
            checkpoint, output, workers, overwrite, callbacks, on_shard, is_checkpoint=True
        )


def synth_adapter(
    output: str | os.PathLike[str],
    preset: str = "tiny",
    *,
    rank: int = DEFAULT_RANK,
    alpha: float | None = None,
    targets: str | Sequence[str] = DEFAULT_TARGETS,
    seed: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
    on_start: Callable[[int, int], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
    on_shard: Callable[[int, int], None] | None = None,
    progress: bool = False,
    **overrides: int | None,
) -> Path:
    """Write a random LoRA adapter to a folder, in the files that PEFT 0.21 would save.

    It is for the checkpoint that `synth` writes with the same preset and dimensions. Its tensors
    are float32. A merge changes weights by a few percent.

    Args:
        output: The folder, which must be local.
        preset: "tiny", "20b" or "120b".
        rank: The rank of each matrix; in a stack of experts, of each expert's.
        alpha: What is added is multiplied by alpha / rank. By default twice the rank, as is
            customary.
        targets: What it changes: "attention" (q, k, v, o), "router", "experts" (gate_up and down of
            all experts), "lm_head"; a list, or a text with commas.
        seed: Decides the values of all tensors.
        workers: The number of threads, by default one more than there are processors, at most 8.
        overwrite: Whether to delete what an earlier run of this tool wrote to `output`.
        on_start: Called with the bytes to write, and how many of them were finished before.
        on_progress: Called with the bytes written since the last call, from any thread.
        on_shard: Called with the number of finished shards and of all (see `convert`).
        progress: Whether to show a progress bar.
        **overrides: Dimensions that replace those of the preset, as in `synth`.

    Returns:
        The folder.

    Raises:
        OptionError: For a rank, an alpha, targets or dimensions that cannot be used.
        OutputError: For an output that cannot be used.
        MachineError: If writing fails.
    """
    adapter = random_adapter(
        preset, rank=rank, alpha=alpha, targets=targets, seed=seed, **overrides
    )
    with progress_callbacks("writing", progress, on_start, on_progress) as callbacks:
        return _write(adapter, output, workers, overwrite, callbacks, on_shard, is_checkpoint=False)


def _write(
    made: RandomCheckpoint,
    output: str | os.PathLike[str],
    workers: int | None,
    overwrite: bool,
    callbacks: tuple[OnStart, OnProgress],
    on_shard: Callable[[int, int], None] | None,
    *,
    is_checkpoint: bool,
) -> Path:
    """Write a random checkpoint or adapter; return the folder."""
    from ._utils.thread_pool import count_workers
    from .writing.output import write_output
    from .writing.output_spec import OutputSpec
    from .writing.thread_executor import ThreadExecutor

    on_start, on_progress = callbacks
    check_callbacks(on_shard=on_shard)
    total = sum(shard.nbytes for shard in made.shards)
    folder = local_path(output)
    _log.info("writing random tensors to %s: %s", folder, sized(total))
    write_output(
        folder,
        OutputSpec(made.identity, made.shards, made.files, has_index=is_checkpoint),
        ThreadExecutor(made.reader, count_workers(workers)),
        overwrite=overwrite,
        on_start=lambda found: on_start(total, found.nbytes),
        on_progress=on_progress,
        on_shard=on_shard or (lambda finished, total: None),
    )
    return folder
