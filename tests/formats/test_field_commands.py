"""Folders given to the wrong command, and inputs of the field to every format."""

from __future__ import annotations

import field_converted
import pytest
from field_cases import Source
from field_converted import CONVERTED, openai
from field_models import (
    MXFP4,
    before,
    chain,
    each,
    model,
    openai_config,
    packed,
    to_hooked,
    transposed,
)
from independent import dequantised, from_openai, from_unfused, load_folder
from mxfp4_oracles import encoded
from outputs import load_output, same_bits
from runs import assert_clean_error, digests, run_in_process

import gptoss_stream


@pytest.fixture
def source(tmp_path):
    Source(config={"quantization_config": MXFP4}, mxfp4=True).write(tmp_path / "source")
    return tmp_path / "source"


def refused(*command: object) -> str:
    done = run_in_process(*command)
    assert_clean_error(done, 2)
    return done.stderr


@pytest.mark.parametrize("to", ["hf", "hf-mxfp4", "openai", "transformer-lens"])
def test_a_part_of_a_model_is_not_converted(to, source, tmp_path):
    part = gptoss_stream.Selection(layers="1")
    gptoss_stream.convert(source, tmp_path / "part", to=to, selection=part)
    before = digests(tmp_path)
    line = refused("convert", tmp_path / "part", tmp_path / "out", "--to", "hf")
    assert "part of a model" in line
    assert "download" not in line
    assert digests(tmp_path) == before


def test_a_checkpoint_is_no_output(source, tmp_path):
    """Verify finds no output in it, and convert does not overwrite it."""
    Source().write(tmp_path / "other")
    before = digests(tmp_path)
    done = run_in_process("verify", source, tmp_path / "other", "--to", "hf")
    assert done.returncode == 1
    assert "missing: gptoss_stream.json" in done.stdout
    for options in ((), ("--overwrite",)):
        assert "other" in refused("convert", source, tmp_path / "other", "--to", "hf", *options)
        assert "source" in refused("convert", source, source, "--to", "hf", *options)
    assert digests(tmp_path) == before


def test_the_output_of_another_source(source, tmp_path):
    """Verify names what differs."""
    Source(each(("norm.weight",), lambda norm: norm + 1)).write(tmp_path / "other")
    gptoss_stream.convert(tmp_path / "other", tmp_path / "out", to="hf")
    done = run_in_process("verify", source, tmp_path / "out")
    assert done.returncode == 1, done
    assert "norm.weight" in done.stdout + done.stderr


def test_an_interrupted_output_is_no_source(source, tmp_path):
    gptoss_stream.convert(source, tmp_path / "out", to="hf", task=(0, 2), max_shard_size="100KB")
    line = refused("convert", tmp_path / "out", tmp_path / "again", "--to", "hf")
    assert str(tmp_path / "out") in line


# fmt: off
SOURCES = {
    "flat blocks, scales as F8_E8M0": Source(
        chain(field_converted.FLAT, field_converted.E8M0), mxfp4=True),
    "blocks with a fixed number of groups": Source(
        chain(field_converted.HARD, before("_orig_mod.")), mxfp4=True),
    "flat blocks in OpenAI's names": Source(
        chain(openai, each(".blocks", lambda b: b.flatten(2)), before("module.")), mxfp4=True,
        outer=lambda _: openai_config()),
    "experts transposed": Source(chain(transposed(), before("module."))),
    "only down_proj transposed": Source(transposed("experts.down_proj")),
    "TransformerLens's names after module.": Source(chain(to_hooked, before("module."))),
    "inside another model": CONVERTED["inside InternVL"].source,
}
# fmt: on
TARGETS = {
    "hf-unfused": lambda folder: from_unfused(load_folder(folder)),
    "hf-mxfp4": load_folder,
    "openai": lambda folder: from_openai(load_folder(folder), openai_config()),
    "transformer-lens": load_folder,
}


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("name", SOURCES)
def test_every_target(name, to, tmp_path):
    """Bit for bit. MXFP4 stays the same bytes, and floats are encoded."""
    case = SOURCES[name]
    plain = case.write(tmp_path / "source")
    done = run_in_process("convert", tmp_path / "source", tmp_path / "out", "--to", to, "--quiet")
    assert done.returncode == 0, done.stderr
    expected = plain
    if to in ("hf-mxfp4", "openai"):
        expected = packed(model())[0] if case.mxfp4 else encoded(plain, "openai")
        plain = dequantised(expected)
    if to == "transformer-lens":
        expected = to_hooked(plain)
    found = TARGETS[to](tmp_path / "out")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        if tensor.element_size() == 1:
            assert found[key].equal(tensor), key
        else:
            assert same_bits(found[key], tensor), key
    assert gptoss_stream.verify(tmp_path / "source", tmp_path / "out").equal
    gptoss_stream.convert(tmp_path / "out", tmp_path / "back", to="hf")
    back = load_output(tmp_path / "back")
    assert all(same_bits(back[key], tensor) for key, tensor in plain.items())
