"""What adapter_config.json says is in an adapter, and is not: then a part of it was lost."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from ..errors import TensorError
from ..model.config import ModelConfig
from .adapter_file import AdapterFile
from .base_model import Place
from .parts import EXPERTS, Module, linear_modules

__all__ = ["refuse_absent"]


def refuse_absent(
    file: AdapterFile, model: ModelConfig, changed: Collection[Place], saved: Collection[str]
) -> None:
    """Refuse an adapter without tensors that its configuration names.

    Args:
        file: The adapter.
        model: The base model.
        changed: The tensors that it changes.
        saved: The names of the tensors that it stores whole.

    Raises:
        TensorError: Naming the first one.
    """
    places = {(place.tensor, place.layer) for place in changed}
    for key, name, tensor, layer in _expected(file, model):
        if (tensor, layer) not in places:
            raise _absent(file, key, name)
    for name in file.config.modules_to_save:
        if not any(f".{name}." in f".{one}" for one in saved):
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
        layers: Iterable[int | None] = range(model.num_layers) if "{l}" in template else (None,)
        for number in layers:
            name = Module(template, number, None).name
            if config.targets_parameter(f"{name}.weight"):
                yield "target_parameters", f"{name}.weight", tensor, number
            elif config.targets_module(name):
                yield "target_modules", name, tensor, number
