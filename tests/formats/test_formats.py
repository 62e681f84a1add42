"""The released formats to those that are loaded, in every dtype, against the oracle and each other.

Every pair of formats: `test_pairs`.
"""

from __future__ import annotations

import json
import re
import shutil
import sys

import oracle
import pytest
import torch
from outputs import load_output, same_bits
from runs import ROOT, digests
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import gptoss_stream
from gptoss_stream.cli.main import main
from gptoss_stream.errors import CheckpointError, OptionError

FORMATS = ("hf-mxfp4", "hf", "openai")
TARGETS = ("hf", "transformer-lens")
DTYPES = ("bfloat16", "float16", "float32")
# Shapes that break a symmetry; the last has its fused q, k and v in shards of their own.
SHAPES = {
    "tiny": {},
    "one expert": {"experts": 1, "layers": 1},
    "I > H": {"hidden_size": 32, "intermediate_size": 96, "layers": 2, "experts": 7},
    "I = H": {"hidden_size": 64, "intermediate_size": 64, "layers": 1},
    "every raw tensor in a shard of its own": {"max_shard_size": 1, "layers": 1},
}


@pytest.fixture(scope="module")
def expected():
    """What the peer makes of a checkpoint, for each target; made once each."""
    made = {}

    def of(source, target) -> dict[str, torch.Tensor]:
        if (source, target) not in made:
            tensors = (
                oracle.load_model(source).state_dict()
                if target == "hf"
                else oracle.state_dict(source)
            )
            made[source, target] = {name: t.detach() for name, t in tensors.items()}
        return made[source, target]

    return of


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("target", TARGETS)
def test_every_source_gives_the_peers_tensors(target, shape, checkpoints, expected, tmp_path):
    """In bfloat16, bit for bit, and all three files byte for byte."""
    outputs = []
    for source in FORMATS:
        out = tmp_path / source
        gptoss_stream.convert(checkpoints(format=source, **shape), out, to=target)
        outputs.append({n: d for n, d in digests(out).items() if n.endswith(".safetensors")})
    assert outputs[1:] == outputs[:1] * 2
    found, wanted = load_output(out), expected(checkpoints(format="hf-mxfp4", **shape), target)
    assert set(found) == set(wanted)
    assert [name for name in wanted if not same_bits(found[name], wanted[name])] == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", FORMATS)
def test_every_dtype(source, target, dtype, checkpoints, expected, tmp_path):
    gptoss_stream.convert(checkpoints(format=source), tmp_path / "out", to=target, dtype=dtype)
    found, wanted = load_output(tmp_path / "out"), expected(checkpoints(), target)
    assert set(found) == set(wanted)
    cast = {name: tensor.to(getattr(torch, dtype)) for name, tensor in wanted.items()}
    assert [name for name in cast if not same_bits(found[name], cast[name])] == []
    assert gptoss_stream.verify(checkpoints(format=source), tmp_path / "out").equal


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
@pytest.mark.parametrize("target", TARGETS)
def test_unquantised_checkpoints_of_other_dtypes(target, stored, checkpoints, tmp_path):
    """Their own bits where the dtype is kept, and the cast's where it is not."""
    source = shutil.copytree(checkpoints(format="hf", layers=2), tmp_path / "source")
    tensors = {
        name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3)).to(stored)
        for name, tensor in load_file(source / "model.safetensors").items()
    }
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    for dtype in DTYPES:
        out = tmp_path / f"{dtype}"
        gptoss_stream.convert(source, out, to=target, dtype=dtype)
        found = load_output(out)
        if target == "hf":
            assert set(found) == set(tensors)
            for name, tensor in tensors.items():
                assert same_bits(found[name], tensor.to(getattr(torch, dtype)))
        else:
            raw = tensors["model.layers.1.mlp.experts.gate_up_proj"][2].to(getattr(torch, dtype))
            assert same_bits(found["blocks.1.mlp.experts.2.W_in.weight"], raw.T[1::2])
            raw = tensors["model.layers.1.mlp.experts.down_proj"][4].to(getattr(torch, dtype))
            assert same_bits(found["blocks.1.mlp.experts.4.W_out.weight"], raw.T)
        assert gptoss_stream.verify(source, out).equal


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_what_the_model_lacks_the_hf_format_lacks(bias, tied, tmp_path):
    """Attention biases, and the output embedding where the input's serves."""
    source = oracle.make_packed(tmp_path / "source", attention_bias=bias, tie_word_embeddings=tied)
    gptoss_stream.convert(source, tmp_path / "out", to="hf")
    found = load_output(tmp_path / "out")
    assert ("model.layers.0.self_attn.q_proj.bias" in found) == bias
    assert ("lm_head.weight" in found) != tied
    wanted = oracle.load_model(source).state_dict()
    assert set(wanted) - set(found) == ({"lm_head.weight"} if tied else set())
    assert [name for name in found if not same_bits(found[name], wanted[name])] == []
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert [name for name in wanted if not same_bits(again[name], wanted[name])] == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("source", FORMATS)
def test_transformers_computes_the_same_logits(source, dtype, checkpoints, tmp_path):
    """Bit for bit, over more tokens than the sliding window holds, of the model as it is loaded
    without a word about how."""
    gptoss_stream.convert(checkpoints(format=source), tmp_path / "out", to="hf", dtype=dtype)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert model.dtype is getattr(torch, dtype)
    tokens = torch.arange(40)[None] * 25 % 1009
    peer = oracle.load_model(checkpoints(), getattr(torch, dtype))
    with torch.no_grad():
        found, wanted = model(tokens).logits, peer(tokens).logits
    assert found.std() > 0
    assert torch.equal(found, wanted)


