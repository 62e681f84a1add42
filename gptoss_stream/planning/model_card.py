"""The model card (README.md) of an output: what it is made of, how to load it, what it cannot do.

Its bytes follow from the plan alone and name no folder of this machine: runs are resumed, and
outputs are compared. Source of the keys: the Hub's documentation of model cards.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from .. import __version__, formats
from .._utils.messages import counted
from ..checkpoint.source_card import CARD_NAME, SourceCard, read_source_card
from ..storage.location import Location
from .plan import Plan

__all__ = ["CARD_NAME", "is_unedited", "model_card"]

_MARK = "<!-- gptoss_stream wrote this model card and leaves it alone once it is edited. sha256: "
_HUB = re.compile(r"hf://([^/@]+/[^/@]+)(?:@([0-9a-f]{40}))?(?:/(.*))?")
_LOCAL_NAMES = ("checkpoint", "checkpoints", "data", "model", "models", "out", "output", "outputs",
                "results", "tmp", "..", ".")  # fmt: skip
_PARTIAL = """import gptoss_stream

tensors = gptoss_stream.open_state_dict(folder)  # nothing is read until a tensor is accessed
name = next(iter(tensors))
tensors[name]"""


def model_card(plan: Plan) -> bytes:
    """Return the model card of a plan's output.

    Raises:
        MachineError: If the card of the source cannot be read.
    """
    source = read_source_card(plan.info.location)
    text = "\n".join(
        [
            "---",
            *_yaml(_metadata(plan, source)),
            "---",
            "",
            _summary(plan),
            "",
            "## How to load it",
            "",
            "```python",
            'folder = "path/to/this/folder"  # or the name of its repository',
            "",
            *_loading(plan).splitlines(),
            "```",
            "",
            "## How it was made",
            "",
            *_making(plan),
            "",
            "## Known limits",
            "",
            *(f"- {limit}" for limit in _limits(plan)),
            "",
        ]
    )
    return _marked(text + "\n")


def is_unedited(card: bytes) -> bool:
    """Return whether a model card is one of this tool, without any change."""
    text, mark, _ = card.decode(errors="replace").rpartition(_MARK)
    return bool(mark) and card == _marked(text)


def _marked(text: str) -> bytes:
    """Return a card with a last line that shows whether it was edited; the Hub does not show it."""
    return f"{text}{_MARK}{hashlib.sha256(text.encode()).hexdigest()} -->\n".encode()


def _metadata(plan: Plan, source: SourceCard) -> dict[str, Any]:
    """Return the metadata: what is not known is left out."""
    bases, relation = _bases(plan, source)
    library = "gptoss_stream" if plan.is_partial else formats.library(formats.load(plan.to))
    tags = ["gpt-oss"]
    tags += ["mxfp4"] if any(_encoded(plan)) else []
    tags += ["lora", "merged"] if plan.merge is not None else []
    tags += ["pruned"] if plan.pruning is not None else []
    return {
        **_license(plan, source),
        **({"base_model": bases} if bases else {}),
        **({"base_model_relation": relation} if relation else {}),
        "library_name": library,
        **({"pipeline_tag": "text-generation"} if library == "transformers" else {}),
        "tags": tags,
    }


def _encoded(plan: Plan) -> Iterator[str]:
    """Yield the names of the output's tensors that are MXFP4."""
    return (t.name for shard in plan.shards for t in shard.tensors if t.dtype.code == "U8")


def _license(plan: Plan, source: SourceCard) -> dict[str, str]:
    """Return the license, if everything that the output is made of has the same."""
    cards = [source]
    if plan.merge is not None:
        cards += [read_source_card(info.location) for info in plan.merge.infos]
    repository = _repository(plan.info.location)
    if source.license is None and (repository or "").startswith("openai/gpt-oss"):
        cards[0] = SourceCard(license="apache-2.0")
    fields = [
        {
            "license": card.license,
            **({"license_name": card.license_name} if card.license == "other" else {}),
            **({"license_link": card.license_link} if card.license == "other" else {}),
        }
        for card in cards
    ]
    if cards[0].license is None or any(one != fields[0] for one in fields):
        return {}
    return {key: value for key, value in fields[0].items() if value}


def _bases(plan: Plan, source: SourceCard) -> tuple[list[str], str | None]:
    """Return the repositories that the output is made of, and its relation to them if known.

    A source that is not on the Hub may say in its card, or its configuration, what it is made of.
    """
    found = _repository(plan.info.location)
    relation = None if plan.mxfp4_rule is None else "quantized"
    bases = [found] if found else []
    if not found:
        bases, relation = [*source.base_models], source.relation
        name = plan.info.config.get("_name_or_path")
        if not bases and isinstance(name, str) and _is_model_name(name):
            bases = [name]
    if plan.merge is not None:
        adapters = [_repository(info.location) for info in plan.merge.infos]
        bases += [name for name in adapters if name and name not in bases]
        relation = "merge"
    return bases, relation if bases else None


