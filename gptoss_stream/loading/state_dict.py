"""A checkpoint as a mapping from names to torch tensors, without converting it.

    >>> import gptoss_stream
    >>> state_dict = gptoss_stream.open_state_dict(
    ...     "gpt-oss-20b", to="transformer-lens"
    ... )  # doctest: +SKIP
    >>> state_dict["blocks.0.attn.W_Q"].shape  # doctest: +SKIP
    torch.Size([64, 2880, 64])

A tensor is a view of a mapped file if its elements are stored as they are wanted. Otherwise it is
made when it is accessed, as `convert` makes it. Needs torch (extra `torch`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from .. import formats
from .._utils.failures import missing_package
from .._utils.messages import counted, listed, sized, summary
from ..adapters import AdapterLike, as_adapters
from ..errors import OptionError
from ..planning.options import ConversionOptions
from ..planning.plan import plan_conversion, read_adapters
from ..storage.location import LocationLike
from ..storage.open_location import open_location
from ..tensors.dtypes import DTypeLike, output_dtype, torch_name
from ..tensors.html_table import TensorRow, html_table
from .checkpoint_tensors import (
    CheckpointTensors,
    NamedTensor,
    planned_tensors,
    read_finished,
    stored_tensors,
)
from .devices import check_device
from .tensor_loader import TensorLoader
from .torch_dtypes import torch_dtype

if TYPE_CHECKING:
    import torch

__all__ = ["StateDict", "TensorSlice", "open_state_dict"]


class StateDict(Mapping[str, "torch.Tensor"]):
    """The tensors of a checkpoint by name, as a read-only mapping.

    Mapped tensors are private to the process: writing to one (an in-place operation) copies the
    pages to memory and never changes the file. They stay valid after `close`. Do not truncate files
    that are in use: accessing a page that is gone kills the process (SIGBUS). A file that has
    changed otherwise is refused when a tensor of it is next accessed.

    A pickled `StateDict` opens the same checkpoint again; after a fork both processes can use it.
    """

    def __init__(
        self,
        tensors: CheckpointTensors,
        dtype: torch.dtype | None,
        device: str | torch.device | None,
        reopen: Callable[[], StateDict] | None = None,
    ) -> None:
        self.location = tensors.location
        """Where the checkpoint is."""
        self._format = tensors.format or "as stored"
        self._entries = tensors.entries
        self._loader = tensors.loader
        self._dtype = dtype
        self._device = device
        self._reopen = reopen

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.get_slice(name)[:]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return summary(self, self._summary())

    def _repr_html_(self) -> str:
        """Return a table with a row for each kind of tensor, for notebooks."""
        return html_table(self._summary(), self._rows())

    def _summary(self) -> str:
        rows = [*self._rows()]
        dtypes = listed([*dict.fromkeys(row.dtype for row in rows)])
        return (
            f"{counted(len(self), 'tensor')}, {sized(sum(row.nbytes for row in rows))}, {dtypes}, "
            f"{self._format}, in {self.location}"
        )

    def _rows(self) -> Iterator[TensorRow]:
        """Yield each tensor as it is accessed; torch may lack its dtype."""
        for name, entry in self._entries.items():
            dtype = entry.dtype
            if self._dtype is not None and dtype.code.startswith(("F", "BF")):
                dtype = output_dtype(self._dtype)
            nbytes = prod(entry.shape) * dtype.bits // 8
            yield TensorRow(name, dtype.code, entry.shape, nbytes)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._reopen is None:
            raise TypeError("this StateDict belongs to a model and cannot be pickled")
        return self._reopen, ()

    def __enter__(self) -> StateDict:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files and refuse further access. Tensors stay valid."""
        self._loader.close()

    def get_slice(self, name: str) -> TensorSlice:
        """Return a tensor that is read when it is indexed, such as `get_slice(name)[3:5]`.

        Only the rows that are asked for are made, that is, indices of the first axis. Of a mapped
        tensor nothing is read yet. All of a tensor is made if it is stored transposed and is not
        mapped, such as `W_U` in another dtype.
        """
        return TensorSlice(self._entries[name], self._loader, self._convert)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, without reading its data."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype, without reading its data."""
        stored = torch_dtype(self._entries[name].dtype, name)
        is_converted = self._dtype is not None and stored.is_floating_point
        return self._dtype if is_converted and self._dtype is not None else stored

    def is_mapped(self, name: str) -> bool:
        """Return whether a tensor is a view of a mapped file, unless it is converted to a dtype."""
        return _can_map(self._entries[name], self._loader)

    def _convert(self, tensor: torch.Tensor) -> torch.Tensor:
        """Convert a tensor to the dtype and the device of the mapping."""
        dtype = self._dtype if tensor.dtype.is_floating_point else None
        return tensor.to(device=self._device, dtype=dtype)


