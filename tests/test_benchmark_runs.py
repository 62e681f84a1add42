"""What is measured already is not measured again. What drops the page cache needs root."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace

import everything
import machine
import pytest
import trials
from runs import ROOT


@pytest.mark.skipif(os.geteuid() != 0, reason="cold page caches need root")
def test_an_interrupted_benchmark_of_formats_goes_on(tmp_path):
    file = tmp_path / "found.json"
    options = ["--preset", "tiny", "--layers", "1", "--folder", tmp_path / "data", "--limit", "0"]
    options += ["--from", "hf-mxfp4", "--to", "hf-mxfp4", "--json", file]
    command = [sys.executable, ROOT / "benchmarks/formats.py", *options]
    with subprocess.Popen([*command, "--runs", "9"]) as process:
        while not file.exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
    first = json.loads(file.read_text())
    assert 0 < len(first["turns"]) < 8
    number = len(first["turns"]) + 1
    done = subprocess.run(
        [*command, "--runs", str(number)], check=True, capture_output=True, text=True
    )
    then = json.loads(file.read_text())
    assert then["turns"][:-1] == first["turns"]
    assert len(then["turns"]) == number
    assert "`hf-mxfp4` to `hf-mxfp4`" in done.stdout
    assert list((tmp_path / "data").iterdir()) == []
    others = subprocess.run([*command, "--layers", "2"], capture_output=True, text=True)
    assert others.returncode == 2
    assert "measured with other arguments" in others.stderr


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Those of a run of one section, whose benchmark does not exist."""
    monkeypatch.setitem(everything.SECTIONS, "peers", "no_such_benchmark.py")
    return Namespace(
        folder=tmp_path, json=tmp_path / "all.json", only=["peers"], again=False, tiny=False
    )


def test_a_section_that_is_there_is_not_measured_again(arguments, capsys):
    entry = {"command": everything.SECTIONS["peers"], "results": []}
    found = {"machine": machine.described() | {"disk": {}}, "sections": {"peers": entry}}
    assert everything.run_sections(arguments, found) == []
    assert "peers: is there" in capsys.readouterr().err
    assert found["sections"] == {"peers": entry}
    assert not arguments.json.exists()


def test_results_of_another_machine_are_kept_apart(arguments):
    found = {"machine": machine.described() | {"disk": {}, "kernel": "0.1"}, "sections": {}}
    with pytest.raises(SystemExit, match="of another machine"):
        everything.run_sections(arguments, found)


def test_a_benchmark_that_fails_is_named_and_the_others_run(arguments):
    found = {"machine": machine.described() | {"disk": {}}, "sections": {}}
    arguments.only = ["peers", "peers"]
    assert everything.run_sections(arguments, found) == ["peers", "peers"]
    assert found["sections"] == {}


def test_a_benchmark_becomes_a_section(arguments, monkeypatch):
    """With its date and the commit; its own file is deleted then."""
    script = arguments.folder / "benchmark.py"
    script.write_text("import pathlib, sys\npathlib.Path(sys.argv[-1]).write_text('[1]')")
    monkeypatch.setitem(everything.SECTIONS, "peers", f"{script} --runs 1")
    found = {"machine": machine.described() | {"disk": {}}, "sections": {}}
    assert everything.run_sections(arguments, found) == []
    assert trials.read_json(arguments.json) == found
    assert found["sections"]["peers"]["results"] == [1]
    assert found["sections"]["peers"]["ended"][:2] == "20"
    assert sorted(arguments.folder.iterdir()) == [arguments.json, script]
