"""The options that make a smaller model, and the file that one of them can name."""

from __future__ import annotations

from .._utils import strict_json
from .._utils.paths import user_path
from .._utils.regular_file import open_regular
from ..errors import OptionError
from ._command import Arguments, Decorator, OptionGroup, combined, option
from ._values import Numbers

__all__ = ["parse_keep_experts", "pruning_options"]

_MAX_NBYTES = 16 << 20
"""The most bytes of a file of experts; 1,024 layers with 1,000 experts each take 5 MB."""

_GROUP = OptionGroup("Pruning", "Makes a smaller model, numbered anew.")

pruning_options: Decorator = combined(
    (
        option(
            "--keep-layers",
            type=Numbers("layer"),
            metavar="LIST",
            group=_GROUP,
            help="layers to keep, such as 0-5 (default: all)",
        ),
        option(
            "--keep-experts",
            type=Numbers("expert", can_be_file=True),
            metavar="LIST",
            group=_GROUP,
            help="experts to keep in every layer, such as 0,3,7-12; or @FILE, a JSON file with a "
            "list for each layer of SOURCE, or an object of lists by layer, all of one length",
        ),
    )
)


def parse_keep_experts(arguments: Arguments) -> str | dict[int, list[int]] | None:
    """Return the experts to keep, as `plan` and `convert` take them; reads the file, if it is one.

    Raises:
        OptionError: If the file cannot be read.
    """
    text: str | None = arguments.keep_experts
    if text is None or not text.startswith("@"):
        return text
    file = user_path(text[1:])
    try:
        with open(open_regular(file), "rb") as opened:
            content = opened.read(_MAX_NBYTES + 1)
        if len(content) > _MAX_NBYTES:
            raise ValueError(f"more than {_MAX_NBYTES} bytes; this is not the file it should be")
        found = strict_json.loads(content)
    except OSError as error:
        raise OptionError(f"--keep-experts {file}: {error.strerror}") from None
    except ValueError as error:
        what = str(error).removeprefix(f"{file}: ")
        raise OptionError(f"--keep-experts {file}: {what}") from None
    try:
        if isinstance(found, list):
            found = {str(layer): experts for layer, experts in enumerate(found)}
        by_layer = {int(layer): [*experts] for layer, experts in found.items()}
        numbers = [number for experts in by_layer.values() for number in experts]
        if [*map(str, by_layer)] != [*found] or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError
    except (ValueError, TypeError, AttributeError):
        raise OptionError(
            f"--keep-experts {file}: it holds no lists of expert numbers; write "
            '[[0, 3], [1, 2], …] or {"0": [0, 3], …}'
        ) from None
    return by_layer