class TensorSlice:
    """A tensor that is read when it is indexed, as by `safetensors.safe_open(…).get_slice`."""

    def __init__(
        self,
        entry: NamedTensor,
        loader: TensorLoader,
        convert: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._entry = entry
        self._loader = loader
        self._convert = convert

    def __repr__(self) -> str:
        return summary(self, f"{self._entry.tensor.name}, {self._entry.dtype}, {list(self.shape)}")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return self._entry.shape

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Return a part of the tensor: `index` means what it means for a tensor."""
        first, *others = index if isinstance(index, tuple) and index else (index,)
        tensor, shape = self._entry.tensor, self._entry.shape
        rows = _rows(first, shape[0]) if shape else None
        if rows is None or rows == (0, shape[0]) or _can_map(self._entry, self._loader):
            stored = self._loader.load(tensor, 0, tensor.nbytes)
            whole = self._typed(stored, shape)
            is_whole = isinstance(index, slice) and index == slice(None)  # [:] also of a scalar
            return self._convert(whole if is_whole else whole[index])
        begin, end = rows
        row_nbytes = tensor.nbytes // shape[0]
        stored = self._loader.load(tensor, begin * row_nbytes, end * row_nbytes)
        part = self._typed(stored, (end - begin, *shape[1:]))
        chosen = 0 if isinstance(first, int) else slice(None)
        return self._convert(part[(chosen, *others)])

    def _typed(self, stored: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Return stored elements as they are meant; those of the source's names are bytes."""
        dtype = torch_dtype(self._entry.dtype, self._entry.tensor.name)
        return (stored if self._entry.is_aligned else stored.clone()).view(dtype).view(shape)


def _can_map(entry: NamedTensor, loader: TensorLoader) -> bool:
    """Return whether a tensor is a view of a mapped file."""
    return entry.is_aligned and loader.can_map(entry.tensor)


def _rows(index: Any, size: int) -> tuple[int, int] | None:
    """Return which rows [begin, end) an index of the first axis means; None for other indices."""
    if isinstance(index, int) and not isinstance(index, bool):
        if not -size <= index < size:
            raise IndexError(f"index {index} is out of range for {size} rows")
        return index % size, index % size + 1
    if isinstance(index, slice) and index.step in (None, 1):
        begin, end, _ = index.indices(size)
        return begin, max(begin, end)
    return None


def open_state_dict(
    source: LocationLike,
    *,
    to: str | None = None,
    dtype: DTypeLike | None = None,
    device: str | torch.device | None = None,
    source_format: str | None = None,
    adapters: AdapterLike | Sequence[AdapterLike] | None = (),
    cache: int | str = 0,
) -> StateDict:
    """Open a checkpoint as a mapping from names to torch tensors; reads headers only.

    The result is a context manager, which need not be used as one.

    Args:
        source: A checkpoint in any format, or an output of `convert`: a local folder, a repository
            of the Hub, or a URL (see `open_location`).
        to: The format (see `formats.names`) whose names and tensors the mapping has, with the
            values that `convert` would write. By default the mapping has the tensors that the
            source stores, under their names.
        dtype: Such as "float32" or torch.float32 (see `DTypeLike`). With `to`, as for `convert`.
            Without `to`, floats are converted when they are accessed, and MXFP4 blocks and scales
            stay uint8.
        device: Copy each tensor to this device when it is accessed. By default, and on the CPU,
            tensors are not copied.
        source_format: With `to`, the format of the source; by default it is detected.
        adapters: With `to`, LoRA adapters to merge, in order: locations, or `Adapter` objects.
        cache: Disk space for what is read of a remote source, in bytes or as a text such as "4GB".
            Processes share it, in `~/.cache/gptoss_stream/blocks`; what was used longest ago goes
            first. By default nothing is kept on the disk, and 64 MB in memory.

    Returns:
        The mapping.

    Raises:
        CheckpointError: If the source cannot be used.
        OptionError: If an argument cannot be used.
        MachineError: If reading fails.
        MissingPackageError: If torch or another extra is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise missing_package(error, "torch") from None
    reopen = partial(
        open_state_dict,
        source,
        to=to,
        dtype=dtype,
        device=device,
        source_format=source_format,
        adapters=adapters,
        cache=cache,
    )
    check_device(device)
    info = read_finished(open_location(source))
    if to is not None:
        options = ConversionOptions(to, source_format, dtype, adapters=as_adapters(adapters))
        read = formats.read_source(info, source_format)
        plan = plan_conversion(read, options, None, read_adapters(options))
        return StateDict(planned_tensors(plan, cache), None, device, reopen)
    if source_format is not None or as_adapters(adapters):
        raise OptionError(
            "without a format to read as, tensors are as they are stored: add to=, such as "
            'to="hf", or leave out source_format= and adapters='
        )
    chosen = None if dtype is None else getattr(torch, torch_name(output_dtype(dtype)))
    return StateDict(stored_tensors(info, cache=cache), chosen, device, reopen)
