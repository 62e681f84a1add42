"""How many requests runs make: the Hub limits those of an address, not the bytes of its CDN."""

from __future__ import annotations

from collections import Counter

import pytest
from hub_cases import (
    AUXILIARY_FILES,
    NAME,
    NOW,
    OUT,
    SIZE,
    assert_nothing_wrong,
    commits,
    contents,
    finished,
    python,
    shards,
)
from runs import INDEX_NAME, run_in_process
from stand_in_hub import Fault, every

TASKS = 10
SMALL = ("--max-shard-size", "80KB")
CARD = "README.md"


def asked(hub) -> Counter[str]:
    """Return how often the Hub itself, not its CDN, was asked for a commit, a listing, the address
    of a file, or a file of the source."""
    found: Counter[str] = Counter()
    for request in hub.requests:
        path = request.path.partition("?")[0]
        if request.origin == "cdn" or NAME not in path:
            continue
        kind = "listing" if "/tree/" in path else "commit" if path.startswith("/api") else ""
        found[kind or f"{request.method} {path.partition('/resolve/')[2].partition('/')[2]}"] += 1
    return found


def of_files(released, nprocesses: int) -> dict[str, int]:
    """Return the requests for metadata and addresses that a number of processes make."""
    shards = [f"HEAD {file.name}" for file in released.glob("*.safetensors")]
    small = [f"GET {name}" for name in ("config.json", INDEX_NAME)]
    return dict.fromkeys([*shards, *small], nprocesses)


COPIED = {f"GET {name}": 1 for name in (*AUXILIARY_FILES, "generation_config.json")}


def test_one_run(hub, convert, released, tmp_path):
    """It asks once for the address of each shard, and for each small file."""
    hub.add_folder(NAME, released)
    assert convert(NAME, "out").returncode == 0
    expected = {"commit": 1, "listing": 1, **of_files(released, 1), **COPIED, f"GET {CARD}": 1}
    assert asked(hub) == expected


@pytest.mark.parametrize("faults", [False, True], ids=["", "with 429s"])
def test_an_array(faults, hub, cli, released, another, whole, tmp_path):
    """The first task resolves the branch and lists the commit, and tells the others. So they all
    read the same commit, whatever the branch is then. A busy Hub is waited for."""
    hub.add_folder(NAME, released)
    for index in range(TASKS):
        task = ("--task-index", index, "--num-tasks", TASKS)
        if faults:
            hub.faults[:] = [every(3, Fault("status", 429, NOW), "hub ")]
        done = cli("convert", NAME, "out", *SMALL, "--quiet", *task)
        assert done.returncode == 0, done.stderr
        if index == 0:
            hub.add_folder(NAME, another)
        assert (tmp_path / "out" / INDEX_NAME).exists() == (index == TASKS - 1)
    assert_nothing_wrong(tmp_path / "out", whole(released, *SMALL))
    expected = {"commit": 1, "listing": 1, **of_files(released, TASKS), **COPIED}
    if not faults:
        assert asked(hub) == expected | {f"GET {CARD}": TASKS}


def test_a_damaged_listing_is_not_believed(hub, cli, released, whole, tmp_path):
    hub.add_folder(NAME, released)
    task = lambda index: cli(  # noqa: E731
        "convert", NAME, "out", *SIZE, "--quiet", "--task-index", index, "--num-tasks", 2
    )
    assert task(0).returncode == 0
    state = tmp_path / "out/.gptoss_stream/run.json"
    state.write_text(state.read_text().replace('"listings": {', '"listings": {"x": 3, ', 1))
    hub.reset_counts()
    done = task(1)
    assert done.returncode == 0, done.stderr
    assert_nothing_wrong(tmp_path / "out", whole(released))


def test_workers_are_told(hub, checkpoints, tmp_path):
    """Only the client resolves the branch, lists the commit, and commits what workers upload,
    several shards at once, with what encoding them has lost."""
    source = checkpoints(layers=2, format="hf")
    hub.add_folder(NAME, source)
    options = ("--to", "hf-mxfp4", "--mxfp4-rule", "ocp", *SIZE, "--quiet")
    local = tmp_path / "local"
    assert run_in_process("convert", source, local, *options).returncode == 0
    command = ("-m", "gptoss_stream", "convert", NAME, f"hf://{OUT}", *options)
    done = python(hub, tmp_path, *command, "--scheduler", "local:2")
    assert done.returncode == 0, done.stderr
    assert contents(hub) == finished(local)
    copied = {"GET generation_config.json": 1}
    assert asked(hub) == {"commit": 1, "listing": 1, **of_files(source, 3), **copied}
    with_shards = [added for added, _ in commits(hub) if added & {*shards(hub)}]
    assert len(with_shards) < len(shards(hub)) == 4
