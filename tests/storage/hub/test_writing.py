"""Writing to a repository of the Hub, and resuming."""

from __future__ import annotations

import json

import pytest
from hub_cases import (
    NAME,
    OUT,
    PUT,
    RECORD,
    SIZE,
    TOKEN,
    commits,
    contents,
    requested,
    shards,
    small_nbytes,
    staged,
)
from hub_runs import after
from runs import INDEX_NAME, WORK_NAME, shards_in, wait_for
from stand_in_hub import Fault


@pytest.mark.parametrize("part_nbytes", [None, 64_000], ids=["in one piece", "in parts"])
def test_a_repository_is_created_and_filled(part_nbytes, hub, cli, released, whole, tmp_path):
    hub.part_nbytes = part_nbytes
    done = cli("convert", released, f"hf://{OUT}", *SIZE)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"hf://{OUT}: 90 tensors" in done.stdout
    assert contents(hub) == whole(released)
    assert hub.repos[OUT].private
    first, *shards, last, cleared = commits(hub)
    assert first == ({f"{WORK_NAME}/run.json"}, set())
    weights = [name for name in whole(released) if name.endswith(".safetensors")]
    assert sorted(shards, key=str) == [({name}, set()) for name in sorted(weights)]
    assert last[0] == {RECORD, "README.md", *whole(released)} - {
        n for added, _ in shards for n in added
    }
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
    checksums = bytes(hub.files(OUT)["SHA256SUMS"].read(0, 10**6)).decode()
    found = {path: content.sha256 for path, content in hub.files(OUT).items()}
    del found["SHA256SUMS"], found[".gitattributes"]
    assert dict(reversed(line.split("  ")) for line in checksums.splitlines()) == found
    assert found == whole(released) | {n: found[n] for n in (RECORD, "README.md")}
    assert staged(tmp_path) == []
    for content in hub.files(OUT).values():
        assert TOKEN.encode() not in bytes(content.read(0, content.nbytes))
    assert not any(r.has_token for r in hub.requests if r.origin == "cdn")


@pytest.mark.parametrize("most", [1, 2])
def test_few_shards_are_staged_at_a_time(most, hub, begin, released, whole, tmp_path):
    """Also if uploads are slow."""
    hub.faults.append(after(0, Fault("slow", 1_500_000), PUT))
    staging = tmp_path / "staging"
    options = ["--max-staged", most, "--staging", staging, "--workers", 3]
    run = begin("convert", released, f"hf://{OUT}", *SIZE, "--quiet", *options)
    counts = set()
    while not run.is_over:
        counts.add(len(shards_in(staging)))
    assert run.done().returncode == 0
    assert contents(hub) == whole(released)
    assert max(counts) == most
    assert list(staging.iterdir()) == []
    assert staged(tmp_path) == []


@pytest.mark.parametrize(("n", "machine"), [(0, "another"), (2, "this"), (4, "another")])
def test_a_killed_run_resumes(n, machine, hub, begin, cli, released, whole, tmp_path):
    """Uploaded shards are neither written nor uploaded again, from any machine."""
    hub.add_folder(NAME, released)
    hub.faults.append(after(n, Fault("slow", 20_000), PUT))
    run = begin("convert", NAME, f"hf://{OUT}", *SIZE, "--quiet")
    wait_for(lambda: len(shards(hub)) == n and "cdn PUT" in requested(hub)[-3:], 20)
    run.kill()
    assert run.done().returncode == -9
    hub.faults.clear()
    uploaded = shards(hub)
    assert len(uploaded) == n
    if machine == "this":
        assert any(file.suffix == ".safetensors" for file in staged(tmp_path))
    hub.reset_counts()
    done = cli("convert", NAME, f"hf://{OUT}", *SIZE, "--quiet", "--json", machine=machine)
    assert done.returncode == 0, done.stderr
    assert contents(hub) == whole(released)
    sizes = json.loads(done.stdout)["shards"]
    assert json.loads(done.stdout)["bytes_resumed"] == sum(uploaded.values())
    assert requested(hub).count("cdn PUT") == len(sizes) - n
    assert list((tmp_path / machine / "gptoss_stream").iterdir()) == []
    if machine == "another" and n == 4:
        weights = sum(file.stat().st_size for file in released.glob("*.safetensors"))
        assert hub.bytes_sent < 0.7 * weights + small_nbytes(released)


def test_the_remote_state_pins_the_source(hub, begin, convert, released, another, whole):
    """Also if another machine resumes: the state in the output names the commit that was read."""
    hub.add_folder(NAME, released)
    hub.faults.append(after(2, Fault("status", 403), PUT))
    assert convert(NAME, f"hf://{OUT}").returncode == 2
    hub.faults.clear()
    assert len(shards(hub)) == 2
    hub.add_folder(NAME, another)
    assert convert(NAME, f"hf://{OUT}", machine="another").returncode == 0
    assert contents(hub) == whole(released)
