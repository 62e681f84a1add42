"""The model card (README.md) of an output with merged adapters: what it was made of.

Source of the keys: the Hub's documentation of model cards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from .. import __version__
from ..adapters import Merge
from .plan import Plan

__all__ = ["CARD_NAME", "model_card"]

CARD_NAME = "README.md"
_LIBRARIES = {"transformer-lens": "transformer-lens"}
_HUB = re.compile(r"hf://([^/@]+/[^/@]+)@?([0-9a-f]{40})?(?:/.*)?")


def model_card(plan: Plan, merge: Merge) -> bytes:
    """Return the model card of a plan's output.

    Args:
        plan: The plan.
        merge: The adapters that it merges.
    """
    location = plan.info.location
    sources = [("base", location.identity, location.revision, "")]
    sources += [
        ("adapter", found["adapter"], found.get("revision"), f"{found['scale']:g}")
        for found in merge.sources()
    ]
    repositories = [name for _, identity, *_ in sources if (name := _repository(identity))]
    metadata: dict[str, Any] = {
        **({"base_model": repositories} if repositories else {}),
        "library_name": _LIBRARIES.get(plan.to, "transformers"),
        "tags": ["gpt-oss", "lora", "merged"],
    }
    rows = [
        f"| {what} | {_shown(identity)} | {_commit(identity) or revision or ''} | {scale} |"
        for what, identity, revision, scale in sources
    ]
    rounding = "rounded as PEFT does" if merge.like_peft else "added in float32 and rounded once"
    encoding = "" if plan.mxfp4_rule is None else f", then to MXFP4 by the rule {plan.mxfp4_rule}"
    lines = [
        "---",
        *_yaml(metadata),
        "---",
        "",
        f"A gpt-oss model with LoRA adapters merged into its weights, in the format `{plan.to}`.",
        "",
        "| | from | revision | scale |",
        "|---|---|---|---|",
        *rows,
        "",
        f"Made by gptoss_stream {__version__}: merged in this order, {rounding}{encoding}. "
        "`gptoss_stream.json` has the details.",
    ]
    return ("\n".join(lines) + "\n").encode()


def _yaml(metadata: Mapping[str, Any]) -> list[str]:
    """Return metadata as lines of YAML, in which JSON texts are texts too."""
    lines = []
    for key, value in metadata.items():
        if isinstance(value, list):
            lines += [f"{key}:", *(f"- {json.dumps(one)}" for one in value)]
        else:
            lines.append(f"{key}: {json.dumps(value)}")
    return lines


def _repository(identity: str) -> str | None:
    """Return the repository of the Hub in an identity, if it is one."""
    found = _HUB.fullmatch(identity)
    return found[1] if found else None


def _commit(identity: str) -> str | None:
    """Return the commit in an identity, if it has one."""
    found = _HUB.fullmatch(identity)
    return found[2] if found else None


def _shown(identity: str) -> str:
    """Return where something is from, for a card that others read: a folder by its name alone."""
    repository = _repository(identity)
    if repository is not None:
        return f"[{repository}](https://huggingface.co/{repository})"
    return identity if "://" in identity else identity.rstrip("/").rpartition("/")[2]