def _is_model_name(name: str) -> bool:
    """Return whether a name is probably that of a repository: a folder may look the same."""
    match = re.fullmatch(r"([\w-][\w.-]*)/([\w-][\w.-]*)", name, re.ASCII)
    return match is not None and match[1] not in _LOCAL_NAMES and "gpt-oss" in match[2].lower()


def _summary(plan: Plan) -> str:
    """Return in one sentence what the output is."""
    what = "Some tensors of a gpt-oss model" if plan.is_partial else "A gpt-oss model"
    model = plan.model
    merged = " with LoRA adapters merged into its weights" if plan.merge is not None else ""
    return (
        f"{what}{merged}, in the format `{plan.to}` of gptoss_stream: "
        f"{counted(model.num_layers, 'layer')}, {counted(model.num_experts, 'expert')} in each, "
        f"{counted(plan.num_tensors, 'tensor')}, {plan.main_dtype.code}"
        f"{' and MXFP4' if any(_encoded(plan)) else ''}."
    )


def _loading(plan: Plan) -> str:
    """Return Python that loads the output."""
    return _PARTIAL if plan.is_partial else formats.loading(formats.load(plan.to))


def _making(plan: Plan) -> Iterator[str]:
    """Yield how the output was made, as lines."""
    parts = [("source", plan.info.location, "")]
    if plan.merge is not None:
        scales = [f"{one['scale']:g}" for one in plan.merge.sources()]
        locations = [info.location for info in plan.merge.infos]
        parts += [("adapter", *one) for one in zip(locations, scales, strict=True)]
    if plan.reference is not None:
        parts.append(("reference", plan.reference.location, ""))
    yield "| | from | commit | scale |"
    yield "|---|---|---|---|"
    for what, location, scale in parts:
        yield f"| {what} | {_shown(location)} | {_commit(location)} | {scale} |"
    yield ""
    yield (
        f"By gptoss_stream {__version__}, from `{plan.source_format}` to `{plan.to}`, dtype "
        f"`{plan.dtype}`. `gptoss_stream.json` has the details."
    )
    if plan.merge is not None:
        how = "rounded as PEFT does" if plan.merge.like_peft else "in float32 and rounded once"
        yield f"The adapters were added in this order, {how}."
    if plan.mxfp4_rule is not None:
        kept = ", where the reference has no blocks for them" if plan.reference else ""
        yield f"Floats were encoded to MXFP4 by the rule `{plan.mxfp4_rule}`{kept}."


def _limits(plan: Plan) -> Iterator[str]:
    """Yield what users of the output should know."""
    if plan.is_partial:
        chosen = json.dumps(plan.selection.as_dict()).replace("`", "'")
        yield (
            f"It is not a whole model: only the tensors of the selection `{chosen}`, under their "
            "names and numbers in the whole model. Read them with the code above or with "
            "safetensors; no program can run them as a model."
        )
    if plan.pruning is not None:
        every = {json.dumps(numbers) for numbers in plan.pruning["experts"].values()}
        experts = f"`{every.pop()}`" if len(every) == 1 else "that `gptoss_stream.json` lists"
        yield (
            f"It is smaller than the source: it has its layers `{plan.pruning['layers']}` and of "
            f"each the experts {experts}, numbered anew. It loads like any other model and was not "
            "trained after that: expect worse answers until it is."
        )
    if plan.mxfp4_rule is not None:
        yield "Encoding to MXFP4 loses precision; `mxfp4_encoding.json` says how much."
    for dtypes, count in plan.narrowed.items():
        yield f"{counted(count, 'tensor')} lost precision: {dtypes}."
    if warning := formats.warning(formats.load(plan.to)):
        yield f"{warning[0].upper()}{warning[1:]}."
    if plan.to == "transformer-lens" and not plan.is_partial:
        yield "The weights are unprocessed: nothing is folded or centred."
    yield (
        "Whoever made it may not have evaluated it. The limits and the terms of what it is made of "
        "apply to it too."
    )


def _yaml(metadata: Mapping[str, Any]) -> Iterator[str]:
    """Yield metadata as lines of YAML, in which JSON texts are texts too."""
    for key, value in metadata.items():
        if isinstance(value, list):
            yield f"{key}:"
            yield from (f"- {json.dumps(one)}" for one in value)
        else:
            yield f"{key}: {json.dumps(value)}"


def _repository(location: Location) -> str | None:
    """Return the repository of the Hub that a location is in, if it is in one."""
    found = _HUB.fullmatch(location.identity)
    return found[1] if found else None


def _commit(location: Location) -> str:
    """Return the commit of a location; empty if it has none."""
    found = _HUB.fullmatch(location.identity)
    return (found[2] if found else None) or ""


def _shown(location: Location) -> str:
    """Return where something is from, for a card that others read: only the Hub is public."""
    found = _HUB.fullmatch(location.identity)
    if found is None:
        return "not on the Hub"
    folder = f", folder `{found[3]}`" if found[3] else ""
    return f"[{found[1]}](https://huggingface.co/{found[1]}){folder}"
