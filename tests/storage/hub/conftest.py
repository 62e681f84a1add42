"""The stand-in Hub, and runs against it as users start them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hub_cases import (
    AUXILIARY_FILES,
    COMMIT,
    LASTING,
    MISSING_SOURCES,
    NAME,
    SIZE,
    UPLOAD_FAULTS,
    assert_nothing_wrong,
    contents,
    finished,
    named,
)
from hub_runs import Launcher, Run, after
from runs import INDEX_NAME, run_in_process, stamps
from stand_in_hub import Request, StandInHub, every, first


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The stand-in Hub, and a launcher of runs against it."""
    with StandInHub() as hub, Launcher(hub.endpoint, tmp_path_factory.mktemp("home")) as launcher:
        yield hub, launcher


@pytest.fixture(scope="module")
def released(checkpoints, tmp_path_factory) -> Path:
    """A folder as OpenAI releases it: several shards, auxiliary files and `original/`."""
    folder = tmp_path_factory.mktemp("released") / "source"
    shutil.copytree(checkpoints(layers=2, max_shard_size="200KB"), folder)
    for name, data in AUXILIARY_FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "README.md").write_text("# A model")
    shutil.copytree(checkpoints(layers=2, format="openai", seed=3), folder / "original")
    return folder


@pytest.fixture(scope="module")
def another(checkpoints) -> Path:
    """Another commit of the same model: the same names and sizes, other weights."""
    return checkpoints(layers=2, max_shard_size="200KB", seed=1)


@pytest.fixture
def hub(served) -> StandInHub:
    """The stand-in Hub, empty and without faults."""
    hub = served[0]
    hub.repos.clear()
    hub.faults.clear()
    hub.tokens.clear()
    hub.link_seconds, hub.part_nbytes = 3600, None
    hub.reset_counts()
    return hub


@pytest.fixture
def begin(served, tmp_path):
    """Start a run in the test's folder; each machine has its own cache."""

    def begin(*arguments: object, machine: str = "this", **more: str) -> Run:
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
    """Convert to several shards, quietly."""

    def convert(source: object, output: object, *options: object, **more: str):
        return cli("convert", source, output, *SIZE, "--quiet", *options, **more)

    return convert


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The SHA-256 of each file that a conversion of a local folder writes, without the record,
    which names the source."""
    known: dict[tuple[object, ...], dict[str, str]] = {}

    def whole(source: Path, *options: str) -> dict[str, str]:
        key = (source, *options)
        if key not in known:
            output = tmp_path_factory.mktemp("whole") / "out"
            assert (
                run_in_process("convert", source, output, *SIZE, "--quiet", *options).returncode
                == 0
            )
            known[key] = finished(output)
        return known[key]

    return whole


@pytest.fixture(scope="module")
def ended(served, released, whole, tmp_path_factory):
    """Runs at the same time that each end by one kind of fault, and the results of running the same
    commands again afterwards."""
    hub, launcher = served
    folder = tmp_path_factory.mktemp("ended")

    def run_all(*options: str) -> dict[str, subprocess.CompletedProcess[str]]:
        commands = {name: ("convert", named(name), name, *SIZE, "--quiet") for name in LASTING}
        runs = {n: launcher.begin(folder, *words, *options) for n, words in commands.items()}
        return {name: run.done() for name, run in runs.items()}

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


@pytest.fixture(scope="module")
def refused(served, released, tmp_path_factory):
    """The results of converting each of `MISSING_SOURCES`, and the path of the output."""
    hub, launcher = served
    folder = tmp_path_factory.mktemp("refused")
    hub.add_folder(NAME, released)
    hub.add_repo("openai/of-datasets", {"README.md": b"", "data.csv": b"1,2"})
    names = ["config.json", INDEX_NAME, "model-00000-of-00003.safetensors"]
    hub.add_repo("openai/in-part", {name: released / name for name in names})
    commands = [("convert", source, "out", "--quiet", *more) for source, more, _ in MISSING_SOURCES]
    runs = [launcher.begin(folder, *words) for words in commands]
    return [run.done() for run in runs], folder / "out"


@pytest.fixture(scope="module")
def sent(served, released, tmp_path_factory):
    """Runs at the same time that each meet one kind of fault: their results, and the files in the
    repositories afterwards."""
    hub, launcher = served
    folder, runs = tmp_path_factory.mktemp("sent"), {}

    def repository_of(request: Request) -> str:
        """Return the repository of a request; the address of an upload does not name it."""
        upload = hub.uploads.get(request.path.split("/")[2])
        whose = [name for name, repo in hub.repos.items() if upload and upload.repo is repo]
        return whose[0] if whose else request.path

    for name, (fault, match) in UPLOAD_FAULTS.items():
        # Other requests than commits are retried by the client, which waits for a second each time.
        spoil = every(2, fault, match) if match == COMMIT else first(1, fault, match)
        repo = named(name)
        hub.faults.append(lambda r, repo=repo, s=spoil: (repo in repository_of(r) and s(r)) or None)
        words = ("convert", released, f"hf://{repo}", *SIZE, "--quiet")
        runs[name] = launcher.begin(folder, *words, XDG_CACHE_HOME=str(folder / "cache"))
    ends = {name: run.done() for name, run in runs.items()}
    hub.faults.clear()
    found = {name: contents(hub, named(name)) if named(name) in hub.repos else {} for name in ends}
    return ends, found, list((folder / "cache" / "gptoss_stream").iterdir())
