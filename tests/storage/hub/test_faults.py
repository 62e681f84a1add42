"""Faults of the Hub while it is read: those that pass do no harm, those that last end the run."""

from __future__ import annotations

import random
import re
import signal
import time

import pytest
from hub_cases import (
    DATA,
    LASTING,
    NAME,
    NOW,
    OUT,
    SIZE,
    assert_nothing_wrong,
    contents,
    finished,
    named,
    requested,
)
from hub_runs import after, at_first
from runs import INDEX_NAME, assert_clean_error, stamps, wait_for
from stand_in_hub import Fault, every, first

RESOLVE = r"hub HEAD .*/resolve/"


SMALL = r"hub GET .*/resolve/"


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


@pytest.fixture(scope="module")
def passed(served, released, tmp_path_factory):
    """Runs at the same time that each meet one kind of fault: every request fails at first."""
    hub, launcher = served
    folder = tmp_path_factory.mktemp("passed")
    runs = {}
    for name, (faults, match) in PASSING.items():
        hub.add_folder(named(name), released)
        hub.faults.append(at_first(faults, match.replace("REPO", named(name))))
        runs[name] = launcher.begin(folder, "convert", named(name), name, *SIZE, "--quiet")
    ends = {name: (run.done(), folder / name) for name, run in runs.items()}
    hub.faults.clear()
    return ends


@pytest.mark.parametrize("name", PASSING)
def test_a_passing_fault_does_no_harm(name, passed, released, whole):
    done, output = passed[name]
    assert done.returncode == 0, done.stderr
    assert finished(output) == whole(released)


@pytest.mark.parametrize("name", LASTING)
def test_a_lasting_fault_ends_the_run(name, ended, released, whole):
    """With one line that names the fault; the same command resumes afterwards."""
    done, before, again, output = ended[name]
    _, _, code, word = LASTING[name]
    assert_clean_error(done, code)
    assert word in done.stderr
    assert f"hf://{named(name)}@" in done.stderr
    assert again.returncode == 0, again.stderr
    assert finished(output) == whole(released)
    assert before.items() <= stamps(output).items()


def test_some_runs_had_finished_shards(ended):
    assert any(before for _, before, _, _ in ended.values())


def test_retry_after_is_respected(hub, convert, released, tmp_path):
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
def test_a_run_that_waits_for_the_network_can_be_interrupted(
    where, number, code, hub, begin, convert, released, whole, tmp_path
):
    """It resumes later."""
    hub.add_folder(NAME, released)
    output = "out" if where == "reading" else f"hf://{OUT}"
    kind, most = ("cdn GET", 12) if where == "reading" else ("cdn PUT", 1)
    hub.faults.append(after(most, Fault("stall", 60), kind))
    run = begin("convert", NAME, output, *SIZE, "--quiet")
    wait_for(lambda: requested(hub).count(kind) > most)
    time.sleep(0.2)
    begun = time.monotonic()
    run.kill(number)
    done = run.done()
    assert time.monotonic() - begun < 30
    assert_clean_error(done, code)
    assert "run the same command again to resume" in done.stderr
    hub.faults.clear()
    assert convert(NAME, output).returncode == 0
    assert (finished(tmp_path / "out") if where == "reading" else contents(hub)) == whole(released)


@pytest.mark.parametrize("seed", range(3))
def test_faults_at_random(seed, hub, convert, released, whole, tmp_path):
    """One request in five fails, each in its own way. Only a flipped bit ends a run, which is then
    run again."""
    hub.add_folder(NAME, released)
    chance = random.Random(seed)

    def spoil(request):
        path = f"{request.origin} {request.method} {request.path}"
        kinds = {DATA: [*OF_DATA.values()], RESOLVE: OF_ADDRESSES, SMALL: OF_SMALL_FILES}
        faults = next((some for match, some in kinds.items() if re.search(match, path)), None)
        if faults is None or chance.random() > 0.2:
            return None
        # Not in the data: the checksum of a byte range is not known.
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
def test_a_flipped_bit_of_a_small_file_is_detected(name, hub, convert, released, whole, tmp_path):
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


def test_a_flipped_bit_of_a_large_tokenizer_is_detected(hub, convert, released, tmp_path):
    """It is read in blocks, from the CDN: 28 MB in the released models."""
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


def test_expired_links_are_renewed(hub, convert, released, whole, tmp_path):
    hub.add_folder(NAME, released)
    hub.link_seconds = 0.1
    hub.faults.append(every(3, Fault("stall", 0.1), DATA))
    done = convert(NAME, "out")
    assert done.returncode == 0, done.stderr
    assert finished(tmp_path / "out") == whole(released)


def test_withdrawn_links_are_renewed(hub, convert, released, whole, tmp_path):
    hub.add_folder(NAME, released)
    withdrawn = every(5, Fault("slow", 10**9), DATA)
    hub.faults.append(lambda request: withdrawn(request) and hub.expire_links())
    done = convert(NAME, "out")
    assert done.returncode == 0, done.stderr
    assert finished(tmp_path / "out") == whole(released)
    assert [request.status for request in hub.requests].count(403) >= 3
