"""The command line: parses, calls the library, prints. Exit codes: 0 done; 1 verify found
differences; 2 bad usage or input; 3 the machine failed; 130 interrupted (143 by SIGTERM).

Nothing heavy is imported before a command runs, so that --help and usage errors come at once.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .. import __version__
from .._utils.failures import machine_error
from ..errors import GptOssStreamError, MachineError
from .convert import _add_convert
from .formats import _formats
from .inspect import _inspect
from .options import (
    Parser,
    add_conversion_options,
    add_selection_options,
    add_source,
    add_source_format,
    add_staging,
    add_workers,
    add_writing_options,
)
from .plan import _plan
from .printing import say
from .signals import Terminated, reset_signals, stop
from .synth import _DIMENSIONS, _synth
from .verify import _verify

if TYPE_CHECKING:
    pass

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # nothing here calls it; its threads cost
    try:
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold any bytes
        arguments = _parser().parse_args(argv)
        run: Callable[[argparse.Namespace], int | None] = arguments.run
        code = run(arguments)
        sys.stdout.flush()
    except GptOssStreamError as error:
        say(f"error: {error}")
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output has left; keep Python from complaining at exit.
        sys.stdout = None
        return 128 + signal.SIGPIPE
    except MemoryError:
        say("error: not enough memory; give it more, or use fewer --workers")
        return MachineError.exit_code
    except OSError as error:
        say(f"error: {machine_error(error, 'printing')}")
        sys.stdout = None
        return 3
    except KeyboardInterrupt:
        say("interrupted; run the same command again to go on")
        return 128 + signal.SIGINT
    except Terminated:
        say("terminated; run the same command again to go on")
        return 128 + signal.SIGTERM
    finally:
        reset_signals()
    return code or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gptoss_stream",
        description="Rewrite gpt-oss checkpoints into the format that other code loads, piece by "
        "piece and in little memory.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=Parser
    )

    _add_convert(commands)

    plan = commands.add_parser("plan", help="show what convert would do; moves no data")
    add_source(plan)
    plan.add_argument(
        "output", metavar="OUTPUT", nargs="?", default=".", help="where it would be written"
    )
    add_staging(plan)
    add_conversion_options(plan)
    add_workers(plan)
    plan.add_argument("--quiet", action="store_true", help="print the plan alone")
    plan.add_argument("--json", action="store_true", help="print the whole plan for programs")
    plan.set_defaults(run=_plan)

    inspect = commands.add_parser("inspect", help="show what a folder is")
    add_source(inspect, also=", or what was made of one")
    add_source_format(inspect)
    inspect.add_argument("--json", action="store_true", help="print it for programs")
    inspect.set_defaults(run=_inspect)

    verify = commands.add_parser("verify", help="compare an output with what its source gives")
    add_source(verify, nargs="?")
    verify.add_argument("output", metavar="OUTPUT", help="folder of the converted one")
    verify.add_argument(
        "--checksums", action="store_true", help="hold OUTPUT against its SHA256SUMS, not a SOURCE"
    )
    verify.add_argument(
        "--to", metavar="FORMAT", help="of OUTPUT; default: what the output's record says"
    )
    add_selection_options(verify)
    verify.add_argument("--sample", type=int, metavar="N", help="only N tensors, at random")
    verify.add_argument("--seed", type=int, default=0, metavar="S", help="of the sample; default 0")
    add_workers(verify)
    verify.add_argument("--quiet", action="store_true", help="print differences only")
    verify.add_argument("--json", action="store_true", help="print the result for programs")
    verify.set_defaults(run=_verify)

    synth = commands.add_parser("synth", help="write a random checkpoint to try things with")
    synth.add_argument("output", metavar="OUTPUT", help="folder to write; new, empty or resumed")
    synth.add_argument(
        "--format",
        default="hf-mxfp4",
        metavar="FORMAT",
        help="default hf-mxfp4; see the command formats",
    )
    synth.add_argument("--preset", default="tiny", metavar="NAME", help="tiny (default), 20b, 120b")
    for name in _DIMENSIONS:
        synth.add_argument(f"--{name}", type=int, metavar="N", help="override the preset's")
    synth.add_argument("--seed", type=int, default=0, metavar="S", help="default 0")
    synth.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="default 5GB (decimal units)"
    )
    add_writing_options(synth)
    synth.set_defaults(run=_synth)

    formats = commands.add_parser("formats", help="list the formats that are read and written")
    formats.add_argument("--json", action="store_true", help="print them for programs")
    formats.set_defaults(run=_formats)
    return parser
