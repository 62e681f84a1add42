"""The small files that are written beside the shards of an output."""

from __future__ import annotations

from .. import formats
from ..checkpoint.auxiliary_files import CopiedFile, find_auxiliary_files
from .model_card import CARD_NAME, model_card
from .plan import Plan

__all__ = ["config_files", "output_files"]


def output_files(plan: Plan) -> dict[str, bytes | CopiedFile]:
    """Return the small files of an output, without index, record and checksums.

    Returns:
        By name: the configuration files of the output's format as bytes, the source's tokenizer,
        chat template and generation settings to be copied, and with adapters a model card.
    """
    card = {} if plan.merge is None else {CARD_NAME: model_card(plan, plan.merge)}
    return {
        **card,
        **{file.name: file for file in find_auxiliary_files(plan.info.location)},
        **config_files(plan),
    }


def config_files(plan: Plan) -> dict[str, bytes]:
    """Return the configuration files of an output's format, by name; nothing is read."""
    config = plan.info.config
    if plan.pruning is not None:
        config = formats.pruned_config(config, plan.model)
    return formats.load(plan.to).files(plan.model, config, plan.main_dtype, partial=plan.is_partial)
