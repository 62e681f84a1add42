"""Adapters of the stacked experts: whose they are, and which way round A and B lie.

PEFT adapts a parameter with three axes by one pair of matrices for all experts: A [rank * experts,
x] with the expert slowest, and B [y, rank * experts] with the expert fastest. x is the input and y
the output, or the other way round: PEFT took the first of the parameter's two axes for either, by
its version and by a mark on the module that transformers has since version 5. What is saved is
consistent in each case, and is read accordingly. Source: PEFT, `tuners/lora/layer.py`
(`ParamWrapper`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ..errors import CheckpointError, OptionError, TensorError
from ..tensors.raw_tensor import RawTensor
from .adapter_file import AdapterFile
from .parts import EXPERTS, Parts

__all__ = [
    "Decision",
    "Stack",
    "decide_b_layout",
    "decide_orientation",
    "find_stacks",
    "pair",
    "refuse",
]


class Stack(NamedTuple):
    """The adapter of all experts' matrices of one kind, in one layer."""

    tensor: str
    """The model tensor: gate_up or down."""
    layer: int
    a: RawTensor
    """[rank * experts, x]."""
    b: RawTensor
    """[y, rank * experts]."""

    @property
    def parameter(self) -> str:
        """The name of the parameter that it adapts."""
        return f"{EXPERTS.format(l=self.layer)}.{self.tensor}_proj"

    @property
    def sides(self) -> tuple[int, int]:
        """x and y."""
        return self.a.shape[1], self.b.shape[0]


class Decision(NamedTuple):
    """Something that is not stored in so many words, and how it was found out."""

    value: str
    reason: str


def refuse(file: AdapterFile, raw: RawTensor, what: str) -> TensorError:
    """Return the error about a tensor of an adapter."""
    where = file.info.location.display_path(raw.shard)
    return TensorError(f"{where}: tensor {raw.name!r} {what}")


def pair(file: AdapterFile, parts: Parts, first: str, second: str) -> tuple[RawTensor, RawTensor]:
    """Return two parts of a module's adapter.

    Raises:
        TensorError: If one is missing, or has not two axes.
    """
    for part, other in ((first, second), (second, first)):
        if part not in parts.tensors:
            raw = next(iter(parts.tensors.values()))
            raise refuse(
                file, parts.tensors.get(other, raw),
                f"has no {part} beside it; save or download the adapter again",
            )  # fmt: skip
    found = parts.tensors[first], parts.tensors[second]
    for raw in found:
        if len(raw.shape) != 2:
            raise refuse(file, raw, f"has the shape {list(raw.shape)}, and it must be a matrix")
    return found


def find_stacks(file: AdapterFile, parts: Iterable[Parts], sizes: Mapping[str, int]) -> list[Stack]:
    """Return the adapters of stacked experts.

    Args:
        file: The adapter.
        parts: The parts of the modules with all experts of a layer.
        sizes: The size of each axis of the model (see `ModelConfig.sizes`).

    Raises:
        TensorError: If a tensor is missing, or is of another model.
    """
    by_layer: dict[int, dict[int, Parts]] = {}
    for one in parts:
        by_layer.setdefault(one.module.layer or 0, {})[one.module.depth] = one
        for part in one.tensors.keys() - {"lora_A", "lora_B"}:
            raise refuse(
                file, one.tensors[part],
                f"is a {part} of stacked experts, which have none in PEFT; correct the program "
                "that saved it",
            )  # fmt: skip
    stacks = []
    for layer, by_depth in sorted(by_layer.items()):
        found = {depth: pair(file, one, "lora_A", "lora_B") for depth, one in by_depth.items()}
        if sorted(found) == [0, 1]:
            # PEFT wraps parameters in the order in which the module defines them: gate_up first.
            stacks.append(_checked(file, Stack("gate_up", layer, *found[1]), sizes))
            stacks.append(_checked(file, Stack("down", layer, *found[0]), sizes))
        elif sorted(found) == [0]:
            stacks.append(_single(file, layer, found[0], sizes))
        else:
            raise refuse(
                file, found[max(found)][0],
                "is of two adapters of this module, and the other one is missing; save or download "
                "the adapter again",
            )  # fmt: skip
    return stacks


def _single(
    file: AdapterFile, layer: int, found: tuple[RawTensor, RawTensor], sizes: Mapping[str, int]
) -> Stack:
    """Return the only adapter of a layer's experts, as target_parameters and its shape say."""
    both = [Stack(tensor, layer, *found) for tensor in ("gate_up", "down")]
    targeted = [stack for stack in both if file.config.targets_parameter(stack.parameter)]
    if len(targeted) == 2:
        raise refuse(
            file, found[0],
            f"is the only adapter of layer {layer}'s experts, and target_parameters names two of "
            "them; save or download the adapter again",
        )  # fmt: skip
    if targeted:
        return _checked(file, targeted[0], sizes)
    fitting = [stack for stack in both if _fits(stack, sizes)]
    if len(fitting) == 2:
        raise refuse(
            file, found[0],
            "fits gate_up_proj and down_proj, and target_parameters in adapter_config.json names "
            "neither; correct it there",
        )  # fmt: skip
    return _checked(file, fitting[0] if fitting else both[0], sizes)


