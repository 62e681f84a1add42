"""Convert every format to every format; independent code writes sources and reads outputs."""

from __future__ import annotations

import json
import re
import shutil

import independent
import oracle
import peer
import pytest
import torch
from format_pairs import ALWAYS_STORED, FORMATS, MXFP4_FORMATS, PAIRS, VARIANTS
from outputs import same_bits
from runs import (
    Conversion,
    assert_clean_error,
    assert_nothing_half_written,
    assert_resumes,
    convert_command,
    limit_file_size,
    run,
    time_limit,
)
from safetensors.torch import save_file

import gptoss_stream
from gptoss_stream.errors import CheckpointError, OptionError


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_pair(source, target, variant, sources, tmp_path):
    """The tensors are as expected bit for bit, in one shard or one shard each; verify agrees."""
    dtype, _ = VARIANTS[variant]
    folder, model = sources(source, variant)
    kept = "keep" if source not in MXFP4_FORMATS or target in MXFP4_FORMATS else name_of(dtype)
    report = gptoss_stream.convert(folder, tmp_path / "out", to=target, dtype=kept)
    assert report.narrowed == {}
    assert report.unmapped == ()
    if target == "transformer-lens":
        found = independent.load_folder(tmp_path / "out")
        expected = peer.converted(folder.parent / "hf", name_of(dtype))
    else:
        found = independent.READERS[target](tmp_path / "out")
        expected = independent.complete(model) if target in ALWAYS_STORED else model
        if target in ("hf", "hf-mxfp4") and "lm_head.weight" not in expected:
            assert "lm_head.weight" not in independent.load_folder(tmp_path / "out")
            expected = {**expected, "lm_head.weight": expected["model.embed_tokens.weight"]}
    assert set(found) == set(expected)
    values = {n: t.to(found[n].dtype) for n, t in expected.items()}  # dequantised to bfloat16
    assert [n for n in values if not same_bits(found[n], values[n])] == []
    assert all(t.dtype is dtype for n, t in found.items() if "experts" not in n)
    assert gptoss_stream.verify(folder, tmp_path / "out").equal
    gptoss_stream.convert(
        folder, tmp_path / "cut", to=target, dtype=kept, max_shard_size=1, workers=1
    )
    whole, cut = (independent.load_folder(tmp_path / name) for name in ("out", "cut"))
    assert set(whole) == set(cut)
    assert all(torch.equal(whole[n].view(torch.uint8), cut[n].view(torch.uint8)) for n in whole)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("source", "target"), [pair for pair in PAIRS if pair[0] != pair[1] and pair[::-1] in PAIRS]
)
def test_converting_back_restores_the_source(source, target, variant, sources, tmp_path):
    """Bit for bit. Added tensors are only those that the intermediate format always stores."""
    folder, _ = sources(source, variant)
    gptoss_stream.convert(folder, tmp_path / "between", to=target, dtype="keep")
    gptoss_stream.convert(tmp_path / "between", tmp_path / "back", to=source, dtype="keep")
    before, after = (independent.load_folder(f) for f in (folder, tmp_path / "back"))
    ignored = {n for n in before if n.rsplit(".", 1)[1] in BUFFERS}
    assert [n for n in before.keys() - ignored if not torch.equal(before[n], after[n])] == []
    assert all(before[n].dtype is after[n].dtype for n in before.keys() - ignored)
    added = after.keys() - before.keys()
    if target not in ALWAYS_STORED:
        assert added == set()
    assert all(n == "lm_head.weight" or n.endswith("_proj.bias") for n in added)


BUFFERS = ("mask", "IGNORE", "rotary_sin", "rotary_cos")


