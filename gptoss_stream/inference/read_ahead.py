"""Reads experts into the system's page cache before they are used.

A pass with many tokens uses most experts of every layer, in the order of the file: reading goes on
into the next layer while this one is computed. A pass with few tokens uses those few that the
router has picked, which are then read at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from ..loading.tensor_loader import TensorLoader
from ..transforms.output_tensor import OutputTensor

__all__ = ["ReadAhead"]

_AHEAD_NBYTES = 256 << 20
"""Decoded bytes of matrices that are read ahead; a fourth of that is read in MXFP4."""
_KEY = tuple[str, "int | None", "int | None"]


class ReadAhead:
    """Knows which matrices are used next.

    Args:
        tensors: The matrices of all experts, by name, layer and expert.
        loader: Reads them.
    """

    def __init__(self, tensors: Mapping[_KEY, OutputTensor], loader: TensorLoader) -> None:
        self._loader = loader
        self._by_layer: dict[int | None, dict[int | None, list[OutputTensor]]] = {}
        for (_, layer, expert), tensor in tensors.items():
            self._by_layer.setdefault(layer, {}).setdefault(expert, []).append(tensor)
        self._upcoming: deque[OutputTensor] = deque()
        self._ahead: dict[OutputTensor, None] = {}

    def begin_pass(self, layer: int, experts: list[int]) -> None:
        """Plan what is read ahead: the experts of this pass, and of the next layer if they are
        many."""
        of_layer = self._by_layer[layer]
        upcoming = [tensor for expert in experts for tensor in of_layer[expert]]
        if 2 * len(experts) >= len(of_layer):
            following = self._by_layer.get(layer + 1, {})
            upcoming += [tensor for tensors in following.values() for tensor in tensors]
        self._upcoming = deque(tensor for tensor in upcoming if tensor not in self._ahead)
        self._fill()

    def advance(self, tensor: OutputTensor) -> None:
        """Read further ahead, as a matrix is used now."""
        self._ahead.pop(tensor, None)
        self._fill()

    def finish(self, tensor: OutputTensor) -> None:
        """Note that a matrix was used."""

    def _fill(self) -> None:
        nbytes = sum(tensor.nbytes for tensor in self._ahead)
        while self._upcoming and nbytes < _AHEAD_NBYTES:
            tensor = self._upcoming.popleft()
            self._loader.prefetch(tensor)
            self._ahead[tensor] = None
            nbytes += tensor.nbytes
