"""An adapter is merged alike from each format and into each: what counts is the model."""

from __future__ import annotations

import independent
import pytest
import torch
from adapter_cases import CASES, Case, converted, name_of, told
from format_pairs import FORMATS, MXFP4_FORMATS
from outputs import same_bits

import gptoss_stream

FLOATS = [name for name in FORMATS if name not in MXFP4_FORMATS]
ADAPTERS = {
    **{
        name: Case(name)
        for name in (
            "attention, experts and head",
            "down of one layer, gate_up of the other",
            "router and experts",
            "embedding and head",
            "tokens of embedding and head",
            "router and head saved",
            "experts saved",
            "DoRA",
            "lora_bias",
            "all biases",
        )
    },
    **{
        name: CASES[name]
        for name in (
            "swapped, experts",
            "grouped by expert, as told",
            "expert by expert",
            "Tinker, shared",
        )
    },
}
"""Those that are of each kind of tensor. Other differences are not of the model's format."""

FOR_EXPERTS = ("attention, experts and head", "down of one layer, gate_up of the other")
FOR_EXPERTS += ("experts saved", "swapped, experts", "expert by expert", "Tinker, shared")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in found if not same_or_bytes(found[name], expected[name])] == []


def same_or_bytes(found, expected):
    if expected.dtype is torch.uint8:
        return torch.equal(found, expected)
    return same_bits(found, expected)


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """The folder of a model with an adapter merged into it, in the format hf."""

    def folder(name, dtype):
        def convert(path):
            converted(made, ADAPTERS[name], dtype, path)
            return path

        return made.once(("merged", name, dtype), convert)

    return folder


@pytest.mark.parametrize("target", [name for name in FORMATS if name != "hf"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_merging_into_a_format(name, target, whole, made, tmp_path):
    """It gives what converting the merged model gives. MXFP4 is of the merged bfloat16."""
    dtype = torch.bfloat16 if target in MXFP4_FORMATS else torch.float32
    found = converted(made, ADAPTERS[name], dtype, tmp_path / "out", to=target)
    options = {"to": target, "dtype": name_of(dtype)}
    gptoss_stream.convert(whole(name, dtype), tmp_path / "expected", **options)
    assert_same(found, independent.load_folder(tmp_path / "expected"))


@pytest.mark.parametrize("source", [name for name in FLOATS if name != "hf"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_merging_from_a_format(name, source, whole, made, tmp_path):
    case, dtype = ADAPTERS[name], torch.float32
    other = made.once(
        ("base", source),
        lambda path: convert_to(made.base(dtype), path, to=source, dtype=name_of(dtype)),
    )
    adapter = told(case, made.adapter(case, dtype))
    options = {"to": "hf", "dtype": name_of(dtype), "adapters": [adapter]}
    gptoss_stream.convert(other, tmp_path / "out", **options)
    expected = independent.load_folder(whole(name, dtype))
    assert_same(independent.load_folder(tmp_path / "out"), expected)


def convert_to(base, path, **options):
    """Convert a model to a new folder, and return that."""
    gptoss_stream.convert(base, path, **options)
    return path


@pytest.fixture(scope="module")
def mxfp4(made):
    """A model with random MXFP4 in either format, or dequantised as hf."""

    def folder(name):
        if name == "hf-mxfp4":
            return made.mxfp4()
        return made.once(("MXFP4 as", name), lambda path: convert_to(made.mxfp4(), path, to=name))

    return folder


@pytest.mark.parametrize("source", MXFP4_FORMATS)
@pytest.mark.parametrize("name", FOR_EXPERTS)
def test_merging_into_dequantised_experts(name, source, mxfp4, made, tmp_path):
    """From MXFP4 it gives what dequantising first and then merging gives."""
    adapter = told(ADAPTERS[name], made.adapter(ADAPTERS[name], torch.bfloat16))
    options = {"to": "hf", "dtype": "bfloat16", "adapters": [adapter]}
    found, expected = (
        independent.load_folder(convert_to(base, tmp_path / str(number), **options))
        for number, base in enumerate((mxfp4(source), mxfp4("hf")))
    )
    assert_same(found, expected)


@pytest.mark.parametrize("target", MXFP4_FORMATS)
@pytest.mark.parametrize("source", MXFP4_FORMATS)
def test_experts_without_deltas_stay_packed(source, target, mxfp4, made, tmp_path):
    """Only what the adapter changes is decoded, merged and encoded; attention is merged."""
    case = Case("attention")
    options = {"adapters": [made.adapter(case, torch.bfloat16)]}
    found = independent.load_folder(
        convert_to(mxfp4(source), tmp_path / "out", to=target, **options)
    )
    before = independent.load_folder(mxfp4(target))
    merged = convert_to(mxfp4("hf"), tmp_path / "merged", to="hf", **options)
    expected = independent.load_folder(convert_to(merged, tmp_path / "again", to=target))
    packed = {name for name in before if before[name].dtype is torch.uint8}
    assert len(packed) == 8
    assert_same(found, {**expected, **{name: before[name] for name in packed}})


@pytest.mark.parametrize("source", MXFP4_FORMATS)
@pytest.mark.parametrize("adapter", ["gate_up of one layer", "down"])
def test_experts_with_deltas_are_encoded_anew(adapter, source, mxfp4, made, tmp_path):
    """As MXFP4 of the merged bfloat16; the other parameters of experts keep their bytes."""
    options = {"adapters": [made.adapter(Case(adapter), torch.bfloat16)]}
    found = independent.load_folder(
        convert_to(mxfp4(source), tmp_path / "out", to="hf-mxfp4", **options)
    )
    merged = convert_to(mxfp4("hf"), tmp_path / "merged", to="hf", **options)
    encoded = independent.load_folder(convert_to(merged, tmp_path / "again", to="hf-mxfp4"))
    before = independent.load_folder(mxfp4("hf-mxfp4"))
    part = "layers.1.mlp.experts.gate_up_proj_" if "gate_up" in adapter else ".down_proj_"
    changed = {name for name in before if part in name and before[name].dtype is torch.uint8}
    assert len(changed) == (2 if "gate_up" in adapter else 4)
    assert_same(found, {**before, **{name: encoded[name] for name in changed}})
    assert all(not torch.equal(found[n], before[n]) for n in changed if n.endswith("blocks"))
