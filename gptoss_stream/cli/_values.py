"""Values of options: checked before anything is opened, and what people write for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from ..errors import OptionError

if TYPE_CHECKING:
    _Type = click.ParamType[Any, Any]
else:  # older versions of click have no types there
    _Type = click.ParamType

__all__ = [
    "COMPONENTS",
    "DTYPES",
    "DTYPES_OR_KEEP",
    "FORMATS",
    "LORA_B_LAYOUTS",
    "LORA_ORIENTATIONS",
    "MXFP4_RULES",
    "PATH",
    "PRESETS",
    "PROGRESS",
    "SIZE",
    "SIZE_OR_ZERO",
    "TARGETS",
    "Choice",
    "Numbers",
    "choices_in_words",
    "did_you_mean",
]


_NONE: Mapping[str, str] = MappingProxyType({})


def did_you_mean(text: str, known: Iterable[str], others: Mapping[str, str] = _NONE) -> str:
    """Return "did you mean …?" for a text that is unknown; empty if nothing is like it.

    Args:
        text: What the user wrote.
        known: The texts that are known.
        others: What else people write, and what to say about it.
    """
    from difflib import get_close_matches

    known, lower = [*known], text.lower()
    if lower in others:
        near = [others[lower]]
    else:
        near = [one for one in known if one.startswith(lower)][:3]
        near = near or get_close_matches(lower, known, 3, 0.7)
        near = near or [others[one] for one in get_close_matches(lower, others, 3, 0.7)]
    return f"did you mean {' or '.join(dict.fromkeys(near))}?" if near else ""


def choices_in_words(values: Sequence[str]) -> str:
    """Return choices separated by commas, with "or" before the last."""
    return " or ".join(filter(None, (", ".join(values[:-1]), values[-1])))


class Choice(_Type):
    """One of several values, or a list of them with commas.

    Args:
        noun: What the value is, for messages.
        values: Returns the values; called when they are needed.
        aliases: What else is understood.
        hints: What else people write, and what they may mean by it.
        is_list: Whether several values with commas are accepted.
    """

    def __init__(
        self,
        noun: str,
        values: Callable[[], Sequence[str]],
        aliases: Mapping[str, str] = _NONE,
        hints: Mapping[str, str] = _NONE,
        *,
        is_list: bool = False,
    ) -> None:
        self.name = noun
        self.values = values
        self.aliases = aliases
        self.hints = hints
        self.is_list = is_list

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """Return the value, or the list, as the library takes it.

        Raises:
            OptionError: For an unknown value.
        """
        parts = value.split(",") if self.is_list else [value]
        return ",".join(self._one(part.strip()) for part in parts)

    def _one(self, text: str) -> str:
        known = self.values()
        lower = text.lower()
        for spelling in (text, lower, lower.replace("_", "-"), lower.replace("-", "_")):
            found = self.aliases.get(spelling, spelling)
            if found in known:
                return found
        hints = {
            **{alias: one for alias, one in self.aliases.items() if one in known},
            **self.hints,
        }
        advice = did_you_mean(text, known, hints)
        raise OptionError(
            f"unknown {self.name} {text!r}; choose one of {', '.join(known)}"
            f"{f'; {advice}' if advice else ''}"
        )

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
        """Return the values that begin so."""
        before, comma, begin = incomplete.rpartition(",") if self.is_list else ("", "", incomplete)
        return [
            CompletionItem(f"{before}{comma}{one}")
            for one in self.values()
            if one.startswith(begin)
        ]


class Numbers(_Type):
    """A list of layers or experts such as 0-3,7; checked but for their number.

    Args:
        noun: "layer" or "expert".
        can_be_file: Whether @FILE is accepted.
    """

    _ITEM = re.compile(r"-?\d{1,9}(--?\d{1,9})?")
    _OTHER_RANGE = re.compile(r"(-?\d*)(?::|\.\.|\.\.\.|…|–)(-?\d*)")

    def __init__(self, noun: str, *, can_be_file: bool = False) -> None:
        self.name = "list"
        self.noun = noun
        self.can_be_file = can_be_file

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """Return the list as it is.

        Raises:
            OptionError: If it is no such list.
        """
        if self.can_be_file and value.startswith("@"):
            return str(value)
        for item in value.split(","):
            if self._ITEM.fullmatch(item.strip()):
                continue
            advice = "write them as 0-3,7 or -1 for the last one"
            if other := self._OTHER_RANGE.fullmatch(item.strip()):
                meant = f"{other[1] or 0}-{other[2] or -1}"
                advice = f"did you mean {meant}? Both ends of a range are included"
            raise OptionError(f"{value!r} names no {self.noun}s; {advice}")
        return str(value)


class _Size(_Type):
    """A size such as 5GB, or in binary units such as 5GiB."""

    name = "size"
    _BINARY = re.compile(r"(\d{1,15}(?:\.\d+)?)\s*([KMGT])iB?", re.IGNORECASE)

    def __init__(self, *, can_be_zero: bool = False) -> None:
        self.can_be_zero = can_be_zero

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """Return the size as the library takes it.

        Raises:
            OptionError: If it is no size.
        """
        from ..planning.shards import parse_size, parse_size_or_zero

        if binary := self._BINARY.fullmatch(value.strip()):
            value = str(int(float(binary[1]) * 1024 ** (1 + "KMGT".index(binary[2].upper()))))
        (parse_size_or_zero if self.can_be_zero else parse_size)(value)
        return str(value)


class _Path(_Type):
    """A path, a URL or the name of a repository; shells complete it as a path."""

    name = "path"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """Return it as it is."""
        return str(value)

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
        """Let the shell complete paths."""
        return [CompletionItem(incomplete, type="file")]


def _formats() -> Sequence[str]:
    from .. import formats

    return formats.names()


def _dtypes() -> Sequence[str]:
    from ..tensors.dtypes import OUTPUT_DTYPES

    return [*OUTPUT_DTYPES]


def _dtypes_or_keep() -> Sequence[str]:
    from ..tensors.dtypes import KEEP

    return [*_dtypes(), KEEP]


def _rules() -> Sequence[str]:
    from ..tensors.mxfp4_rules import RULES

    return [*RULES]


def _components() -> Sequence[str]:
    from ..model.selection import GROUPS

    return [*GROUPS]


def _presets() -> Sequence[str]:
    from ..random_checkpoint import PRESETS

    return [*PRESETS]


def _targets() -> Sequence[str]:
    from ..random_adapter import TARGETS

    return [*TARGETS]


def _b_layouts() -> Sequence[str]:
    from ..adapters.adapter import B_LAYOUTS

    return B_LAYOUTS


def _orientations() -> Sequence[str]:
    from ..adapters.adapter import ORIENTATIONS

    return ORIENTATIONS


_DTYPE_ALIASES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "fp32": "float32",
    "f32": "float32",
    **{f"torch.{name}": name for name in ("bfloat16", "float16", "float32")},
}
_DTYPE_HINTS = {"mxfp4": "--to hf-mxfp4", "auto": "keep", "original": "keep", "float": "float32"}
_FORMAT_HINTS = {
    "huggingface": "hf (unquantized) or hf-mxfp4",
    "transformers": "hf (unquantized) or hf-mxfp4",
    "mxfp4": "hf-mxfp4 or openai",
    "gpt-oss": "hf-mxfp4 or openai",
}
_COMPONENT_ALIASES = {
    "attn": "attention",
    "expert": "experts",
    "embedding": "embeddings",
    "embed": "embeddings",
    "norm": "norms",
}
_PRESET_ALIASES = {f"gpt-oss-{size}": size for size in ("20b", "120b")}

FORMATS = Choice("format", _formats, {"tl": "transformer-lens"}, _FORMAT_HINTS)
DTYPES = Choice("dtype", _dtypes, _DTYPE_ALIASES, _DTYPE_HINTS)
DTYPES_OR_KEEP = Choice("dtype", _dtypes_or_keep, _DTYPE_ALIASES, _DTYPE_HINTS)
MXFP4_RULES = Choice("MXFP4 rule", _rules)
COMPONENTS = Choice(
    "group", _components, _COMPONENT_ALIASES, {"mlp": "experts", "moe": "experts"}, is_list=True
)
PRESETS = Choice("preset", _presets, _PRESET_ALIASES)
TARGETS = Choice("target", _targets, {"attn": "attention", "lm-head": "lm_head"}, is_list=True)
LORA_B_LAYOUTS = Choice("layout of lora_B:", _b_layouts)
LORA_ORIENTATIONS = Choice("orientation of an adapter:", _orientations)
PROGRESS = Choice("kind of progress", lambda: ("auto", "bar", "log", "none"))
SIZE = _Size()
SIZE_OR_ZERO = _Size(can_be_zero=True)
PATH = _Path()
