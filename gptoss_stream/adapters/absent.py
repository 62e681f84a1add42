"""What adapter_config.json says is in an adapter, and is not: then a part of it was lost."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from .. import formats
from ..errors import TensorError
from ..model.config import ModelConfig
from .adapter_file import AdapterFile
from .base_model import Place
from .parts import EXPERTS, Module, Saved, linear_modules

__all__ = ["refuse_absent"]


def refuse_absent(
    file: AdapterFile, model: ModelConfig, changed: Collection[Place], saved: Collection[Saved]
) -> None:
    """Refuse an adapter without tensors that its configuration names.

    Args:
        file: The adapter.
        model: The base model.
        changed: The tensors that it changes.
        saved: The tensors that it stores whole.

    Raises:
        TensorError: Naming the first one.
    """
    places: dict[tuple[str, int | None], set[int | None]] = {}
    for place in changed:
        places.setdefault((place.tensor, place.layer), set()).add(place.expert)
    for key, name, tensor, layer in _expected(file, model):
        if (tensor, layer) not in places:
            raise _absent(file, key, name)
    for (_, layer), experts in places.items():
        lacking = sorted({*range(model.num_experts)} - experts)
        if None not in experts and lacking:
            raise TensorError(
                f"{file.info.location}: expert {lacking[0]} of layer {layer} has no adapter, and "
                "other experts have one: a part of it was not saved; save or download it again"
            )
    stored = {(one.row.stored, one.layer) for one in saved}
    for row in formats.load("hf").TABLE:
        if row.is_in(model) and set(row.stored.split(".")) & set(file.config.modules_to_save):
            for layer in _layers(row.stored, model):
                if (row.stored, layer) not in stored:
                    name = Module(row.stored, layer, None).name
                    raise _absent(file, "modules_to_save", name)
    embeddings = {"embed_tokens": "embed", "lm_head": "unembed"}
    for name in file.config.token_indices:
        if (embeddings.get(name), None) not in places:
            raise _absent(file, "trainable_token_indices", name)


def _absent(file: AdapterFile, key: str, name: str) -> TensorError:
    """Return the error for something that is named and not there."""
    return TensorError(
        f"{file.info.location}: {key} in adapter_config.json names {name!r}, and the adapter has "
        "no tensors for it: a part of it was not saved; save or download it again"
    )


def _layers(template: str, model: ModelConfig) -> Iterable[int | None]:
    """Return the layers that a name is used for; None alone without any."""
    return range(model.num_layers) if "{l}" in template else (None,)


def _expected(file: AdapterFile, model: ModelConfig) -> Iterator[tuple[str, str, str, int | None]]:
    """Yield the key of the configuration, the name, and the model tensor and layer of each target.

    Modules are looked for where they are a list of names, without exceptions to it.
    """
    config = file.config
    for layer in range(model.num_layers):
        experts = EXPERTS.format(l=layer)
        for tensor in ("gate_up", "down"):
            name = f"{experts}.{tensor}_proj"
            if config.targets_parameter(name):
                yield "target_parameters", name, tensor, layer
    for template, tensor in linear_modules():
        for number in _layers(template, model):
            name = Module(template, number, None).name
            if config.targets_parameter(f"{name}.weight"):
                yield "target_parameters", f"{name}.weight", tensor, number
            elif config.targets_module(name):
                yield "target_modules", name, tensor, number
