"""The choice of layers and experts of which a smaller model is made, numbered anew."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeAlias

from .._utils.arguments import whole_number
from .._utils.messages import listed
from ..errors import OptionError
from .config import ModelConfig
from .numbers import NumbersLike, numbers_in, numbers_text

__all__ = ["ExpertsLike", "Pruning", "ResolvedPruning", "prune"]

ExpertsLike: TypeAlias = "NumbersLike | Mapping[int, Iterable[int]]"
"""How callers name the experts to keep: those of every layer, or by the source's layer number."""


@dataclass(frozen=True, slots=True)
class Pruning:
    """What to keep of a model.

    Args:
        layers: Layer numbers such as "0-5,8"; -1 is the last. None for all.
        experts: Expert numbers, likewise, which are kept in every layer; or pairs of a layer's
            number and its experts. None for all.
    """

    layers: str | None = None
    experts: str | tuple[tuple[int, tuple[int, ...]], ...] | None = None

    @classmethod
    def of(cls, layers: NumbersLike | None, experts: ExpertsLike | None) -> Pruning | None:
        """Return what to keep; None if that is everything.

        Raises:
            OptionError: If they name no numbers.
        """
        kept = numbers_text(layers, "layer")
        if not isinstance(experts, Mapping):
            text = numbers_text(experts, "expert")
            return None if kept is None and text is None else cls(kept, text)
        try:
            pairs = [
                (whole_number(layer, "layer", 0), tuple(whole_number(e, "expert", 0) for e in some))
                for layer, some in experts.items()
            ]
        except (TypeError, OptionError):
            raise OptionError(
                "the experts to keep are given by layer, as numbers from 0 on: {0: [0, 3], …}"
            ) from None
        return cls(kept, tuple(sorted(pairs)))

    def resolve(self, model: ModelConfig) -> ResolvedPruning:
        """Return what is kept of a model.

        Raises:
            OptionError: For numbers that the model does not have or that occur twice, for a layer
                without experts, and if layers would have different numbers of experts.
        """
        sizes = {axis: model.sizes[axis] for axis in ("l", "e")}
        layers = tuple(range(model.num_layers))
        if self.layers is not None:
            layers = _distinct(self.layers, model.num_layers, "layer")
        if self.experts is None or isinstance(self.experts, str):
            text = f"0-{model.num_experts - 1}" if self.experts is None else self.experts
            experts = _distinct(text, model.num_experts, "expert")
            return ResolvedPruning(layers, (experts,) * len(layers), sizes)
        by_layer = dict(self.experts)
        if max(by_layer, default=0) >= model.num_layers:
            raise OptionError(
                f"layer {max(by_layer)}: there are layers 0 to {model.num_layers - 1}"
            )
        for layer in layers:
            _check_experts(layer, by_layer.get(layer), model)
            if len(by_layer[layer]) != len(by_layer[layers[0]]):
                raise OptionError(
                    f"layer {layers[0]} keeps {len(by_layer[layers[0]])} experts and layer {layer} "
                    f"{len(by_layer[layer])}; a gpt-oss has as many in each: keep equal numbers"
                )
        return ResolvedPruning(
            layers, tuple(tuple(sorted(by_layer[layer])) for layer in layers), sizes
        )


def _distinct(text: str, count: int, noun: str) -> tuple[int, ...]:
    """Return the numbers in a text, sorted; refuse one that occurs twice, which may be mistyped."""
    numbers = sorted(numbers_in(text, count, noun))
    for one, other in pairwise(numbers):
        if one == other:
            raise OptionError(f"{text!r} keeps {noun} {one} twice; name it once")
    return tuple(numbers)


def _check_experts(layer: int, experts: Sequence[int] | None, model: ModelConfig) -> None:
    """Check the experts that are kept of a layer that is kept."""
    if experts is None:
        raise OptionError(f"layer {layer} is kept, and nothing says which of its experts")
    if not experts:
        raise OptionError(f"layer {layer} keeps no expert; keep at least one, or not the layer")
    if len(set(experts)) < len(experts):
        raise OptionError(f"layer {layer} keeps an expert twice: {listed([*map(str, experts)])}")
    if max(experts) >= model.num_experts:
        raise OptionError(
            f"expert {max(experts)} of layer {layer}: there are experts 0 to "
            f"{model.num_experts - 1}"
        )


@dataclass(frozen=True, slots=True)
class ResolvedPruning:
    """What is kept of one model, by numbers of the source. Positions are the new numbers."""

    layers: tuple[int, ...]
    experts: tuple[tuple[int, ...], ...]
    """Of each layer that is kept, the experts that are kept."""
    source_sizes: Mapping[str, int]
    """The source's numbers of layers and experts, by the axes `l` and `e`."""

    def model(self, model: ModelConfig) -> ModelConfig:
        """Return the smaller model."""
        num_experts = len(self.experts[0])
        return replace(
            model,
            num_layers=len(self.layers),
            layer_types=tuple(model.layer_types[layer] for layer in self.layers),
            num_experts=num_experts,
            experts_per_token=min(model.experts_per_token, num_experts),
        )

    def keeps(self, layer: int, expert: int | None) -> bool:
        """Return whether a layer of the source is kept, or one of its experts."""
        if layer not in self.layers:
            return False
        return expert is None or expert in self.experts[self.layers.index(layer)]

    def keeps_first_experts(self, layer: int) -> bool:
        """Return whether the experts of a layer, by its new number, keep their numbers."""
        return self.experts[layer] == tuple(range(len(self.experts[layer])))

    def source_indices(self, fixed: Mapping[str, int]) -> dict[str, int]:
        """Return indices of axes with the source's layer and expert instead of the new ones.

        Args:
            fixed: An index for each of some axes. An expert is of a layer that is given too.
        """
        found = dict(fixed)
        if "l" in fixed:
            found["l"] = self.layers[fixed["l"]]
            if "e" in fixed:
                found["e"] = self.experts[fixed["l"]][fixed["e"]]
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return what is kept as JSON types."""
        return {
            "layers": list(self.layers),
            "experts": {str(n): list(e) for n, e in zip(self.layers, self.experts, strict=True)},
        }

    @staticmethod
    def options(record: Mapping[str, Any]) -> tuple[str, ExpertsLike]:
        """Return the layers and the experts of `Pruning.of` that `as_dict` describes."""
        experts = {int(layer): some for layer, some in record["experts"].items()}
        return ",".join(map(str, record["layers"])), experts


def prune(model: ModelConfig, pruning: Pruning | None) -> ResolvedPruning | None:
    """Return what is kept of a model; None if that is everything.

    Raises:
        OptionError: As `Pruning.resolve`.
    """
    if pruning is None:
        return None
    resolved = pruning.resolve(model)
    sizes = len(resolved.layers), len(resolved.experts[0])
    return None if sizes == (model.num_layers, model.num_experts) else resolved