def _expected(tensor: str, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Return the input and the output size of an expert's matrix."""
    if tensor == "gate_up":
        return sizes["m"], 2 * sizes["i"]
    return sizes["i"], sizes["m"]


def _fits(stack: Stack, sizes: Mapping[str, int]) -> bool:
    """Return whether a stack's sides are those of its tensor, either way round."""
    return sorted(stack.sides) == sorted(_expected(stack.tensor, sizes))


def _checked(file: AdapterFile, stack: Stack, sizes: Mapping[str, int]) -> Stack:
    """Return a stack whose shapes agree with the model and with the rank."""
    rank = file.config.rank_of(stack.parameter)
    experts = sizes["e"]
    lengths = stack.a.shape[0], stack.b.shape[1]
    if not _fits(stack, sizes):
        x, y = _expected(stack.tensor, sizes)
        raise refuse(
            file, stack.a,
            f"is {list(stack.a.shape)} and lora_B {list(stack.b.shape)}; {stack.tensor}_proj of "
            f"the base model has {x} inputs and {y} outputs: it was trained on another model",
        )  # fmt: skip
    if lengths != (rank * experts, rank * experts):
        raise refuse(
            file, stack.a,
            f"is {list(stack.a.shape)} and lora_B {list(stack.b.shape)}; with rank {rank} of "
            f"adapter_config.json and {experts} experts of the base model they have {rank} * "
            f"{experts} = {rank * experts} rows and columns",
        )  # fmt: skip
    return stack


def decide_orientation(
    file: AdapterFile, stacks: Sequence[Stack], sizes: Mapping[str, int]
) -> Decision:
    """Return whether A of the stacks is along the inputs ("normal") or the outputs ("swapped").

    Raises:
        TensorError: If the tensors contradict each other.
        OptionError: If they contradict what the user says.
        CheckpointError: If nothing shows it.
    """
    asked = file.adapter.orientation
    seen: dict[str, Stack] = {}
    for stack in stacks:
        inputs, outputs = _expected(stack.tensor, sizes)
        if inputs != outputs:
            value = "normal" if stack.sides == (inputs, outputs) else "swapped"
            seen.setdefault(value, stack)
    if len(seen) > 1:
        raise refuse(
            file, seen["swapped"].a,
            f"is along the outputs, and {seen['normal'].a.name!r} along the inputs; correct the "
            "program that saved them",
        )  # fmt: skip
    if seen:
        ((value, stack),) = seen.items()
        if asked not in (None, value):
            raise OptionError(
                f"--lora-orientation {asked}: the shape of {stack.a.name!r} shows that the adapter "
                f"is {value}; remove the option"
            )
        return Decision(value, f"by the shape of {stack.tensor}_proj")
    if asked is not None:
        return Decision(asked, "as asked")
    return _by_versions(file)


def _by_versions(file: AdapterFile) -> Decision:
    """Return the orientation that the versions of PEFT and transformers saved."""
    peft = file.config.peft_version or file.card.peft
    transformers = file.card.transformers
    version = _numbers(peft)[:3]
    if (0, 17) <= version < (0, 19):
        return Decision("normal", f"by PEFT's version, {peft}")
    major = _numbers(transformers)[:1]
    if version >= (0, 19) and major:
        has_mark, is_inverted = major >= (5,), version[:3] == (0, 19, 0)
        if has_mark or not is_inverted:
            value = "normal" if has_mark != is_inverted else "swapped"
            return Decision(
                value, f"by the versions of PEFT, {peft}, and transformers, {transformers}"
            )
    raise CheckpointError(
        f"{file.info.location}: nothing shows which way round the adapter of down_proj lies: its "
        "matrix is square, gate_up_proj has no adapter, and which versions of PEFT (>= 0.19) and "
        "transformers saved it is not known; if it was transformers 5 with PEFT 0.19.1 or later, "
        "add --lora-orientation normal"
    )


def _numbers(version: str | None) -> tuple[int, ...]:
    """Return the numbers of a version: (0, 19, 1) for "0.19.1.dev0"."""
    return tuple(map(int, re.findall(r"\d{1,6}", version or "")[:3]))


def decide_b_layout(file: AdapterFile, stacks: Sequence[Stack]) -> Decision:
    """Return how the columns of the stacks' B are ordered (see `B_LAYOUTS`).

    Raises:
        OptionError: If the adapter contradicts what the user says.
        CheckpointError: If nothing shows it.
    """
    asked, marked = file.adapter.b_layout, file.config.b_layout
    if marked is not None:
        if asked not in (None, marked):
            raise OptionError(
                f"--lora-b-layout {asked}: lora_B_layout in {file.config.where} is {marked}; "
                "remove the option"
            )
        return Decision(marked, "by lora_B_layout in adapter_config.json")
    if asked is not None:
        return Decision(asked, "as asked")
    if not (file.config.is_unsloth or file.card.is_unsloth):
        return Decision("rank_major", "as PEFT saves it")
    ranks = {file.config.rank_of(stack.parameter) for stack in stacks}
    if ranks == {1} or all(stack.b.shape[1] in ranks for stack in stacks):
        return Decision("rank_major", "the layouts are the same with rank 1 or one expert")
    raise CheckpointError(
        f"{file.info.location}: unsloth saved the adapter, and nothing in it says how the columns "
        "of lora_B are ordered: add --lora-b-layout grouped_by_expert if it was trained before "
        "unsloth-zoo wrote lora_B_layout (September 2026), or rank_major if it was trained by PEFT "
        "or migrated"
    )
