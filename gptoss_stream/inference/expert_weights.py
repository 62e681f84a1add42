"""The weights of experts that stay in the checkpoint and are decoded when they are used."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

from ..loading.tensor_loader import TensorLoader
from ..loading.torch_dtypes import TORCH_NAMES
from ..transforms.output_tensor import OutputTensor
from .read_ahead import ReadAhead
from .unsaved_matrix import refuse_saving

__all__ = ["ExpertMatrix", "ExpertWeights"]


class ExpertWeights:
    """The matrices of all experts of a model.

    Args:
        tensors: The matrices, with their origins: `gate_up` [2 * intermediate, hidden], whose rows
            alternate between gate and up, and `down` [hidden, intermediate].
        loader: Makes them.
        cache_nbytes: The most bytes of decoded matrices that are kept for later passes.
    """

    def __init__(
        self, tensors: list[OutputTensor], loader: TensorLoader, cache_nbytes: int
    ) -> None:
        self._tensors = {(*tensor.origin,): tensor for tensor in tensors}
        self._loader = loader
        self._cache_nbytes = cache_nbytes
        self._cached: OrderedDict[OutputTensor, torch.Tensor] = OrderedDict()
        self._used_nbytes = 0
        self._lock = threading.Lock()
        self._memory = threading.local()
        self._ahead = ReadAhead(self._tensors, loader)

    def __deepcopy__(self, memo: Any) -> ExpertWeights:
        """Return the same weights: copies of a model share them."""
        return self

    __reduce_ex__ = refuse_saving

    def matrix(self, name: str, layer: int, expert: int) -> ExpertMatrix:
        """Return a matrix of an expert; nothing is read.

        Args:
            name: "gate_up" or "down".
            layer: The layer.
            expert: The expert.
        """
        return ExpertMatrix(self, self._tensors[name, layer, expert])

    def begin_pass(self, layer: int, experts: list[int]) -> None:
        """Begin a pass through a layer, which will use these experts, in this order."""
        self._ahead.begin_pass(layer, experts)

    def load(self, tensor: OutputTensor) -> torch.Tensor:
        """Return a matrix: mapped, or decoded to memory that belongs to the caller."""
        return self._loader.load(tensor, 0, tensor.nbytes)

    @contextmanager
    def borrow(self, tensor: OutputTensor) -> Iterator[torch.Tensor]:
        """Give a matrix that is valid within the context."""
        if self._loader.can_map(tensor):
            yield self.load(tensor)
            return
        with self._lock:
            cached = self._cached.get(tensor)
            if cached is not None:
                self._cached.move_to_end(tensor)
        if cached is None:
            self._ahead.advance(tensor)
        if cached is not None:
            yield cached
        elif tensor.nbytes <= self._cache_nbytes:
            yield self._keep(tensor, self.load(tensor))
        else:
            memory = self._take_memory(tensor.nbytes)
            used = memory[: tensor.nbytes]
            self._loader.make_into(tensor, 0, tensor.nbytes, used.numpy())
            yield used.view(getattr(torch, TORCH_NAMES[tensor.dtype])).view(tensor.shape)
            self._memory.free = memory
        if cached is None:
            self._ahead.finish(tensor)

    def _keep(self, tensor: OutputTensor, decoded: torch.Tensor) -> torch.Tensor:
        """Keep a decoded matrix in the place of those that were used longest ago."""
        with self._lock:
            if tensor not in self._cached:
                self._cached[tensor] = decoded
                self._used_nbytes += tensor.nbytes
            while self._used_nbytes > self._cache_nbytes:
                oldest, _ = self._cached.popitem(last=False)
                self._used_nbytes -= oldest.nbytes
        return decoded

    def _take_memory(self, nbytes: int) -> torch.Tensor:
        """Return memory of this thread that is used again: new pages cost more than decoding."""
        free: torch.Tensor | None = getattr(self._memory, "free", None)
        self._memory.free = None
        if free is None or len(free) < nbytes:
            free = torch.empty(nbytes, dtype=torch.uint8)
        return free


class ExpertMatrix:
    """A matrix of an expert, [out, in], that is decoded when it is used."""

    def __init__(self, weights: ExpertWeights, tensor: OutputTensor) -> None:
        self._weights = weights
        self._tensor = tensor

    @property
    def shape(self) -> torch.Size:
        """Its shape, [out, in]."""
        return torch.Size(self._tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype once it is decoded."""
        dtype: torch.dtype = getattr(torch, TORCH_NAMES[self._tensor.dtype])
        return dtype

    def tensor(self) -> torch.Tensor:
        """Return the matrix as a tensor, which is not kept."""
        return self._weights.load(self._tensor)

    def multiply(self, inputs: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply activations with the matrix.

        Args:
            inputs: [tokens, in].
            bias: [out], added before the sum is rounded, as by `torch.nn.Linear`.

        Returns:
            [tokens, out], differentiable with respect to the inputs.
        """
        product: torch.Tensor = _Product.apply(inputs, self, bias)  # type: ignore[no-untyped-call]
        return product

    @contextmanager
    def borrow(self, like: torch.Tensor) -> Iterator[torch.Tensor]:
        """Give the decoded matrix in the dtype and on the device of a tensor."""
        with self._weights.borrow(self._tensor) as matrix:
            yield matrix.to(device=like.device, dtype=like.dtype)


class _Product(torch.autograd.Function):
    """A product with a matrix that is decoded again for the backward pass, not kept."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, matrix: ExpertMatrix, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.matrix = matrix
        with matrix.borrow(inputs) as weight:
            return functional.linear(inputs, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, None, torch.Tensor | None]:
        of_bias = gradient.sum(0) if ctx.needs_input_grad[2] else None
        with ctx.matrix.borrow(gradient) as weight:
            return gradient @ weight, None, of_bias
