"""The Hub as a source and as a place to write to: the real client, in runs as users start them,
against the stand-in of `stand_in_hub`.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import ANY

import pytest
from hub_runs import Job, Launcher, after, at_first, environment, wait_for
from runs import INDEX_NAME, WORK_NAME, assert_clean_error, digests, run_here, shards_there, stamps
from stand_in_hub import Fault, Request, StandInHub, every, first

NAME = "openai/gpt-oss-tiny"
OUT = "tester/out"
RECORD = "gptoss_stream.json"
OWN = (".gitattributes", "README.md")
SIZE = ("--max-shard-size", "150KB")
DATA = r"cdn GET .*/lfs/"
RESOLVE = r"hub HEAD .*/resolve/"
SMALL = r"hub GET .*/resolve/"
PUT = r"cdn PUT"
COMMIT = r"hub POST .*/commit/"
COMPANIONS = {
    "tokenizer.json": b'{"version": "1.0"}' * 500,
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
}


# ------------------------------------------------------------------------------- what they all use


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The stand-in, and what begins runs against it."""
    with StandInHub() as hub, Launcher(hub.endpoint, tmp_path_factory.mktemp("home")) as launcher:
        yield hub, launcher


@pytest.fixture(scope="module")
def released(checkpoints, tmp_path_factory) -> Path:
    """A folder as OpenAI releases them: of several shards, with companions and `original/`."""
    folder = tmp_path_factory.mktemp("released") / "source"
    shutil.copytree(checkpoints(layers=2, max_shard_size="200KB"), folder)
    for name, data in COMPANIONS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "README.md").write_text("# A model")
    shutil.copytree(checkpoints(layers=2, format="openai", seed=3), folder / "original")
    return folder


@pytest.fixture(scope="module")
def another(checkpoints) -> Path:
    """Another state of the same model: the same names and sizes, other weights."""
    return checkpoints(layers=2, max_shard_size="200KB", seed=1)


@pytest.fixture
def hub(served) -> StandInHub:
    """The stand-in with nothing in it, and nothing wrong with it."""
    hub = served[0]
    hub.repos.clear()
    hub.faults.clear()
    hub.tokens.clear()
    hub.link_seconds, hub.part_nbytes = 3600, None
    hub.reset_counts()
    return hub


@pytest.fixture
def begin(served, tmp_path):
    """Begin a run in the folder of the test, on some machine: one has one cache."""

    def begin(*arguments: object, machine: str = "this", **more: str) -> Job:
        cache = str(tmp_path / machine)
        return served[1].begin(tmp_path, *arguments, **{"XDG_CACHE_HOME": cache, **more})

    return begin


