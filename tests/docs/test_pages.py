"""What the README and the quickstarts say can be done, is done."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path

import pytest
from hub_runs import Launcher
from pages import PAGES, QUICKSTARTS, blocks, run_page, run_shell
from runs import ROOT, digests
from stand_in_hub import StandInHub

import gptoss_stream
from gptoss_stream.cli.main import main

COMMENTS = ("demo", "example", "test", "install", "job script", "on the Hub")
OF_OTHER_VERSIONS = ("transformer-bridge.md", "nnsight.md")  # test_environments.py runs them
OF_OTHER_MACHINES = ("slurm.md", "hub-to-hub.md")  # with tests of their own below
HERE = [page for page in PAGES if page.name not in OF_OTHER_VERSIONS + OF_OTHER_MACHINES]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_block_runs_in_a_test_or_says_why_not(page):
    for block in blocks(page):
        if block.language in ("sh", "python"):
            assert block.comment in ("", *COMMENTS) or block.comment.startswith("not run: ")
        else:
            assert block.language == "text"


@pytest.mark.parametrize("page", HERE, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page, tmp_path, monkeypatch, capsys):
    assert run_page(page, tmp_path, monkeypatch) > 1


def test_the_slurm_script_of_the_quickstart(tmp_path, monkeypatch):
    """Bash runs it as SLURM would, the tasks in any order; the whole is as from one process."""
    (page,) = (page for page in QUICKSTARTS if page.name == "slurm.md")
    (script,) = (block.code for block in blocks(page) if block.comment == "job script")
    first, last = map(int, re.search(r"--array=(\d+)-(\d+)", script).groups())
    gptoss_stream.synth(tmp_path / "demo/checkpoint")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", str(first))
    monkeypatch.setenv("SLURM_ARRAY_TASK_MAX", str(last))
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", str(last - first + 1))
    for number in reversed(range(first, last + 1)):
        assert not (tmp_path / "demo/converted/model.safetensors.index.json").exists()
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(number))
        subprocess.run(["bash", "-euc", script], cwd=tmp_path, check=True, capture_output=True)
    assert run_page(page, tmp_path, monkeypatch) > 1  # verifies it
    command = script[script.index("python") :].replace("demo/converted", "demo/whole")
    run_shell(command.replace("--slurm-array", ""))
    assert len(list((tmp_path / "demo/converted").glob("*.safetensors"))) > last
    assert digests(tmp_path / "demo/converted", "*.safetensors") == digests(
        tmp_path / "demo/whole", "*.safetensors"
    )


def test_hub_to_hub(checkpoints, tmp_path):
    """Against the stand-in for the Hub, in processes of their own."""
    (page,) = (page for page in QUICKSTARTS if page.name == "hub-to-hub.md")
    code = "".join(block.code for block in blocks(page) if block.comment == "on the Hub")
    (tmp_path / "home").mkdir()
    with StandInHub() as hub, Launcher(hub.endpoint, tmp_path / "home") as launcher:
        hub.add_folder("openai/gpt-oss-20b", checkpoints())
        commands = re.findall(r"^python -m gptoss_stream ([^#\n]+)", code, re.MULTILINE)
        for command in commands:
            done = launcher.begin(tmp_path, *command.split()).done()
            assert done.returncode == 0, done.stderr
        assert "model.safetensors" in hub.files("you/gpt-oss-20b-tl")
    assert len(commands) == 4
    assert {raw.name for raw in tmp_path.glob("routers/*.safetensors")} == {"model.safetensors"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_extras_exist(page):
    project = (ROOT / "pyproject.toml").read_text()
    known = re.findall(r"^([\w-]+) = \[", project.partition("[project.optional-")[2], re.MULTILINE)
    for names in re.findall(r"'\.\[([\w,-]+)\]'", page.read_text()):
        assert set(names.split(",")) <= set(known)


def test_links_of_the_readme_lead_to_pages():
    """And the addresses in it are those of the project."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    for address in re.findall(r"\]\((\S+?)\)", text):
        for base, found in {
            "https://gptoss-stream.github.io/gptoss_stream/": "docs/{}.md",
            "https://github.com/gptoss-stream/gptoss_stream/blob/main/": "{}",
            "https://raw.githubusercontent.com/gptoss-stream/gptoss_stream/main/": "{}",
        }.items():
            if address.startswith(base):
                name, _, anchor = address.removeprefix(base).partition("#")
                file = ROOT / found.format(name.rstrip("/") or "index")
                assert file.is_file(), address
                assert not anchor or f"\n## {anchor.capitalize()}\n" in file.read_text(), address
                break
        else:
            pytest.fail(f"{address} is of no part of the project")


def test_every_command_is_named_with_options_that_exist():
    """On all pages: each option of a command in a block is one that the command has."""
    helps: dict[str, str] = {}
    texts = [page.read_text() for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]]
    lines = re.findall(r"^(?:\$ )?python -m gptoss_stream (\w+)((?:[^\n\\#]|\\\n)*)",
                       "\n".join(texts), re.MULTILINE)  # fmt: skip
    assert len(lines) > 50
    for command, rest in lines:
        if command not in helps:
            with redirect_stdout(StringIO()) as printed, suppress(SystemExit):
                main([command, "--help"])
            helps[command] = printed.getvalue()
        for option in re.findall(r"(?<=\s)--[\w-]+", rest):
            assert option in helps[command], (command, option)
