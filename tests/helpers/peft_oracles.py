"""What merging adapters must give: by PEFT itself, and by formulas in float64.

Neither imports the package, and the formulas use nothing of PEFT.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from independent import load_folder
from peft import PeftModel
from peft_models import load, quiet
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]
PREFIX = "base_model.model."
TINKER = {"w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", None)}
"""The parameter of an expert's matrix, and for gate and up the first of every second row."""


@dataclass(frozen=True)
class Read:
    """An adapter's folder, and how it must be read where its files do not say so."""

    folder: Path
    scale: float = 1.0
    grouped_by_expert: bool = False
    swapped: bool = False


# --- by PEFT ------------------------------------------------------------------------------------


def peft_merged(
    base: Path, *adapters: Path, dtype: torch.dtype, as_other_versions: bool = False
) -> Tensors:
    """Return the tensors of a model after PEFT has merged adapters into it, one after another."""
    with quiet():
        model = load(base, dtype, as_other_versions)
        for adapter in adapters:
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def peft_logits(base: Path, adapter: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of a float32 model with an adapter that is applied, not merged."""
    with quiet(), torch.no_grad():
        return PeftModel.from_pretrained(load(base, torch.float32), adapter).eval()(tokens).logits


# --- by formulas --------------------------------------------------------------------------------


def float64_merged(base: Path, *adapters: Path | Read) -> Tensors:
    """Return the tensors of a model after merging adapters, in float64 and unrounded."""
    return _merged(base, adapters, absolute=False)


def magnitudes(base: Path, *adapters: Path | Read) -> Tensors:
    """Return the sums of the absolute values of all terms of which each merged value consists.

    The errors of computing in float32, in any order, are some units in the last place of these.
    """
    return _merged(base, adapters, absolute=True)


def _merged(base: Path, adapters: Iterable[Path | Read], absolute: bool) -> Tensors:
    merged = {name: tensor.double() for name, tensor in load_folder(base).items()}
    if absolute:
        merged = {name: tensor.abs() for name, tensor in merged.items()}
    experts = json.loads((base / "config.json").read_text())["num_local_experts"]
    for adapter in adapters:
        read = adapter if isinstance(adapter, Read) else Read(adapter)
        _Merge(read, merged, experts, absolute).run()
    return merged


class _Merge:
    """Merges one adapter into float64 tensors, in place."""

    def __init__(self, read: Read, merged: Tensors, experts: int, absolute: bool) -> None:
        self.read, self.merged, self.experts, self.absolute = read, merged, experts, absolute
        self.config = json.loads((read.folder / "adapter_config.json").read_text())
        stored = load_file(read.folder / "adapter_model.safetensors")
        self.left = {name.removeprefix(PREFIX): t.double() for name, t in stored.items()}
        self.names = set(self.left)
        if absolute:
            self.left = {name: tensor.abs() for name, tensor in self.left.items()}

    def run(self) -> None:
        """Use every tensor of the adapter once. Replaced tensors are first: deltas add to them."""
        for key in [key for key in self.left if "lora_" not in key]:
            self.replace(key)
        for key in [key for key in self.left if key.endswith(("lora_A.weight", "embedding_A"))]:
            module, _, kind = key.removesuffix(".weight").rpartition(".")
            a, b = self.left.pop(key), self.left.pop(key.replace("_A", "_B"))
            if kind == "lora_embedding_A":
                self.embedding(module, a, b)
            elif ".mlp.experts" in module:
                self.any_expert(module, a, b)
            else:
                self.linear(module, a, b)
        assert not self.left, f"not used: {sorted(self.left)}"

    def replace(self, key: str) -> None:
        """Put whole tensors, or rows of tokens, in the place of the base's."""
        value = self.left.pop(key)
        if key.endswith(".token_adapter.trainable_tokens_delta"):
            module = key.removesuffix(".token_adapter.trainable_tokens_delta")
            indices: Any = self.config["trainable_token_indices"]
            if isinstance(indices, dict):
                indices = indices[module.rpartition(".")[2]]
            self.merged[f"{module}.weight"][indices] = value
        else:
            name = key.replace(".base_layer.", ".")
            assert self.merged[name].shape == value.shape
            self.merged[name] = value

    def scaling(self, rank: int, name: str) -> float:
        """Return the factor of B A, for a module or an expert parameter by its whole name."""
        assert rank == self.pattern("rank_pattern", name, self.config["r"])
        alpha = self.pattern("alpha_pattern", name, self.config["lora_alpha"])
        root = self.config.get("use_rslora", False)
        return self.read.scale * alpha / (math.sqrt(rank) if root else rank)

    def pattern(self, which: str, name: str, default: int) -> int:
        """Return the value of the first pattern that fits the end of a name, from a point on."""
        for pattern, value in self.config.get(which, {}).items():
            if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name):
                return value
        return default

    def linear(self, module: str, a: torch.Tensor, b: torch.Tensor) -> None:
        """Merge into a matrix [out, in], with DoRA's magnitudes and LoRA's bias if there are."""
        name = module.replace("model.unembed_tokens", "lm_head").replace(".attn.", ".self_attn.")
        of_parameter = f"{name}.weight" if name.endswith(".router") else name
        scaling = self.scaling(len(a), of_parameter)
        weight = self.merged[f"{name}.weight"] + scaling * torch.einsum("or,ri->oi", b, a)
        magnitude = self.left.pop(f"{module}.lora_magnitude_vector", None)
        if magnitude is not None and not self.absolute:
            norms = weight.square().sum(1).sqrt()
            weight = weight * (magnitude / norms)[:, None]
        self.merged[f"{name}.weight"] = weight
        bias = self.left.pop(f"{module}.lora_B.bias", None)
        if bias is not None:
            self.merged[f"{name}.bias"] = self.merged[f"{name}.bias"] + scaling * bias

    def embedding(self, module: str, a: torch.Tensor, b: torch.Tensor) -> None:
        """Merge into an embedding [V, H]: A is [r, V], B is [H, r], DoRA's norms are of columns."""
        scaling = self.scaling(len(a), module)
        weight = self.merged[f"{module}.weight"] + scaling * torch.einsum("hr,rv->vh", b, a)
        magnitude = self.left.pop(f"{module}.lora_magnitude_vector", None)
        if magnitude is not None and not self.absolute:
            weight = weight * (magnitude / weight.square().sum(0).sqrt())[None]
        self.merged[f"{module}.weight"] = weight

    def any_expert(self, module: str, a: torch.Tensor, b: torch.Tensor) -> None:
        """Merge into experts, of which each format of adapters has its names."""
        experts, _, rest = module.partition(".experts")
        experts += ".experts."
        if rest in ("", ".base_layer"):
            self.stacked(module, experts, a, b)
        elif rest[1:] in TINKER:
            self.tinker(experts, rest[1:], a, b)
        else:
            what, number = rest[1:].removesuffix(".base_layer").split(".")
            name = experts + what.removesuffix("s")
            scaling = self.scaling(len(a), f"{experts}{what}.{number}")
            self.merged[name][int(number)] += scaling * torch.einsum("or,ri->io", b, a)

    def stacked(self, module: str, experts: str, a: torch.Tensor, b: torch.Tensor) -> None:
        """Merge PEFT's factors of all experts into a parameter [E, in, out]."""
        name = experts + self.parameter(module, experts)
        rank = len(a) // self.experts
        scaling = self.scaling(rank, name)
        for e in range(self.experts):
            rows = slice(e * rank, (e + 1) * rank)
            columns = rows if self.read.grouped_by_expert else slice(e, None, self.experts)
            product = torch.einsum("or,ri->oi", b[:, columns], a[rows])
            self.merged[name][e] += scaling * (product if self.read.swapped else product.T)

    def parameter(self, module: str, experts: str) -> str:
        """Return which parameter factors are of. Of two in a layer gate_up is the inner one."""
        if module.endswith(".base_layer"):
            return "gate_up_proj"
        if f"{module}.base_layer.lora_A.weight" in self.names:
            return "down_proj"
        (only,) = {
            target.rpartition(".")[2]
            for target in self.config["target_parameters"]
            for what in ("gate_up_proj", "down_proj")
            if f".{experts}{what}".endswith(f".{target}")
        }
        return only

    def tinker(self, experts: str, kind: str, a: torch.Tensor, b: torch.Tensor) -> None:
        """Merge factors [E, r, in] and [E, out, r], of which one may be shared by all experts."""
        what, first = TINKER[kind]
        scaling = self.scaling(a.shape[1], f"{experts}{kind}")
        shape = (self.experts, -1, -1)
        product = torch.einsum("eri,eor->eio", a.expand(*shape), b.expand(*shape))
        columns = slice(None) if first is None else slice(first, None, 2)
        self.merged[experts + what][..., columns] += scaling * product