@pytest.fixture
def cli(begin):
    """Run a command line to its end."""

    def cli(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
        return begin(*arguments, **more).done()

    return cli


@pytest.fixture
def convert(cli):
    """Convert into several shards, without a word where all goes well."""

    def convert(source: object, output: object, *options: object, **more: str):
        return cli("convert", source, output, *SIZE, "--quiet", *options, **more)

    return convert


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files that a conversion of a local folder gives, by their SHA-256; but its record, which
    says where the source was."""
    made: dict[tuple[object, ...], dict[str, str]] = {}

    def whole(source: Path, *options: str) -> dict[str, str]:
        key = (source, *options)
        if key not in made:
            output = tmp_path_factory.mktemp("whole") / "out"
            assert run_here("convert", source, output, *SIZE, "--quiet", *options).returncode == 0
            made[key] = finished(output)
        return made[key]

    return whole


def finished(output: Path) -> dict[str, str]:
    """What stands under its name in an output, but for the record."""
    found = digests(output)
    return {n: d for n, d in found.items() if n != RECORD and not n.startswith(f"{WORK_NAME}/")}


def assert_nothing_wrong(output: Path, whole: Mapping[str, str]) -> None:
    """Whatever stands under a final name is as in the whole output; with an index, all is there."""
    found = finished(output)
    assert found.items() <= whole.items(), sorted(n for n in found if found[n] != whole.get(n))
    if INDEX_NAME in found:
        assert found == whole


def python(hub: StandInHub, home: Path, *words: str, **more: str):
    """A command of a fresh interpreter, for what it reads when it starts."""
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=home,
        env=environment(hub.endpoint, home, **more),
    )


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    return done.stderr.splitlines()


# -------------------------------------------------------------------------------------- the bytes


@pytest.mark.parametrize(
    ("source", "options", "folder", "at"),
    [
        (NAME, [], "main", ""),
        (NAME, ["--subfolder", "original"], "original", "/original"),
        (f"hf://{NAME}/original", [], "original", "/original"),
        (NAME, ["--revision", "next"], "next", ""),
        (f"hf://{NAME}@next", [], "next", ""),
        (f"hf://{NAME}@COMMIT/in/it", [], "in it", "/in/it"),
    ],
)
def test_the_output_is_that_of_the_local_folder(
    source, options, folder, at, hub, cli, released, another, whole, tmp_path
):
    first_commit = hub.add_folder(NAME, released)
    files = {f.relative_to(another).as_posix(): f for f in another.rglob("*") if f.is_file()}
    inner = {f"in/it/{name}": file for name, file in files.items()}
    next_commit = hub.add_repo(NAME, files | inner, branch="next")
    commit = first_commit if folder in ("main", "original") else next_commit
    local = {"main": released, "original": released / "original"}.get(folder, another)
    options = [option.replace("COMMIT", commit) for option in options]
    done = cli("convert", source.replace("COMMIT", commit), "out", *SIZE, *options)
    assert done.returncode == 0, done.stderr
    assert lines(done) == [f"gptoss_stream: reading hf://{NAME}@{commit[:12]}{at}"]
    assert finished(tmp_path / "out") == whole(local)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) >= 4
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["source"] == f"hf://{NAME}@{commit}{at}"


def test_as_a_user_starts_it(hub, released, whole, tmp_path):
    """From a fresh interpreter, with no setting changed."""
    commit = hub.add_folder(NAME, released)
    from_hub = f"gptoss_stream: reading hf://{NAME}@{commit[:12]}\n"
    for words, said in (
        (["inspect", NAME], "hf-mxfp4"),
        (["convert", NAME, "out", *SIZE], "90 tensors"),
        (["verify", NAME, "out"], "out: equal"),
    ):
        done = python(hub, tmp_path, "-m", "gptoss_stream", *words)
        assert (done.returncode, done.stderr) == (0, from_hub)
        assert said in done.stdout
    assert finished(tmp_path / "out") == whole(released)


def test_a_folder_of_this_machine_comes_first(hub, cli, another, released, whole, tmp_path):
    hub.add_folder(NAME, released)
    shutil.copytree(another, tmp_path / NAME)
    done = cli("convert", NAME, "out", *SIZE)
    assert done.returncode == 0
    assert lines(done) == [f"gptoss_stream: reading the local folder {NAME}"]
    assert finished(tmp_path / "out") == whole(another)
    assert hub.requests == []
    refused = cli("convert", NAME, "out2", "--revision", "main")
    assert_clean_error(refused, 2)
    assert "--revision is only for a repository of the Hub" in refused.stderr
    assert cli("convert", f"hf://{NAME}", "out3", *SIZE).returncode == 0
    assert finished(tmp_path / "out3") == whole(released)


# ------------------------------------------------------------------------------------- the traffic


def header_nbytes(folder: Path) -> int:
    return sum(
        8 + int.from_bytes(shard.read_bytes()[:8], "little")
        for shard in folder.glob("*.safetensors")
    )


def small_nbytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*") if file.suffix != ".safetensors")


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ([], 1),
        (["--layers", "1", "--only", "experts"], 0.4),
        (["--only", "router", "--only", "norms"], 0.02),
    ],
)
def test_what_is_needed_is_sent_once(options, share, hub, cli, released, tmp_path):
    hub.add_folder(NAME, released)
    done = cli("convert", NAME, "out", *SIZE, *options, "--json")
    assert done.returncode == 0
    needed = json.loads(done.stdout)["bytes_in"]
    weights = sum(file.stat().st_size for file in released.glob("*.safetensors"))
    assert needed <= share * weights
    headers, small = header_nbytes(released), small_nbytes(released)
    assert needed <= hub.bytes_sent - headers <= 1.02 * needed + small
    assert_no_byte_twice(hub, released)


def assert_no_byte_twice(hub: StandInHub, folder: Path) -> None:
    """But the first of each file, in which the length of its header stands."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    for request in hub.requests:
        if request.origin == "cdn":
            assert request.range is not None, "a whole shard was asked for"
            begin, last = request.range.removeprefix("bytes=").split("-")
            if begin != "0":
                ranges.setdefault(request.path, []).append((int(begin), int(last)))
    assert len(ranges) == len(list(folder.glob("*.safetensors")))
    for found in ranges.values():
        found.sort()
        assert all(one[1] < other[0] for one, other in itertools.pairwise(found))
    small = [r.path for r in hub.requests if r.origin == "hub" and r.method == "GET"]
    assert len(small) == len(set(small))


def is_of_a_block(request: Request) -> bool:
    """Whether data was asked for, and not a header."""
    return request.origin == "cdn" and len(request.range or "") > len("bytes=8-99999")


def test_large_blocks_are_sent_once(hub, tmp_path, checkpoints, whole):
    """As they are without the settings of these tests: of up to 16 MiB. One that breaks off goes
    on where it was, but for less than a MiB."""
    source = checkpoints(layers=1, vocab_size=160_000, hidden_size=64)
    hub.add_folder(NAME, source)
    breaks = 2
    hub.faults.append(first(breaks, Fault("drop_after", 5_500_000), is_of_a_block))
    options = ["--max-shard-size", "30MB", "--json"]
    done = python(hub, tmp_path, "-m", "gptoss_stream", "convert", NAME, "out", *options)
    assert done.returncode == 0, done.stderr
    assert finished(tmp_path / "out") == whole(source, *options[:2])
    needed = json.loads(done.stdout)["bytes_in"]
    assert 35_000_000 < needed <= hub.bytes_sent <= 1.02 * needed + breaks * (1 << 20)
    blocks = [request for request in hub.requests if is_of_a_block(request)]
    assert 3 + breaks <= len(blocks) <= 6 + breaks


# ------------------------------------------------------------------------------ what can go wrong

NOW = {"Retry-After": "0"}
OF_DATA = {
    "429": Fault("status", 429, NOW),
    "429 in the Hub's words": Fault("status", 429, {"RateLimit": '"api";r=0;t=0'}),
    "500": Fault("status", 500),
    "503": Fault("status", 503, NOW),
    "408": Fault("status", 408),
    "a refusal": Fault("status", 403),
    "an end at once": Fault("drop_after", 0),
    "an end after a while": Fault("drop_after", 30_000),
    "half": Fault("short"),
    "half, and said so": Fault("wrong_length"),
    "no answer": Fault("lose_reply"),
    "the whole file": Fault("ignore_range"),
    "other bytes": Fault("shift_range", 7),
    "gzip": Fault("gzip"),
    "a page": Fault("html"),
    "little at a time": Fault("slow", 400_000),
    "a pause": Fault("stall", 0.3),
}
OF_ADDRESSES = [*map(OF_DATA.get, ("429", "500", "503", "no answer"))]
OF_SMALL_FILES = [*OF_ADDRESSES, *map(OF_DATA.get, ("half", "an end at once", "gzip"))]


PASSING = {
    **{f"{name}, of the data": ([fault], "cdn GET /lfs/REPO/") for name, fault in OF_DATA.items()},
    "of addresses": (OF_ADDRESSES, "hub HEAD /REPO/resolve/"),
    "of small files": (OF_SMALL_FILES, "hub GET /REPO/resolve/"),
    "of the repository": (OF_ADDRESSES[:2], "hub GET /api/models/REPO$"),
    "of the listing": (OF_ADDRESSES[1:2], "hub GET /api/models/REPO/tree/"),
}


def named(name: str) -> str:
    """A repository for a case of a table."""
    return "openai/" + re.sub(r"\W+", "-", name)


@pytest.fixture(scope="module")
def passed(served, released, tmp_path_factory):
    """Runs that each had to do with one kind of fault: whatever they ask for fails at first. They
    are done at the same time."""
    hub, launcher = served
    folder = tmp_path_factory.mktemp("passed")
    jobs = {}
    for name, (faults, match) in PASSING.items():
        hub.add_folder(named(name), released)
        hub.faults.append(at_first(faults, match.replace("REPO", named(name))))
        jobs[name] = launcher.begin(folder, "convert", named(name), name, *SIZE, "--quiet")
    ends = {name: (job.done(), folder / name) for name, job in jobs.items()}
    hub.faults.clear()
    return ends


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_does_no_harm(name, passed, released, whole):
    done, output = passed[name]
    assert done.returncode == 0, done.stderr
    assert finished(output) == whole(released)


OF_LATER_DATA = (21, "cdn GET /lfs/REPO/")
OF_LATER_ADDRESSES = (16, "hub HEAD /REPO/resolve/")
LASTING = {
    "500 from the first": (Fault("status", 500), (0, "cdn GET /lfs/REPO/"), 3, "answers 500"),
    "500 of the data": (Fault("status", 500), OF_LATER_DATA, 3, "the server answers 500"),
    "403 of the data": (Fault("status", 403), OF_LATER_DATA, 3, "refuses its own signed address"),
    "404 of the data": (Fault("status", 404), OF_LATER_DATA, 2, "it does not exist (404)"),
    "416 of the data": (Fault("status", 416), OF_LATER_DATA, 2, "it is shorter than it was"),
    "an end at once": (Fault("drop_after", 0), OF_LATER_DATA, 3, "check the network"),
    "no answer": (Fault("lose_reply"), OF_LATER_DATA, 3, "check the network"),
    "half": (Fault("wrong_length"), OF_LATER_DATA, 3, "the server sends"),
    "the whole file": (Fault("ignore_range"), OF_LATER_DATA, 3, "does not honour byte ranges"),
    "other bytes": (Fault("shift_range", 1), OF_LATER_DATA, 3, "the server sends bytes"),
    "gzip": (Fault("gzip"), OF_LATER_DATA, 3, "with the coding 'gzip'"),
    "a page for the data": (Fault("html"), OF_LATER_DATA, 3, "does not honour byte ranges"),
    "503 of an address": (Fault("status", 503, NOW), OF_LATER_ADDRESSES, 3, "the Hub answers 503"),
    "404 of an address": (Fault("status", 404), OF_LATER_ADDRESSES, 2, "the Hub answers 404"),
    "403 of an address": (Fault("status", 403), OF_LATER_ADDRESSES, 2, "no access (403)"),
    "no answer for an address": (
        Fault("lose_reply"),
        OF_LATER_ADDRESSES,
        3,
        "the Hub cannot be reached",
    ),
    "a page for an address": (Fault("html"), OF_LATER_ADDRESSES, 3, "not one of the Hub"),
    "no commit": (Fault("no_commit_header"), OF_LATER_ADDRESSES, 3, "it names no commit"),
    "another sum": (
        Fault("wrong_etag"),
        OF_LATER_ADDRESSES,
        2,
        "it changed while it was being read",
    ),
    "another size": (
        Fault("wrong_size"),
        OF_LATER_ADDRESSES,
        2,
        "it changed while it was being read",
    ),
}


@pytest.fixture(scope="module")
def ended(served, released, whole, tmp_path_factory):
    """Runs that each ended by one kind of fault, all at the same time, and what came of it when the
    same commands were run again after it."""
    hub, launcher = served
    folder = tmp_path_factory.mktemp("ended")

    def run_all(*options: str) -> dict[str, subprocess.CompletedProcess[str]]:
        commands = {name: ("convert", named(name), name, *SIZE, "--quiet") for name in LASTING}
        jobs = {n: launcher.begin(folder, *words, *options) for n, words in commands.items()}
        return {name: job.done() for name, job in jobs.items()}

    for name, (fault, (n, match), _, _) in LASTING.items():
        hub.add_folder(named(name), released)
        hub.faults.append(after(n, fault, match.replace("REPO", named(name))))
    ends = run_all("--workers", "1")
    hub.faults.clear()
    for name in LASTING:
        assert_nothing_wrong(folder / name, whole(released))
    before = {name: stamps(folder / name) for name in LASTING}
    again = run_all()
    return {name: (ends[name], before[name], again[name], folder / name) for name in LASTING}


@pytest.mark.parametrize("name", LASTING)
def test_what_lasts_ends_the_run(name, ended, released, whole):
    """With one line that says what; and the same command again, when it is over, goes on."""
    done, before, again, output = ended[name]
    _, _, code, word = LASTING[name]
    assert_clean_error(done, code)
    assert word in done.stderr
    assert f"hf://{named(name)}@" in done.stderr
    assert again.returncode == 0, again.stderr
    assert finished(output) == whole(released)
    assert before.items() <= stamps(output).items()


def test_some_had_finished_shards(ended):
    assert sum(bool(before) for _, before, _, _ in ended.values()) >= 5


def test_a_server_is_left_alone_for_as_long_as_it_asks(hub, convert, released, tmp_path):
    hub.add_folder(NAME, released)
    hub.faults.append(first(1, Fault("status", 429, {"Retry-After": "1"}), DATA))
    begin = time.monotonic()
    assert convert(NAME, "out").returncode == 0
    assert 1 < time.monotonic() - begin < 20


@pytest.mark.parametrize(
    ("where", "number", "code"),
    [("reading", signal.SIGINT, 130), ("writing", signal.SIGTERM, 143)],
    ids=["reading", "writing"],
)
def test_a_run_that_waits_for_the_network_is_interrupted_at_once(
    where, number, code, hub, begin, convert, released, whole, tmp_path
):
    """And goes on later."""
    hub.add_folder(NAME, released)
    output = "out" if where == "reading" else f"hf://{OUT}"
    kind, most = ("cdn GET", 12) if where == "reading" else ("cdn PUT", 1)
    hub.faults.append(after(most, Fault("stall", 60), kind))
    job = begin("convert", NAME, output, *SIZE, "--quiet")
    wait_for(lambda: told(hub).count(kind) > most)
    time.sleep(0.2)
    begun = time.monotonic()
    job.kill(number)
    done = job.done()
    assert time.monotonic() - begun < 5
    assert_clean_error(done, code)
    assert "run the same command again to resume" in done.stderr
    hub.faults.clear()
    assert convert(NAME, output).returncode == 0
    assert (finished(tmp_path / "out") if where == "reading" else contents(hub)) == whole(released)


@pytest.mark.parametrize("seed", range(3))
def test_all_of_it_at_random(seed, hub, convert, released, whole, tmp_path):
    """One request in five goes wrong, each in its own way. Only a bit that was flipped ends a run,
    which is then run again."""
    hub.add_folder(NAME, released)
    chance = random.Random(seed)

    def spoil(request):
        path = f"{request.origin} {request.method} {request.path}"
        kinds = {DATA: [*OF_DATA.values()], RESOLVE: OF_ADDRESSES, SMALL: OF_SMALL_FILES}
        faults = next((some for match, some in kinds.items() if re.search(match, path)), None)
        if faults is None or chance.random() > 0.2:
            return None
        # Not of the data: of a part of a file nobody knows the sum.
        flipped = seed % 2 and faults is OF_SMALL_FILES and chance.random() < 0.5
        return Fault("flip") if flipped else chance.choice(faults)

    hub.faults.append(spoil)
    ends = []
    for _ in range(20):
        done = convert(NAME, "out")
        assert_nothing_wrong(tmp_path / "out", whole(released))
        if done.returncode == 0:
            break
        assert_clean_error(done, 2, 3)
        ends.append(done.stderr)
    assert finished(tmp_path / "out") == whole(released)
    assert seed % 2 or ends == []


@pytest.mark.parametrize("name", ["config.json", INDEX_NAME, "chat_template.jinja"])
def test_a_flipped_bit_of_a_small_file_is_seen(name, hub, convert, released, whole, tmp_path):
    hub.add_folder(NAME, released)
    hub.faults.append(after(0, Fault("flip"), rf"hub GET .*/{name}"))
    done = convert(NAME, "out")
    assert_clean_error(done, 2, 3)
    assert f"/{name}: " in done.stderr
    assert not (tmp_path / "out" / name).exists()
    assert_nothing_wrong(tmp_path / "out", whole(released))
    hub.faults.clear()
    assert convert(NAME, "out").returncode == 0
    assert finished(tmp_path / "out") == whole(released)


def test_a_flipped_bit_of_a_large_tokenizer_is_seen(hub, convert, released, tmp_path):
    """It is read in parts, from the CDN: 28 MB in the released models."""
    tokenizer = random.Random(0).randbytes(11_000_000)
    (tmp_path / "files").mkdir()
    files = {f.name: f for f in released.glob("*.*") if f.is_file()}
    commit = hub.add_repo(NAME, {**files, "tokenizer.json": tokenizer})
    oid = hub.repos[NAME].commits[commit]["tokenizer.json"].sha256
    turns = iter([False, True])
    hub.faults.append(
        lambda r: Fault("flip") if r.path.endswith(f"/{oid}") and next(turns, False) else None
    )
    done = convert(NAME, "out", "--only", "router")
    assert next(turns, None) is None
    assert_clean_error(done, 2, 3)
    assert "tokenizer.json" in done.stderr
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert convert(NAME, "out", "--only", "router").returncode == 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == tokenizer


def test_addresses_that_run_out_are_asked_for_again(hub, convert, released, whole, tmp_path):
    hub.add_folder(NAME, released)
    hub.link_seconds = 0.1
    hub.faults.append(every(3, Fault("stall", 0.1), DATA))
    done = convert(NAME, "out")
    assert done.returncode == 0, done.stderr
    assert finished(tmp_path / "out") == whole(released)


def test_addresses_that_are_all_withdrawn_are_asked_for_again(
    hub, convert, released, whole, tmp_path
):
    hub.add_folder(NAME, released)
    withdrawn = every(5, Fault("slow", 10**9), DATA)
    hub.faults.append(lambda request: withdrawn(request) and hub.expire_links())
    done = convert(NAME, "out")
    assert done.returncode == 0, done.stderr
    assert finished(tmp_path / "out") == whole(released)
    assert [request.status for request in hub.requests].count(403) >= 3


# --------------------------------------------------------------------------- a state that is moved


def stop_midway(hub: StandInHub, convert, source: str, *options: str, n: int = 20):
    """Begin a conversion, and let its source fail for good."""
    hub.faults.append(after(n, Fault("status", 500), DATA))
    done = convert(source, "out", "--workers", "1", *options)
    assert_clean_error(done, 3)
    hub.faults.clear()


def test_a_resumed_run_reads_the_state_that_it_began_with(
    hub, convert, cli, released, another, whole, tmp_path
):
    began = hub.add_folder(NAME, released)
    stop_midway(hub, convert, NAME)
    assert 1 <= len(list((tmp_path / "out").glob("*.safetensors"))) < len(whole(released)) - 5
    hub.add_folder(NAME, another)
    done = cli("convert", NAME, "out", *SIZE)
    assert done.returncode == 0, done.stderr
    assert f"reading hf://{NAME}@{began[:12]}, the commit recorded by the" in done.stderr
    assert finished(tmp_path / "out") == whole(released)
    assert json.loads((tmp_path / "out" / RECORD).read_text())["source"] == f"hf://{NAME}@{began}"


def test_a_new_run_reads_the_state_of_now(hub, convert, released, another, whole, tmp_path):
    hub.add_folder(NAME, released)
    assert convert(NAME, "before").returncode == 0
    hub.add_folder(NAME, another)
    assert convert(NAME, "after").returncode == 0
    assert finished(tmp_path / "after") == whole(another)
    refused = convert(NAME, "before")
    assert_clean_error(refused, 2)
    assert "a finished run that differs in source_files" in refused.stderr
    assert convert(NAME, "before", "--overwrite").returncode == 0
    assert finished(tmp_path / "before") == whole(another)


def test_a_state_that_moves_during_the_run_is_not_seen(
    hub, convert, released, another, whole, tmp_path
):
    hub.add_folder(NAME, released)
    turns = iter(range(1000))

    def move(request):
        if next(turns) in range(3, 60, 9):
            hub.add_folder(NAME, another)

    hub.faults.append(move)
    assert convert(NAME, "out").returncode == 0
    assert finished(tmp_path / "out") == whole(released)


def test_a_commit_of_other_files_changes_nothing(hub, convert, released, whole, tmp_path):
    hub.add_folder(NAME, released)
    stop_midway(hub, convert, NAME)
    files = {f.relative_to(released).as_posix(): f for f in released.rglob("*") if f.is_file()}
    hub.add_repo(NAME, {**files, "README.md": b"# Another text"})
    assert convert(NAME, "out").returncode == 0
    assert finished(tmp_path / "out") == whole(released)
    hub.add_repo(NAME, {**files, "README.md": b"# Still another"})
    assert convert(NAME, "out").returncode == 0  # nothing was left to do


def test_another_revision_is_refused(hub, convert, released, another, tmp_path):
    hub.add_folder(NAME, released)
    hub.add_folder(NAME, another, branch="next")
    stop_midway(hub, convert, NAME)
    before = digests(tmp_path / "out")
    done = convert(NAME, "out", "--revision", "next")
    assert_clean_error(done, 2)
    assert "an unfinished run that differs in source_revision (was main, now next)" in done.stderr
    after = digests(tmp_path / "out")
    assert {n: d for n, d in before.items() if n != f"{WORK_NAME}/lock"}.items() <= after.items()


def test_a_state_that_is_gone_is_said(hub, convert, released, another, whole, tmp_path):
    """A branch that was rewritten, and its old commit deleted."""
    began = hub.add_folder(NAME, released)
    stop_midway(hub, convert, NAME)
    hub.add_folder(NAME, another)
    del hub.repos[NAME].commits[began]
    done = convert(NAME, "out")
    assert_clean_error(done, 2)
    assert "--overwrite" in done.stderr
    assert convert(NAME, "out", "--overwrite").returncode == 0
    assert finished(tmp_path / "out") == whole(another)


def test_a_run_that_replaces_another_reads_the_state_of_now(
    hub, convert, released, another, whole, tmp_path
):
    hub.add_folder(NAME, released)
    stop_midway(hub, convert, NAME)
    hub.add_folder(NAME, another)
    assert convert(NAME, "out", "--overwrite").returncode == 0
    assert finished(tmp_path / "out") == whole(another)


# --------------------------------------------------------------------------------- who may read it

TOKEN = "hf_" + "Right" * 7
WRONG = "hf_" + "Wrong" * 7


def assert_no_secret(done: subprocess.CompletedProcess[str], *folders: Path) -> None:
    """No token and no signature, in what was said or in a file."""
    files = [f for folder in folders for f in folder.rglob("*") if f.is_file()]
    assert not folders or files
    for text in (done.stdout.encode(), done.stderr.encode(), *(f.read_bytes() for f in files)):
        for secret in (TOKEN, WRONG, "X-Amz"):
            assert secret.encode() not in text


@pytest.mark.parametrize("way", ["option", "variable"])
def test_a_private_repository_is_read_with_a_token(way, hub, cli, released, whole, tmp_path):
    """Which only the Hub sees, and which is written nowhere."""
    hub.tokens.add(TOKEN)
    hub.add_folder(NAME, released, private=True)
    options = ["--token", TOKEN] if way == "option" else []
    more = {"HF_TOKEN": TOKEN} if way == "variable" else {}
    hub.faults.append(after(20, Fault("status", 500), DATA))
    done = cli("convert", NAME, "out", *SIZE, *options, **more)
    assert done.returncode == 3
    assert (tmp_path / "out" / WORK_NAME / "run.json").exists()
    assert_no_secret(done, tmp_path)
    hub.faults.clear()
    done = cli("convert", NAME, "out", *SIZE, *options, "--json", **more)
    assert done.returncode == 0, done.stderr
    assert finished(tmp_path / "out") == whole(released)
    assert_no_secret(done, tmp_path)
    for request in hub.requests:
        if request.path != "/api/agent-harnesses":  # huggingface_hub's own
            assert request.has_token == (request.origin == "hub"), request
    assert cli("inspect", NAME, *options, **more).returncode == 0
    assert cli("verify", NAME, "out", *options, **more).returncode == 0


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ([], "no repository of the Hub that you can see; check the name, or log in"),
        (["--token", WRONG], "log in with `hf auth login`, or give another --token"),
    ],
)
def test_without_the_right_token_it_is_said_what_to_do(
    options, word, hub, convert, released, tmp_path
):
    hub.tokens.add(TOKEN)
    hub.add_folder(NAME, released, private=True)
    done = convert(NAME, "out", *options)
    assert_clean_error(done, 2)
    assert word in done.stderr
    assert_no_secret(done)
    assert not (tmp_path / "out").exists()


