"""The Hub as a source and as a place to write to: the real client, in runs as users start them,
against the stand-in of `stand_in_hub`.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from hub_runs import Job, Launcher, after, environment, wait_for
from runs import INDEX_NAME, ROOT, WORK_NAME, assert_clean_error, digests, run_here
from stand_in_hub import Fault, StandInHub, every, first

NAME = "openai/gpt-oss-tiny"
RECORD = "gptoss_stream.json"
SIZE = ("--max-shard-size", "150KB")
DATA = r"cdn GET .*/lfs/"
RESOLVE = r"hub HEAD .*/resolve/"
SMALL = r"hub GET .*/resolve/"
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


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    return done.stderr.splitlines()


# -------------------------------------------------------------------------------------- the bytes


@pytest.mark.parametrize(
    ("source", "options", "folder", "at"),
    [
        (NAME, [], "main", ""),
        (f"hf://{NAME}", [], "main", ""),
        (NAME, ["--subfolder", "original"], "original", "/original"),
        (f"hf://{NAME}/original", [], "original", "/original"),
        (NAME, ["--revision", "next"], "next", ""),
        (NAME, ["--revision", "COMMIT"], "next", ""),
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
    """From a fresh interpreter, with no setting changed: inspect, plan, convert, verify."""
    commit = hub.add_folder(NAME, released)
    from_hub = f"gptoss_stream: reading hf://{NAME}@{commit[:12]}\n"
    for words, said in (
        (["inspect", NAME], "hf-mxfp4"),
        (["plan", NAME], "90 tensors, transformer-lens in bfloat16"),
        (["convert", NAME, "out", *SIZE], "90 tensors"),
        (["verify", NAME, "out"], "out: equal"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "gptoss_stream", *words],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=tmp_path,
            env=environment(hub.endpoint, tmp_path),
        )
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
    assert "--revision is for a repository of the Hub, which this is not" in refused.stderr
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
        (["--experts", "0"], 0.9),
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
        assert all(one[1] < other[0] for one, other in zip(found, found[1:], strict=False))
    small = [r.path for r in hub.requests if r.origin == "hub" and r.method == "GET"]
    assert len(small) == len(set(small))


def test_large_blocks_are_sent_once(hub, tmp_path, checkpoints, whole):
    """As they are without the settings of these tests: several of 16 MiB."""
    source = checkpoints(layers=1, vocab_size=160_000, hidden_size=64)
    hub.add_folder(NAME, source)
    done = subprocess.run(
        [sys.executable, "-m", "gptoss_stream", "convert", NAME, "out", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env=environment(hub.endpoint, tmp_path),
    )
    assert done.returncode == 0, done.stderr
    needed = json.loads(done.stdout)["bytes_in"]
    assert 35_000_000 < needed <= hub.bytes_sent <= 1.02 * needed
    assert_no_byte_twice(hub, source)
    blocks = [request for request in hub.requests if request.origin == "cdn"]
    assert 3 <= len(blocks) - 2 <= 6


# ------------------------------------------------------------------------------ what can go wrong

NOW = {"Retry-After": "0"}
PASSING = {
    f"{name} of {what}": (fault, match)
    for what, match, faults in (
        (
            "the data",
            DATA,
            {
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
            },
        ),
        (
            "an address",
            RESOLVE,
            {
                "429": Fault("status", 429, NOW),
                "500": Fault("status", 500),
                "503": Fault("status", 503, NOW),
                "no answer": Fault("lose_reply"),
            },
        ),
        (
            "a small file",
            SMALL,
            {
                "429": Fault("status", 429, NOW),
                "502": Fault("status", 502),
                "half": Fault("short"),
                "an end at once": Fault("drop_after", 0),
                "gzip": Fault("gzip"),
                "no answer": Fault("lose_reply"),
            },
        ),
        (
            "the listing",
            r"hub GET /api/models/",
            {
                "429": Fault("status", 429, NOW),
                "500": Fault("status", 500),
                "no answer": Fault("lose_reply"),
            },
        ),
    )
    for name, fault in faults.items()
}


@pytest.mark.parametrize(("fault", "match"), PASSING.values(), ids=PASSING.keys())
def test_what_passes_does_no_harm(fault, match, hub, convert, released, whole, tmp_path):
    """Three in a row, and one in each four of what comes after."""
    hub.add_folder(NAME, released)
    hub.faults += [first(2, fault, match), every(4, fault, match)]
    done = convert(NAME, "out")
    assert done.returncode == 0, done.stderr
    assert finished(tmp_path / "out") == whole(released)


LASTING = {
    "429 of the data": (Fault("status", 429, NOW), DATA, 3, "the server answers 429"),
    "500 of the data": (Fault("status", 500), DATA, 3, "the server answers 500"),
    "403 of the data": (Fault("status", 403), DATA, 3, "refuses its own signed address"),
    "404 of the data": (Fault("status", 404), DATA, 2, "it is not there (404)"),
    "416 of the data": (Fault("status", 416), DATA, 2, "it is shorter than it was"),
    "an end at once": (Fault("drop_after", 0), DATA, 3, "check the network"),
    "no answer": (Fault("lose_reply"), DATA, 3, "check the network"),
    "half": (Fault("wrong_length"), DATA, 3, "the server sends"),
    "the whole file": (Fault("ignore_range"), DATA, 3, "does not honour byte ranges"),
    "other bytes": (Fault("shift_range", 1), DATA, 3, "the server sends bytes"),
    "gzip": (Fault("gzip"), DATA, 3, "with the coding 'gzip'"),
    "a page for the data": (Fault("html"), DATA, 3, "does not honour byte ranges"),
    "503 of an address": (Fault("status", 503, NOW), RESOLVE, 3, "the Hub answers 503"),
    "404 of an address": (Fault("status", 404), RESOLVE, 2, "the Hub answers 404"),
    "403 of an address": (Fault("status", 403), RESOLVE, 2, "no access (403)"),
    "no answer for an address": (Fault("lose_reply"), RESOLVE, 3, "the Hub cannot be reached"),
    "a page for an address": (Fault("html"), RESOLVE, 3, "none of the Hub's"),
    "no commit": (Fault("no_commit_header"), RESOLVE, 3, "it names no commit"),
    "another sum": (Fault("wrong_etag"), RESOLVE, 2, "it changed while it was being read"),
    "another size": (Fault("wrong_size"), RESOLVE, 2, "it changed while it was being read"),
}


@pytest.mark.parametrize(
    ("fault", "match", "code", "word", "late"),
    [
        pytest.param(*what, late, id=f"{name}, {'late' if late else 'early'}")
        for name, what in LASTING.items()
        for late in (False, True)
        if late or name in ("500 of the data", "a page for an address", "another sum")
    ],
)
def test_what_lasts_ends_the_run(
    fault, match, code, word, late, hub, convert, released, whole, tmp_path
):
    """With one line that says what; and the same command again, when it is over, goes on."""
    commit = hub.add_folder(NAME, released)
    hub.faults.append(after((14 if match == DATA else 11) if late else 0, fault, match))
    done = convert(NAME, "out", "--workers", "1")
    assert_clean_error(done, code)
    assert word in done.stderr
    assert f"hf://{NAME}@{commit[:12]}" in done.stderr
    assert_nothing_wrong(tmp_path / "out", whole(released))
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").glob("*.safetensors")}
    hub.faults.clear()
    again = convert(NAME, "out")
    assert again.returncode == 0, again.stderr
    assert finished(tmp_path / "out") == whole(released)
    assert before.items() <= {f: f.stat().st_mtime_ns for f in before}.items()


@pytest.mark.parametrize("seed", range(6))
def test_all_of_it_at_random(seed, hub, convert, released, whole, tmp_path):
    """One request in five goes wrong, each in its own way. Only a bit that was flipped ends a run,
    which is then run again."""
    hub.add_folder(NAME, released)
    chance = random.Random(seed)

    def spoil(request):
        path = f"{request.origin} {request.method} {request.path}"
        faults = [fault for fault, match in PASSING.values() if re.search(match, path)]
        if re.search("/api/", path) or chance.random() > 0.2:
            return None
        # Not of the data: of a part of a file nobody knows the sum.
        flipped = seed % 2 and re.search(SMALL, path) and chance.random() < 0.5
        return Fault("flip") if flipped else chance.choice(faults)

    hub.faults.append(spoil)
    ends = []
    for turn in range(20):
        done = convert(NAME, "out")
        assert_nothing_wrong(tmp_path / "out", whole(released))
        if done.returncode == 0:
            break
        assert_clean_error(done, 2, 3)
        ends.append(done.stderr)
    assert finished(tmp_path / "out") == whole(released)
    assert seed % 2 or turn == 0, ends


@pytest.mark.parametrize("name", ["config.json", INDEX_NAME, *COMPANIONS])
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


@pytest.mark.parametrize("seconds", [0.05, 0.2])
def test_addresses_that_run_out_are_asked_for_again(
    seconds, hub, convert, released, whole, tmp_path
):
    hub.add_folder(NAME, released)
    hub.link_seconds = seconds
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
    assert f"reading hf://{NAME}@{began[:12]}" in done.stderr
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


@pytest.mark.parametrize(
    ("source", "options"), [(NAME, ["--revision", "next"]), (f"hf://{NAME}@next", [])]
)
def test_another_revision_is_refused(source, options, hub, convert, released, another, tmp_path):
    hub.add_folder(NAME, released)
    hub.add_folder(NAME, another, branch="next")
    stop_midway(hub, convert, NAME)
    before = digests(tmp_path / "out")
    done = convert(source, "out", *options)
    assert_clean_error(done, 2)
    assert "an unfinished run that differs in source_revision (main there, next now)" in done.stderr
    after = digests(tmp_path / "out")
    assert {n: d for n, d in before.items() if n != f"{WORK_NAME}/lock"}.items() <= after.items()


def test_a_state_that_is_gone_is_said(hub, convert, released, another, tmp_path):
    """A branch that was rewritten, and its old commit deleted."""
    began = hub.add_folder(NAME, released)
    stop_midway(hub, convert, NAME)
    hub.add_folder(NAME, another)
    del hub.repos[NAME].commits[began]
    done = convert(NAME, "out")
    assert_clean_error(done, 2)
    assert "--overwrite" in done.stderr
    assert convert(NAME, "out", "--overwrite").returncode == 0


# --------------------------------------------------------------------------------- who may read it

TOKEN = "hf_" + "Right" * 7
WRONG = "hf_" + "Wrong" * 7


def assert_no_secret(done: subprocess.CompletedProcess[str], *folders: Path) -> None:
    """No token and no signature, in what was said or in a file."""
    files = [f for folder in folders for f in folder.rglob("*") if f.is_file()]
    assert not folders or files
    for text in (done.stdout.encode(), done.stderr.encode(), *(f.read_bytes() for f in files)):
        for secret in (TOKEN, WRONG, "Signature"):
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


@pytest.mark.parametrize(
    "fault",
    [Fault("drop_after", 0), Fault("drop_after", 50_000), Fault("status", 429, NOW)],
    ids=["an end at once", "an end after a while", "429"],
)
def test_warnings_of_the_client_hold_no_secret(fault, hub, cli, released, whole, tmp_path, served):
    """It warns of a download that broke off, and names the address."""
    name = f"openai/warned-{fault.kind}-{fault.value}"
    hub.tokens.add(TOKEN)
    hub.add_folder(name, released, private=True)
    hub.faults.append(first(1, fault, DATA + r".*[0-9a-f]{64}"))
    hub.faults.append(lambda r: None)
    done = cli("convert", name, "out", *SIZE, "--download", HF_TOKEN=TOKEN)
    assert_no_secret(done, tmp_path, served[1].home)
    print(done.stderr)
    assert done.returncode == 0
    assert finished(tmp_path / "out") == whole(released)
