"""A converted folder as a mapping from name to tensor, on the disk until a tensor is touched.

Files are mapped when the first of their tensors is asked for; a tensor is a view of the map, so
that a slice of it costs its own pages only. Needs torch (extra `torch`).
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
from ..checkpoint.metadata import RawTensor, read_header
from ..errors import OutputError
from ..storage.local_folder import LocalFolder
from ..storage.open_location import local_path
from ..tensors.dtypes import OUTPUT_DTYPES, DType, output_dtype, torch_name
from ..tensors.safetensors_header import INDEX_NAME, parse_index
from ..writing.run_state import WORK_NAME
from .output_info import reading_output

if TYPE_CHECKING:
    import torch

__all__ = ["StateDict", "open_state_dict"]


# Private, so that a write to a tensor never reaches the file, and without a reservation: Linux
# would refuse a private map that is larger than the memory, though hardly any of it is written to.
_NORESERVE = 0x4000 if os.uname().sysname == "Linux" else 0


class StateDict(Mapping[str, "torch.Tensor"]):
    """The tensors of a converted folder by name; read-only, as a mapping.

    Tensors lie in the page cache and belong to this process alone: what is written to one (an
    in-place operation) is copied to memory and never reaches the file. They stay valid when the
    mapping is closed. Pickled, it is opened anew by its path; after a fork both processes have
    it. The files must not be cut while they are in use: no process survives that.
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
        self._raws: dict[str, RawTensor] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self._opening = threading.Lock()
        self._closed = False

    def __getitem__(self, name: str) -> torch.Tensor:
        import torch

        raw, mapped = self._find(name)
        is_packed = raw.dtype is DType.U8
        kind = torch.uint8 if is_packed else getattr(torch, torch_name(raw.dtype))
        count = raw.nbytes // raw.dtype.itemsize
        if count == 0:
            tensor = torch.empty(raw.shape, dtype=kind)
        else:
            tensor = torch.frombuffer(mapped, dtype=kind, count=count, offset=raw.offset)
        return tensor.reshape(raw.shape).to(
            device=self._device, dtype=kind if is_packed else self._dtype
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
        """Let go of the files; a file is unmapped with the last tensor of it."""
        self._closed = True
        self._maps.clear()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not touched."""
        return self._find(name)[0].shape

    def _find(self, name: str) -> tuple[RawTensor, mmap.mmap]:
        shard = self._weight_map[name]
        with self._opening:
            if self._closed:
                raise OutputError(f"{self.path}: closed; open it again")
            if shard not in self._maps:
                self._open(shard)
            return self._raws[name], self._maps[shard]

    def _open(self, shard: str) -> None:
        file = self.path / shard
        with reading_output(file):
            _, raws, _ = read_header(LocalFolder(self.path), shard)
            with open(file, "rb") as opened:
                mapped = mmap.mmap(
                    opened.fileno(),
                    0,
                    flags=mmap.MAP_PRIVATE | _NORESERVE,
                    prot=mmap.PROT_READ | mmap.PROT_WRITE,
                )
        wanted = {name for name, where in self._weight_map.items() if where == shard}
        if raws.keys() != wanted:
            different = listed([*map(repr, sorted(raws.keys() ^ wanted))])
            raise OutputError(
                f"{file}: the index says otherwise of {different}; convert again, or run verify"
            )
        for raw in raws.values():
            if raw.dtype not in (*OUTPUT_DTYPES.values(), DType.U8):
                raise OutputError(f"{file}: tensor {raw.name!r} is {raw.dtype}, no output's dtype")
        self._raws |= raws
        self._maps[shard] = mapped


def open_state_dict(
    path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    device: str | torch.device | None = None,
) -> StateDict:
    """Open a converted folder, of any format, as a mapping from name to torch tensor.

    Reads the index only. With `dtype` (a torch name such as "float32") or `device`, each tensor
    is converted when it is asked for, and is then a copy; blocks and scales of MXFP4 stay uint8.

    Raises `OutputError` for a folder that
    is no finished output, `OptionError` for a dtype that is none, `MachineError` where reading
    fails, `MissingPackageError` without torch. A context manager, which need not be used as one.
    """
    try:
        import torch
    except ImportError as error:
        raise missing_package(error, "torch") from None
    folder = local_path(path)
    kind = None if dtype is None else getattr(torch, torch_name(output_dtype(dtype)))
    index = folder / INDEX_NAME
    with reading_output(index):
        if not index.is_file():
            unfinished = (folder / WORK_NAME).exists()
            raise OutputError(
                f"{folder}: "
                + (
                    "an unfinished conversion; run the same convert again"
                    if unfinished
                    else f"no {INDEX_NAME} in it; name a converted folder"
                )
            )
        weight_map = parse_index(index.read_bytes(), str(index))
        missing = sorted({s for s in weight_map.values() if not (folder / s).is_file()})
    if missing:
        raise OutputError(f"{folder}: shards are missing: {listed(missing)}; convert again")
    return StateDict(folder, weight_map, kind, device)


def _reopen(path: str, dtype: torch.dtype | None, device: str | torch.device | None) -> StateDict:
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    return open_state_dict(path, dtype=name, device=device)
