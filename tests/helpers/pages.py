"""The code blocks of the documentation, with the comment that stands before a block.

A block of `sh` or `python` without a comment runs in the tests. The comment of another says why
not, or which test runs it.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
from runs import ROOT, run_in_process

QUICKSTARTS = sorted((ROOT / "docs/quickstart").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "docs/index.md", *QUICKSTARTS]
_BLOCK = re.compile(r"(?:^<!-- ([^>]+) -->\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A code block."""

    comment: str
    """What is in the comment on the line before it; empty without one."""
    language: str
    code: str


def blocks(page: Path) -> list[Block]:
    """Return the code blocks of a page."""
    return [Block(*match) for match in _BLOCK.findall(page.read_text())]


def run_shell(code: str) -> None:
    """Run the commands of a block in the current folder, without those that install packages."""
    for line in re.split(r"\n|&&", code.replace("\\\n", "")):
        words = shlex.split(line, comments=True)
        if not words or "venv" in words or words[0].endswith("pip"):
            continue
        assert words[0].endswith("python"), line
        assert words[1:3] == ["-m", "gptoss_stream"], line
        done = run_in_process(*words[3:])
        assert done.returncode == 0, (line, done.stderr)


def run_page(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the blocks of a page, in its order; returns how many there were."""
    monkeypatch.chdir(folder)
    names: dict[str, object] = {"__name__": "page"}
    number = 0
    for block in blocks(page):
        if block.language == "python" and not block.comment:
            exec(compile(block.code, str(page), "exec"), names)
        elif block.language == "sh" and block.comment in ("", "demo"):
            run_shell(block.code)
        else:
            continue
        number += 1
    return number
