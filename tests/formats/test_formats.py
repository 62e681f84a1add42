"""The released formats to those that are loaded, in every dtype, checked against the oracle.

Every pair of formats: `test_pairs`. Adding a format: `test_added_formats`.
"""

from __future__ import annotations

import json
import shutil

import oracle
import pytest
import torch
from outputs import load_output, same_bits
from runs import digests
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import gptoss_stream
from gptoss_stream.cli.main import main
from gptoss_stream.errors import CheckpointError, OptionError

FORMATS = ("hf-mxfp4", "hf", "openai")
TARGETS = ("hf", "transformer-lens")
DTYPES = ("bfloat16", "float16", "float32")
# Shapes with sizes that differ or are equal; in the last one, fused q, k and v are in own shards.
SHAPES = {
    "tiny": {},
    "one expert": {"experts": 1, "layers": 1},
    "I > H": {"hidden_size": 32, "intermediate_size": 96, "layers": 2, "experts": 7},
    "I = H": {"hidden_size": 64, "intermediate_size": 64, "layers": 1},
    "every raw tensor in a shard of its own": {"max_shard_size": 1, "layers": 1},
}


@pytest.fixture(scope="module")
def peer_tensors():
    """Return a function that gives the peer's tensors of a checkpoint for a target, cached."""
    cache = {}

    def of(source, target) -> dict[str, torch.Tensor]:
        if (source, target) not in cache:
            tensors = (
                oracle.load_model(source).state_dict()
                if target == "hf"
                else oracle.state_dict(source)
            )
            cache[source, target] = {name: t.detach() for name, t in tensors.items()}
        return cache[source, target]

    return of


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("target", TARGETS)
def test_every_source_gives_the_peers_tensors(target, shape, checkpoints, peer_tensors, tmp_path):
    """In bfloat16, with equal bits, and the same file from each of the three sources."""
    outputs = []
    for source in FORMATS:
        out = tmp_path / source
        gptoss_stream.convert(checkpoints(format=source, **shape), out, to=target)
        outputs.append({n: d for n, d in digests(out).items() if n.endswith(".safetensors")})
    assert outputs[1:] == outputs[:1] * 2
    found, expected = (
        load_output(out),
        peer_tensors(checkpoints(format="hf-mxfp4", **shape), target),
    )
    assert set(found) == set(expected)
    assert [name for name in expected if not same_bits(found[name], expected[name])] == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", FORMATS)
def test_every_dtype(source, target, dtype, checkpoints, peer_tensors, tmp_path):
    gptoss_stream.convert(checkpoints(format=source), tmp_path / "out", to=target, dtype=dtype)
    found, expected = load_output(tmp_path / "out"), peer_tensors(checkpoints(), target)
    assert set(found) == set(expected)
    cast = {name: tensor.to(getattr(torch, dtype)) for name, tensor in expected.items()}
    assert [name for name in cast if not same_bits(found[name], cast[name])] == []
    assert gptoss_stream.verify(checkpoints(format=source), tmp_path / "out").equal


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
@pytest.mark.parametrize("target", TARGETS)
def test_unquantized_checkpoints_of_other_dtypes(target, stored, checkpoints, tmp_path):
    """The bits are the source's, or those of a cast to the output's dtype."""
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
def test_tensors_that_the_model_lacks_are_not_in_the_hf_format(bias, tied, tmp_path):
    """Attention biases, and the unembedding if the embeddings are tied."""
    source = oracle.save_mxfp4(tmp_path / "source", attention_bias=bias, tie_word_embeddings=tied)
    gptoss_stream.convert(source, tmp_path / "out", to="hf")
    found = load_output(tmp_path / "out")
    assert ("model.layers.0.self_attn.q_proj.bias" in found) == bias
    assert ("lm_head.weight" in found) != tied
    expected = oracle.load_model(source).state_dict()
    assert set(expected) - set(found) == ({"lm_head.weight"} if tied else set())
    assert [name for name in found if not same_bits(found[name], expected[name])] == []
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert [name for name in expected if not same_bits(again[name], expected[name])] == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("source", FORMATS)
def test_transformers_computes_the_same_logits(source, dtype, checkpoints, tmp_path):
    """The bits are equal, for more tokens than the sliding window and with default loading."""
    gptoss_stream.convert(checkpoints(format=source), tmp_path / "out", to="hf", dtype=dtype)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert model.dtype is getattr(torch, dtype)
    tokens = torch.arange(40)[None] * 25 % 1009
    peer = oracle.load_model(checkpoints(), getattr(torch, dtype))
    with torch.no_grad():
        found, expected = model(tokens).logits, peer(tokens).logits
    assert found.std() > 0
    assert torch.equal(found, expected)


def test_configurations_of_all_sources_are_equal(checkpoints, tmp_path):
    """OpenAI's has other names and fewer settings. The one that is written is complete."""
    configs = {}
    for source in FORMATS:
        gptoss_stream.convert(checkpoints(format=source), tmp_path / source, to="hf")
        text = json.loads((tmp_path / source / "config.json").read_text())
        assert "quantization_config" not in text
        assert text["torch_dtype"] == text["dtype"] == "bfloat16"
        configs[source] = AutoConfig.from_pretrained(tmp_path / source).to_dict()
        for key in ("_name_or_path", "eos_token_id", "pad_token_id"):  # OpenAI's has no tokens
            configs[source].pop(key, None)
    assert configs["openai"] == configs["hf-mxfp4"] == configs["hf"]
    original = AutoConfig.from_pretrained(checkpoints()).to_dict()
    for config in (original, configs["openai"]):
        for key in (
            "quantization_config",
            "_name_or_path",
            "dtype",
            "torch_dtype",
            "eos_token_id",
            "pad_token_id",
        ):
            config.pop(key, None)
    assert configs["openai"] == original


def test_hooked_configurations_of_all_sources_are_equal(checkpoints, tmp_path):
    texts = set()
    for source in FORMATS:
        gptoss_stream.convert(checkpoints(format=source), tmp_path / source)
        texts.add((tmp_path / source / "tl_config.json").read_text())
    assert len(texts) == 1


def test_a_repository_with_two_formats(checkpoints, tmp_path):
    """As released: the top level in Hugging Face's format, `original/` in OpenAI's.

    Here with an index, without one, and in a single file.
    """
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


def test_the_format_can_be_given(checkpoints, tmp_path):
    """Without a quantization_config the tensors decide, unless the format is given."""
    source = shutil.copytree(checkpoints(layers=1), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config))
    found = gptoss_stream.plan(source)
    assert found.source_format == "hf-mxfp4"
    assert any("no quantization_config" in note for note in found.notes)
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


def test_formats_are_listed(capsys):
    names = ["hf", "hf-mxfp4", "hf-unfused", "openai", "transformer-lens"]
    assert main(["formats", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"schema": 1, "formats": names}
    assert main(["formats"]) == 0
    assert capsys.readouterr().out.split() == names
    assert gptoss_stream.formats.names() == tuple(names)
    for name in names:
        assert gptoss_stream.formats.load(name).TABLE


def test_the_tokenizer_is_copied(checkpoints, tmp_path):
    source = shutil.copytree(checkpoints(), tmp_path / "source")
    oracle.save_tokenizer(source)
    for target in TARGETS:
        gptoss_stream.convert(source, tmp_path / target, to=target)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / target)
        assert tokenizer("w7 w1000 x")["input_ids"] == [7, 1000, 0]
