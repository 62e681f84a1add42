"""Entry point of the command line.

Exit codes: 0 success; 1 `verify` found differences, or `inspect --against` rearranged tensors; 2
bad usage or bad input; 3 system error (disk full, I/O error, out of memory); 130 interrupted; 141
broken pipe; 143 terminated.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence

from .. import __version__
from .._utils.failures import machine_error
from .._utils.platforms import refuse_windows
from ..errors import GptOssStreamError, MachineError
from . import convert, export, formats, inspect, plan, show, synth, verify
from ._parser import Parser
from ._printing import print_message, show_warnings
from ._signals import Terminated, install_signal_handlers, reset_signal_handlers

__all__ = ["main"]

_BROKEN_PIPE = 141  # 128 + SIGPIPE, which Windows does not have
_COMMANDS = (convert, plan, inspect, show, export, verify, synth, formats)


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
        arguments = _parser().parse_args(argv)
        refuse_windows()
        code: int = arguments.run(arguments)
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


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line.

    A command's parsed arguments have its function `run` as `run`.
    """
    parser = argparse.ArgumentParser(
        prog="gptoss_stream",
        description="Convert gpt-oss checkpoints between formats, and read single tensors.",
        epilog="'gptoss_stream COMMAND --help' describes a command.",
    )
    parser.add_argument(
        "--version", action="version", version=__version__, help="print the version"
    )
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=Parser
    )
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser
