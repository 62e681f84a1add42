"""Commands, options and arguments for click, with help in groups and examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeAlias

import click

from .._utils.platforms import refuse_windows
from ._printing import show_warnings
from ._values import Choice, choices_in_words, did_you_mean

__all__ = ["MAIN", "Arguments", "Commands", "Decorator", "OptionGroup", "argument", "combined",
           "command", "option"]  # fmt: skip

Decorator: TypeAlias = Callable[[Any], Any]
"""What adds an option or an argument to a command's function."""

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

_OTHER_WORDS = {
    "--layout": "--to",
    "--target": "--to",
    "--to-format": "--to",
    "--source-format": "--from",
    "--input-format": "--from",
    "--out": "--output",
    "--out-dir": "--output",
    "--output-dir": "--output",
    "--torch-dtype": "--dtype",
    "--force": "--overwrite",
    "--threads": "--workers",
    "--num-workers": "--workers",
    "--components": "--only",
    "--lora": "--adapter",
    "--base": "--reference",
}
"""What other programs call options."""

_OTHER_COMMANDS = {"compare": "inspect SOURCE --against REFERENCE", "merge": "convert --adapter"}


class Arguments(SimpleNamespace):
    """The parsed arguments of a command, by the names of its options."""


class OptionGroup(NamedTuple):
    """A section of a command's help."""

    title: str
    description: str = ""


MAIN = OptionGroup("Options")


class _Option(click.Option):
    """An option in a group."""

    def __init__(self, *args: Any, group: OptionGroup = MAIN, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the name and the help, with the choices instead of {choices}."""
        record = super().get_help_record(ctx)
        if record is None or not isinstance(self.type, Choice):
            return record
        return record[0], record[1].replace("{choices}", choices_in_words(self.type.values()))


class _Base(click.Command):
    """What the commands and their group have in common."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; let every usage error know its command."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        """Return the option `--help`, described like the others."""
        found = super().get_help_option(ctx)
        if found is not None:
            found.help = "print this help"
        return found


class _Argument(click.Argument):
    """An argument with help."""

    def __init__(self, *args: Any, about: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.about = about


class _Command(_Base):
    """A command whose function takes `Arguments` and returns the exit code."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the arguments, and the options in groups."""
        arguments = [(_shown_name(p), p.about) for p in self.params if isinstance(p, _Argument)]
        if arguments:
            with formatter.section("Arguments"):
                formatter.write_dl(arguments)
        groups: dict[OptionGroup, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and not isinstance(param, click.Argument):
                groups.setdefault(getattr(param, "group", MAIN), []).append(record)
        for group, records in groups.items():
            with formatter.section(group.title):
                if group.description:
                    formatter.write_text(group.description)
                    formatter.write_paragraph()
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    formatter.write(f"  {ctx.command_path} {example}\n")

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        refuse_windows()
        assert self.callback is not None
        arguments = Arguments(**ctx.params)
        show_warnings(verbose=arguments.verbose)
        return self.callback(arguments)


class Commands(_Base, click.Group):
    """The commands, with a suggestion for an unknown one."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Return the command that the first argument names."""
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            advice = did_you_mean(name, self.commands, _OTHER_COMMANDS)
            names = ", ".join(self.commands)
            raise click.UsageError(
                f"there is no command {name!r}; {advice or f'choose one of {names}'}", ctx
            )
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands in the order of use."""
        return list(self.commands)


def command(
    name: str, *, short_help: str, description: str, examples: Sequence[str]
) -> Callable[[Callable[[Arguments], int]], click.Command]:
    """Make a command of a function that returns the exit code.

    Args:
        name: The command.
        short_help: What it does, for the list of commands.
        description: What it does, for its own help.
        examples: Arguments of it that do something useful.
    """

    def make(function: Callable[[Arguments], int]) -> click.Command:
        made = click.command(
            name,
            cls=_Command,
            context_settings=_SETTINGS,
            short_help=short_help,
            help=description,
            examples=examples,
        )(function)
        made.params.append(
            _Option(["-v", "--verbose"], is_flag=True, help="also print what the run is doing")
        )
        return made

    return make


def option(*names: str, help: str, group: OptionGroup = MAIN, **options: Any) -> Decorator:  # noqa: A002 (as of click)
    """Add an option; `{choices}` in its help becomes the values of a `Choice`."""
    return click.option(*names, cls=_Option, help=help, group=group, **options)


def argument(name: str, about: str, **options: Any) -> Decorator:
    """Add an argument with help."""
    return click.argument(name, cls=_Argument, about=about, **options)


def combined(decorators: Iterable[Decorator]) -> Decorator:
    """Return a decorator that adds several options, in this order."""
    ordered = [*decorators]

    def add(function: Any) -> Any:
        for decorator in reversed(ordered):
            function = decorator(function)
        return function

    return add


def usage_message(error: click.UsageError) -> str:
    """Return what is wrong with the arguments, in words."""
    if isinstance(error, click.NoSuchOption) and error.ctx is not None:
        called, name = error.ctx.command, error.option_name
        others = called.commands.values() if isinstance(called, Commands) else ()
        if any(name in param.opts for one in others for param in one.params):
            return f"{name} is an option of a command; write it after the command"
        known = [name for param in called.get_params(error.ctx) for name in param.opts]
        words = {word: one for word, one in _OTHER_WORDS.items() if one in known}
        advice = did_you_mean(name, known, words)
        return f"there is no option {name}; {advice or '--help lists the options'}"
    if isinstance(error, click.MissingParameter) and error.param is not None:
        return f"{_shown_name(error.param)} is missing"
    message = error.format_message().rstrip(".")
    return message[:1].lower() + message[1:] if message[1:2].islower() else message


def _shown_name(param: click.Parameter) -> str:
    """Return what the help calls an argument."""
    return (param.metavar or param.human_readable_name).strip("[].").upper()