def test_a_gated_repository_is_opened_with_a_token(hub, convert, released, whole, tmp_path):
    hub.tokens.add(TOKEN)
    hub.add_folder(NAME, released, gated=True)
    done = convert(NAME, "out")
    assert_clean_error(done, 2)
    assert f"accept its conditions on the page of {NAME}" in done.stderr
    assert convert(NAME, "out", "--token", TOKEN).returncode == 0
    assert finished(tmp_path / "out") == whole(released)


def test_warnings_of_the_client_hold_no_secret(hub, begin, released, whole, tmp_path, served):
    """It warns of a download that broke off, and names the address."""
    hub.tokens.add(TOKEN)
    faults = [Fault("drop_after", 0), Fault("drop_after", 50_000), Fault("status", 429, NOW)]
    jobs = {}
    for number, fault in enumerate(faults):
        name = f"openai/warned-{number}"
        hub.add_folder(name, released, private=True)
        of_it = lambda r, name=name: r.range is None and f"/lfs/{name}/" in r.path  # noqa: E731
        hub.faults.append(first(1, fault, of_it))
        command = ("convert", name, f"out-{number}", *SIZE, "--download")
        jobs[tmp_path / f"out-{number}"] = begin(*command, HF_TOKEN=TOKEN)
    ended = {output: job.done() for output, job in jobs.items()}  # all, before files are looked at
    for output, done in ended.items():
        assert done.returncode == 0
        assert "?…" in done.stderr, "it did not warn"
        assert_no_secret(done, tmp_path, served[1].home)
        assert finished(output) == whole(released)


# ----------------------------------------------------------------------------- what is here already


def shards_asked_for(hub: StandInHub) -> list[str]:
    """The CDN's files of which data was sent whole."""
    return [r.path for r in hub.requests if r.origin == "cdn" and r.range is None]


def test_offline_the_cache_is_read(hub, released, another, whole, tmp_path):
    hub.add_folder(NAME, released)
    command = ["-m", "gptoss_stream", "convert", NAME, "out", *SIZE, "--quiet"]
    without = python(hub, tmp_path, *command, HF_HUB_OFFLINE="1")
    assert_clean_error(without, 2)
    assert "HF_HUB_OFFLINE is set, and it is not in the cache" in without.stderr
    download = f"import huggingface_hub as h; h.snapshot_download({NAME!r})"
    assert python(hub, tmp_path, "-c", download).returncode == 0
    hub.add_folder(NAME, another)
    hub.reset_counts()
    done = python(hub, tmp_path, *command, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert finished(tmp_path / "out") == whole(released)
    assert hub.requests == []
    command = [*command[:3], "out", "hf://tester/out"]
    written = python(hub, tmp_path, *command, HF_HUB_OFFLINE="1")
    assert_clean_error(written, 2)
    assert "HF_HUB_OFFLINE is set" in written.stderr


def test_a_download_is_done_once(hub, cli, convert, released, whole, tmp_path):
    name = "openai/downloaded"
    hub.add_folder(name, released)
    done = convert(name, "out", "--download")
    assert done.returncode == 0, done.stderr
    assert finished(tmp_path / "out") == whole(released)
    assert len(shards_asked_for(hub)) == len({*shards_asked_for(hub)})
    assert len(shards_asked_for(hub)) == len(list(released.glob("*.safetensors")))
    for options in (["--dtype", "float32"], ["--to", "hf"], ["--layers", "0", "--download"]):
        hub.reset_counts()
        assert convert(name, "other", *options, "--overwrite").returncode == 0
        assert not [r for r in hub.requests if r.origin == "cdn" and r.method == "GET"]
        assert finished(tmp_path / "other") == whole(released, *options[:2])


def test_only_what_is_needed_is_downloaded(hub, convert, released, whole, tmp_path):
    name = "openai/downloaded-in-part"
    hub.add_folder(name, released)
    options = ["--only", "embeddings", "--exclude", "*unembed*"]
    done = convert(name, "out", "--download", *options)
    assert done.returncode == 0, done.stderr
    assert finished(tmp_path / "out") == whole(released, *options)
    assert len(shards_asked_for(hub)) == 1


def test_what_is_not_whole_in_the_cache_is_not_used(
    hub, convert, released, whole, served, tmp_path
):
    name = "openai/downloaded-badly"
    hub.add_folder(name, released)
    assert convert(name, "out", "--download").returncode == 0
    cached = sorted((served[1].home / "hf/hub/models--openai--downloaded-badly/blobs").iterdir())
    cut = max(cached, key=lambda blob: blob.stat().st_size)
    cut.write_bytes(cut.read_bytes()[:-1])
    hub.reset_counts()
    for options in ([], ["--download"]):
        done = convert(name, "out", "--overwrite", *options)
        assert done.returncode == 0, done.stderr
        assert finished(tmp_path / "out") == whole(released)
    assert {r.path.rsplit("/")[-1] for r in hub.requests if r.origin == "cdn"} == {cut.name}


# ----------------------------------------------------------------------- what cannot be read at all


NOT_THERE = [
    ("openai/nothing", [], "no local folder and no repository of the Hub that you can see"),
    ("hf://openai/nothing", [], "no repository of the Hub that you can see"),
    (NAME, ["--revision", "v9"], "there is no such revision; check --revision"),
    (f"hf://{NAME}@v9", [], "there is no such revision"),
    (f"hf://{NAME}@main", ["--revision", "v9"], "it names another revision than --revision v9"),
    (NAME, ["--subfolder", "nothing"], "/nothing: there are no files in it; check the name"),
    (f"hf://{NAME}/nothing", [], "/nothing: there are no files in it"),
    (NAME, ["--subfolder", "additional_chat_templates"], "config.json: missing"),
    ("hf://datasets/openai/x", [], "name a model as hf://user/name@revision/folder"),
    ("hf://openai", [], "name a model as hf://user/name@revision/folder"),
    ("hf://", [], "name a model as hf://user/name@revision/folder"),
    ("hf://openai/x--y..z", [], "not a name that a repository can have"),
    ("openai/of-datasets", [], "config.json: missing; a checkpoint folder needs it"),
    ("openai/in-part", [], "3 of its 4 shards are not there"),
]


@pytest.fixture(scope="module")
def refused(served, released, tmp_path_factory):
    """The ends of these runs, which are done at the same time."""
    hub, launcher = served
    folder = tmp_path_factory.mktemp("refused")
    hub.add_folder(NAME, released)
    hub.add_repo("openai/of-datasets", {"README.md": b"", "data.csv": b"1,2"})
    names = ["config.json", INDEX_NAME, "model-00000-of-00003.safetensors"]
    hub.add_repo("openai/in-part", {name: released / name for name in names})
    commands = [("convert", source, "out", "--quiet", *more) for source, more, _ in NOT_THERE]
    jobs = [launcher.begin(folder, *words) for words in commands]
    return [job.done() for job in jobs], folder / "out"


@pytest.mark.parametrize("number", range(len(NOT_THERE)))
def test_what_is_not_there_is_said(number, refused):
    done, output = refused[0][number], refused[1]
    assert_clean_error(done, 2)
    assert NOT_THERE[number][2] in done.stderr
    assert not output.exists()


@pytest.fixture
def closed() -> str:
    """An address at which nobody listens."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_a_hub_that_is_down_is_soon_given_up(closed, released, tmp_path):
    """Though a user starts it with nothing changed."""
    start = time.monotonic()
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "gptoss_stream", "convert", source, output, "--quiet"],
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=environment(closed, tmp_path),
        )
        for source, output in ((NAME, "out"), (released, f"hf://{OUT}"))
    ]
    for run in runs:
        _, said = run.communicate(timeout=60)
        assert time.monotonic() - start < 15
        assert_clean_error(subprocess.CompletedProcess(run.args, run.returncode, "", said), 3)
        assert "the Hub cannot be reached" in said


@pytest.mark.parametrize(("source", "output"), [(NAME, "out"), ("here", "hf://tester/out")])
def test_a_server_that_is_no_hub_is_seen(source, output, hub, convert, released, tmp_path):
    (tmp_path / "here").symlink_to(released)
    hub.add_folder(NAME, released)
    hub.faults.append(after(0, Fault("html"), ""))
    done = convert(source, output)
    assert_clean_error(done, 3)
    assert "the server's answer is not one of the Hub" in done.stderr
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------ a place to write to


def contents(hub: StandInHub, name: str = OUT) -> dict[str, str]:
    """What is in a repository, by its SHA-256, but for the record and what every repository has."""
    found = {path: content.sha256 for path, content in hub.files(name).items()}
    return {path: digest for path, digest in found.items() if path not in (RECORD, *OWN)}


def commits(hub: StandInHub, name: str = OUT) -> list[tuple[set[str], set[str]]]:
    """What each commit added and what it deleted."""
    states = [set(files) for files in hub.repos[name].commits.values()]
    return [(now - before, before - now) for before, now in itertools.pairwise(states)]


def shards(hub: StandInHub, name: str = OUT) -> dict[str, int]:
    """The shards that are there, with their sizes."""
    with hub.lock:
        found = hub.files(name) if name in hub.repos else {}
    return {n: content.nbytes for n, content in found.items() if n.endswith(".safetensors")}


def staged(tmp_path: Path, machine: str = "this") -> list[Path]:
    """The files in the staging folder of a machine."""
    return [f for f in (tmp_path / machine).rglob("*") if f.is_file()]


@pytest.mark.parametrize("part_nbytes", [None, 64_000], ids=["in one piece", "in parts"])
def test_a_repository_is_made_and_filled(part_nbytes, hub, cli, released, whole, tmp_path):
    hub.part_nbytes = part_nbytes
    done = cli("convert", released, f"hf://{OUT}", *SIZE)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"hf://{OUT}: 90 tensors" in done.stdout
    assert contents(hub) == whole(released)
    assert hub.repos[OUT].private
    made, *shards, last, cleared = commits(hub)
    assert made == ({f"{WORK_NAME}/run.json"}, set())
    weights = [name for name in whole(released) if name.endswith(".safetensors")]
    assert sorted(shards, key=str) == [({name}, set()) for name in sorted(weights)]
    assert last[0] == {RECORD, *whole(released)} - {n for added, _ in shards for n in added}
    assert INDEX_NAME in last[0]
    assert cleared == (set(), {f"{WORK_NAME}/run.json"})
    assert hub.bytes_received == sum(c.nbytes for n, c in hub.files(OUT).items() if "model-" in n)
    assert list((tmp_path / "this" / "gptoss_stream").iterdir()) == []
    again = cli("convert", released, f"hf://{OUT}", *SIZE)
    assert "nothing to do: all shards were already written" in again.stdout
    assert len(commits(hub)) == len(shards) + 3
    assert list((tmp_path / "this" / "gptoss_stream").iterdir()) == []


def test_from_repository_to_repository(hub, convert, released, whole, tmp_path):
    """In one command, with one token for both; the CDN sees none."""
    hub.tokens.add(TOKEN)
    hub.add_folder(NAME, released, private=True)
    done = convert(NAME, f"hf://{OUT}", "--checksums", "--token", TOKEN)
    assert done.returncode == 0, done.stderr
    sums = bytes(hub.files(OUT)["SHA256SUMS"].read(0, 10**6)).decode()
    found = {path: content.sha256 for path, content in hub.files(OUT).items() if path not in OWN}
    del found["SHA256SUMS"]
    assert dict(reversed(line.split("  ")) for line in sums.splitlines()) == found
    assert found == whole(released) | {RECORD: found[RECORD]}
    assert staged(tmp_path) == []
    for content in hub.files(OUT).values():
        assert TOKEN.encode() not in bytes(content.read(0, content.nbytes))
    assert not any(r.has_token for r in hub.requests if r.origin == "cdn")


@pytest.mark.parametrize("most", [1, 2])
def test_few_shards_are_staged_at_a_time(most, hub, begin, released, whole, tmp_path):
    """Though the Hub is slow to take them."""
    hub.faults.append(after(0, Fault("slow", 1_500_000), PUT))
    here = tmp_path / "here"
    options = ["--max-staged", most, "--staging", here, "--workers", 3]
    job = begin("convert", released, f"hf://{OUT}", *SIZE, "--quiet", *options)
    counts = set()
    while not job.is_over:
        counts.add(len(shards_there(here)))
    assert job.done().returncode == 0
    assert contents(hub) == whole(released)
    assert max(counts) == most
    assert list(here.iterdir()) == []
    assert staged(tmp_path) == []


@pytest.mark.parametrize(("n", "machine"), [(0, "another"), (2, "this"), (4, "another")])
def test_a_killed_run_goes_on_where_it_was(n, machine, hub, begin, cli, released, whole, tmp_path):
    """What has arrived is neither made nor sent again, from whatever machine."""
    hub.add_folder(NAME, released)
    hub.faults.append(after(n, Fault("slow", 20_000), PUT))
    job = begin("convert", NAME, f"hf://{OUT}", *SIZE, "--quiet")
    wait_for(lambda: len(shards(hub)) == n and "cdn PUT" in told(hub)[-3:], 20)
    job.kill()
    assert job.done().returncode == -9
    hub.faults.clear()
    there = shards(hub)
    assert len(there) == n
    if machine == "this":
        assert any(file.suffix == ".safetensors" for file in staged(tmp_path))
    hub.reset_counts()
    done = cli("convert", NAME, f"hf://{OUT}", *SIZE, "--quiet", "--json", machine=machine)
    assert done.returncode == 0, done.stderr
    assert contents(hub) == whole(released)
    sizes = json.loads(done.stdout)["shards"]
    assert json.loads(done.stdout)["bytes_resumed"] == sum(there.values())
    assert told(hub).count("cdn PUT") == len(sizes) - n
    assert list((tmp_path / machine / "gptoss_stream").iterdir()) == []
    if machine == "another" and n == 4:
        weights = sum(file.stat().st_size for file in released.glob("*.safetensors"))
        assert hub.bytes_sent < 0.7 * weights + small_nbytes(released)


def told(hub: StandInHub) -> list[str]:
    return [f"{request.origin} {request.method}" for request in hub.requests]


def test_a_source_that_moves_is_pinned_by_what_is_there(
    hub, begin, convert, released, another, whole
):
    """Also where another machine goes on: the far end says which commit was read."""
    hub.add_folder(NAME, released)
    hub.faults.append(after(2, Fault("status", 403), PUT))
    assert convert(NAME, f"hf://{OUT}").returncode == 2
    hub.faults.clear()
    assert len(shards(hub)) == 2
    hub.add_folder(NAME, another)
    assert convert(NAME, f"hf://{OUT}", machine="another").returncode == 0
    assert contents(hub) == whole(released)


REFUSED = {
    "an upload that is not allowed": (Fault("status", 403), PUT, 2, "no access (403)"),
    "a commit that is not allowed": (Fault("status", 403), COMMIT, 2, "no access (403)"),
    "a commit that fails": (Fault("status", 500), COMMIT, 3, "the Hub answers 500"),
    "a commit that is never answered": (Fault("lose_reply"), COMMIT, 3, "cannot be reached"),
    "commits of somebody else": (Fault("status", 412), COMMIT, 3, "the Hub answers 412"),
    "a page for an answer": (Fault("html"), COMMIT, 3, "not one of the Hub"),
}


@pytest.mark.parametrize(("fault", "match", "code", "word"), REFUSED.values(), ids=REFUSED.keys())
def test_what_the_hub_does_not_take_ends_the_run(
    fault, match, code, word, hub, convert, released, whole, tmp_path
):
    """With one line, and nothing lost: the same command goes on with what has not arrived."""
    hub.faults.append(after(3, fault, match))
    done = convert(released, f"hf://{OUT}")
    assert_clean_error(done, code)
    assert word in done.stderr
    assert f"hf://{OUT}" in done.stderr
    assert contents(hub).items() <= {**whole(released), f"{WORK_NAME}/run.json": ANY}.items()
    assert INDEX_NAME not in contents(hub)
    hub.faults.clear()
    there = len(shards(hub))
    hub.reset_counts()
    assert convert(released, f"hf://{OUT}").returncode == 0
    assert contents(hub) == whole(released)
    assert told(hub).count("cdn PUT") <= len(shards(hub)) - there
    assert staged(tmp_path) == []


SENDING = {
    "commits that are not answered": (Fault("lose_reply"), COMMIT),
    "commits of somebody else": (Fault("status", 412), COMMIT),
    "503 of commits": (Fault("status", 503, NOW), COMMIT),
    "an upload that breaks off": (Fault("drop_after", 10), PUT),
    "an upload that is not answered": (Fault("lose_reply"), PUT),
    "questions that are not answered": (Fault("lose_reply"), r"POST .*(batch|preupload)"),
    "503 of the listing": (Fault("status", 503), r"GET .*/tree/"),
}


@pytest.fixture(scope="module")
def sent(served, released, tmp_path_factory):
    """Runs that each had to do with one kind of fault, all at the same time: what was said, and
    what is in the repository then."""
    hub, launcher = served
    folder, jobs = tmp_path_factory.mktemp("sent"), {}

    def repository_of(request: Request) -> str:
        """Of an upload the address does not tell."""
        upload = hub.uploads.get(request.path.split("/")[2])
        whose = [name for name, repo in hub.repos.items() if upload and upload.repo is repo]
        return whose[0] if whose else request.path

    for name, (fault, match) in SENDING.items():
        # Where it is not the tool that tries again, the client waits for a second before.
        spoil = every(2, fault, match) if match == COMMIT else first(1, fault, match)
        repo = named(name)
        hub.faults.append(lambda r, repo=repo, s=spoil: (repo in repository_of(r) and s(r)) or None)
        words = ("convert", released, f"hf://{repo}", *SIZE, "--quiet")
        jobs[name] = launcher.begin(folder, *words, XDG_CACHE_HOME=str(folder / "cache"))
    ends = {name: job.done() for name, job in jobs.items()}
    hub.faults.clear()
    found = {name: contents(hub, named(name)) if named(name) in hub.repos else {} for name in ends}
    return ends, found, list((folder / "cache" / "gptoss_stream").iterdir())


@pytest.mark.parametrize("name", SENDING)
def test_an_upload_goes_on_after_what_passes(name, sent, released, whole):
    """Whether the Hub has done what it was asked to, or not."""
    ends, found, left = sent
    done, (_, match) = ends[name], SENDING[name]
    assert done.returncode == 0, done.stderr
    assert found[name] == whole(released)
    assert left == []
    assert_no_secret(done)
    assert ("?…" in done.stderr) == (match == PUT)  # of these the client warns, with the address


def test_a_repository_is_made_though_the_hub_does_not_say_so(hub, convert, released, whole):
    hub.faults.append(first(1, Fault("lose_reply"), "POST .*/create"))
    assert convert(released, f"hf://{OUT}").returncode == 0
    assert contents(hub) == whole(released)


@pytest.mark.parametrize("nbytes", [None, 1000], ids=["other bytes", "another size"])
def test_what_has_arrived_is_held_against_what_was_sent(
    nbytes, hub, convert, released, whole, tmp_path
):
    """And what is known to be wrong there is made and sent again."""

    def spoil(request):
        if "/tree/" in request.path and len(shards(hub)) == 3:
            name = max(shards(hub))
            wrong = random.Random(0).randbytes(nbytes or shards(hub)[name])
            hub.add_repo(OUT, {**hub.files(OUT), name: wrong})

    hub.faults.append(spoil)
    done = convert(released, f"hf://{OUT}", "--workers", "1")
    assert_clean_error(done, 3)
    assert "what the Hub lists is not what was sent" in done.stderr
    hub.faults.clear()
    assert INDEX_NAME not in contents(hub)
    assert convert(released, f"hf://{OUT}").returncode == 0
    assert contents(hub) == whole(released)


def test_an_output_is_replaced_when_that_is_wanted(hub, convert, released, another, whole):
    """By other options or another source; of what is there only what the tool made."""
    assert convert(released, f"hf://{OUT}").returncode == 0
    card = {"README.md": b"# Mine", ".gitattributes": b"* text\n"}
    hub.add_repo(OUT, {**hub.files(OUT), **card})
    for source, options, word in (
        (released, ["--dtype", "float32"], "dtype"),
        (released, ["--to", "hf"], "format"),
        (another, [], "source_files"),
    ):
        before = contents(hub)
        refused = convert(source, f"hf://{OUT}", *options)
        assert_clean_error(refused, 2)
        assert f"a finished run that differs in {word}" in refused.stderr
        assert "--overwrite" in refused.stderr
        assert contents(hub) == before
        done = convert(source, f"hf://{OUT}", *options, "--overwrite")
        assert done.returncode == 0, done.stderr
        assert contents(hub) == whole(source, *options)
        for name, data in card.items():
            assert bytes(hub.files(OUT)[name].data) == data


def test_an_unfinished_output_of_another_run_is_refused(hub, convert, released, whole, tmp_path):
    hub.faults.append(after(2, Fault("status", 403), PUT))
    assert convert(released, f"hf://{OUT}").returncode == 2
    hub.faults.clear()
    before, n = contents(hub), len(commits(hub))
    for machine in ("this", "another"):
        done = convert(released, f"hf://{OUT}", "--dtype", "float32", machine=machine)
        assert_clean_error(done, 2)
        assert "differs in dtype (was bfloat16, now float32)" in done.stderr
    assert (contents(hub), len(commits(hub))) == (before, n)
    done = convert(released, f"hf://{OUT}", "--dtype", "float32", "--overwrite")
    assert done.returncode == 0, done.stderr
    assert contents(hub) == whole(released, "--dtype", "float32")


def test_files_of_somebody_else_are_left_alone(hub, convert, released, whole):
    """With or without --overwrite; so is the source itself."""
    hub.add_repo(OUT, {"weights.bin": b"mine", "README.md": b"# Mine"})
    hub.add_folder(NAME, released)
    for output, word in ((OUT, "weights.bin"), (NAME, "")):
        before = hub.files(output)
        for options in ([], ["--overwrite"]):
            done = convert(NAME, f"hf://{output}", *options)
            assert_clean_error(done, 2)
            assert "it holds files that are not this tool's" in done.stderr
            assert word in done.stderr
        assert hub.files(output) == before
        assert len(hub.repos[output].commits) == 1
    # A folder beside them is ours.
    assert convert(NAME, f"hf://{OUT}/converted").returncode == 0
    found = {n.removeprefix("converted/"): d for n, d in contents(hub).items()}
    assert found.keys() - whole(released).keys() == {"weights.bin", RECORD}
    assert found.items() >= whole(released).items()


def test_a_listing_that_is_refused_is_not_an_empty_repository(hub, convert, released):
    """Or files would be written among somebody else's."""
    hub.add_repo(OUT, {"weights.bin": b"mine"})
    for status in (400, 403):
        hub.faults.append(after(0, Fault("status", status), r"GET .*/tree/"))
        done = convert(released, f"hf://{OUT}")
        assert_clean_error(done, 2, 3)
        assert len(hub.repos[OUT].commits) == 1
        hub.faults.clear()


@pytest.mark.parametrize("options", [[], ["--token", WRONG]], ids=["no token", "a wrong one"])
def test_writing_needs_the_right_token(options, hub, convert, released, tmp_path):
    hub.tokens.add(TOKEN)
    done = convert(released, f"hf://{OUT}", *options)
    assert_clean_error(done, 2)
    assert "log in with `hf auth login`" in done.stderr
    assert_no_secret(done)
    assert hub.repos == {}
    assert staged(tmp_path) == []
    assert convert(released, f"hf://{OUT}", "--token", TOKEN).returncode == 0
    assert hub.repos[OUT].private


def test_what_was_deleted_there_is_made_again(hub, convert, released, whole):
    assert convert(released, f"hf://{OUT}").returncode == 0
    files = dict(hub.files(OUT))
    lost = sorted(shards(hub))[2]
    del files[lost]
    hub.add_repo(OUT, files)
    hub.reset_counts()
    assert convert(released, f"hf://{OUT}").returncode == 0
    assert contents(hub) == whole(released)
    assert told(hub).count("cdn PUT") <= 1