def test_configurations_of_both_origins_mean_the_same(checkpoints, tmp_path):
    """OpenAI's has other names and leaves much out; the one made of it is complete."""
    configs = {}
    for source in FORMATS:
        gptoss_stream.convert(checkpoints(format=source), tmp_path / source, to="hf")
        text = json.loads((tmp_path / source / "config.json").read_text())
        assert "quantization_config" not in text
        assert text["torch_dtype"] == text["dtype"] == "bfloat16"
        configs[source] = AutoConfig.from_pretrained(tmp_path / source).to_dict()
        configs[source].pop("_name_or_path", None)
    assert configs["openai"] == configs["hf-mxfp4"] == configs["hf"]
    original = AutoConfig.from_pretrained(checkpoints()).to_dict()
    for config in (original, configs["openai"]):
        for key in ("quantization_config", "_name_or_path", "dtype", "torch_dtype"):
            config.pop(key, None)
    assert configs["openai"] == original


def test_hooked_configurations_of_both_origins_are_the_same(checkpoints, tmp_path):
    texts = set()
    for source in FORMATS:
        gptoss_stream.convert(checkpoints(format=source), tmp_path / source)
        texts.add((tmp_path / source / "tl_config.json").read_text())
    assert len(texts) == 1


def test_a_folder_with_both_formats_is_the_one_that_is_named(checkpoints, tmp_path):
    """As released: the top level in Hugging Face's format, `original/` in OpenAI's; here with an
    index, without one, and in one file."""
    repository = shutil.copytree(checkpoints(), tmp_path / "repository")
    for options in ({}, {"max_shard_size": "200KB"}):
        shutil.rmtree(repository / "original", ignore_errors=True)
        shutil.copytree(checkpoints(format="openai", **options), repository / "original")
        for index in (True, False):
            if not index:
                (repository / "original/model.safetensors.index.json").unlink()
            top, original = (
                gptoss_stream.plan(repository),
                gptoss_stream.plan(repository / "original"),
            )
            assert (top.source_format, original.source_format) == ("hf-mxfp4", "openai")
            assert original.num_tensors == top.num_tensors
    gptoss_stream.convert(repository, tmp_path / "top")
    gptoss_stream.convert(repository / "original", tmp_path / "original")
    assert (tmp_path / "top/model.safetensors").read_bytes() == (
        tmp_path / "original/model.safetensors"
    ).read_bytes()


def test_the_format_can_be_told(checkpoints, tmp_path):
    """A copy whose config.json has lost its quantisation is not guessed at."""
    source = shutil.copytree(checkpoints(layers=1), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="add --from hf-mxfp4"):
        gptoss_stream.plan(source)
    assert gptoss_stream.plan(source, source_format="hf-mxfp4").source_format == "hf-mxfp4"
    with pytest.raises(CheckpointError, match=r"'model.layers.0.mlp.experts.gate_up_proj'"):
        gptoss_stream.plan(source, source_format="hf")
    with pytest.raises(OptionError, match="unknown format 'x'; choose one of hf, hf-mxfp4, "):
        gptoss_stream.plan(source, source_format="x")


@pytest.mark.parametrize("experts", [7, 19, 23])
def test_pruned_models(experts, checkpoints):
    for source in FORMATS:
        plan = gptoss_stream.plan(checkpoints(format=source, experts=experts, layers=1))
        assert plan.model.num_experts == experts


README = (ROOT / "README.md").read_text()
(HALVES,) = re.findall(r"<!-- format -->\n```python\n(.*?)```\n<!-- end -->", README, re.DOTALL)


@pytest.fixture
def add_format(tmp_path, monkeypatch):
    """Add a format by its one file, and give its name."""
    (tmp_path / "formats").mkdir()
    folders = [*gptoss_stream.formats.__path__, str(tmp_path / "formats")]
    monkeypatch.setattr(gptoss_stream.formats, "__path__", folders)
    names = []

    def add(name, code):
        (tmp_path / f"formats/{name}.py").write_text(code)
        names.append(name)
        return name

    yield add
    for name in names:
        sys.modules.pop(f"gptoss_stream.formats.{name}", None)


@pytest.fixture
def halves(add_format):
    """The format that the README adds."""
    return add_format("halves", HALVES)