@pytest.mark.parametrize(
    ("source", "target"), [("transformer-lens", "hf"), ("hf-mxfp4", "openai"), ("hf", "hf-unfused")]
)
def test_an_interrupted_run_of_other_formats_resumes(source, target, checkpoints, tmp_path):
    folder, out = checkpoints(format=source), tmp_path / "out"
    options = ("--to", target)
    whole = Conversion.done(folder, tmp_path / "whole", *options)
    done = run(convert_command(folder, out, *options), preexec_fn=limit_file_size(150_000))
    assert_clean_error(done, 3)
    assert_nothing_half_written(out, whole.whole)
    assert_resumes(folder, out, whole.whole, *options)


@pytest.mark.parametrize("target", MXFP4_FORMATS)
@pytest.mark.parametrize("source", MXFP4_FORMATS)
def test_mxfp4_bytes_are_copied_unchanged(source, target, sources, tmp_path):
    folder, _ = sources(source, "bf16")
    gptoss_stream.convert(folder, tmp_path / "out", to=target)
    before, after = independent.load_folder(folder), independent.load_folder(tmp_path / "out")
    if source != target:
        renamed = {"mlp1_weight.": "experts.gate_up_proj_", "mlp2_weight.": "experts.down_proj_"}
        openai = before if source == "openai" else after
        for old, new in renamed.items():
            for name in [name for name in openai if old in name]:
                openai[name.replace("block.", "model.layers.").replace(old, new)] = openai.pop(name)
    mxfp4 = [name for name in before if name.endswith(("blocks", "scales"))]
    assert len(mxfp4) == 2 * 2 * 2
    assert all(torch.equal(before[name], after[name]) for name in mxfp4)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_the_default_dtype(source, target, sources, tmp_path):
    """It is the source's for its own format and from TransformerLens, else bfloat16; the plan
    counts the tensors that lose precision."""
    plan = gptoss_stream.plan(sources(source, "f32, one expert")[0], to=target)
    kept = source in (target, "transformer-lens")
    assert plan.dtype == ("keep" if kept else "bfloat16")
    if kept:
        assert plan.narrowed == {}
    else:
        dense = [t for shard in plan.shards for t in shard.tensors if t.dtype.code != "U8"]
        assert {t.dtype.code for t in dense} == {"BF16"}
        assert list(plan.narrowed) == ["F32 to BF16"]
        assert 20 < plan.narrowed["F32 to BF16"] <= len(dense)


def test_a_loss_of_precision_is_printed(sources, tmp_path, capsys):
    from gptoss_stream.cli.main import main

    source = str(sources("hf", "f32, one expert")[0])
    for command in ("plan", "convert"):
        assert main([command, source, str(tmp_path / "out"), "--to", "hf-unfused"]) == 0
        assert "\nprecision lost in 37 tensors: F32 to BF16\n" in capsys.readouterr().out
        assert main([command, source, str(tmp_path / "kept"), "--to", "hf"]) == 0
        assert "precision lost" not in capsys.readouterr().out


