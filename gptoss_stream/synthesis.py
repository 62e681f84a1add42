"""Writes random checkpoints, for tests, benchmarks and trying things."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .planning.shards import DEFAULT_SHARD_SIZE
from .random_checkpoint import DEFAULT_FORMAT, random_checkpoint
from .storage.open_location import local_path

if TYPE_CHECKING:
    pass

__all__ = ["synth"]


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
        on_progress: Called with bytes written since the last call, from any thread.
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
    from ._utils.thread_pool import count_workers
    from .writing.output import write_output
    from .writing.output_spec import OutputSpec
    from .writing.thread_executor import ThreadExecutor

    checkpoint = random_checkpoint(
        preset, format=format, seed=seed, max_shard_size=max_shard_size, **overrides
    )
    total = sum(shard.nbytes for shard in checkpoint.shards)
    folder = local_path(output)
    write_output(
        folder,
        OutputSpec(checkpoint.identity, checkpoint.shards, checkpoint.files),
        ThreadExecutor(checkpoint.reader, count_workers(workers)),
        overwrite=overwrite,
        on_start=lambda done: on_start(total, done) if on_start is not None else None,
        on_progress=on_progress or (lambda nbytes: None),
    )
    return folder
