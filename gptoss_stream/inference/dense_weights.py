"""The weights that every token uses: read ahead, layer by layer."""

from __future__ import annotations

from collections.abc import Container

from ..loading.tensor_loader import TensorLoader
from ..planning.plan import Plan
from ..transforms.output_tensor import OutputTensor

__all__ = ["DenseWeights"]


class DenseWeights:
    """The dense weights of a model; those of the first layer begin to be read at once.

    The embedding is left out, of which a pass uses a few rows.

    Args:
        plan: The model.
        loader: Makes its tensors.
        others: The names of model tensors that are not dense.
    """

    def __init__(self, plan: Plan, loader: TensorLoader, others: Container[str]) -> None:
        self._loader = loader
        self._by_layer: dict[int, list[OutputTensor]] = {}
        for shard in plan.shards:
            for tensor in shard.tensors:
                name, layer, _ = tensor.origin
                if name not in others and name != "embed":
                    number = plan.model.num_layers if layer is None else layer
                    self._by_layer.setdefault(number, []).append(tensor)
        self.prefetch(0)

    @property
    def nbytes(self) -> int:
        """The size of the weights."""
        return sum(tensor.nbytes for some in self._by_layer.values() for tensor in some)

    def prefetch(self, layer: int) -> None:
        """Begin to read the weights of a layer, or those that follow on the last layer."""
        for tensor in self._by_layer[layer]:
            self._loader.prefetch(tensor)
