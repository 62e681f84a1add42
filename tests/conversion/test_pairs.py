"""Every format to every format, against writers and readers that are not this package's."""

from __future__ import annotations

import json
import re
import shutil

import independent
import oracle
import peer
import pytest
import torch
from outputs import same_bits
from runs import (
    Conversion,
    assert_clean_error,
    assert_nothing_half_written,
    assert_resumes,
    convert_command,
    digests,
    limit_file_size,
    run,
    time_limit,
)
from safetensors.torch import save_file

import gptoss_stream
from gptoss_stream.errors import CheckpointError, OptionError

FORMATS = gptoss_stream.formats.names()
PACKED = ("hf-mxfp4", "openai")
ALWAYS_STORED = ("openai", "transformer-lens")  # heads and biases
PAIRS = [(a, b) for a in FORMATS for b in FORMATS if b not in PACKED or a in PACKED]

# Of each size another number but for the last: one expert, one key/value head, nh * hd = H.
VARIANTS = {
    "bf16": (torch.bfloat16, {}),
    "f32, one expert": (torch.float32, {"num_local_experts": 1, "num_experts_per_tok": 1}),
    "bf16, tied, no biases": (
        torch.bfloat16,
        {"tie_word_embeddings": True, "attention_bias": False},
    ),
    "f32, tied": (torch.float32, {"tie_word_embeddings": True}),
    "bf16, no biases, H = I = nh * hd": (
        torch.bfloat16,
        {"attention_bias": False, "hidden_size": 96, "num_key_value_heads": 1},
    ),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Give the folder of a random model in a format, and the model; made once each."""
    made = {}

    def source(name, variant):
        if (name, variant) not in made:
            dtype, settings = VARIANTS[variant]
            folder = tmp_path_factory.mktemp("source")
            made[name, variant] = independent.write_source(name, folder, dtype, **settings)
        return made[name, variant]

    return source


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_pair(source, target, variant, sources, tmp_path):
    """Bit for bit, whole and in shards of their own; verify finds nothing."""
    dtype, _ = VARIANTS[variant]
    folder, model = sources(source, variant)
    kept = "keep" if source not in PACKED or target in PACKED else name_of(dtype)
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
    values = {n: t.to(found[n].dtype) for n, t in expected.items()}  # MXFP4 is bfloat16 here
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
def test_there_and_back(source, target, variant, sources, tmp_path):
    """The source's own bits, and what the format in between always stores in addition."""
    folder, _ = sources(source, variant)
    gptoss_stream.convert(folder, tmp_path / "there", to=target, dtype="keep")
    gptoss_stream.convert(tmp_path / "there", tmp_path / "back", to=source, dtype="keep")
    before, after = (independent.load_folder(f) for f in (folder, tmp_path / "back"))
    ignored = {n for n in before if n.rsplit(".", 1)[1] in BUFFERS}
    assert [n for n in before.keys() - ignored if not torch.equal(before[n], after[n])] == []
    assert all(before[n].dtype is after[n].dtype for n in before.keys() - ignored)
    added = after.keys() - before.keys()
    if target not in ALWAYS_STORED:
        assert added == set()
    assert all(n == "lm_head.weight" or n.endswith("_proj.bias") for n in added)


BUFFERS = ("mask", "IGNORE", "rotary_sin", "rotary_cos")


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_pair_in_pieces_of_any_size(source, target, checkpoints, tmp_path, monkeypatch):
    """The bytes depend neither on chunks nor threads, nor on whether a transposition is spilled,
    also if the dtype changes."""
    folder = checkpoints(format=source, layers=2)
    dtypes = ["keep"] if target in PACKED else ["keep", "float32"]
    for dtype in dtypes:
        options = {"to": target, "dtype": dtype, "max_shard_size": "300KB"}
        gptoss_stream.convert(folder, tmp_path / f"{dtype}-whole", **options)
        expected = digests(tmp_path / f"{dtype}-whole")
        for workers, chunk, spilled in ((1, 4096, 1000), (3, 12_288, 1000), (2, 1 << 17, 10**8)):
            with monkeypatch.context() as patch:
                patch.setattr("gptoss_stream.writing.executor.CHUNK_NBYTES", chunk)
                low = workers == 3
                patch.setattr(
                    "gptoss_stream.writing.spill_file.is_memory_low", lambda nbytes, low=low: low
                )
                patch.setattr("gptoss_stream.planning.shards.SPILL_NBYTES", spilled)
                out = tmp_path / f"{dtype}-{workers}"
                gptoss_stream.convert(folder, out, workers=workers, **options)
                assert digests(out) == expected
                assert gptoss_stream.verify(folder, out).equal


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_only_the_vocabulary_is_spilled(source, target, sources, monkeypatch):
    """Experts never are, however large; and the vocabulary only where it is transposed."""
    monkeypatch.setattr("gptoss_stream.planning.shards.SPILL_NBYTES", 0)
    for variant in ("bf16", "f32, one expert"):
        shards = gptoss_stream.plan(sources(source, variant)[0], to=target).shards
        spilled = {segment for shard in shards for segment, _ in shard.spilled()}
        names = [t.name for shard in shards for t in shard.tensors if spilled & {*t.segments}]
        transposed = {"transformer-lens": "unembed.W_U", "openai": "unembedding.weight"}
        head = transposed.get(target, "lm_head.weight")
        is_turned = (source == "transformer-lens") != (target == "transformer-lens")
        assert names == ([head] if is_turned else [])


@pytest.mark.parametrize(
    ("source", "target"), [("transformer-lens", "hf"), ("hf-mxfp4", "openai"), ("hf", "hf-unfused")]
)
def test_an_interrupted_run_of_other_formats_goes_on(source, target, checkpoints, tmp_path):
    folder, out = checkpoints(format=source), tmp_path / "out"
    options = ("--to", target)
    whole = Conversion.done(folder, tmp_path / "whole", *options)
    done = run(convert_command(folder, out, *options), preexec_fn=limit_file_size(150_000))
    assert_clean_error(done, 3)
    assert_nothing_half_written(out, whole.whole)
    assert_resumes(folder, out, whole.whole, *options)


@pytest.mark.parametrize("target", PACKED)
@pytest.mark.parametrize("source", PACKED)
def test_packed_bytes_are_moved_unchanged(source, target, sources, tmp_path):
    folder, _ = sources(source, "bf16")
    gptoss_stream.convert(folder, tmp_path / "out", to=target)
    before, after = independent.load_folder(folder), independent.load_folder(tmp_path / "out")
    if source != target:
        renamed = {"mlp1_weight.": "experts.gate_up_proj_", "mlp2_weight.": "experts.down_proj_"}
        openai = before if source == "openai" else after
        for old, new in renamed.items():
            for name in [name for name in openai if old in name]:
                openai[name.replace("block.", "model.layers.").replace(old, new)] = openai.pop(name)
    packed = [name for name in before if name.endswith(("blocks", "scales"))]
    assert len(packed) == 2 * 2 * 2
    assert all(torch.equal(before[name], after[name]) for name in packed)


@pytest.mark.parametrize("target", PACKED)
@pytest.mark.parametrize("source", [name for name in FORMATS if name not in PACKED])
def test_floats_are_not_quantised(source, target, sources, tmp_path):
    with pytest.raises(
        OptionError, match=f"{source} to {target}: .* not quantized by this version"
    ):
        gptoss_stream.convert(sources(source, "bf16")[0], tmp_path / "out", to=target)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_the_dtype_that_is_not_asked_for(source, target, sources, tmp_path):
    """The source's own to itself and from TransformerLens, else bfloat16, and what is narrowed is
    said."""
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


def test_a_narrowing_is_said(sources, tmp_path, capsys):
    from gptoss_stream.cli.main import main

    source = str(sources("hf", "f32, one expert")[0])
    for command in ("plan", "convert"):
        assert main([command, source, str(tmp_path / "out"), "--to", "hf-unfused"]) == 0
        assert "\nprecision lost in 37 tensors: F32 to BF16\n" in capsys.readouterr().out
        assert main([command, source, str(tmp_path / "kept"), "--to", "hf"]) == 0
        assert "precision lost" not in capsys.readouterr().out


@pytest.mark.parametrize("target", PACKED)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dtypes_that_a_packed_target_has_not(target, dtype, sources):
    with pytest.raises(OptionError, match=f"{target} has its experts in MXFP4 and all else in bf"):
        gptoss_stream.plan(sources("openai", "bf16")[0], to=target, dtype=dtype)


def test_dtypes_of_several_sources_of_one_tensor(sources, tmp_path):
    """Kept, they become the one that holds all of them exactly."""
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


def test_the_singular_spelling_is_read_where_it_is_told(sources, tmp_path, capsys):
    """Some write halves under these names, others rows in turn."""
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
    """transformers would read the stacked ones, and leave the others."""
    folder, model = sources("hf-unfused", "bf16")
    stored = independent.load_folder(folder)
    stored |= {name: tensor for name, tensor in model.items() if "experts" in name}
    config = json.loads((folder / "config.json").read_text())
    source = independent.save(tmp_path / "source", stored, config=config)
    with pytest.raises(CheckpointError, match=r"one of hf, beside those of hf-unfused; remove the"):
        gptoss_stream.plan(source, to="hf")


@pytest.mark.parametrize("variant", ["bf16", "f32, one expert"])
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_verify_without_a_record(source, target, variant, sources, tmp_path):
    """The tensors say which dtype they were made in."""
    folder, _ = sources(source, variant)
    gptoss_stream.convert(folder, tmp_path / "out", to=target, dtype="keep")
    (tmp_path / "out/gptoss_stream.json").unlink()
    (difference,) = gptoss_stream.verify(folder, tmp_path / "out", to=target).differences
    assert (difference.kind, difference.name) == ("missing", "gptoss_stream.json")


def test_who_writes_unfused_experts_is_warned(sources, tmp_path, capsys):
    from gptoss_stream.cli.main import main

    source = str(sources("hf", "bf16")[0])
    assert main(["convert", source, str(tmp_path / "out"), "--to", "hf-unfused"]) == 0
    assert "would leave the experts random" in capsys.readouterr().err


def test_a_stored_head_counts(tmp_path):
    """Whatever the configuration says; by names alone, so also where it equals the embedding."""
    source = oracle.save_dense(tmp_path / "source", tie_word_embeddings=True)
    tensors = independent.load_folder(source)
    assert "lm_head.weight" not in tensors
    for head in (tensors["model.embed_tokens.weight"] * 2, tensors["model.embed_tokens.weight"]):
        save_file({**tensors, "lm_head.weight": head.clone()}, source / "model.safetensors")
        out = tmp_path / f"out-{head.abs().sum()}"
        gptoss_stream.convert(source, out, to="hf")
        assert torch.equal(independent.read_hf(out)["lm_head.weight"], head)
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_stored_biases_count(tmp_path):
    source = oracle.save_dense(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"attention_bias": False}))
    gptoss_stream.convert(source, tmp_path / "out", to="hf")
    found, wanted = independent.read_hf(tmp_path / "out"), independent.load_folder(source)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def lose(tensors, name):
    del tensors[name]


