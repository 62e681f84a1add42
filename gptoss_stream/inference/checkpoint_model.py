"""A checkpoint opened as a model: dense tensors by name, and experts that are decoded when used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from .. import formats
from ..loading.checkpoint_tensors import planned_tensors, read_finished
from ..loading.devices import check_device
from ..loading.state_dict import StateDict
from ..planning.options import ConversionOptions
from ..planning.output_files import config_files
from ..planning.plan import Plan, plan_conversion, read_adapters
from ..planning.shards import parse_size_or_zero
from ..storage.location import Location
from ..tensors import compiled
from ..tensors.dtypes import dtype_name, torch_name
from ..transforms.output_tensor import OutputTensor
from .one_dtype import one_dtype

if TYPE_CHECKING:
    import torch

    from .expert_weights import ExpertWeights

__all__ = ["CheckpointModel", "open_checkpoint_model"]

_MATRICES = ("gate_up", "down")


@dataclass(frozen=True, slots=True)
class CheckpointModel:
    """A model that stays in its checkpoint."""

    plan: Plan
    """The plan of a conversion to the format whose names the model uses."""
    tensors: StateDict
    """All its tensors."""
    experts: ExpertWeights | None
    """The experts, if they have to be decoded; None if all can be mapped."""

    def config(self, name: str) -> dict[str, Any]:
        """Return a configuration file of the format."""
        return dict(json.loads(config_files(self.plan)[name]))


def open_checkpoint_model(
    location: Location,
    options: ConversionOptions,
    device: str | torch.device | None,
    expert_cache: int | str,
    cache: int | str,
) -> CheckpointModel:
    """Open a checkpoint as a model; raises as `open_state_dict` does.

    Args:
        location: The checkpoint.
        options: The format whose names are used, the dtype, layers and adapters.
        device: Where dense tensors are.
        expert_cache: The most bytes of decoded experts that are kept, or a text such as "2GB".
        cache: Disk space for what is read of a remote checkpoint (see `open_state_dict`).
    """
    check_device(device)
    cache_nbytes = parse_size_or_zero(expert_cache)
    source = formats.read_source(read_finished(location), options.source_format)
    adapters = read_adapters(options)
    plan = plan_conversion(source, options, None, adapters)
    dtype, is_one_of_several = one_dtype(location, _floats(plan), dtype_name(options.dtype))
    if is_one_of_several:
        plan = plan_conversion(source, replace(options, dtype=dtype), None, adapters)
    planned = planned_tensors(plan, cache)
    tensors = StateDict(planned, None, device)
    if all(tensors.is_mapped(tensor.name) for tensor in _matrices(plan)):
        return CheckpointModel(plan, tensors, None)
    from .dense_weights import DenseWeights
    from .expert_weights import ExpertWeights

    compiled.enable()
    # One matrix for gate and up, with rows as MXFP4 stores them: nothing is transposed.
    by_expert = plan_conversion(
        source, replace(options, to="hf-unfused", dtype=plan.dtype), None, adapters
    )
    dense = DenseWeights(plan, planned.loader, _MATRICES)
    loader = planned_tensors(by_expert, cache).loader
    experts = ExpertWeights(_matrices(by_expert), loader, cache_nbytes, dense)
    return CheckpointModel(plan, tensors, experts)


def _floats(plan: Plan) -> Iterator[tuple[str, int]]:
    """Yield the dtype and the number of elements of each tensor of a plan."""
    for shard in plan.shards:
        for tensor in shard.tensors:
            yield torch_name(tensor.dtype), prod(tensor.shape)


def _matrices(plan: Plan) -> list[OutputTensor]:
    """Return the tensors of a plan that hold experts' matrices."""
    return [
        tensor
        for shard in plan.shards
        for tensor in shard.tensors
        if tensor.origin.model_tensor in _MATRICES
    ]