@pytest.mark.parametrize("target", MXFP4_FORMATS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dtypes_that_mxfp4_formats_do_not_have(target, dtype, sources):
    with pytest.raises(OptionError, match=f"{target} has its experts in MXFP4 and all else in bf"):
        gptoss_stream.plan(sources("openai", "bf16")[0], to=target, dtype=dtype)


def test_several_dtypes_of_the_sources_of_one_tensor(sources, tmp_path):
    """With the dtype kept, the output has the dtype that represents all of them exactly."""
    folder, _ = sources("hf-unfused", "bf16")
    stored = independent.load_folder(folder)
    one = "model.layers.1.mlp.experts.gate_up_projs.1.weight"
    two = "model.layers.0.mlp.experts.down_projs.2.bias"
    stored[one], stored[two] = stored[one].to(torch.float16), stored[two].float() / 3
    config = json.loads((folder / "config.json").read_text())
    source = independent.save(tmp_path / "source", stored, config=config)
    gptoss_stream.convert(source, tmp_path / "out", to="hf", dtype="keep")
    found = independent.load_folder(tmp_path / "out")
    expected = independent.from_unfused({n: t.float() for n, t in stored.items()})
    assert all(torch.equal(found[n].float(), expected[n]) for n in expected)
    wide = {n for n in found if found[n].dtype is torch.float32}
    assert wide == {
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj_bias",
    }
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert gptoss_stream.verify(source, tmp_path / "out").equal


def test_the_singular_spelling_is_read_if_the_format_is_given(sources, tmp_path, capsys):
    """Without the format it is ambiguous: some tools store halves under these names, others
    alternating rows."""
    from gptoss_stream.cli.main import main

    folder, model = sources("hf-unfused", "bf16")
    stored = {
        name.replace("gate_up_projs.", "").replace("down_projs.", "").replace(".linear", ""): t
        for name, t in independent.load_folder(folder).items()
        if "gate_up_projs" not in name and "down_projs" not in name
    }
    for name, tensor in independent.load_folder(folder).items():
        for module in ("gate_up_proj", "down_proj"):
            if f"{module}s." in name:
                prefix, rest = name.split(f"{module}s.")
                number, kind = rest.split(".")
                stored[f"{prefix}{number}.{module}.{kind}"] = tensor
    config = json.loads((folder / "config.json").read_text())
    source = independent.save(tmp_path / "source", stored, config=config)
    with pytest.raises(CheckpointError, match=r"as two halves; .* add --from hf-unfused"):
        gptoss_stream.plan(source, to="hf")
    assert main(["inspect", str(source), "--from", "hf-unfused"]) == 0
    assert "hf-unfused (as asked)" in capsys.readouterr().out
    gptoss_stream.convert(source, tmp_path / "out", to="hf", source_format="hf-unfused")
    found = independent.load_folder(tmp_path / "out")
    assert set(found) == set(model)
    assert all(torch.equal(found[name], model[name]) for name in model)


def test_two_spellings_of_one_tensor_are_refused(sources, tmp_path):
    folder, _ = sources("hf-unfused", "bf16")
    stored = independent.load_folder(folder)
    stored["model.layers.1.mlp.router.bias"] = stored["model.layers.1.mlp.router.linear.bias"] * 2
    config = json.loads((folder / "config.json").read_text())
    source = independent.save(tmp_path / "source", stored, config=config)
    with pytest.raises(CheckpointError, match=r"router.linear.bias' and as .*router.bias'; remove"):
        gptoss_stream.plan(source, to="hf")


def test_experts_of_two_formats_are_refused(sources, tmp_path):
    """transformers would read the stacked experts and ignore the others."""
    folder, model = sources("hf-unfused", "bf16")
    stored = independent.load_folder(folder)
    stored |= {name: tensor for name, tensor in model.items() if "experts" in name}
    config = json.loads((folder / "config.json").read_text())
    source = independent.save(tmp_path / "source", stored, config=config)
    with pytest.raises(CheckpointError, match=r"one of hf-unfused, beside those of hf; remove the"):
        gptoss_stream.plan(source, to="hf")


@pytest.mark.parametrize("variant", ["bf16", "f32, one expert"])
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_verify_without_a_record(source, target, variant, sources, tmp_path):
    """The dtype of the conversion is found in the output's tensors."""
    folder, _ = sources(source, variant)
    gptoss_stream.convert(folder, tmp_path / "out", to=target, dtype="keep")
    (tmp_path / "out/gptoss_stream.json").unlink()
    (difference,) = gptoss_stream.verify(folder, tmp_path / "out", to=target).differences
    assert (difference.kind, difference.name) == ("missing", "gptoss_stream.json")


def test_writing_unfused_experts_prints_a_warning(sources, tmp_path, capsys):
    from gptoss_stream.cli.main import main

    source = str(sources("hf", "bf16")[0])
    assert main(["convert", source, str(tmp_path / "out"), "--to", "hf-unfused"]) == 0
    assert "would leave the experts random" in capsys.readouterr().err


def test_a_stored_head_is_kept(tmp_path):
    """Even if the configuration ties the embeddings, or if the head equals the embedding."""
    source = oracle.save_dense(tmp_path / "source", tie_word_embeddings=True)
    tensors = independent.load_folder(source)
    assert "lm_head.weight" not in tensors
    for head in (tensors["model.embed_tokens.weight"] * 2, tensors["model.embed_tokens.weight"]):
        save_file({**tensors, "lm_head.weight": head.clone()}, source / "model.safetensors")
        out = tmp_path / f"out-{head.abs().sum()}"
        gptoss_stream.convert(source, out, to="hf")
        assert torch.equal(independent.read_hf(out)["lm_head.weight"], head)
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_stored_biases_are_kept(tmp_path):
    """Even if the configuration has no biases."""
    source = oracle.save_dense(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"attention_bias": False}))
    gptoss_stream.convert(source, tmp_path / "out", to="hf")
    found, expected = independent.read_hf(tmp_path / "out"), independent.load_folder(source)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def remove(tensors, name):
    del tensors[name]


