"""The changes of experts' matrices that are adapted together, by PEFT or by tinker-cookbook."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ..tensors.raw_tensor import RegroupedTensor
from ..transforms.changes import Change, LowRankChange
from ..transforms.factors import Factor
from .base_model import Addition, BaseModel, Place
from .parts import EXPERT_PARTS, EXPERTS, Module, Parts
from .stacks import Stack, refuse

__all__ = ["stack_changes", "tinker_changes"]


def stack_changes(
    base: BaseModel, stack: Stack, orientation: str, b_layout: str
) -> Iterator[Addition]:
    """Yield the changes of all experts of a layer."""
    base.check_numbers(Module(EXPERTS, stack.layer, None), stack.a)
    experts = base.model.num_experts
    rank = stack.a.shape[0] // experts
    width, height = stack.sides
    b = stack.b
    if experts > 1:
        b = RegroupedTensor(
            b.name, b.dtype, (experts, height, rank), b.shard, b.offset, b.checkpoint,
            is_group_fastest=b_layout == "rank_major",
        )  # fmt: skip
    scale = base.scale(stack.parameter)
    is_swapped = orientation == "swapped"

    def make(expert: int) -> Change:
        of_a = Factor(stack.a, expert * rank * width, width, rank, is_rank_first=True)
        of_b = Factor(b, expert * height * rank, height, rank, is_rank_first=False)
        left, right = (of_a, of_b) if is_swapped else (of_b, of_a)
        return LowRankChange(
            left, right, (left.size, right.size), scale, base.cache, is_rounded_by_peft=True
        )

    for expert in range(experts):
        place = Place(stack.tensor, stack.layer, expert)
        yield Addition(place, partial(make, expert))


def tinker_changes(base: BaseModel, parts: Parts, name: str) -> Iterator[Addition]:
    """Yield the changes of one of the experts' matrices in Tinker's form, for all experts.

    A is [experts, rank, inputs] and B [experts, outputs, rank], either with 1 instead of the
    experts if they share it. Gate and up have adapters of their own.
    """
    module, experts = parts.module, base.model.num_experts
    tensor, part = EXPERT_PARTS[name]
    raws = [parts.tensors.get(part) for part in ("lora_A", "lora_B")]
    if raws[0] is None or raws[1] is None:
        raise refuse(
            base.file, next(iter(parts.tensors.values())),
            "has no other half beside it; save or download the adapter again",
        )  # fmt: skip
    a, b = raws[0], raws[1]
    outputs, inputs = base.matrix_shape(tensor)
    indices = None if part is None else range(part, outputs, 2)
    height = outputs if indices is None else len(indices)
    for raw in (a, b):
        if len(raw.shape) != 3 or raw.shape[0] not in (1, experts):
            raise refuse(
                base.file, raw,
                f"has the shape {list(raw.shape)}; the first axis must be 1, or {experts} as "
                "the base model has experts",
            )  # fmt: skip
    rank = base.rank(module.name, a, a.shape[1])
    base.check_shape(a, (a.shape[0], rank, inputs), "the base model")
    base.check_shape(b, (b.shape[0], height, rank), "the base model")
    scale = base.scale(module.name)

    def make(expert: int) -> Change:
        first_a, first_b = ((expert if raw.shape[0] > 1 else 0) for raw in (a, b))
        right = Factor(a, first_a * rank * inputs, inputs, rank, is_rank_first=True)
        left = Factor(b, first_b * height * rank, height, rank, is_rank_first=False,
                      indices=indices)  # fmt: skip
        return LowRankChange(
            left, right, (outputs, inputs), scale, base.cache, is_rounded_by_peft=True
        )

    for expert in range(experts):
        yield Addition(Place(tensor, module.layer, expert), partial(make, expert))
