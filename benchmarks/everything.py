"""Every benchmark that the documentation quotes, in one JSON file, and the pictures.

    python benchmarks/everything.py --folder /some/disk
    python benchmarks/everything.py --folder /some/disk --only conversions-20b peers
    python benchmarks/everything.py --draw

Runs one benchmark after another, each as a command of its own, and writes what it found to
`docs/benchmarks.json` with its date and the commit, beside a description of the machine. Then draws
the pictures into the same folder. The tables of the site are made from the same file when the site
is built (`tables.py`).

A section that is there already, by the same command, is not measured again (`--again` does). The
same command goes on after an interruption; the conversions of all formats do so after the turn in
which they were interrupted. A benchmark that fails is reported at the end, and the others run.
Needs root, some hours, and 66 GB of disk. `--tiny` tries with tiny models whether everything runs.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import machine
import trials

DOCS = trials.HERE.parent / "docs"
RESULTS = DOCS / "benchmarks.json"
SECTIONS = {
    "conversions-20b": "formats.py --preset 20b --layers 24 --float-layers 16 --runs 3 "
    "--limit 0 --from hf-mxfp4 hf transformer-lens hf-unfused openai",
    "conversions-numpy": "formats.py --preset 20b --layers 8 --runs 3 --limit 0 "
    "--without-numba 3 --from hf-mxfp4 hf --to hf transformer-lens hf-mxfp4",
    "conversions-120b": "formats.py --preset 120b --layers 4 --runs 3 --limit 0",
    "conversions-limited": "formats.py --preset 20b --layers 2 --runs 5 --limit 256MB",
    "peers": "peers.py --preset 20b --layers 2 --runs 3",
    "memory": "memory.py --preset 20b --layers 2",
    "growth-20b": "growth.py --preset 20b --layers 1 2 4 8 24 --runs 3 --limits",
    "growth-120b": "growth.py --preset 120b --layers 1 2 4 --runs 3 --limits",
    "limits": "growth.py --preset 20b --layers --limit-layers 2 --runs 5 "
    "--limits 2GB 512MB 256MB 192MB",
    "adapters-20b": "adapters.py --preset 20b --layers 24 --rank 16 --runs 3 --no-peft",
    "adapters-peft": "adapters.py --preset 20b --layers 2 --rank 16 --runs 3",
    "inference-20b": "inference.py --preset 20b --runs 3 --limit 8GB",
    "inference-2-layers": "inference.py --preset 20b --layers 2 --runs 3 --limit 8GB",
    "inference-120b": "inference.py --preset 120b --runs 2",
    "remote": "remote.py --preset 120b",
    "remote-xet": "remote.py --preset 120b --layers 4 --xet",
    "opening": "opening.py --preset 20b --layers 2 4 --runs 3",
    "cores": "cores.py --preset 20b --layers 2 --runs 2",
}
TINY = {
    "formats.py": "--layers 1 --float-layers 1 --runs 1 --from hf-mxfp4 --to hf",
    "growth.py": "--layers 1 2 --limit-layers 1 --runs 1",
    "remote.py": "--layers 1 --check 1",
}
"""What makes a benchmark small, beside its other options, if not `--layers 1 --runs 1`."""


def command(section: str, *, is_tiny: bool) -> str:
    """Return the benchmark of a section, and its options but for the folder."""
    line = SECTIONS[section]
    if not is_tiny:
        return line
    return f"{line} --preset tiny {TINY.get(line.split()[0], '--layers 1 --runs 1')}"


def measure(section: str, line: str, folder: Path) -> dict[str, Any]:
    """Run the benchmark of a section.

    Args:
        section: Its name.
        line: The benchmark and its options.
        folder: For its data, and for its results as long as it is incomplete.

    Returns:
        The section.

    Raises:
        CalledProcessError: If it fails.
    """
    partial = folder / f"{section}.json"
    script, *options = shlex.split(line)
    options += ["--folder", str(folder), "--json", str(partial)]
    subprocess.run([sys.executable, str(trials.HERE / script), *options], check=True)
    results = trials.read_json(partial)
    partial.unlink()
    return {"command": line, "ended": trials.now(), "commit": commit(), "results": results}


def commit() -> str | None:
    """Return the commit of this repository, with `+` if the code differs from it."""
    git = ["git", "-C", str(trials.HERE.parent)]
    found = subprocess.run(
        [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True
    )
    if found.returncode:
        return None
    changes = [*git, "diff", "--quiet", "HEAD", "--", "gptoss_stream", "benchmarks"]
    return found.stdout.strip() + ("+" if subprocess.run(changes).returncode else "")


def on_this_machine(found: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Return whether results are of this machine, or of none that is known."""
    there = found.get("machine")
    return there is None or {k: v for k, v in there.items() if k != "disk"} == here


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("benchmark-data"))
    parser.add_argument("--json", type=Path, default=RESULTS, help="default: docs/benchmarks.json")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=[*SECTIONS])
    parser.add_argument("--again", action="store_true", help="measure also what is there already")
    parser.add_argument("--draw", action="store_true", help="only draw")
    parser.add_argument("--tiny", action="store_true", help="try with tiny models; needs --json")
    arguments = parser.parse_args()
    file = arguments.json
    if arguments.tiny and file == RESULTS:
        parser.error("--tiny needs --json: its numbers are not for the documentation")
    found = trials.read_json(file) if file.exists() else {"sections": {}}
    failed = [] if arguments.draw else run_sections(arguments, found)

    import pictures  # needs matplotlib, which measuring does not

    pictures.draw(found, file.parent)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def run_sections(arguments: argparse.Namespace, found: dict[str, Any]) -> list[str]:
    """Measure the chosen sections that are not there, and return those that failed."""
    here = machine.described()
    if not on_this_machine(found, here):
        sys.exit(f"{arguments.json}: of another machine or other versions; choose another --json")
    if found.get("machine") is None:
        nbytes = 1 << 20 if arguments.tiny else 8 << 30
        found["machine"] = here | {"disk": machine.disk(arguments.folder, nbytes)}
        trials.write_json(found, arguments.json)
    failed = []
    for section in arguments.only:
        line = command(section, is_tiny=arguments.tiny)
        if found["sections"].get(section, {}).get("command") == line and not arguments.again:
            trials.say(f"{section}: is there")
            continue
        trials.say(f"{section}: {line}")
        try:
            found["sections"][section] = measure(section, line, arguments.folder)
        except subprocess.CalledProcessError as error:
            trials.say(str(error))
            failed.append(section)
        else:
            trials.write_json(found, arguments.json)
    return failed


if __name__ == "__main__":
    main()
