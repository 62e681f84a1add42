"""Pages that need an environment of their own run as users run them, from the first command on."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
from pages import PAGES, blocks
from runs import ROOT

pytestmark = pytest.mark.slow

NAMES = ["README.md", "transformer-bridge.md", "nnsight.md"]


@pytest.mark.parametrize("page", [p for p in PAGES if p.name in NAMES], ids=lambda page: page.name)
def test_a_page_runs_in_a_fresh_environment(page, tmp_path):
    """Bash installs what the page says; then one Python process runs its blocks in order."""
    clone = tmp_path / "clone"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "demo")
    shutil.copytree(ROOT, clone, ignore=ignored)
    install, run = [], ["import subprocess"]
    for comment, language, code in blocks(page):
        if comment == "demo":
            install += [code, ". .venv/bin/activate"]
        elif comment == "install":
            install.append(code)
        elif language == "python":
            run.append(code)
        elif language == "sh" and comment in ("", "example"):
            run.append(f"subprocess.run(['bash', '-euc', {code!r}], check=True)")
    (clone / "page.py").write_text("\n".join(run))
    script = "\n".join(["set -eu", *install, "python page.py"])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=clone, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
