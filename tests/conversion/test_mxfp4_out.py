"""Floats become MXFP4 on the way: every source, every rule, bit for bit."""

from __future__ import annotations

import json
import shutil

import independent
import mxfp4_oracles
import oracle
import pytest
import torch
from format_pairs import FORMATS, MXFP4_FORMATS, VARIANTS
from runs import assert_clean_error, digests, run_in_process
from safetensors.torch import load_file, save_file

import gptoss_stream
from gptoss_stream.errors import OptionError
from gptoss_stream.tensors.mxfp4_rules import RULES

DENSE = [name for name in FORMATS if name not in MXFP4_FORMATS]
EXPERTS = ("gate_up_proj", "down_proj")


def stored_as_hf_mxfp4(folder, target: str) -> independent.Tensors:
    found = independent.load_folder(folder)
    if target == "openai":
        return independent.from_openai(found, json.loads((folder / "config.json").read_text()))
    return found


def shard_of(folder) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("target", MXFP4_FORMATS)
@pytest.mark.parametrize("source", DENSE)
def test_every_source_and_rule(source, target, rule, sources, tmp_path):
    """The bytes are those of a plain reference, whatever the source's order of axes."""
    folder, model = sources(source, "bf16")
    gptoss_stream.convert(folder, tmp_path / "out", to=target, mxfp4_rule=rule)
    found = stored_as_hf_mxfp4(tmp_path / "out", target)
    expected = mxfp4_oracles.encoded(model, rule)
    if target == "openai":
        expected = {**{n: t for n, t in independent.complete(model).items()
                       if not n.endswith(EXPERTS)}, **expected}  # fmt: skip
    assert set(found) == set(expected)
    assert [n for n in expected if not torch.equal(found[n], expected[n])] == []
    assert gptoss_stream.verify(folder, tmp_path / "out").equal


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("source", DENSE)
def test_other_dtypes_and_shapes(source, variant, sources, tmp_path, monkeypatch):
    """float32 is rounded to bfloat16 first. Chunks cut rows; blocks and scales stay together."""
    folder, model = sources(source, variant)
    gptoss_stream.convert(folder, tmp_path / "out", to="hf-mxfp4")
    found = independent.load_folder(tmp_path / "out")
    expected = {n: t for n, t in mxfp4_oracles.encoded(model, "openai").items() if n in found}
    assert {n for n in expected if n.endswith(("_blocks", "_scales"))}
    assert set(found) - set(expected) <= {"lm_head.weight", *independent.complete(model)}
    assert [n for n in expected if not torch.equal(found[n], expected[n])] == []
    for number, chunk in enumerate((4096, 12_288)):
        monkeypatch.setattr("gptoss_stream.writing.executor.CHUNK_NBYTES", chunk)
        out = tmp_path / str(chunk)
        gptoss_stream.convert(folder, out, to="hf-mxfp4", max_shard_size=1, workers=3 - number)
        cut = independent.load_folder(out)
        assert all(torch.equal(cut[name], found[name]) for name in found)
        shards = shard_of(out)
        for name in expected:
            if name.endswith("_blocks"):
                assert shards[name] == shards[name.replace("_blocks", "_scales")]
        pairs = sum(name.endswith("_blocks") for name in expected)
        assert len(set(shards.values())) == len(found) - pairs
        for module in ("data", "verify"):
            monkeypatch.setattr(f"gptoss_stream.verification.{module}.CHUNK_NBYTES", chunk)
        assert gptoss_stream.verify(folder, out).equal


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint in MXFP4, with many blocks of small codes only."""
    folder = tmp_path_factory.mktemp("base") / "base"
    oracle.save_mxfp4(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_blocks"):
            tensor[:, ::2] &= 0xBB  # codes 0 to 3 of either sign, so that other scales fit too
            tensor[:, 0] = 0x80
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("between", DENSE)
def test_back_and_forth(base, between, tmp_path):
    """Without a reference the values come back, with it the bytes; in either format for it."""
    gptoss_stream.convert(base, tmp_path / "floats", to=between)
    report = gptoss_stream.convert(tmp_path / "floats", tmp_path / "values", to="hf-mxfp4")
    gptoss_stream.convert(base, tmp_path / "openai", to="openai")
    first, again = (independent.load_folder(f) for f in (base, tmp_path / "values"))
    changed = {n for n in first if not torch.equal(first[n], again[n])}
    assert changed
    assert changed <= {n for n in first if n.endswith(("_blocks", "_scales"))}
    before, after = independent.dequantised(first), independent.dequantised(again)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert report.mxfp4["total"]["relative_error"] == report.mxfp4["total"]["flushed"] == 0
    for name, reference in (("kept", base), ("kept2", tmp_path / "openai")):
        out = tmp_path / name
        report = gptoss_stream.convert(
            tmp_path / "floats", out, to="hf-mxfp4", reference=reference, max_shard_size="100KB"
        )
        kept = independent.load_folder(out)
        assert all(torch.equal(first[n], kept[n]) for n in first)
        total = report.mxfp4["total"]
        assert total["blocks_kept"] == total["blocks"] > 0
        assert gptoss_stream.verify(tmp_path / "floats", out).equal


def test_trained_blocks_are_encoded_and_the_others_kept(base, tmp_path, monkeypatch):
    """Zeros count as equal whatever their sign, as programs add 0 to weights."""
    gptoss_stream.convert(base, tmp_path / "floats", to="hf")
    file = tmp_path / "floats/model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    for other in tensors:
        if other.endswith(EXPERTS):
            tensors[other] += 0.0  # -0 becomes 0
    tensors[name][1, 32:64, 3] += 1.0  # the second block of row 3 of expert 1
    save_file(tensors, file, {"format": "pt"})
    monkeypatch.setattr("gptoss_stream.writing.executor.CHUNK_NBYTES", 4096)
    monkeypatch.setattr("gptoss_stream.transforms.encode._REFERENCE_NBYTES", 500)
    monkeypatch.setattr("gptoss_stream.transforms.encode._COMPARED_ROWS", 3)
    report = gptoss_stream.convert(
        tmp_path / "floats", tmp_path / "out", to="hf-mxfp4", reference=base
    )
    first, found = independent.load_folder(base), independent.load_folder(tmp_path / "out")
    assert {n for n in first if not torch.equal(first[n], found[n])} == {
        f"{name}_blocks", f"{name}_scales"
    }  # fmt: skip
    differs = (first[f"{name}_blocks"] != found[f"{name}_blocks"]).any(-1).nonzero()
    assert differs.tolist() == [[1, 3, 1]]
    expected = mxfp4_oracles.encoded({name: tensors[name]}, "openai")
    assert torch.equal(expected[f"{name}_blocks"][1, 3, 1], found[f"{name}_blocks"][1, 3, 1])
    assert torch.equal(expected[f"{name}_scales"][1, 3, 1], found[f"{name}_scales"][1, 3, 1])
    per_tensor = report.mxfp4["tensors"]
    assert {n: t["blocks_encoded"] for n, t in per_tensor.items() if t["blocks_encoded"]} == {
        f"{name}_blocks": 1
    }
    assert gptoss_stream.verify(tmp_path / "floats", tmp_path / "out").equal


def test_a_nan_scale_of_the_reference_is_not_kept(base, tmp_path):
    """A block of zeros with the scale NaN looks as if it had the values of zeros."""
    gptoss_stream.convert(base, tmp_path / "floats", to="hf")
    damaged = shutil.copytree(base, tmp_path / "damaged")
    tensors = load_file(damaged / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj_scales"
    assert int(tensors[name.replace("scales", "blocks")][0, 0, 0].max()) & 0x77 == 0
    tensors[name][0, 0, 0] = 255
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    gptoss_stream.convert(tmp_path / "floats", tmp_path / "out", to="hf-mxfp4", reference=damaged)
    assert int(independent.load_folder(tmp_path / "out")[name][0, 0, 0]) == 0


@pytest.mark.parametrize("rule", RULES)
def test_what_is_lost_is_reported(rule, sources, tmp_path):
    """Per tensor and in all, as computed from the output."""
    folder, model = sources("hf", "f32, tied")
    report = gptoss_stream.convert(folder, tmp_path / "out", to="hf-mxfp4", mxfp4_rule=rule)
    found = independent.dequantised(independent.load_folder(tmp_path / "out"))
    errors, norms, values, flushed = 0.0, 0.0, 0, 0
    names = [n for n in model if n.endswith(EXPERTS)]
    for name in names:
        exact, got = model[name].to(torch.bfloat16).double(), found[name].double()
        error, norm = float(((exact - got) ** 2).sum()), float((exact**2).sum())
        zeroed = int(((exact != 0) & (got == 0)).sum())
        one = report.mxfp4["tensors"][f"{name}_blocks"]
        assert one["relative_error"] == pytest.approx((error / norm) ** 0.5, rel=1e-5)
        assert one["flushed"] == zeroed / exact.numel()
        assert one["blocks"] == exact.numel() // 32
        errors, norms = errors + error, norms + norm
        values, flushed = values + exact.numel(), flushed + zeroed
    total = report.mxfp4["total"]
    assert total["relative_error"] == pytest.approx((errors / norms) ** 0.5, rel=1e-5)
    assert total["flushed"] == flushed / values > 0
    assert (total["clipped"] > 0) == (rule in ("ocp", "even"))
    assert json.loads((tmp_path / "out/mxfp4_encoding.json").read_text()) == report.mxfp4
    again = gptoss_stream.convert(folder, tmp_path / "out", to="hf-mxfp4", mxfp4_rule=rule)
    assert again.mxfp4 == report.mxfp4


def test_large_tensors_are_measured_on_some_rows(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr("gptoss_stream.tensors.encoding_loss._MEASURED_ROWS", 16)
    monkeypatch.setattr("gptoss_stream.tensors.encoding_loss._MEASURED_STEP", 4)
    monkeypatch.setattr("gptoss_stream.tensors.encoding_loss._MEASURED_RUN", 5)
    source = checkpoints(layers=1, format="hf")
    tensors = independent.load_folder(source)
    for name in tensors:
        if name.endswith(EXPERTS):
            tensors[name] = torch.randn(tensors[name].shape).to(torch.bfloat16)
    config = json.loads((source / "config.json").read_text())
    folder = independent.save(tmp_path / "source", tensors, config=config)
    report = gptoss_stream.convert(folder, tmp_path / "out", to="hf-mxfp4")
    found = independent.dequantised(independent.load_folder(tmp_path / "out"))
    for name, one in report.mxfp4["tensors"].items():
        exact = tensors[name.removesuffix("_blocks")].double()
        error = (exact - found[name.removesuffix("_blocks")].double()).norm() / exact.norm()
        assert one["relative_error"] == pytest.approx(float(error), rel=0.05)
        assert one["relative_error"] != pytest.approx(float(error), rel=1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("source", DENSE)
def test_what_mxfp4_cannot_hold_is_refused(value, source, sources, tmp_path):
    """Naming the tensor; nothing looks finished."""
    folder = shutil.copytree(sources(source, "bf16")[0], tmp_path / "source")
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    names = [n for n in sorted(tensors) if tensors[n].dim() > 1]
    name = next(n for n in names if "down_proj" in n or "W_out.weight" in n)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file, {"format": "pt"})
    done = run_in_process("convert", folder, tmp_path / "out", "--to", "hf-mxfp4", "--quiet")
    assert_clean_error(done, 2)
    assert name in done.stderr
    assert file.name in done.stderr
    assert "NaN" in done.stderr
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_options_without_an_effect_are_refused(base, sources, tmp_path):
    dense, _ = sources("hf", "bf16")
    for source, to, options, word in (
        (base, "openai", {"mxfp4_rule": "ocp"}, "already"),
        (base, "hf-mxfp4", {"reference": base}, "already"),
        (dense, "hf", {"mxfp4_rule": "openai"}, "no MXFP4"),
        (dense, "transformer-lens", {"reference": base}, "no MXFP4"),
        (dense, "hf-mxfp4", {"mxfp4_rule": "nearest"}, "choose one of openai"),
        (dense, "hf-mxfp4", {"reference": dense}, "without MXFP4"),
        (dense, "hf-mxfp4", {"dtype": "float32"}, "choose bfloat16"),
    ):
        with pytest.raises(OptionError, match=word):
            gptoss_stream.convert(source, tmp_path / "out", to=to, **options)
        assert not (tmp_path / "out").exists()


def test_a_reference_of_another_size_is_refused(base, checkpoints, tmp_path):
    with pytest.raises(OptionError, match="the source has"):
        gptoss_stream.plan(checkpoints(format="hf"), to="hf-mxfp4", reference=base)


def test_rows_that_do_not_divide_into_blocks_are_refused(tmp_path):
    folder = oracle.save_dense(tmp_path / "source", hidden_size=80)
    with pytest.raises(OptionError, match="80 values"):
        gptoss_stream.convert(folder, tmp_path / "out", to="hf-mxfp4")


def test_another_rule_or_reference_is_another_run(base, tmp_path):
    """It does not resume, and verify takes what is recorded or what it is told."""
    gptoss_stream.convert(base, tmp_path / "floats", to="hf")
    floats, out = tmp_path / "floats", tmp_path / "out"
    gptoss_stream.convert(floats, out, to="hf-mxfp4", mxfp4_rule="modelopt")
    for options in ((), ("--mxfp4-rule", "modelopt", "--reference", base)):
        done = run_in_process("convert", floats, out, "--to", "hf-mxfp4", *options)
        assert_clean_error(done, 2)
        assert "mxfp4_rule" in done.stderr or "reference" in done.stderr
    assert gptoss_stream.verify(floats, out).equal
    assert not gptoss_stream.verify(floats, out, mxfp4_rule="ocp").equal
    before = digests(out)
    gptoss_stream.convert(floats, out, to="hf-mxfp4", mxfp4_rule="modelopt")
    assert digests(out) == before


def test_logits_before_and_after(base, tmp_path):
    """transformers computes the same of the original, of the floats and of what is written back."""
    gptoss_stream.convert(base, tmp_path / "floats", to="hf")
    gptoss_stream.convert(tmp_path / "floats", tmp_path / "back", to="hf-mxfp4")
    tokens = torch.arange(1, 12)[None]
    with torch.no_grad():
        original, floats, back = (
            oracle.load_model(folder)(tokens).logits  # MXFP4 is dequantized by transformers
            for folder in (base, tmp_path / "floats", tmp_path / "back")
        )
    assert torch.isfinite(original).all()
    assert torch.equal(original, floats)
    assert torch.equal(original, back)
