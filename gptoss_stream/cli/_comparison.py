"""Printing of a comparison of two checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .._utils.messages import counted

if TYPE_CHECKING:
    from ..verification.relations import Comparison, Relation

__all__ = ["print_comparison"]


def print_comparison(result: Comparison) -> None:
    """Print a line for each model tensor, and for each one of them that differs from the others."""
    print(
        f"{result.source} ({result.source_format}) against {result.reference} "
        f"({result.reference_format})\n"
        f"{counted(result.layers, 'layer')}, experts {', '.join(map(str, result.experts)) or '-'}, "
        f"{counted(result.num_values, 'value')} compared"
    )
    for note in result.notes:
        print(f"note: {note}")
    tensors: dict[str, list[Relation]] = {}
    for relation in result.relations:
        tensors.setdefault(relation.tensor, []).append(relation)
    width = max(map(len, tensors), default=0)
    for tensor, relations in tensors.items():
        summary = _summary(relations)
        print(f"  {tensor:{width}}  {_extent(relations)}{summary}")
        if len(_kinds(relations)) > 1:
            for relation in relations:
                if str(relation) != "equal":
                    print(f"  {'':{width}}    {_position(relation)}: {relation}")
    for line in _advice(result):
        print(line)


def _kinds(relations: Sequence[Relation]) -> Counter[tuple[str, str]]:
    """Count relations by arrangement and values."""
    return Counter((relation.arrangement, relation.values) for relation in relations)


def _extent(relations: Sequence[Relation]) -> str:
    """Return the number of layers and experts in words; empty for a tensor outside layers."""
    layers = len({relation.layer for relation in relations})
    experts = len({relation.expert for relation in relations})
    if relations[0].layer is None:
        return ""
    of_experts = "" if relations[0].expert is None else f" x {counted(experts, 'expert')}"
    return f"{counted(layers, 'layer')}{of_experts}: "


def _summary(relations: Sequence[Relation]) -> str:
    """Return how many tensors are equal, changed and so on; of those changed, by how much."""
    kinds = _kinds(relations)
    parts = []
    for kind, count in kinds.items():
        same = [r for r in relations if (r.arrangement, r.values) == kind]
        same.sort(key=lambda relation: relation.scale or relation.difference or 0.0)
        least, most = str(same[0]), str(same[-1])
        text = least if least == most else f"{least} to {most.rpartition(' ')[2]}"
        if len(relations) > 1:
            text = f"{'all' if len(kinds) == 1 else count} {text}"
        parts.append(text)
    return ", ".join(parts)


def _position(relation: Relation) -> str:
    """Return the layer and the expert in words."""
    expert = "" if relation.expert is None else f", expert {relation.expert}"
    return f"layer {relation.layer}{expert}"


def _advice(result: Comparison) -> Iterator[str]:
    """Yield what rearranged tensors mean."""
    rearranged = result.rearranged
    for arrangement in dict.fromkeys(rearranged.values()):
        tensors = [tensor for tensor, found in rearranged.items() if found == arrangement]
        yield (
            f"{', '.join(tensors)}: {arrangement} in every compared tensor; if the reference is as "
            f"{result.reference_format} should be, the source is not as {result.source_format} "
            "should be, and converting it as it is would give a wrong model"
        )