# --- comparing ----------------------------------------------------------------------------------


def changed_names(before: Tensors, after: Tensors) -> set[str]:
    """Return the names of the tensors whose values differ."""
    return {name for name in after if not torch.equal(before[name].double(), after[name].double())}


BITS = {torch.bfloat16: 8, torch.float32: 24}


def rounded(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round float64 to the nearest value of a dtype, ties to even, in one step.

    torch rounds float64 to float32 first, and that to bfloat16.
    """
    mantissa, exponent = torch.frexp(exact)
    digits = torch.round(torch.ldexp(mantissa, torch.tensor(BITS[dtype])))
    return torch.ldexp(digits, exponent - BITS[dtype]).to(dtype)


def unit(dtype: torch.dtype, *tensors: torch.Tensor) -> torch.Tensor:
    """Return one unit in the last place of the largest of several values, in float64."""
    largest = torch.stack([tensor.double().abs() for tensor in tensors]).amax(0)
    _, exponent = torch.frexp(largest)
    return torch.ldexp(torch.ones_like(largest), exponent - BITS[dtype])


def total_error(found: Tensors, exact: Tensors, names: Iterable[str]) -> float:
    """Return the sum of all differences to exact values, over some tensors."""
    return sum(float((found[name].double() - exact[name]).abs().sum()) for name in names)
