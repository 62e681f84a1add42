"""The small files that are written beside the shards of an output."""

from __future__ import annotations

from .. import formats
from ..checkpoint.auxiliary_files import CopiedFile, find_auxiliary_files
from .model_card import CARD_NAME, model_card
from .plan import Plan

__all__ = ["config_files", "determined_files", "output_files"]


def output_files(plan: Plan) -> dict[str, bytes | CopiedFile]:
    """Return the small files of an output, without index, record and checksums.

    Returns:
        By name: those of `determined_files`, and a model card.
    """
    return {CARD_NAME: model_card(plan), **determined_files(plan)}


def determined_files(plan: Plan) -> dict[str, bytes | CopiedFile]:
    """Return the small files that follow from the source's files, wherever these are.

    Returns:
        By name: the configuration files of the output's format as bytes, and the source's
        tokenizer, chat template and generation settings to be copied.
    """
    copied = {file.name: file for file in find_auxiliary_files(plan.info.location)}
    return {**copied, **config_files(plan)}


def config_files(plan: Plan) -> dict[str, bytes]:
    """Return the configuration files of an output's format, by name; nothing is read."""
    config = plan.info.config
    if plan.pruning is not None:
        config = formats.pruned_config(config, plan.model)
    return formats.load(plan.to).files(plan.model, config, plan.main_dtype, partial=plan.is_partial)
