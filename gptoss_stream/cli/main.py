"""Entry point of the command line.

Exit codes: 0 success; 1 `verify` found differences, or `inspect --against` rearranged tensors; 2
bad usage or bad input; 3 system error (disk full, I/O error, out of memory), or `plan` found too
little space; 130 interrupted; 141 broken pipe; 143 terminated.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from click.shell_completion import shell_complete

from .. import __version__
from .._utils.failures import machine_error
from ..errors import GptOssStreamError, MachineError
from ._command import Commands, usage_message
from ._printing import print_message, show_warnings
from ._signals import Terminated, install_signal_handlers, reset_signal_handlers
from .convert import convert
from .export import export
from .formats import formats
from .inspect import inspect
from .plan import plan
from .show import show
from .synth import synth
from .verify import verify

__all__ = ["main"]

_BROKEN_PIPE = 141  # 128 + SIGPIPE, which Windows does not have
_SCRIPT = "gptoss-stream"
_COMPLETE = "_GPTOSS_STREAM_COMPLETE"

_commands = Commands(
    "gptoss_stream",
    {
        str(command.name): command
        for command in (convert, plan, inspect, show, export, verify, synth, formats)
    },
    help="Convert gpt-oss checkpoints between formats, and read single tensors.",
    epilog="COMMAND --help describes a command.",
    subcommand_metavar="COMMAND ...",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
click.version_option(__version__, message="%(version)s", help="print the version")(_commands)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The command line without the program's name; by default `sys.argv[1:]`.

    Returns:
        The exit code.

    Raises:
        SystemExit: For `--help`, `--version` and usage errors.
    """
    # numpy's OpenBLAS is not used; its threads would only take memory.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        install_signal_handlers()
        show_warnings()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a path may contain any bytes
        code = _run(sys.argv[1:] if argv is None else [*argv])
        sys.stdout.flush()
        return code
    except GptOssStreamError as error:
        print_message(f"error: {error}")
        return error.exit_code
    except BrokenPipeError:
        sys.stdout = None  # otherwise Python tries to flush it at exit and prints an error
        return _BROKEN_PIPE
    except MemoryError:
        print_message("error: out of memory; free some memory or use fewer --workers")
        return MachineError.exit_code
    except OSError as error:  # the library's own are GptOssStreamErrors
        print_message(f"error: {machine_error(error, 'printing')}")
        sys.stdout = None
        return MachineError.exit_code
    except KeyboardInterrupt:
        print_message("interrupted; run the same command again to resume")
        return 128 + signal.SIGINT
    except Terminated:
        print_message("terminated; run the same command again to resume")
        return 128 + signal.SIGTERM
    finally:
        reset_signal_handlers()


def _run(arguments: list[str]) -> int:
    """Parse the command line and run the command; return the exit code.

    Raises:
        SystemExit: For `--help`, `--version`, usage errors, and the completion of a command line.
    """
    name = Path(sys.argv[0]).name
    program = _SCRIPT if name == _SCRIPT else "python -m gptoss_stream"
    if _COMPLETE in os.environ:
        raise SystemExit(shell_complete(_commands, {}, name, _COMPLETE, os.environ[_COMPLETE]))
    try:
        with _commands.make_context(program, arguments) as context:
            code: int = _commands.invoke(context)
            return code
    except click.exceptions.Exit as done:
        sys.stdout.flush()
        raise SystemExit(done.exit_code) from None
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except click.UsageError as error:
        if error.ctx is not None:
            print(error.ctx.get_usage(), file=sys.stderr)
        print_message(f"error: {usage_message(error)}")
        raise SystemExit(error.exit_code) from None
