"""Faults of the Hub while shards are uploaded."""

from __future__ import annotations

import random
from unittest.mock import ANY

import pytest
from hub_cases import (
    COMMIT,
    OUT,
    PUT,
    SIZE,
    UPLOAD_FAULTS,
    assert_no_secret,
    contents,
    requested,
    shards,
    staged,
)
from hub_runs import after
from runs import INDEX_NAME, WORK_NAME, assert_clean_error, wait_for
from stand_in_hub import Fault, first

REFUSED = {
    "an upload that is not allowed": (Fault("status", 403), PUT, 2, "no access (403)"),
    "a commit that is not allowed": (Fault("status", 403), COMMIT, 2, "no access (403)"),
    "a commit that fails": (Fault("status", 500), COMMIT, 3, "the Hub answers 500"),
    "a commit that is never answered": (Fault("lose_reply"), COMMIT, 3, "cannot be reached"),
    "commits of another user": (Fault("status", 412), COMMIT, 3, "the Hub answers 412"),
    "a page for an answer": (Fault("html"), COMMIT, 3, "not one of the Hub"),
}


@pytest.mark.parametrize(("fault", "match", "code", "word"), REFUSED.values(), ids=REFUSED.keys())
def test_a_refused_upload_ends_the_run(
    fault, match, code, word, hub, convert, released, whole, tmp_path
):
    """With one line, and nothing is lost: the same command uploads what is missing."""
    hub.faults.append(after(3, fault, match))
    done = convert(released, f"hf://{OUT}")
    assert_clean_error(done, code)
    assert word in done.stderr
    assert f"hf://{OUT}" in done.stderr
    assert contents(hub).items() <= {**whole(released), f"{WORK_NAME}/run.json": ANY}.items()
    assert INDEX_NAME not in contents(hub)
    hub.faults.clear()
    uploaded = len(shards(hub))
    hub.reset_counts()
    assert convert(released, f"hf://{OUT}").returncode == 0
    assert contents(hub) == whole(released)
    assert requested(hub).count("cdn PUT") <= len(shards(hub)) - uploaded
    assert staged(tmp_path) == []


@pytest.mark.parametrize("name", UPLOAD_FAULTS)
def test_an_upload_survives_passing_faults(name, sent, released, whole):
    """Whether the Hub has carried out the request or not."""
    ends, found, left = sent
    done, (_, match) = ends[name], UPLOAD_FAULTS[name]
    assert done.returncode == 0, done.stderr
    assert found[name] == whole(released)
    assert left == []
    assert_no_secret(done)
    # The client warns of failed uploads, with the address.
    assert ("?…" in done.stderr) == (match == PUT)


def test_a_repository_is_created_although_the_reply_is_lost(hub, convert, released, whole):
    hub.faults.append(first(1, Fault("lose_reply"), "POST .*/create"))
    assert convert(released, f"hf://{OUT}").returncode == 0
    assert contents(hub) == whole(released)


@pytest.mark.parametrize("nbytes", [None, 1000], ids=["other bytes", "another size"])
def test_uploaded_files_are_checked(nbytes, hub, convert, released, whole, tmp_path):
    """A shard that is known to be damaged is written and uploaded again."""

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


def test_a_listing_that_is_one_commit_old(hub, convert, released, whole):
    """The Hub is asked again."""
    newest, times = [], []

    def age(request):
        repo = hub.repos.get(OUT)
        if newest:
            repo.branches["main"] = newest.pop()
        elif "/tree/" in request.path and len(shards(hub)) >= 3 and not times:
            newest.append(repo.branches["main"])
            times.append(request)
            repo.branches["main"] = [*repo.commits][-2]

    hub.faults.append(age)
    done = convert(released, f"hf://{OUT}", "--workers", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert times
    assert contents(hub) == whole(released)


def test_a_staged_shard_that_has_changed(hub, convert, released, tmp_path):
    """The Hub refuses it without a word of why."""
    hub.faults.append(lambda r: Fault("status", 403) if r.method == "PUT" else None)
    assert convert(released, f"hf://{OUT}").returncode == 2
    hub.faults.clear()
    shard = next((tmp_path / "this").glob("gptoss_stream/*/*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    done = convert(released, f"hf://{OUT}")
    assert_clean_error(done, 3)
    assert f"{shard}: it is not what was written to it; check the disk" in done.stderr
    assert shard.name not in contents(hub)


def test_a_wait_that_the_hub_asks_for_is_said(hub, convert, released, whole):
    """For commits beyond those that it allows in an hour; and no longer time than is waited."""
    headers = {"Retry-After": "2300492428"}
    hub.faults.append(first(1, Fault("status", 429, headers), COMMIT))
    limits = {"MAX_RETRY_AFTER": "1", "SAID_SECONDS": "1"}
    done = convert(released, f"hf://{OUT}", **limits)
    assert done.returncode == 0, done.stderr
    line = f"gptoss_stream: hf://{OUT}: the Hub allows no more requests now; waiting 1 s\n"
    assert done.stderr == line
    assert contents(hub) == whole(released)


def test_a_refusal_keeps_what_is_uploaded_and_says_why(hub, begin, convert, released, whole):
    """Also if it is the first request of the next run that is refused."""
    slow, some = Fault("slow", 60_000), len(hub.uploads) + 3
    hub.faults.append(lambda r: slow if r.method == "PUT" and len(hub.uploads) > some else None)
    run = begin("convert", released, f"hf://{OUT}", "--workers=1", *SIZE, PUBLISH_SECONDS="60")
    wait_for(lambda: len(hub.uploads) > some)
    run.kill()
    full = {"X-Error-Message": "Private repository storage limit reached"}
    hub.faults[:] = [after(0, Fault("status", 403, full), COMMIT)]
    done = convert(released, f"hf://{OUT}")
    assert_clean_error(done, 2)
    assert "(403: Private repository storage limit reached)" in done.stderr
    hub.faults.clear()
    hub.reset_counts()
    assert convert(released, f"hf://{OUT}").returncode == 0
    assert contents(hub) == whole(released)
    assert requested(hub).count("cdn PUT") <= len(shards(hub)) - 2


def test_files_that_another_task_deletes_first(hub, convert, released, whole):
    deleted = []

    def delete(request):
        repo = hub.repos.get(OUT)
        files = repo.commits[repo.branches["main"]] if repo else {}
        if request.method == "POST" and "/commit/" in request.path and INDEX_NAME in files:
            left = {n: entry for n, entry in files.items() if not n.endswith(".sha256")}
            deleted.append(len(files) - len(left))
            repo.commit("main", left)

    hub.faults.append(delete)
    done = convert(released, f"hf://{OUT}", "--checksums")
    assert done.returncode == 0, done.stderr
    assert deleted[0] > 0
    assert contents(hub) == whole(released, "--checksums")
