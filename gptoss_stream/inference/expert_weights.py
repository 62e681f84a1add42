"""The weights of experts that stay in the checkpoint and are decoded when they are used."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from .._utils.forks import begin_again_after_fork
from .._utils.memory import available_nbytes
from ..loading.tensor_loader import TensorLoader
from ..loading.torch_dtypes import torch_dtype
from ..transforms.output_tensor import OutputTensor
from .decode_ahead import DecodeAhead
from .dense_weights import DenseWeights
from .expert_cache import ExpertCache
from .unsaved_matrix import refuse_saving

__all__ = ["ExpertMatrix", "ExpertWeights"]

_FEW_PICKS = 16
"""Of a pass: four tokens with four experts each, up to which packed rows are multiplied faster than
they are decoded."""
_SOME_TOKENS = 64
"""Tokens for each expert, up to which decoding takes longer than multiplying."""
_MARGIN_NBYTES = 1_000_000_000
"""Memory that is left to activations and to other programs."""


class ExpertWeights:
    """The matrices of all experts of a model.

    Args:
        tensors: The matrices, with their origins: `gate_up` [2 * intermediate, hidden], whose rows
            alternate between gate and up, and `down` [hidden, intermediate].
        loader: Makes them.
        cache_nbytes: The most bytes of decoded matrices that are kept for later passes.
        dense: The other weights.
    """

    def __init__(
        self,
        tensors: Sequence[OutputTensor],
        loader: TensorLoader,
        cache_nbytes: int,
        dense: DenseWeights,
    ) -> None:
        self._loader = loader
        self._cache = ExpertCache(loader, cache_nbytes)
        self._dense = dense
        self._layers: dict[int, dict[int, dict[str, OutputTensor]]] = {}
        for tensor in tensors:
            name, layer, expert = tensor.origin
            assert layer is not None
            assert expert is not None
            self._layers.setdefault(layer, {}).setdefault(expert, {})[name] = tensor
        self._ahead = DecodeAhead(
            self._decode, loader.prefetch, max(tensor.nbytes for tensor in tensors)
        )
        self.begin_again()
        begin_again_after_fork(self)
        self._visited: set[int] = set()
        self._is_many = self._multiplies = False
        self._num_kept_layers = self._count_kept_layers(dense.nbytes)

    def begin_again(self) -> None:
        """Begin with no pass and no background thread, as a child process does after a fork."""
        self._pass = threading.Lock()
        self._owner = 0
        self._ahead.begin_again()

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
        return ExpertMatrix(self, self._layers[layer][expert][name])

    @contextmanager
    def one_pass(self, layer: int, experts: Sequence[int], num_picks: int) -> Iterator[None]:
        """Decode ahead in a context in which a thread uses these experts, in this order.

        If another thread is in such a context, matrices are decoded when they are used.

        Args:
            layer: The layer.
            experts: The experts that the router has picked.
            num_picks: How often it has picked one, for all tokens together.
        """
        if not self._pass.acquire(blocking=False):
            yield
            return
        threads = torch.get_num_threads()
        self._owner = threading.get_ident()
        try:
            matrices = [m for expert in experts for m in self._layers[layer][expert].values()]
            self._multiplies = num_picks <= _FEW_PICKS and all(map(self._can_multiply, matrices))
            self._begin(layer, matrices, 2 * len(experts) >= len(self._layers[layer]))
            if num_picks <= _SOME_TOKENS * len(experts) and not self._multiplies:
                torch.set_num_threads(max(1, threads // 2))  # others decode meanwhile
            yield
        finally:
            torch.set_num_threads(threads)
            self._owner = 0
            self._pass.release()

    def multiply_packed(self, tensor: OutputTensor, inputs: torch.Tensor) -> torch.Tensor | None:
        """Multiply a few tokens with a matrix that is not decoded to memory.

        Args:
            tensor: The matrix, [out, in].
            inputs: [tokens, in].

        Returns:
            [tokens, out] float32; None if the matrix has to be decoded.
        """
        if not self._multiplies or self._owner != threading.get_ident():
            return None
        product = torch.empty(len(inputs), tensor.shape[0])
        tokens = inputs.to("cpu", torch.float32).contiguous()
        self._loader.multiply(tensor, tokens.numpy(), product.numpy())
        return product

    def _can_multiply(self, tensor: OutputTensor) -> bool:
        return not self._cache.nbytes and self._loader.can_multiply(tensor)

    def _begin(self, layer: int, matrices: list[OutputTensor], is_many: bool) -> None:
        """Begin to read or to decode what a pass uses, and the next layer if that is most of it."""
        self._is_many = is_many
        if is_many or layer not in self._visited:
            self._visited.add(layer)
            self._ahead.run(partial(self._dense.prefetch, layer + 1))
        if self._multiplies:
            for matrix in matrices:
                self._ahead.run(partial(self._loader.prefetch, matrix))
            return
        if is_many:
            following = self._layers.get(layer + 1, {})
            later = [matrix for expert in following.values() for matrix in expert.values()]
            matrices = [*matrices, *later]
        if not self._cache.nbytes:
            self._ahead.begin([one for one in matrices if not self._loader.can_map(one)])

    def _decode(self, tensor: OutputTensor, memory: torch.Tensor) -> None:
        """Decode a matrix into memory."""
        self._loader.make_into(tensor, 0, tensor.nbytes, memory.numpy())
        layer = tensor.origin.layer
        if self._is_many and layer is not None and layer >= self._num_kept_layers:
            self._loader.forget(tensor)

    def _count_kept_layers(self, dense_nbytes: int) -> int:
        """Return the number of layers whose experts stay in the system's page cache.

        A pass with many tokens reads all experts in the same order. If they do not fit into memory,
        the system would drop each just before it is read again, and dense weights with them.
        """
        free = available_nbytes() - dense_nbytes - _MARGIN_NBYTES
        for layer in sorted(self._layers):
            of_layer = self._layers[layer].values()
            free -= sum(self._loader.source_nbytes(m) for one in of_layer for m in one.values())
            if free < 0:
                return layer
        return len(self._layers)

    def load(self, tensor: OutputTensor) -> torch.Tensor:
        """Return a matrix: mapped, or decoded to memory that belongs to the caller."""
        return self._loader.load(tensor, 0, tensor.nbytes)

    @contextmanager
    def borrow(self, tensor: OutputTensor) -> Iterator[torch.Tensor]:
        """Give a matrix that is valid within the context."""
        if self._loader.can_map(tensor):
            yield self.load(tensor)
            return
        is_owner = self._owner == threading.get_ident()
        memory = self._ahead.take(tensor) if is_owner else None
        if memory is None:
            with self._cache.borrow(tensor) as memory:
                yield _typed(tensor, memory)
            return
        try:
            yield _typed(tensor, memory)
        finally:
            self._ahead.give_back(memory)


def _typed(tensor: OutputTensor, memory: torch.Tensor) -> torch.Tensor:
    """Return the matrix in memory that may be larger."""
    dtype = torch_dtype(tensor.dtype, tensor.name)
    return memory[: tensor.nbytes].view(dtype).view(tensor.shape)


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
        return torch_dtype(self._tensor.dtype, self._tensor.name)

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

    def multiply_packed(self, inputs: torch.Tensor) -> torch.Tensor | None:
        """See `ExpertWeights.multiply_packed`."""
        return self._weights.multiply_packed(self._tensor, inputs)

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
        product = matrix.multiply_packed(inputs)
        if product is not None:
            return (product if bias is None else product + bias.float()).to(inputs)
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
