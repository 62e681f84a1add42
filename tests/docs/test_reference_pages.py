"""Pages that describe the code agree with it: tables of formats, messages, keys of JSON objects."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest
from pages import blocks
from runs import ROOT, run_in_process

import gptoss_stream
from gptoss_stream.formats import load, names, table_specs
from gptoss_stream.random_checkpoint import PRESETS

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def hooks():
    """The module that MkDocs calls."""
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", names())
def test_shapes_in_the_tables_are_those_of_a_model(name, hooks):
    """With the sizes of the tiny model, of which no two are equal."""
    model = PRESETS["tiny"].model()
    sizes = {symbol: model.sizes[axis] for axis, symbol in hooks.SYMBOLS.items() if axis != "t"}
    expected = {
        spec.name: (spec.shape, [dtype.name for dtype in spec.dtypes])
        for spec in table_specs(load(name).TABLE, model)
    }
    found = {}
    for stored, shape, dtypes in hooks.tensors(name):
        lengths = [eval(axis.replace("·", "*").replace("/", "//"), sizes) for axis in shape]
        found[stored] = (tuple(lengths), dtypes)
    for optional in found.keys() - expected.keys():  # zero in this model, but stored by a format
        assert optional.endswith("b_U")
    assert {key: found[key] for key in expected} == expected


def literals() -> list[str]:
    """Return all texts in the source; what is inserted in them is `…`."""
    found = []
    for file in Path(gptoss_stream.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[sd]|\{\w+\}", "…", node.value))
    return found


def quoted() -> list[str]:
    return [
        line
        for block in blocks(DOCS / "troubleshooting.md")
        if block.language == "text"
        for line in block.code.splitlines()
    ]


def in_source(message: str, texts: list[str]) -> bool:
    """Return whether the parts of a message between `…` are in one text, in this order."""
    pattern = ".*".join(re.escape(part) for part in message.split("…"))
    return any(re.search(pattern, text) for text in texts)


def test_quoted_messages_are_in_the_source():
    texts, messages = literals(), quoted()
    assert len(messages) > 30
    assert [message for message in messages if not in_source(message, texts)] == []
    assert not in_source("…: the disc is full", texts)


def keys_in(section: str) -> set[str]:
    """Return what is quoted in the first column of the table after a heading of the page."""
    text = (DOCS / "files.md").read_text()
    table = text.partition(f"{section}\n")[2].split("\n#")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    return set(re.findall(r"`([^`]+)`", " ".join(rows)))


@pytest.fixture(scope="module")
def outputs(checkpoints, tmp_path_factory):
    """A folder with an adapter and outputs of several kinds."""
    folder = tmp_path_factory.mktemp("outputs")
    gptoss_stream.synth_adapter(folder / "adapter")
    dense = gptoss_stream.synth(folder / "dense", format="hf")
    commands = {
        "whole": ["--checksums"],
        "merged": ["--adapter", folder / "adapter", "--merge-like-peft", "--keep-experts", "0-3"],
        "packed": ["--to", "hf-mxfp4", "--reference", checkpoints()],
    }
    reports = {}
    for name, options in commands.items():
        done = run_in_process("convert", dense, folder / name, "--json", *options)
        assert done.returncode == 0, done.stderr
        reports[name] = json.loads(done.stdout)
    return folder, reports


def test_the_record(outputs):
    folder, _ = outputs
    found = set()
    for name in ("whole", "merged", "packed"):
        found |= json.loads((folder / name / "gptoss_stream.json").read_text()).keys()
    assert keys_in("## `gptoss_stream.json`") - found == {"source_revision", "listings"}  # remote
    assert found <= keys_in("## `gptoss_stream.json`")


def test_the_report_of_mxfp4(outputs):
    folder, reports = outputs
    found = json.loads((folder / "packed/mxfp4_encoding.json").read_text())
    assert set(found) == keys_in("## `mxfp4_encoding.json`")
    assert reports["packed"]["mxfp4"] == found


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("convert", ["dense", "again"]),
        ("plan", ["dense", "planned"]),
        ("verify", ["dense", "whole"]),
        ("show", ["dense", "model.norm.weight"]),
    ],
)
def test_the_json_of_a_command(command, words, outputs, monkeypatch):
    monkeypatch.chdir(outputs[0])
    done = run_in_process(command, *words, "--json")
    assert set(json.loads(done.stdout)) == keys_in(f"### `{command} --json`")


def test_the_json_of_inspect(outputs, monkeypatch):
    monkeypatch.chdir(outputs[0])
    rows = re.findall(r"^\| (.+?) \| (`path.*|`source.*) \|$",
                      (DOCS / "files.md").read_text(), re.MULTILINE)  # fmt: skip
    described = {name: set(re.findall(r"`(\w+)`", keys)) for name, keys in rows}
    for name, words in {
        "a checkpoint": ["dense"],
        "an output": ["whole"],
        "an adapter": ["adapter"],
        "`--against`": ["dense", "--against", "packed"],
    }.items():
        done = run_in_process("inspect", *words, "--json")
        assert set(json.loads(done.stdout)) == described[name], name


def test_checksums(outputs):
    """A line has the form that the page says."""
    for line in (outputs[0] / "whole/SHA256SUMS").read_text().splitlines():
        assert re.fullmatch(r"[0-9a-f]{64}  [\w.-]+", line)