def turn(tensors, name):
    tensors[name] = tensors[name].reshape(*tensors[name].shape, 1)


def widen(tensors, name):
    tensors[name] = tensors[name].double()


def beyond(tensors, name):
    """A tensor of a third layer, of which the configuration knows nothing."""
    tensors[re.sub(r"(layers|blocks?)\.1\.", r"\1.2.", name)] = tensors[name]


NOT_CONVERTED = {
    lose: "1 tensor missing that",
    turn: "calls for",
    widen: "is F64",
    beyond: "is of a layer that",
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
    if source in PACKED and damage is widen:
        name = name.replace("_scales", "_bias").replace("weight.scales", "bias")
    damage(stored, name)
    configs = {file.stem: json.loads(file.read_text()) for file in folder.glob("*config.json")}
    damaged = independent.save(tmp_path / "source", stored, **configs)
    with pytest.raises(CheckpointError, match=NOT_CONVERTED[damage]) as refusal:
        gptoss_stream.convert(damaged, tmp_path / "out", to=source)
    word = re.sub(r"\.1\.", ".2.", name, count=1) if damage is beyond else name
    assert repr(word) in str(refusal.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["hf-unfused", "transformer-lens"])
def test_a_configuration_for_millions_of_tensors_is_refused_at_once(source, sources, tmp_path):
    """Of a source that stores experts one by one; nothing is looked for 67 million times."""
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
