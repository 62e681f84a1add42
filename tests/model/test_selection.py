"""Selections of output tensors: which tensors they match, what is refused, what is read."""

from __future__ import annotations

import json
from math import prod

import pytest
from outputs import load_output, same_bits
from safetensors.torch import load_file

import gptoss_stream
from gptoss_stream import Selection
from gptoss_stream.cli.main import main
from gptoss_stream.errors import OptionError
from gptoss_stream.model.numbers import parse_numbers


@pytest.fixture(scope="module")
def whole(checkpoints, tmp_path_factory):
    """The complete output for the tiny model (4 layers, 5 experts), by format."""
    outputs = {}
    for to in ("hf", "transformer-lens"):
        out = tmp_path_factory.mktemp("whole") / to
        gptoss_stream.convert(checkpoints(), out, to=to)
        outputs[to] = load_output(out)
    return outputs


def layer(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[parts.index("blocks") + 1]) if "blocks" in parts else None


def expert(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[parts.index("experts") + 1]) if "experts" in parts else None


SELECTIONS = {
    "layers": (["--layers", "0-1,3"], lambda n: layer(n) in (None, 0, 1, 3)),
    "the last layer": (["--layers", "-1"], lambda n: layer(n) in (None, 3)),
    "experts": (["--experts", "0,3-4"], lambda n: expert(n) in (None, 0, 3, 4)),
    "a group": (["--only", "attention"], lambda n: ".attn." in n),
    "groups": (
        ["--only", "embeddings", "--only", "norms"],
        lambda n: "embed" in n or ".ln" in n or n.startswith("ln"),
    ),
    "the router": (["--only", "router"], lambda n: ".mlp.W_gate." in n),
    "names": (
        ["--include", "*.W_[QO]", "--include", "unembed*"],
        lambda n: n.endswith(("W_Q", "W_O")) or n.startswith("unembed"),
    ),
    "excluded names": (
        ["--exclude", "*.bias", "--exclude", "*embed*"],
        lambda n: not n.endswith(".bias") and "embed" not in n,
    ),
    "everything at once": (
        ["--layers", "2", "--experts", "1", "--only", "experts", "--exclude", "*bias"],
        lambda n: layer(n) == 2 and expert(n) == 1 and not n.endswith("bias"),
    ),
}


@pytest.mark.parametrize(("options", "matches"), SELECTIONS.values(), ids=SELECTIONS.keys())
@pytest.mark.parametrize("source", ["hf-mxfp4", "hf", "openai"])
def test_a_selection_matches(source, options, matches, checkpoints, whole, tmp_path, capsys):
    """The output has exactly these tensors, with the bits and names of the complete output.

    The record has the selection, and verify checks the output against it.
    """
    out = tmp_path / "out"
    command = [str(checkpoints(format=source)), str(out), *options]
    assert main(["convert", *command]) == 0
    assert ", part of the model" in capsys.readouterr().out
    found, expected = load_output(out), whole["transformer-lens"]
    assert set(found) == {name for name in expected if matches(name)}
    assert [name for name in found if not same_bits(found[name], expected[name])] == []
    record = json.loads((out / "gptoss_stream.json").read_text())
    assert record["partial"]
    assert len(record["selection"]) == len({option for option in options if option[:2] == "--"})
    assert main(["verify", *command[:2]]) == 0
    assert main(["verify", *command]) == 0
    assert main(["verify", *command[:2], "--layers", "0"]) == 1
    assert main(["plan", *command, "--json"]) == 0


def test_a_partial_hf_output_has_no_config(checkpoints, whole, tmp_path):
    """With a config.json, transformers would fill the missing tensors with random numbers."""
    out = tmp_path / "out"
    gptoss_stream.convert(checkpoints(), out, to="hf", selection=Selection(layers="1"))
    found, expected = load_output(out), whole["hf"]
    assert set(found) == {n for n in expected if ".layers." not in n or ".layers.1." in n}
    assert all(same_bits(found[name], expected[name]) for name in found)
    assert not (out / "config.json").exists()
    assert (out / "source_config.json").exists()


