"""LoRA adapters in repositories of the Hub."""

from __future__ import annotations

import json

import pytest
from hub_cases import DATA, NAME, RECORD, SIZE
from hub_runs import after
from runs import assert_clean_error, digests
from stand_in_hub import Fault

import gptoss_stream

ADAPTER = "someone/adapter"
SHARDS = "*.safetensors"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two random adapters with the same names and sizes."""
    folder = tmp_path_factory.mktemp("adapters")
    return [
        gptoss_stream.synth_adapter(folder / str(seed), layers=2, rank=4, seed=seed)
        for seed in (1, 2)
    ]


def test_a_resumed_run_reads_the_adapter_that_it_began_with(
    hub, convert, cli, released, adapters, tmp_path
):
    hub.add_folder(NAME, released)
    began = hub.add_folder(ADAPTER, adapters[0])
    hub.faults.append(after(24, Fault("status", 500), DATA))
    assert_clean_error(convert(NAME, "out", "--adapter", ADAPTER, "--workers", "1"), 3)
    hub.faults.clear()
    finished = {*(tmp_path / "out").glob(SHARDS)}
    assert finished
    hub.add_folder(ADAPTER, adapters[1])
    done = cli("convert", NAME, "out", *SIZE, "--adapter", ADAPTER)
    assert done.returncode == 0, done.stderr
    assert f"merging hf://{ADAPTER}@" in done.stderr
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["adapters"] == [
        {"adapter": f"hf://{ADAPTER}@{began}", "revision": "main", "scale": 1.0}
    ]
    card = (tmp_path / "out/README.md").read_text()
    assert f'base_model:\n- "{NAME}"\n- "{ADAPTER}"\nbase_model_relation: "merge"\n' in card
    assert f"| adapter | [{ADAPTER}](https://huggingface.co/{ADAPTER}) | {began} | 1 |" in card
    local = tmp_path / "local"
    gptoss_stream.convert(released, local, adapters=adapters[0], max_shard_size=SIZE[1])
    assert digests(tmp_path / "out", SHARDS) == digests(local, SHARDS)
    assert cli("verify", NAME, "out").returncode == 0  # as recorded: the first commit
    newest = cli("verify", NAME, "out", "--adapter", ADAPTER)
    assert newest.returncode == 1


def test_revision(hub, convert, released, adapters, tmp_path):
    """It is named after the repository."""
    hub.add_folder(NAME, released)
    hub.add_folder(ADAPTER, adapters[0])
    hub.add_folder(ADAPTER, adapters[1], branch="next")
    assert convert(NAME, "out", "--adapter", f"hf://{ADAPTER}@next").returncode == 0
    gptoss_stream.convert(
        released, tmp_path / "local", adapters=[adapters[1]], max_shard_size=SIZE[1]
    )
    assert digests(tmp_path / "out", SHARDS) == digests(tmp_path / "local", SHARDS)


def test_no_adapter_in_a_repository(hub, convert, released):
    hub.add_folder(NAME, released)
    done = convert(NAME, "out", "--adapter", NAME)
    assert_clean_error(done, 2)
    assert "adapter_config.json: missing; this is a whole checkpoint and no adapter" in done.stderr