def reshape(tensors, name):
    tensors[name] = tensors[name].reshape(*tensors[name].shape, 1)


def widen(tensors, name):
    tensors[name] = tensors[name].double()


def add_layer(tensors, name):
    """Add a tensor of a third layer, which is not in the configuration."""
    tensors[re.sub(r"(layers|blocks?)\.1\.", r"\1.2.", name)] = tensors[name]


NOT_CONVERTED = {
    remove: "1 tensor missing that",
    reshape: "calls for",
    widen: "is F64",
    add_layer: "is of a layer that",
}
ONE_OF = {
    "hf": "model.layers.1.mlp.experts.down_proj",
    "hf-mxfp4": "model.layers.1.mlp.experts.down_proj_scales",
    "hf-unfused": "model.layers.1.mlp.experts.down_projs.0.weight",
    "openai": "block.1.mlp.mlp2_weight.scales",
    "transformer-lens": "blocks.1.mlp.experts.0.W_out.weight",
}


@pytest.mark.parametrize("damage", NOT_CONVERTED)
@pytest.mark.parametrize("source", FORMATS)
def test_tensors_that_do_not_fit_are_named(source, damage, sources, tmp_path):
    folder, _ = sources(source, "bf16")
    stored, name = independent.load_folder(folder), ONE_OF[source]
    if source in MXFP4_FORMATS and damage is widen:
        name = name.replace("_scales", "_bias").replace("weight.scales", "bias")
    damage(stored, name)
    configs = {file.stem: json.loads(file.read_text()) for file in folder.glob("*config.json")}
    damaged = independent.save(tmp_path / "source", stored, **configs)
    with pytest.raises(CheckpointError, match=NOT_CONVERTED[damage]) as refusal:
        gptoss_stream.convert(damaged, tmp_path / "out", to=source)
    named = re.sub(r"\.1\.", ".2.", name, count=1) if damage is add_layer else name
    assert repr(named) in str(refusal.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["hf-unfused", "transformer-lens"])
def test_a_configuration_for_millions_of_tensors_is_refused_at_once(source, sources, tmp_path):
    """For formats that store experts one by one: not each of the 67 million names is looked up."""
    folder = shutil.copytree(sources(source, "bf16")[0], tmp_path / "source")
    file = folder / ("config.json" if source == "hf-unfused" else "tl_config.json")
    names = ("num_hidden_layers", "num_local_experts", "n_layers", "num_experts")
    config = json.loads(file.read_text())
    config |= dict(zip(names, (1024, 65_536) * 2, strict=True))
    config |= {"layer_types": None, "attn_types": ["local"] * 1024}
    file.write_text(json.dumps(config))
    with (
        time_limit(10),
        pytest.raises(CheckpointError, match=r"calls for \d{3},\d{3},\d{3} tensors, and there are"),
    ):
        gptoss_stream.plan(folder, to="hf")
