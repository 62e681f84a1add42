"""Adapters to merge, each with the model that it is for and with what must be said about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import oracle
import peft_models
import peft_rewrites as rewrites
import torch
from independent import load_folder
from peft_oracles import Read, Tensors, float64_merged, magnitudes, peft_merged
from safetensors.torch import save_file

import gptoss_stream


@dataclass(frozen=True)
class Case:
    """An adapter for a model.

    Args:
        adapter: Its name among those that PEFT makes.
        rewrite: What other program's form it has; None for PEFT's.
        base: The name of the model's settings.
        other_versions: Whether PEFT wrote it as pairs of versions do that swap in and out.
        told: What the user says about it.
    """

    adapter: str
    rewrite: rewrites.Rewrite | None = None
    base: str = "plain"
    other_versions: bool = False
    told: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def grouped(self) -> bool:
        """Whether the columns of B are expert by expert."""
        return self.rewrite in (rewrites.grouped_by_expert, rewrites.without_mark)


SWAPPED = {"other_versions": True}
READ_BY_PEFT: dict[str, Case] = {
    **{name: Case(name) for name in peft_models.ADAPTERS if name != "DoRA of embedding"},
    "no biases, attention": Case("attention", base="no biases"),
    "square, experts": Case("experts", base="square"),
    "square, down": Case("down", base="square", told={"orientation": "normal"}),
    **{
        f"swapped, {name}": Case(name, **SWAPPED)
        for name in ("gate_up", "down", "experts", "down of one layer, gate_up of the other")
    },
    "swapped, rsLoRA": Case("rsLoRA", **SWAPPED),
    "swapped, square, experts": Case("experts", base="square", **SWAPPED),
    "swapped, square, down": Case(
        "down", base="square", told={"orientation": "swapped"}, **SWAPPED
    ),
    "swapped, old configuration": Case("experts", rewrites.without_version, **SWAPPED),
    "old configuration": Case("attention and experts", rewrites.without_version),
    "old configuration, patterns": Case("patterns", rewrites.without_version),
    "stored in bfloat16": Case("attention and experts", rewrites.in_bfloat16),
    "stored in float16": Case("patterns", rewrites.in_float16),
    "embedding and head of another base": Case("embedding and head", rewrites.own_base_layer),
    "marked as rank_major": Case("experts", rewrites.marked_rank_major),
}
"""Adapters that PEFT reads as they are meant."""

GROUPED = {"b_layout": "grouped_by_expert"}
NOT_READ_BY_PEFT: dict[str, Case] = {
    "grouped by expert": Case("attention and experts", rewrites.grouped_by_expert),
    "grouped by expert, one layer": Case("gate_up of one layer", rewrites.grouped_by_expert),
    "grouped by expert, rsLoRA": Case("rsLoRA", rewrites.grouped_by_expert),
    "grouped by expert, as told": Case("experts", rewrites.without_mark, told=GROUPED),
    "grouped by expert, swapped": Case("experts", rewrites.grouped_by_expert, **SWAPPED),
    "expert by expert": Case("attention and experts", rewrites.per_expert),
    "Tinker": Case("attention, experts and head", rewrites.tinker),
    "Tinker, shared": Case("shared factors", rewrites.tinker_shared),
}
"""Adapters that PEFT cannot read, or reads as noise. Each has the deltas of one that it reads."""
CASES = READ_BY_PEFT | NOT_READ_BY_PEFT


class Made:
    """Makes models, adapters and what merging them must give, each once."""

    def __init__(self, root: Path) -> None:
        self.root, self._made = root, {}

    def once(self, key: tuple, make: Callable[[Path], Any]) -> Any:
        """Return what was made for a key, or make it; it may write to the given new path."""
        if key not in self._made:
            self._made[key] = make(self.root / str(len(self._made)))
        return self._made[key]

    def base(self, dtype: torch.dtype, name: str = "plain") -> Path:
        """Return the folder of a model."""
        settings = peft_models.BASES[name]
        return self.once(
            ("base", dtype, name), lambda path: peft_models.save_base(path, dtype, **settings)
        )

    def mxfp4(self) -> Path:
        """Return the folder of a model with random MXFP4 for its experts' matrices.

        Many blocks have small codes only, so that encoding their values anew gives other bytes.
        """
        return self.once(("mxfp4",), _save_mxfp4)

    def from_peft(self, case: Case, dtype: torch.dtype) -> Path:
        """Return the folder that PEFT saved."""
        name = case.adapter
        key = ("from PEFT", name, case.base, dtype, case.other_versions)
        if name == "shared factors":
            whole = Case("attention, experts and head", None, case.base)
            experts = peft_models.BASES[case.base]["num_local_experts"]
            source = self.from_peft(whole, dtype)
            return self.once(key, lambda path: rewrites.shared(source, path, experts))
        config = peft_models.ADAPTERS[name]
        base = self.base(dtype, case.base)
        return self.once(
            key, lambda path: peft_models.save_adapter(path, base, 1, case.other_versions, **config)
        )

    def adapter(self, case: Case, dtype: torch.dtype) -> Path:
        """Return the folder of an adapter, in the form of the program that it is said to be of."""
        source, rewrite = self.from_peft(case, dtype), case.rewrite
        if rewrite is None:
            return source
        experts = peft_models.BASES[case.base]["num_local_experts"]
        return self.once(("adapter", source, rewrite), lambda path: rewrite(source, path, experts))

    def read(self, case: Case, dtype: torch.dtype) -> Read:
        """Return an adapter with what one must know to read it right."""
        folder = self.adapter(case, dtype)
        return Read(folder, grouped_by_expert=case.grouped, swapped=case.other_versions)

    def by_peft(self, case: Case, dtype: torch.dtype) -> Tensors:
        """Return what PEFT merges: of the same deltas in its own form, if it cannot read this."""
        read = case in READ_BY_PEFT.values()
        folder = self.adapter(case, dtype) if read else self.from_peft(case, dtype)
        base, other = self.base(dtype, case.base), case.other_versions
        return self.once(
            ("by PEFT", folder),
            lambda _: peft_merged(base, folder, dtype=dtype, as_other_versions=other),
        )

    def exact(self, case: Case, dtype: torch.dtype) -> Tensors:
        """Return the merged tensors in float64."""
        base, read = self.base(dtype, case.base), self.read(case, dtype)
        return self.once(("exact", read), lambda _: float64_merged(base, read))

    def magnitudes(self, case: Case, dtype: torch.dtype) -> Tensors:
        """Return the sums of absolute values."""
        base, read = self.base(dtype, case.base), self.read(case, dtype)
        return self.once(("magnitudes", read), lambda _: magnitudes(base, read))


def _save_mxfp4(folder: Path) -> Path:
    oracle.save_mxfp4(folder, **peft_models.SIZES)
    tensors = load_folder(folder)
    for name, tensor in tensors.items():
        if name.endswith("_blocks"):
            tensor[:, ::2] &= 0xBB  # codes 0 to 3 of either sign
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def name_of(dtype: torch.dtype) -> str:
    """Return what a dtype is called in options."""
    return str(dtype).removeprefix("torch.")


def told(case: Case, folder: Path) -> Any:
    """Return an adapter as a user gives it: its folder, or what they know about it too."""
    return gptoss_stream.Adapter(folder, **case.told) if case.told else folder


def converted(
    made: Made, case: Case, dtype: torch.dtype, out: Path, to: str = "hf", **options: Any
) -> Tensors:
    """Convert a model and merge an adapter on the way, both in a dtype; return the tensors."""
    adapter = told(case, made.adapter(case, dtype))
    base = made.base(dtype, case.base)
    gptoss_stream.convert(base, out, to=to, dtype=name_of(dtype), adapters=[adapter], **options)
    return load_folder(out)