def as_halves(tensors):
    """Hugging Face's tensors as that format stores them."""
    out = {}
    for name, tensor in tensors.items():
        if name.endswith("gate_up_proj"):
            halves = tensor.transpose(1, 2)
            out[name.replace("gate_up_proj", "w13")] = torch.cat(
                [halves[:, 0::2], halves[:, 1::2]], 1
            )
        elif name.endswith("gate_up_proj_bias"):
            out[name.replace("gate_up_proj", "w13")] = torch.cat(
                [tensor[:, 0::2], tensor[:, 1::2]], 1
            )
        elif name.endswith("down_proj"):
            out[name.replace("down_proj", "w2")] = tensor.transpose(1, 2).contiguous()
        else:
            out[name.replace("down_proj", "w2")] = tensor
    return out


@pytest.mark.parametrize("other", gptoss_stream.formats.names())
def test_a_format_is_added_as_the_readme_says(other, halves, checkpoints, expected, tmp_path):
    """By its one file it is read and written, from and to all others."""
    assert halves in gptoss_stream.formats.names()
    source = checkpoints(format=other)
    gptoss_stream.convert(source, tmp_path / "there", to=halves, dtype="bfloat16")
    found, wanted = load_output(tmp_path / "there"), as_halves(expected(checkpoints(), "hf"))
    assert set(found) == set(wanted)
    assert [name for name in wanted if not same_bits(found[name], wanted[name])] == []
    assert gptoss_stream.verify(source, tmp_path / "there").equal
    assert gptoss_stream.plan(tmp_path / "there", to="hf").source_format == halves
    if other in ("hf-mxfp4", "openai"):
        return
    gptoss_stream.convert(tmp_path / "there", tmp_path / "back", to=other)
    before, after = load_output(source), load_output(tmp_path / "back")
    assert set(before) == set(after)
    assert [name for name in before if not same_bits(after[name], before[name])] == []
    gptoss_stream.convert(tmp_path / "there", tmp_path / "again", to=halves)
    again = load_output(tmp_path / "again")
    assert [name for name in found if not same_bits(again[name], found[name])] == []


def test_a_format_without_a_place_for_a_tensor_loses_none(add_format, checkpoints, tmp_path):
    """And makes none up."""
    code = HALVES.replace("    *FIRST,", "    *[row for row in FIRST if row.tensor != 'sinks'],")
    name = add_format("sinkless", code)
    with pytest.raises(CheckpointError, match=r"self_attn.sinks' is not zero, and the format sinkless"):
        gptoss_stream.convert(checkpoints(), tmp_path / "out", to=name)
    gptoss_stream.convert(checkpoints(), tmp_path / "with", to=add_format("halves", HALVES))
    sinks = {"source_format": name, "to": "hf"}
    with pytest.raises(OptionError, match=r"holds nothing that 'model.layers.0.self_attn.sinks'"):
        gptoss_stream.convert(tmp_path / "with", tmp_path / "out", **sinks)
    assert not (tmp_path / "out").exists()


def test_a_format_that_may_have_a_bias_of_the_head(add_format, checkpoints, tmp_path):
    """It is read where it is stored, and only then."""
    row = 'Row("lm_head.bias", "unembed_bias", "v", optional=True)'
    name = add_format("biased", HALVES.replace("    *LAST,", f"    *LAST,\n    {row},"))
    gptoss_stream.convert(checkpoints(), tmp_path / "there", to=name)
    assert "lm_head.bias" not in load_output(tmp_path / "there")
    assert gptoss_stream.plan(tmp_path / "there", to="hf", source_format=name).num_tensors == 71
    shard = tmp_path / "there/model.safetensors"
    tensors = load_file(shard) | {"lm_head.bias": torch.arange(1009).bfloat16()}
    save_file(tensors, shard, {"format": "pt"})
    (tmp_path / "there/model.safetensors.index.json").unlink()
    gptoss_stream.convert(tmp_path / "there", tmp_path / "tl", source_format=name)
    found = load_output(tmp_path / "tl")["unembed.b_U"]
    assert torch.equal(found, torch.arange(1009).bfloat16())
    gptoss_stream.convert(tmp_path / "tl", tmp_path / "back", to=name)
    assert torch.equal(load_output(tmp_path / "back")["lm_head.bias"], found)
    with pytest.raises(CheckpointError, match=r"'lm_head.bias' is not zero, and the format hf cannot"):
        gptoss_stream.plan(tmp_path / "there", to="hf", source_format=name)


def test_formats_are_listed(capsys):
    names = ["hf", "hf-mxfp4", "hf-unfused", "openai", "transformer-lens"]
    assert main(["formats", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"formats": names}
    assert main(["formats"]) == 0
    assert capsys.readouterr().out.split() == names
    assert gptoss_stream.formats.names() == tuple(names)
    for name in names:
        assert gptoss_stream.formats.load(name).TABLE


def test_the_tokenizer_comes_along(checkpoints, tmp_path):
    source = shutil.copytree(checkpoints(), tmp_path / "source")
    oracle.save_tokenizer(source)
    for target in TARGETS:
        gptoss_stream.convert(source, tmp_path / target, to=target)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / target)
        assert tokenizer("w7 w1000 x")["input_ids"] == [7, 1000, 0]