def test_a_selection_of_everything_is_a_complete_output(checkpoints, tmp_path):
    """It has the same bytes, and its record does not say partial."""
    gptoss_stream.convert(checkpoints(), tmp_path / "all", selection=Selection(layers="0-3"))
    gptoss_stream.convert(checkpoints(), tmp_path / "whole")
    assert (tmp_path / "all/model.safetensors").read_bytes() == (
        tmp_path / "whole/model.safetensors"
    ).read_bytes()
    assert not json.loads((tmp_path / "all/gptoss_stream.json").read_text())["partial"]


def test_the_same_selection_written_differently_resumes(checkpoints, tmp_path):
    for layers in ("1,2", "1-2", "-3--2", "2,1,1"):
        report = gptoss_stream.convert(
            checkpoints(), tmp_path / "out", selection=Selection(layers=layers)
        )
    assert report.bytes_resumed == report.bytes_out
    with pytest.raises(gptoss_stream.GptOssStreamError, match="differs in selection"):
        gptoss_stream.convert(checkpoints(), tmp_path / "out", selection=Selection(layers="1"))


REFUSED = {
    "a layer that does not exist": (Selection(layers="4"), "layer 4: there are layers 0 to 3"),
    "before the first": (Selection(layers="-5"), "layer -5: there are layers 0 to 3"),
    "an expert that does not exist": (
        Selection(experts="0-5"),
        "expert 5: there are experts 0 to 4",
    ),
    "backwards": (Selection(layers="3-1"), "'3-1': the first layer comes after the last"),
    "no numbers": (Selection(layers="a"), "'a' names no layers"),
    "nothing": (Selection(layers=""), "'' names no layers"),
    "an unknown group": (Selection(only=("mlp",)), "unknown group 'mlp'; choose among attention"),
    "a pattern without a match": (
        Selection(include=("x*",)),
        "matches no tensor of transformer-lens",
    ),
    "everything excluded": (Selection(exclude=("*",)), "matches no tensor of transformer-lens"),
}


@pytest.mark.parametrize(("selection", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_selections_that_are_refused(selection, message, checkpoints, tmp_path):
    with pytest.raises(OptionError) as refusal:
        gptoss_stream.convert(checkpoints(), tmp_path / "out", selection=selection)
    assert message in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_experts_of_a_stack_cannot_be_selected(checkpoints):
    """In a stack, an expert's number is its index, which would change."""
    with pytest.raises(OptionError, match="stacks the experts in one tensor"):
        gptoss_stream.plan(checkpoints(), to="hf", selection=Selection(experts="0"))
    plan = gptoss_stream.plan(
        checkpoints(), to="hf", selection=Selection(experts="0", only=("attention",))
    )
    assert plan.num_tensors == 4 * 9


@pytest.mark.parametrize("source", ["hf-mxfp4", "hf", "openai"])
def test_only_what_is_selected_is_read(source, checkpoints, tmp_path, monkeypatch):
    """Only bytes that the selection needs are read, as many as the plan says."""
    folder = checkpoints(format=source)
    selection = Selection(layers="2", experts="1", only=("experts",))
    plan = gptoss_stream.plan(folder, selection=selection)
    read = {}
    from gptoss_stream.checkpoint.local_reader import LocalReader

    original = LocalReader.read

    def recording(self, tensor, first, shape):
        size = tensor.dtype.itemsize
        bytes_read = range(first * size, (first + prod(shape)) * size)
        read.setdefault(tensor.name, set()).update(bytes_read)
        return original(self, tensor, first, shape)

    monkeypatch.setattr(LocalReader, "read", recording)
    gptoss_stream.convert(folder, tmp_path / "out", selection=selection)
    assert sum(map(len, read.values())) == plan.source_nbytes
    raw = {name: plan.info.tensors[name].nbytes for name in read}
    assert all(len(read[name]) * 5 == raw[name] for name in read)  # one of five experts
    assert all(".2." in name for name in read)
    assert plan.unmapped == ()


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0", (0,)), ("-1", (9,)), ("0-2,5", (0, 1, 2, 5)), ("7--1", (7, 8, 9)), (" 3 , 1", (1, 3))],
)
def test_numbers(text, numbers):
    assert parse_numbers(text, 10, "layer") == numbers


def test_a_partial_output_loads(checkpoints, tmp_path):
    out = tmp_path / "out"
    gptoss_stream.convert(checkpoints(), out, selection=Selection(only=("router",)))
    assert len(load_file(out / "model.safetensors")) == 8
