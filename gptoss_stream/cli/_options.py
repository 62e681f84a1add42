"""Options that several commands share."""

from __future__ import annotations

import click

from ._command import Arguments, Decorator, OptionGroup, argument, combined, option
from ._values import COMPONENTS, DTYPES_OR_KEEP, FORMATS, MXFP4_RULES, PATH, SIZE, Numbers

__all__ = [
    "conversion_options",
    "given_output",
    "json_option",
    "max_shard_size_option",
    "output_argument",
    "output_option",
    "overwrite_option",
    "quantization_options",
    "quiet_option",
    "remote_output_options",
    "remote_source_options",
    "required_output",
    "selection_options",
    "source_argument",
    "source_format_option",
    "workers_option",
]


def source_argument(what: str = "checkpoint to read", *, is_required: bool = True) -> Decorator:
    """Add the argument SOURCE.

    Args:
        what: What SOURCE is, for the help.
        is_required: Whether it must be given.
    """
    about = f"{what}: a folder, a Hub repository such as openai/gpt-oss-20b, or a URL"
    return argument("source", about, type=PATH, required=is_required)


def output_argument(about: str, metavar: str = "[OUTPUT]") -> Decorator:
    """Add the argument OUTPUT, and `--output` for it.

    Args:
        about: What OUTPUT is, for the help.
        metavar: What the usage calls it.
    """
    return combined(
        (
            argument("output", about, type=PATH, required=False, metavar=metavar),
            output_option("OUTPUT"),
        )
    )


def output_option(name: str) -> Decorator:
    """Add `--output`; `name` is the argument that it may stand for."""
    return option(
        "-o",
        "--output",
        "output_option",
        type=PATH,
        metavar=name,
        help=f"another way to give {name}",
    )


def given_output(arguments: Arguments, positional: str | None) -> str | None:
    """Return the output that is given as an argument or with `--output`, if any.

    Raises:
        UsageError: If both are given.
    """
    named: str | None = arguments.output_option
    if named is not None and positional is not None:
        raise click.UsageError(
            f"two outputs are given: {positional} and --output {named}; remove one of them",
            click.get_current_context(),
        )
    return positional if named is None else named


def required_output(arguments: Arguments) -> str:
    """Return OUTPUT.

    Raises:
        UsageError: If it is given twice, or not at all.
    """
    output = given_output(arguments, arguments.output)
    if output is None:
        raise click.UsageError("OUTPUT is missing", click.get_current_context())
    return output


def remote_source_options(*, can_download: bool = False, or_output: bool = False) -> Decorator:
    """Add the options of a remote SOURCE.

    Args:
        can_download: Whether the command has `--download`.
        or_output: Whether they are those of OUTPUT if there is no SOURCE.
    """
    group = OptionGroup(
        "Remote source", "With --checksums they are of OUTPUT." if or_output else ""
    )
    options = [
        option(
            "--revision",
            metavar="REV",
            group=group,
            help="branch, tag or commit of a Hub repository",
        ),
        option(
            "--subfolder",
            metavar="DIR",
            group=group,
            help="folder in SOURCE with the checkpoint, such as original",
        ),
        option(
            "--token",
            metavar="TOKEN",
            group=group,
            help="Hub token (default: cached login or HF_TOKEN)",
        ),
        option(
            "--download",
            is_flag=True,
            group=group,
            help="download SOURCE to the Hub cache instead of streaming it",
        ),
    ]
    return combined(options if can_download else options[:-1])


_REMOTE_OUTPUT = OptionGroup("Remote output")

remote_output_options: Decorator = combined(
    (
        option(
            "--staging",
            type=PATH,
            metavar="DIR",
            group=_REMOTE_OUTPUT,
            help="local folder for shards until they are uploaded (default: in the user's cache)",
        ),
        option(
            "--max-staged",
            type=int,
            default=2,
            metavar="N",
            group=_REMOTE_OUTPUT,
            help="maximum number of shards in that folder (default: 2)",
        ),
    )
)

source_format_option: Decorator = option(
    "--from",
    "source_format",
    type=FORMATS,
    metavar="FORMAT",
    help="format of SOURCE: {choices} (default: detected)",
)

max_shard_size_option: Decorator = option(
    "--max-shard-size",
    type=SIZE,
    metavar="SIZE",
    help="maximum size of a shard, such as 500MB or 5GiB (default: 5GB, in decimal units); a "
    "larger tensor gets a shard of its own",
)

quantization_options: Decorator = combined(
    (
        option(
            "--mxfp4-rule",
            type=MXFP4_RULES,
            metavar="RULE",
            help="how floats become MXFP4: {choices} (default: openai); see docs/mxfp4.md",
        ),
        option(
            "--reference",
            type=PATH,
            metavar="BASE",
            help="checkpoint in MXFP4 that SOURCE was trained from, such as openai/gpt-oss-20b: "
            "its blocks are kept where they have the values of SOURCE",
        ),
    )
)

conversion_options: Decorator = combined(
    (
        option(
            "--to",
            type=FORMATS,
            default="transformer-lens",
            metavar="FORMAT",
            help="format to write: {choices} (default: transformer-lens)",
        ),
        source_format_option,
        option(
            "--dtype",
            type=DTYPES_OR_KEEP,
            metavar="DTYPE",
            help="dtype to write: {choices} for each tensor's own (default: keep from a format to "
            "itself and from transformer-lens, otherwise bfloat16)",
        ),
        max_shard_size_option,
        quantization_options,
    )
)


def selection_options(description: str = "The options are combined.") -> Decorator:
    """Add the options that select tensors of the output."""
    group = OptionGroup("Selection", description)
    return combined(
        (
            option(
                "--layers",
                type=Numbers("layer"),
                metavar="LIST",
                group=group,
                help="layers, such as 0-3,7; -1 is the last; tensors outside layers are kept",
            ),
            option(
                "--experts",
                type=Numbers("expert"),
                metavar="LIST",
                group=group,
                help="experts, such as 0,5-9; -1 is the last; tensors outside experts are kept",
            ),
            option(
                "--only",
                type=COMPONENTS,
                multiple=True,
                metavar="LIST",
                group=group,
                help="groups of tensors with commas: {choices}; may be repeated",
            ),
            *(
                option(
                    f"--{name}",
                    multiple=True,
                    metavar="GLOB",
                    group=group,
                    help=f"output tensors with names {effect}, such as '*.bias'; may be repeated",
                )
                for name, effect in (("include", "that match"), ("exclude", "that do not match"))
            ),
        )
    )


workers_option: Decorator = option(
    "--workers",
    type=int,
    metavar="N",
    help="number of threads (default: one more than processors, at most 8)",
)

overwrite_option: Decorator = option(
    "--overwrite",
    is_flag=True,
    help="replace an earlier output of this tool; other files are not deleted",
)

json_option: Decorator = option("--json", is_flag=True, help="print JSON")


def quiet_option(what: str = "errors") -> Decorator:
    """Add `--quiet`; `what` is all that is then printed."""
    return option("--quiet", is_flag=True, help=f"print {what} only")
