"""The command line: parses, calls the library, prints. Exit codes: 0 done; 1 verify found
differences; 2 bad usage or input; 3 the machine failed; 130 interrupted (143 by SIGTERM).

Nothing heavy is imported before a command runs, so that --help and usage errors come at once.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from . import __version__
from .errors import (
    GptOssStreamError,
    MachineError,
    OptionError,
    counted,
    listed,
    machine_error,
    sized,
    user_path,
)

if TYPE_CHECKING:
    from .checkpoint import CheckpointInfo, RawTensor
    from .converted import ConvertedInfo
    from .places import Place, Store
    from .planner import Plan
    from .selection import Selection

__all__ = ["main"]


class _Terminated(BaseException):
    """SIGTERM came."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # nothing here calls it; its threads cost
    try:
        signal.signal(signal.SIGINT, _stop)
        signal.signal(signal.SIGTERM, _stop)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold any bytes
        arguments = _parser().parse_args(argv)
        run: Callable[[argparse.Namespace], int | None] = arguments.run
        code = run(arguments)
        sys.stdout.flush()
    except GptOssStreamError as error:
        _say(f"error: {error}")
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output has left; keep Python from complaining at exit.
        sys.stdout = None
        return 128 + signal.SIGPIPE
    except MemoryError:
        _say("error: not enough memory; give it more, or use fewer --workers")
        return MachineError.exit_code
    except OSError as error:
        _say(f"error: {machine_error(error, 'printing')}")
        sys.stdout = None
        return 3
    except KeyboardInterrupt:
        _say("interrupted; run the same command again to go on")
        return 128 + signal.SIGINT
    except _Terminated:
        _say("terminated; run the same command again to go on")
        return 128 + signal.SIGTERM
    finally:
        _end_at_signals()
    return code or 0


