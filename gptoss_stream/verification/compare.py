"""The public function `compare`. It writes nothing.

>>> import gptoss_stream
>>> result = gptoss_stream.compare("my-gpt-oss-20b", "openai/gpt-oss-20b")  # doctest: +SKIP
>>> result.rearranged  # doctest: +SKIP
{'down': 'transposed'}
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .._utils.failures import machine_error
from .._utils.progress import OnProgress, check_callbacks, progress_callbacks
from ..checkpoint.metadata import read_metadata
from ..checkpoint.open_reader import CheckpointReader, open_reader
from ..checkpoint.reader import ElementRange, ReadSchedule
from ..errors import OptionError
from ..formats import SourceModel, check_tensors, read_source
from ..model.selection import GROUPS
from ..model.tensors import MODEL_TENSORS, matrix_axes, matrix_shape
from ..storage.location import LocationLike
from ..storage.open_location import open_location
from .arrangements import Arrangement, arrangements, relate
from .elements import Array, Elements, ModelElements
from .relations import Comparison, Relation

__all__ = ["compare"]

_log = logging.getLogger(__name__)

_LENGTH = 16
"""Rows and columns of a block of values that is compared."""

_MUST_BE_EQUAL = {
    "m": "hidden size",
    "i": "intermediate size",
    "n": "number of attention heads",
    "k": "number of key/value heads",
    "h": "head dimension",
}


def compare(
    source: LocationLike,
    reference: LocationLike,
    *,
    source_format: str | None = None,
    reference_format: str | None = None,
    on_start: Callable[[int, int], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
    progress: bool = False,
) -> Comparison:
    """Compare a few values of each tensor with a reference that has the same model or a base of it.

    This finds what no shape shows: a square matrix that was transposed, and gate and up that are
    stored in another order than the format says. Each may have any format. Of a large remote
    checkpoint some tens of MB are read.

    Args:
        source: A folder, a Hub repository, or a URL (see `open_location`).
        reference: The same of the checkpoint to compare with.
        source_format: The format of the source; by default it is detected.
        reference_format: The format of the reference; by default it is detected.
        on_start: Called with the bytes of the values to compare, as float32, and 0.
        on_progress: Called with the bytes compared since the last call.
        progress: Whether to show a progress bar.

    Returns:
        How each tensor of the source relates to that of the reference.

    Raises:
        OptionError: If there is no format of that name, or if the models have different sizes.
        CheckpointError: If one of them is not a valid checkpoint.
        MachineError: If reading fails.
        MissingPackageError: If an optional package is not installed.
    """
    check_callbacks(on_start=on_start, on_progress=on_progress)
    found, expected = _read(source, source_format), _read(reference, reference_format)
    sizes, notes = _common_sizes(found, expected)
    models = ModelElements(found), ModelElements(expected)
    tasks = [*_tasks(sizes, models)]
    try:
        with (
            open_reader(found.info) as reader,
            open_reader(expected.info) as reference_reader,
            progress_callbacks("comparing", progress, on_start, on_progress) as (start, advance),
        ):
            _log.info("comparing %s with %s", found.info.location, expected.info.location)
            readers = reader, reference_reader
            start(sum(task.nbytes for task in tasks), 0)
            relations = [*_relations(tasks, models, readers, advance)]
            for one in readers:
                one.check_unchanged()
    except OSError as error:
        raise machine_error(error, f"comparing {found.info.location}") from error
    return Comparison(
        source=str(found.info.location),
        source_format=found.name,
        reference=str(expected.info.location),
        reference_format=expected.name,
        layers=sizes["l"],
        experts=tuple(_some_experts(sizes)),
        num_values=sum(len(task.rows) for task in tasks),
        notes=tuple(notes),
        relations=tuple(relations),
    )


def _read(location: LocationLike, name: str | None) -> SourceModel:
    """Read the format and the model of a checkpoint, and check its tensors."""
    source = read_source(read_metadata(open_location(location)), name)
    check_tensors(source.table, source.model, source.info)
    return source


def _common_sizes(source: SourceModel, reference: SourceModel) -> tuple[dict[str, int], list[str]]:
    """Return the size of each axis that both models have, and what is left out; 0 experts for none.

    Raises:
        OptionError: If the models cannot be compared.
    """
    sizes, others = source.model.sizes, reference.model.sizes
    for axis, what in _MUST_BE_EQUAL.items():
        if sizes[axis] != others[axis]:
            raise OptionError(
                f"{source.info.location} has the {what} {sizes[axis]}, and "
                f"{reference.info.location} {others[axis]}: they cannot be compared"
            )
    notes = []
    for axis, noun in (("l", "layers"), ("v", "tokens of the vocabulary")):
        if sizes[axis] != others[axis]:
            common = min(sizes[axis], others[axis])
            notes.append(
                f"the source has {sizes[axis]} {noun}, the reference {others[axis]}: the first "
                f"{common} were compared"
            )
            sizes[axis] = common
    if sizes["e"] != others["e"]:
        notes.append(
            f"the source has {sizes['e']} experts, the reference {others['e']}: experts and router "
            "were not compared"
        )
        sizes["e"] = 0
    return sizes, notes


def _some_experts(sizes: Mapping[str, int]) -> list[int]:
    """Return the first, the middle and the last expert."""
    count = sizes["e"]
    return sorted({0, count // 2, count - 1}) if count else []


class _Task(NamedTuple):
    """A tensor to compare."""

    tensor: str
    layer: int | None
    expert: int | None
    rows: Array
    """The rows of the values to compare."""
    columns: Array
    """Their columns."""
    arrangements: Mapping[str, Arrangement]
    sizes: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        """Bytes of the values as float32."""
        return 4 * len(self.rows)

    def elements(self, arrangement: str) -> Elements:
        """Return the elements of the reference that are the values in an arrangement."""
        rows, columns = self.arrangements[arrangement](self.rows, self.columns)
        indices = {
            "l": np.full_like(rows, self.layer or 0),
            "e": np.full_like(rows, self.expert or 0),
        }
        for axes, numbers in zip(matrix_axes(self.tensor), (rows, columns), strict=True):
            if axes:
                shape = [self.sizes[axis] for axis in axes]
                indices |= zip(axes, np.unravel_index(numbers, shape), strict=True)
        return Elements(self.tensor, indices)


def _tasks(
    sizes: Mapping[str, int], models: tuple[ModelElements, ModelElements]
) -> Iterator[_Task]:
    """Yield all tensors to compare, layer by layer."""
    present = [name for name in MODEL_TENSORS if any(model.stores(name) for model in models)]
    for layer in (None, *range(sizes["l"])):
        for tensor in present:
            axes = MODEL_TENSORS[tensor].split()
            if ("l" in axes) != (layer is not None) or ("e" in axes and not sizes["e"]):
                continue
            num_rows, num_columns = matrix_shape(tensor, sizes)
            named = dict(
                arrangements(tensor, num_rows, num_columns, is_split=models[0].is_split(tensor))
            )
            rows, columns = _positions(num_rows, num_columns)
            for expert in _some_experts(sizes) if tensor in GROUPS["experts"] else (None,):
                yield _Task(tensor, layer, expert, rows, columns, named, sizes)


def _positions(num_rows: int, num_columns: int) -> tuple[Array, Array]:
    """Return the rows and columns of the values to compare.

    Of a vector they are all, of a matrix two square blocks: at the begin, and in the middle, where
    the second half of the rows begins.
    """
    if num_columns == 1:
        return np.arange(num_rows), np.zeros(num_rows, np.int64)
    length = min(_LENGTH, num_rows, num_columns)
    inside = np.arange(length)
    blocks = {(0, 0), tuple(min(size // 2, size - length) for size in (num_rows, num_columns))}
    grids = [np.meshgrid(row + inside, column + inside) for row, column in sorted(blocks)]
    rows, columns = (np.concatenate([grid[axis].ravel() for grid in grids]) for axis in (0, 1))
    return rows, columns


def _relations(
    tasks: Sequence[_Task],
    models: tuple[ModelElements, ModelElements],
    readers: tuple[CheckpointReader, CheckpointReader],
    on_progress: OnProgress,
) -> Iterator[Relation]:
    """Read and compare each tensor."""
    source, reference = models
    reader, reference_reader = readers

    def source_ranges(step: int) -> Iterator[ElementRange]:
        yield from source.ranges(tasks[step].elements(""))

    def reference_ranges(step: int) -> Iterator[ElementRange]:
        for name in tasks[step].arrangements:
            yield from reference.ranges(tasks[step].elements(name))

    stop = threading.Event()
    try:
        reader.set_schedule(ReadSchedule(len(tasks), source_ranges), stop)
        reference_reader.set_schedule(ReadSchedule(len(tasks), reference_ranges), stop)
        for step, task in enumerate(tasks):
            for one in readers:
                one.begin_step(step)
            found = source.read(reader, task.elements(""))
            expected = {
                name: reference.read(reference_reader, task.elements(name))
                for name in task.arrangements
            }
            for one in readers:
                one.end_step(step)
            relation = relate(task.tensor, task.layer, task.expert, found, expected)
            is_missing = not all(model.stores(task.tensor) for model in models)
            if is_missing and relation.values != "equal":
                relation = Relation(task.tensor, task.layer, task.expert, "missing")
            on_progress(task.nbytes)
            yield relation
    finally:
        stop.set()
