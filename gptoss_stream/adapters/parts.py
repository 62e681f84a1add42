"""An adapter's tensors by module: which are the A and B of what, and which are stored whole.

Names are those of PEFT (`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`), or of
tinker-cookbook (`….attn.q_proj.…`, `….mlp.experts.w1.…`, `unembed_tokens`). Names of modules are
Hugging Face's, as the formats `hf` and `hf-unfused` have them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from .. import formats
from .._utils.messages import counted
from ..errors import TensorError
from ..formats import Row
from ..tensors.raw_tensor import RawTensor
from .adapter_file import AdapterFile

__all__ = [
    "EXPERTS",
    "EXPERT_PARTS",
    "Module",
    "Parts",
    "Saved",
    "linear_modules",
    "model_tensor",
    "parts_of",
]

EXPERTS = "model.layers.{l}.mlp.experts"
"""The module of the stacked experts."""
EXPERT_PARTS = {"w1": ("gate_up", 0), "w3": ("gate_up", 1), "w2": ("down", None)}
"""Tinker's names of the experts' matrices: the model tensor, and gate (0) or up (1) of it."""

_PREFIX = "base_model.model."
_LORA = re.compile(
    r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    r"|token_adapter\.trainable_tokens_delta)(?:\.default)?(?:\.(weight|bias))?$"
)
_RENAMED = (
    (re.compile(r"(\.layers\.\d+)\.attn\."), r"\1.self_attn."),
    (re.compile(r"^(?:model\.)?unembed_tokens$"), "lm_head"),
    (re.compile(r"^(?=layers\.|embed_tokens(\.|$)|norm\.)"), "model."),  # of a model without head
    (re.compile(r"\.modules_to_save(?:\.default)?(?=\.|$)"), ""),
)


class Module(NamedTuple):
    """A module of the model that an adapter changes."""

    template: str
    """Its name, with `{l}` for the layer and `{e}` for the expert."""
    layer: int | None
    expert: int | None
    depth: int = 0
    """How many other adapters of the same module are around its own: the experts' matrices are two
    parameters of one module, and PEFT nests their adapters."""

    @property
    def name(self) -> str:
        """The name in Hugging Face's model."""
        return self.template.format(l=self.layer, e=self.expert)


@dataclass(slots=True)
class Parts:
    """The tensors of one module's adapter: by part, such as `lora_A` or `lora_B.bias`."""

    module: Module
    tensors: dict[str, RawTensor] = field(default_factory=dict)


class Saved(NamedTuple):
    """A tensor that the adapter stores whole, instead of the base model's."""

    row: Row
    """The row of Hugging Face's table."""
    layer: int | None
    raw: RawTensor


def parts_of(file: AdapterFile) -> tuple[list[Parts], list[Saved]]:
    """Return the adapters of modules, and the tensors that are stored whole.

    Raises:
        TensorError: If a tensor has no place in a gpt-oss, or two have the same.
    """
    modules = _module_names()
    table = formats.load("hf").TABLE
    rows = {name: row for row in table for name in (row.stored, *row.aliases)}
    parts: dict[Module, Parts] = {}
    saved: dict[tuple[str, int | None], Saved] = {}
    unknown = []
    for raw in file.info.tensors.values():
        name = raw.name
        while name.startswith(_PREFIX):
            name = name.removeprefix(_PREFIX)
        found = _LORA.search(name)
        if found is None:
            template, layer, _ = _template(_renamed(name).replace(".base_layer", ""))
            if template not in rows:
                unknown.append(raw.name)
                continue
            if (template, layer) in saved:
                raise _twice(file, raw, saved[template, layer].raw)
            saved[template, layer] = Saved(rows[template], layer, raw)
            continue
        path = _renamed(name[: found.start()])
        template, layer, expert = _template(path.replace(".base_layer", ""))
        if template not in modules:
            unknown.append(raw.name)
            continue
        module = Module(template, layer, expert, path.count(".base_layer"))
        part = found[1] + (".bias" if found[2] == "bias" else "")
        of_module = parts.setdefault(module, Parts(module)).tensors
        if part in of_module:
            raise _twice(file, raw, of_module[part])
        of_module[part] = raw
    if unknown:
        raise TensorError(
            f"{file.info.location}: {counted(len(unknown), 'tensor')} of the adapter "
            f"{'has' if len(unknown) == 1 else 'have'} no place in a gpt-oss model, such as "
            f"{unknown[0]!r}: without them the merged model would be another"
        )
    return list(parts.values()), list(saved.values())


def _renamed(name: str) -> str:
    """Return a name as Hugging Face's model has it."""
    for pattern, replacement in _RENAMED:
        name = pattern.sub(replacement, name)
    return name


def _template(name: str) -> tuple[str, int | None, int | None]:
    """Return a name with `{l}` and `{e}` instead of the layer and the expert, and these."""
    found: dict[str, int] = {}

    def keep(match: re.Match[str]) -> str:
        axis = "l" if match[1] == ".layers." else "e"
        found[axis] = int(match[2])
        return f"{match[1]}{{{axis}}}"

    template = re.sub(r"(\.layers\.|_projs\.)(\d{1,6})(?=\.|$)", keep, name)
    return template, found.get("l"), found.get("e")


@cache
def _module_names() -> dict[str, str]:
    """Return the modules that adapters can change, and the model tensors of their weights."""
    names = {EXPERTS: "", **{f"{EXPERTS}.{part}": of for part, (of, _) in EXPERT_PARTS.items()}}
    for table in (formats.load("hf").TABLE, formats.load("hf-unfused").TABLE):
        for row in table:
            for stored in (row.stored, *row.aliases):
                if stored.endswith(".weight") and "norm" not in stored:
                    names[stored.removesuffix(".weight")] = row.tensor
    return names


def linear_modules() -> list[tuple[str, str]]:
    """Return the modules with a weight of all experts or none, and its model tensor."""
    names = _module_names().items()
    return [(name, tensor) for name, tensor in names if tensor and EXPERTS not in name]


def model_tensor(module: Module) -> str:
    """Return the model tensor that is the weight of a module; empty for the stacked experts."""
    return _module_names()[module.template]


def _twice(file: AdapterFile, raw: RawTensor, other: RawTensor) -> TensorError:
    """Return the error for two tensors with the same meaning."""
    return TensorError(
        f"{file.info.location.display_path(raw.shard)}: tensors {other.name!r} and {raw.name!r} "
        "are the same but for what is before their names; remove the one that does not count"
    )
