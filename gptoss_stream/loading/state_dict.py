"""A converted output as a mapping from names to memory-mapped torch tensors.

A file is mapped when one of its tensors is first accessed. A tensor is a view of the map, so that
the system reads only those pages that are used. Needs torch (extra `torch`).

    >>> import gptoss_stream
    >>> state_dict = gptoss_stream.open_state_dict("gpt-oss-20b-tl")  # doctest: +SKIP
    >>> state_dict["blocks.0.attn.W_Q"].shape  # doctest: +SKIP
    torch.Size([64, 2880, 64])
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._utils.failures import missing_package
from .._utils.messages import listed
from ..checkpoint.metadata import read_header
from ..errors import OutputError
from ..storage.local_folder import LocalFolder
from ..storage.open_location import local_path
from ..tensors.dtypes import OUTPUT_DTYPES, DType, output_dtype, torch_name
from ..tensors.raw_tensor import RawTensor
from ..tensors.safetensors_header import INDEX_NAME, parse_index
from ..writing.run_state import WORK_NAME
from .read_errors import translate_read_errors

if TYPE_CHECKING:
    import torch

__all__ = ["StateDict", "open_state_dict"]


# Without a reservation of swap space: Linux would refuse a private map that is larger than memory,
# though hardly any of it is written to. (MAP_NORESERVE, which `mmap` lacks before Python 3.13.)
_NORESERVE = 0x4000 if os.uname().sysname == "Linux" else 0


class StateDict(Mapping[str, "torch.Tensor"]):
    """The tensors of a converted output by name, as a read-only mapping.

    Tensors are private to the process: writing to one (an in-place operation) copies the pages to
    memory and never changes the file. Tensors stay valid after `close`. A pickled `StateDict`
    opens the same folder again; after a fork both processes can use it. Do not truncate files
    that are in use: accessing a page that is gone kills the process (SIGBUS).
    """

    def __init__(
        self,
        path: Path,
        weight_map: Mapping[str, str],
        dtype: torch.dtype | None,
        device: str | torch.device | None,
    ) -> None:
        self.path = path
        self._weight_map = weight_map
        self._dtype = dtype
        self._device = device
        self._location = LocalFolder(path)
        self._raws: dict[str, RawTensor] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self._lock = threading.Lock()
        self._is_closed = False

    def __getitem__(self, name: str) -> torch.Tensor:
        import torch

        raw, mapped = self._find(name)
        is_mxfp4 = raw.dtype is DType.U8
        dtype = torch.uint8 if is_mxfp4 else getattr(torch, torch_name(raw.dtype))
        count = raw.nbytes // raw.dtype.itemsize
        if count == 0:
            tensor = torch.empty(raw.shape, dtype=dtype)
        else:
            tensor = torch.frombuffer(mapped, dtype=dtype, count=count, offset=raw.offset)
        return tensor.reshape(raw.shape).to(
            device=self._device, dtype=dtype if is_mxfp4 else self._dtype
        )

    def __contains__(self, name: object) -> bool:
        return name in self._weight_map

    def __iter__(self) -> Iterator[str]:
        return iter(self._weight_map)

    def __len__(self) -> int:
        return len(self._weight_map)

    def __repr__(self) -> str:
        return f"<StateDict of {len(self)} tensors in {self.path}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.path), self._dtype, self._device)

    def __enter__(self) -> StateDict:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Refuse further access; each file is unmapped with its last tensor."""
        self._is_closed = True
        self._maps.clear()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape from the header, without reading its data."""
        return self._find(name)[0].shape

    def _find(self, name: str) -> tuple[RawTensor, mmap.mmap]:
        """Return a tensor's description and its mapped shard."""
        shard = self._weight_map[name]
        with self._lock:
            if self._is_closed:
                raise OutputError(f"{self.path}: closed; open it again")
            if shard not in self._maps:
                self._open(shard)
            return self._raws[name], self._maps[shard]

    def _open(self, shard: str) -> None:
        """Map a shard and check that its tensors are those of the index."""
        file = self.path / shard
        with translate_read_errors(file):
            _, raws, _ = read_header(self._location, shard)
            with open(file, "rb") as opened:
                mapped = mmap.mmap(
                    opened.fileno(),
                    0,
                    flags=mmap.MAP_PRIVATE | _NORESERVE,  # writing to it never changes the file
                    prot=mmap.PROT_READ | mmap.PROT_WRITE,
                )
        expected = {name for name, where in self._weight_map.items() if where == shard}
        if raws.keys() != expected:
            different = listed([*map(repr, sorted(raws.keys() ^ expected))])
            raise OutputError(
                f"{file}: its tensors are not those of the index: {different}; convert again, or "
                "run verify"
            )
        for raw in raws.values():
            if raw.dtype not in (*OUTPUT_DTYPES.values(), DType.U8):
                raise OutputError(
                    f"{file}: tensor {raw.name!r} is {raw.dtype}, which is not a dtype of outputs"
                )
        self._raws |= raws
        self._maps[shard] = mapped


def open_state_dict(
    path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    device: str | torch.device | None = None,
) -> StateDict:
    """Open a converted output, of any format, as a mapping from names to torch tensors.

    Only the index is read. The result is a context manager, which need not be used as one.

    Args:
        path: A local output folder.
        dtype: A torch name such as "float32": each tensor is converted to it, as a copy, when it
            is accessed. MXFP4 blocks and scales stay uint8. By default tensors are not converted.
        device: Copy each tensor to this device when it is accessed. By default, and on the CPU,
            tensors are not copied.

    Raises:
        OutputError: If the folder is not a finished output.
        OptionError: If the dtype is unknown.
        MachineError: If reading fails.
        MissingPackageError: If torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise missing_package(error, "torch") from None
    folder = local_path(path)
    torch_dtype = None if dtype is None else getattr(torch, torch_name(output_dtype(dtype)))
    return StateDict(folder, _read_weight_map(folder), torch_dtype, device)


def _read_weight_map(folder: Path) -> dict[str, str]:
    """Read the index of an output: tensor name to shard, all of which exist."""
    index = folder / INDEX_NAME
    with translate_read_errors(index):
        if not index.is_file():
            what = (
                "an unfinished conversion; run the same convert again"
                if (folder / WORK_NAME).exists()
                else f"no {INDEX_NAME} in it; name a converted output"
            )
            raise OutputError(f"{folder}: {what}")
        weight_map = parse_index(index.read_bytes(), str(index))
        missing = [name for name in sorted({*weight_map.values()}) if not (folder / name).is_file()]
    if missing:
        raise OutputError(f"{folder}: shards are missing: {listed(missing)}; convert again")
    return weight_map


def _reopen(path: str, dtype: torch.dtype | None, device: str | torch.device | None) -> StateDict:
    """Open the folder of a pickled `StateDict`."""
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    return open_state_dict(path, dtype=name, device=device)