def _stop(signum: int, frame: FrameType | None) -> None:
    """End what runs. Not in the middle of an import, in whose callbacks an exception gets lost."""
    if _is_importing(frame):
        signal.signal(signal.SIGALRM, lambda _, later: _stop(signum, later))
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        return
    _end_at_signals()
    raise KeyboardInterrupt if signum == signal.SIGINT else _Terminated


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _end_at_signals() -> None:
    """From here on a signal, a second one for instance, ends the process without a word."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def _say(message: str) -> None:
    """One line to stderr, whatever the message holds."""
    print("gptoss_stream: " + " ".join(message.splitlines()), file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """Takes options between positionals of which one may be left out."""

    _is_within = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._is_within:
            return super().parse_known_args(args, namespace)
        self._is_within = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_within = False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gptoss_stream",
        description="Rewrite gpt-oss checkpoints into the format that other code loads, piece by "
        "piece and in little memory.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=_Parser
    )

    _add_convert(commands)

    plan = commands.add_parser("plan", help="show what convert would do; moves no data")
    _add_source(plan)
    plan.add_argument(
        "output", metavar="OUTPUT", nargs="?", default=".", help="where it would be written"
    )
    _add_staging(plan)
    _add_options(plan)
    _add_workers(plan)
    plan.add_argument("--quiet", action="store_true", help="print the plan alone")
    plan.add_argument("--json", action="store_true", help="print the whole plan for programs")
    plan.set_defaults(run=_plan)

    inspect = commands.add_parser("inspect", help="show what a folder is")
    _add_source(inspect, also=", or what was made of one")
    _add_source_format(inspect)
    inspect.add_argument("--json", action="store_true", help="print it for programs")
    inspect.set_defaults(run=_inspect)

    verify = commands.add_parser("verify", help="compare an output with what its source gives")
    _add_source(verify, nargs="?")
    verify.add_argument("output", metavar="OUTPUT", help="folder of the converted one")
    verify.add_argument(
        "--checksums", action="store_true", help="hold OUTPUT against its SHA256SUMS, not a SOURCE"
    )
    verify.add_argument(
        "--to", metavar="FORMAT", help="of OUTPUT; default: what the output's record says"
    )
    _add_selection_options(verify)
    verify.add_argument("--sample", type=int, metavar="N", help="only N tensors, at random")
    verify.add_argument("--seed", type=int, default=0, metavar="S", help="of the sample; default 0")
    _add_workers(verify)
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
    _add_writing_options(synth)
    synth.set_defaults(run=_synth)

    formats = commands.add_parser("formats", help="list the formats that are read and written")
    formats.add_argument("--json", action="store_true", help="print them for programs")
    formats.set_defaults(run=_formats)
    return parser


_DIMENSIONS = (
    "layers",
    "experts",
    "hidden-size",
    "intermediate-size",
    "num-attention-heads",
    "num-key-value-heads",
    "head-dim",
    "vocab-size",
)


def _add_convert(commands: argparse._SubParsersAction[_Parser]) -> None:
    convert = commands.add_parser("convert", help="convert a checkpoint")
    _add_source(convert)
    convert.add_argument(
        "output",
        metavar="OUTPUT",
        help="folder to write, new, empty or resumed; or s3://bucket/folder, hf://user/name, …",
    )
    convert.add_argument(
        "--download",
        action="store_true",
        help="download SOURCE into the Hub's cache, not stream it",
    )
    _add_staging(convert)
    _add_options(convert)
    _add_writing_options(convert)
    _add_sharing(convert)
    convert.add_argument(
        "--checksums", action="store_true", help="write SHA256SUMS too, of all files"
    )
    convert.add_argument("--json", action="store_true", help="print a report for programs")
    convert.set_defaults(run=_convert)


def _add_source(
    parser: argparse.ArgumentParser, also: str = "", nargs: Literal["?"] | None = None
) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        nargs=nargs,
        help=f"folder of a gpt-oss checkpoint{also}; or openai/gpt-oss-20b on the Hub; or a URL",
    )
    part = parser.add_argument_group("a source that is not a folder here")
    part.add_argument("--revision", metavar="REV", help="branch, tag or commit of a repository")
    part.add_argument("--subfolder", metavar="DIR", help="folder in it, such as original")
    part.add_argument("--token", metavar="TOKEN", help="of the Hub; default: the usual login")


def _add_staging(parser: argparse.ArgumentParser) -> None:
    part = parser.add_argument_group("an output that is not a folder here")
    part.add_argument(
        "--staging", metavar="DIR", help="where shards lie until they are sent; default: the cache"
    )
    part.add_argument(
        "--max-staged", type=int, default=2, metavar="N", help="shards there at a time; default 2"
    )


def _add_sharing(parser: argparse.ArgumentParser) -> None:
    part = parser.add_argument_group("on several machines, which see SOURCE and OUTPUT alike")
    part.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="of a Dask cluster: tcp://host:8786 or its file; local:N for N processes here",
    )
    part.add_argument("--task-index", type=int, metavar="I", help="make the part of task I …")
    part.add_argument("--num-tasks", type=int, metavar="N", help="… of N, counted from 0")
    part.add_argument(
        "--slurm-array", action="store_true", help="take both from the SLURM job array"
    )


def _task(arguments: argparse.Namespace) -> tuple[int, int] | None:
    """Which task of how many this is, if it is one of several."""
    if not arguments.slurm_array:
        if (arguments.task_index is None) != (arguments.num_tasks is None):
            raise OptionError("--task-index and --num-tasks go together")
        if arguments.task_index is None:
            return None
        return arguments.task_index, arguments.num_tasks
    if arguments.task_index is not None or arguments.num_tasks is not None:
        raise OptionError("--slurm-array takes index and number of the task by itself")
    found = {
        name: os.environ.get(f"SLURM_ARRAY_TASK_{name}", default)
        for name, default in (("ID", None), ("COUNT", None), ("MIN", "0"), ("STEP", "1"))
    }
    try:
        number, count, least, step = (int(value) for value in found.values() if value is not None)
    except ValueError:
        raise OptionError(
            "--slurm-array: this is not a task of a SLURM array; start it with sbatch --array=0-15"
        ) from None
    index, rest = divmod(number - least, max(1, step))
    if rest or not 0 <= index < count:
        raise OptionError(
            f"--slurm-array: task {number} of {count} is none of an unbroken array; start it with "
            f"sbatch --array=0-{count - 1}, or give --task-index and --num-tasks"
        )
    return index, count


def _refuse_with_scheduler(arguments: argparse.Namespace, task: tuple[int, int] | None) -> None:
    if task is not None:
        raise OptionError("--scheduler starts tasks by itself; leave out those of a batch system")
    for option, value, instead in (
        ("--token", arguments.token, "set HF_TOKEN where the workers run"),
        ("--download", arguments.download, "workers read what they need by themselves"),
    ):
        if value:
            raise OptionError(f"{option} does not go to other machines; {instead}")


def _source(arguments: argparse.Namespace, store: Store | None = None) -> Place:
    """The place that SOURCE means; says which it is where that is not plain. A token may be meant
    for the `store` alone."""
    from .places import Folder, is_repository, is_repository_name, open_place

    place = open_place(
        arguments.source,
        revision=arguments.revision,
        subfolder=arguments.subfolder,
        token=arguments.token if store is None or is_repository(arguments.source) else None,
        download=getattr(arguments, "download", False),
    )
    if not getattr(arguments, "quiet", False):
        if not place.is_local:
            _say(f"reading {place}")
        elif is_repository_name(arguments.source) and isinstance(place, Folder):
            _say(f"reading the local folder {place}")
    return place


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--to",
        default="transformer-lens",
        metavar="FORMAT",
        help="what to write; default transformer-lens; see the command formats",
    )
    _add_selection_options(parser)
    parser.add_argument(
        "--dtype",
        metavar="DTYPE",
        help="bfloat16, float16, float32 or keep; default: keep from a format to itself and from "
        "transformer-lens, else bfloat16",
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="default 5GB (decimal units)"
    )


def _add_source_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from", dest="source_format", metavar="FORMAT", help="of SOURCE; default: detected"
    )


def _add_selection_options(parser: argparse.ArgumentParser) -> None:
    _add_source_format(parser)
    part = parser.add_argument_group("in part", "each option restricts what it speaks of")
    part.add_argument(
        "--layers", metavar="LIST", help="such as 0-3,7; -1 is the last (--layers=-2,-1)"
    )
    part.add_argument("--experts", metavar="LIST", help="such as 0,5-9; -1 is the last")
    part.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="GROUP",
        help="attention, experts, router, embeddings or norms; may be repeated",
    )
    for name in ("include", "exclude"):
        part.add_argument(
            f"--{name}",
            action="append",
            default=[],
            metavar="GLOB",
            help="on names of output tensors; may be repeated",
        )


def _selection(arguments: argparse.Namespace) -> Selection | None:
    """The selection that was asked for, if any."""
    from .selection import Selection

    selection = Selection(
        arguments.layers,
        arguments.experts,
        tuple(arguments.only),
        tuple(arguments.include),
        tuple(arguments.exclude),
    )
    return None if selection == Selection() else selection


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="threads; default one more than processors, at most 8",
    )


def _add_writing_options(parser: argparse.ArgumentParser) -> None:
    _add_workers(parser)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier output of this tool"
    )
    parser.add_argument("--quiet", action="store_true", help="print errors only")


@contextmanager
def _progress(quiet: bool) -> Iterator[tuple[Callable[[int, int], None], Callable[[int], None]]]:
    """A progress bar in a terminal, nothing elsewhere: (start with total and done, advance)."""
    if quiet or not sys.stderr.isatty():
        yield (lambda total, done: None), (lambda nbytes: None)
        return
    from tqdm import tqdm

    bar = tqdm(unit="B", unit_scale=True, dynamic_ncols=True, leave=False)

    def start(total: int, done: int) -> None:
        bar.reset(total)
        bar.initial = bar.n = done
        bar.refresh()

    try:
        yield start, bar.update
    finally:
        bar.close()


def _convert(arguments: argparse.Namespace) -> None:
    from .converter import convert
    from .share import Share

    task = _task(arguments)
    if arguments.scheduler:
        _refuse_with_scheduler(arguments, task)
    with _client(arguments) as client, _progress(arguments.quiet) as (start, advance):
        store = _store(arguments)
        source = _source(arguments, store)

        def on_plan(planned: Plan, resumed: int) -> None:
            shards = planned.shards if task is None else Share(*task).of(planned.shards)
            total = sum(shard.nbytes for shard in shards)
            if not arguments.quiet:
                if planned.info.place is not source:
                    _say(f"going on with {planned.info.place}, which the run began to read")
                _warn(planned)
                if resumed:
                    _say(f"resuming: {sized(resumed)} of {sized(total)} are finished")
            start(total, resumed)

        report = convert(
            source,
            store or arguments.output,
            to=arguments.to,
            source_format=arguments.source_format,
            dtype=arguments.dtype,
            max_shard_size=arguments.max_shard_size,
            selection=_selection(arguments),
            workers=arguments.workers,
            overwrite=arguments.overwrite,
            checksums=arguments.checksums,
            staging=arguments.staging,
            max_staged=arguments.max_staged,
            client=client,
            task=task,
            on_plan=on_plan,
            on_bytes=advance,
        )
    if arguments.json:
        print(json.dumps(report.as_dict(), indent=2))
    elif not arguments.quiet:
        print(
            f"{report.output}: {counted(report.tensors, 'tensor')}, {sized(report.bytes_out)} in "
            f"{counted(len(report.shards), 'shard')}, {_format_line(report.format, report.dtype)}"
            f"{', a part of the model' if report.partial else ''}"
        )
        _print_narrowed(report.narrowed)
        if task is not None:
            state = "all is finished" if report.complete else "others are still to be made"
            print(f"task {task[0]} of {task[1]} is done; {state}")
            return
        written = report.bytes_out - report.bytes_resumed
        if report.bytes_resumed == report.bytes_out:
            print("nothing was left to do")
            return
        read = f"read {sized(report.bytes_in)} and " if written == report.bytes_out else ""
        print(
            f"{read}wrote {sized(written)} in {report.seconds:.1f} s "
            f"({sized(round(written / report.seconds))}/s), peak memory {sized(report.peak_rss)}"
        )


@contextmanager
def _client(arguments: argparse.Namespace) -> Iterator[Any]:
    """The Dask client that was asked for, if any."""
    if not arguments.scheduler:
        yield None
        return
    from .cluster import open_client

    with open_client(arguments.scheduler) as client:
        if not client.nthreads() and not arguments.quiet:
            _say(f"waiting for workers of {arguments.scheduler}")
        yield client


def _store(arguments: argparse.Namespace) -> Store | None:
    """The remote place that OUTPUT means, if it means one."""
    from .places import open_store

    return open_store(arguments.output, token=arguments.token)


def _warn(planned: Plan) -> None:
    if planned.warning:
        _say(f"warning: {planned.warning}")
    if planned.unused:
        shown = listed(planned.unused, 5)
        _say(f"warning: {counted(len(planned.unused), 'tensor')} not converted: {shown}")


def _plan(arguments: argparse.Namespace) -> None:
    from .executor import memory_nbytes
    from .output import free_nbytes
    from .planner import plan
    from .remote_output import staged_nbytes, staging_folder
    from .workers import count_workers

    store = _store(arguments)
    planned = plan(
        _source(arguments, store),
        to=arguments.to,
        source_format=arguments.source_format,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        selection=_selection(arguments),
    )
    workers = count_workers(arguments.workers)
    if store is None:
        where = user_path(arguments.output)
        needed = planned.nbytes + planned.scratch_nbytes
    else:
        where = staging_folder(store, arguments.staging)
        needed = staged_nbytes(planned.shards, arguments.max_staged)
    free = free_nbytes(where)
    is_local = planned.info.place.is_local and store is None
    memory = memory_nbytes(workers, is_local=is_local)
    if arguments.json:
        print(json.dumps(_plan_as_dict(planned, needed, free, memory), indent=2))
        return
    model = planned.model
    print(
        f"source   {planned.info.place}: {planned.source_format} ({planned.recognised_by})\n"
        f"model    {_model_line(model)}\n"
        f"output   {counted(planned.num_tensors, 'tensor')}{_part(planned.selection.as_dict())}, "
        f"{_format_line(planned.to, planned.dtype)}, "
        f"{sized(planned.nbytes)} in {counted(len(planned.shards), 'shard')}, "
        f"of {sized(planned.source_nbytes)} read\n"
        f"disk     {sized(needed)} needed, {sized(free)} free"
        f"{'' if needed <= free else ': NOT ENOUGH'}\n"
        f"memory   {sized(memory)} at most, {counted(workers, 'worker')}"
    )
    _print_narrowed(planned.narrowed)
    for shard in planned.shards:
        print(f"  {shard.name}  {sized(shard.nbytes):>9}  {counted(len(shard.tensors), 'tensor')}")
    if not arguments.quiet:
        _warn(planned)


def _print_narrowed(narrowed: Mapping[str, int]) -> None:
    for dtypes, count in narrowed.items():
        print(f"narrowed {counted(count, 'tensor')} from {dtypes}")


def _format_line(name: str, dtype: str) -> str:
    """A format and a dtype in words."""
    return f"{name} in {'the dtypes of the source' if dtype == 'keep' else dtype}"


def _part(selection: Mapping[str, Any]) -> str:
    """A selection in words; nothing for all."""
    chosen = [f"{name} {','.join(map(str, value))}" for name, value in selection.items()]
    return f" ({'; '.join(chosen)})" if chosen else ""


def _model_line(model: Any) -> str:
    return (
        f"{counted(model.num_layers, 'layer')}, {counted(model.num_experts, 'expert')} "
        f"({model.experts_per_token} for each token), "
        f"{model.num_parameters / 1e9:.3g} billion parameters"
    )


def _plan_as_dict(planned: Plan, needed: int, free: int, memory: int) -> dict[str, Any]:
    return {
        "source": str(planned.info.place),
        "source_format": planned.source_format,
        "recognised_by": planned.recognised_by,
        "model": {
            "layers": planned.model.num_layers,
            "experts": planned.model.num_experts,
            "experts_per_token": planned.model.experts_per_token,
            "parameters": planned.model.num_parameters,
            **planned.model.dimensions,
        },
        "format": planned.to,
        "partial": planned.is_partial,
        "selection": planned.selection.as_dict(),
        "dtype": planned.dtype,
        "narrowed": dict(planned.narrowed),
        "max_shard_size": planned.max_shard_size,
        "tensors": planned.num_tensors,
        "source_bytes": planned.source_nbytes,
        "data_bytes": planned.data_nbytes,
        "bytes": planned.nbytes,
        "disk_needed": needed,
        "disk_free": free,
        "memory": memory,
        "unused": list(planned.unused),
        "shards": [
            {
                "name": shard.name,
                "bytes": shard.nbytes,
                "tensors": [
                    {
                        "name": tensor.name,
                        "dtype": tensor.dtype.code,
                        "shape": list(tensor.shape),
                        "offset": offset,
                        "bytes": tensor.nbytes,
                    }
                    for tensor, offset in zip(shard.tensors, shard.offsets, strict=True)
                ],
            }
            for shard in planned.shards
        ],
    }


def _inspect(arguments: argparse.Namespace) -> None:
    from .checkpoint import describe
    from .converted import describe_converted
    from .formats import detect, load, naming_config
    from .places import Folder
    from .tables import read_table

    place = _source(arguments)
    converted = describe_converted(place.path) if isinstance(place, Folder) else None
    if converted is not None:
        _inspect_converted(converted, arguments.json)
        return
    info = describe(place)
    name, reason = arguments.source_format, "as asked"
    if name is None:
        name, reason = detect(info)
    found = load(name)
    with naming_config(info):
        _, model = read_table(found.TABLE, found.read_model(info), info)
    if arguments.json:
        print(json.dumps(_info_as_dict(info, name, reason, model.dimensions), indent=2))
        return
    total = sum(raw.nbytes for raw in info.tensors.values())
    print(
        f"{info.place}: {name} ({reason})\n"
        f"{_model_line(model)}\n"
        f"{counted(len(info.tensors), 'tensor')}, {sized(total)} in "
        f"{counted(len(info.shards), 'shard')}"
    )
    _print_tensors(info.tensors)


def _inspect_converted(info: ConvertedInfo, as_json: bool) -> None:
    if as_json:
        print(json.dumps(info.as_dict(), indent=2))
        return
    state = "complete"
    if info.missing:
        state = f"{'incomplete' if info.finished else 'unfinished'}, without {listed(info.missing)}"
    elif not info.finished:
        state = "unfinished"
    if not info.complete:
        state += "; run the same convert again"
    total = sum(raw.nbytes for raw in info.tensors.values())
    shards = {raw.shard for raw in info.tensors.values()}
    print(
        f"{info.path}: converted, {_format_line(info.format, info.dtype)}{_part(info.selection)}\n"
        f"from {info.source} ({info.source_format}) by gptoss_stream {info.version}\n"
        f"{counted(len(info.tensors), 'tensor')}, {sized(total)} in "
        f"{counted(len(shards), 'shard')}: {state}"
    )
    _print_tensors(info.tensors)


def _print_tensors(tensors: Mapping[str, RawTensor]) -> None:
    width = max(map(len, tensors), default=0)
    for raw in tensors.values():
        print(f"  {raw.name:{width}}  {raw.dtype.code:4}  {list(raw.shape)}  {raw.shard}")


def _info_as_dict(
    info: CheckpointInfo, name: str, reason: str, dimensions: dict[str, int]
) -> dict[str, Any]:
    return {
        "path": str(info.place),
        "format": name,
        "recognised_by": reason,
        "model": dimensions,
        "config": dict(info.config),
        "shards": {shard.name: shard.nbytes for shard in info.shards},
        "tensors": {
            raw.name: {
                "dtype": raw.dtype.code,
                "shape": list(raw.shape),
                "shard": raw.shard,
                "offset": raw.offset,
                "bytes": raw.nbytes,
            }
            for raw in info.tensors.values()
        },
    }


def _verify(arguments: argparse.Namespace) -> int:
    from .verifier import verify, verify_checksums

    if (arguments.source is None) != arguments.checksums:
        raise OptionError("verify takes either SOURCE and OUTPUT, or OUTPUT and --checksums")
    with _progress(arguments.quiet) as (start, advance):
        if arguments.checksums:
            result = verify_checksums(
                arguments.output, on_plan=lambda nbytes: start(nbytes, 0), on_bytes=advance
            )
        else:
            result = verify(
                _source(arguments),
                arguments.output,
                to=arguments.to,
                source_format=arguments.source_format,
                selection=_selection(arguments),
                sample=arguments.sample,
                seed=arguments.seed,
                workers=arguments.workers,
                on_plan=lambda nbytes: start(nbytes, 0),
                on_bytes=advance,
            )
    if arguments.json:
        print(json.dumps(result.as_dict(), indent=2))
        return 0 if result.equal else 1
    for difference in result.differences:
        print(difference)
    what = (
        counted(result.files, "file") if arguments.checksums else counted(result.tensors, "tensor")
    )
    compared = f"{what}, {sized(result.nbytes)}{_part(result.selection)}"
    if not result.equal:
        print(f"{result.output}: {counted(len(result.differences), 'difference')} ({compared})")
        return 1
    if not arguments.quiet:
        print(f"{result.output}: equal ({compared} compared)")
    return 0


def _synth(arguments: argparse.Namespace) -> None:
    from .synthesis import synth

    overrides = {
        name.replace("-", "_"): getattr(arguments, name.replace("-", "_")) for name in _DIMENSIONS
    }
    with _progress(arguments.quiet) as (start, advance):
        folder = synth(
            arguments.output,
            arguments.preset,
            format=arguments.format,
            seed=arguments.seed,
            max_shard_size=arguments.max_shard_size,
            workers=arguments.workers,
            overwrite=arguments.overwrite,
            on_plan=start,
            on_bytes=advance,
            **overrides,
        )
    if not arguments.quiet:
        print(
            f"{folder}: a random checkpoint "
            f"({arguments.preset}, {arguments.format}, seed {arguments.seed})"
        )


def _formats(arguments: argparse.Namespace) -> None:
    from . import formats

    known = list(formats.names())
    print(json.dumps({"formats": known}, indent=2) if arguments.json else "\n".join(known))
