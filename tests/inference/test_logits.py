"""Models off a checkpoint compute what transformers computes with a checkpoint that it has
dequantised itself."""

from __future__ import annotations

import json
import shutil

import oracle
import pytest
import torch
from inference_runs import TOKENS, is_hooked, logits

import gptoss_stream

FORMATS = ["hf", "hf-mxfp4", "hf-unfused", "openai", "transformer-lens"]

SHAPES = {
    "sizes that all differ": {},  # H = 64, I = 96, 4 heads of 24, 2 for k and v, V = 101
    "intermediate below hidden": {"hidden_size": 96, "intermediate_size": 32},
    "as many heads for k and v": {"num_key_value_heads": 4},
    "one head for k and v": {"num_key_value_heads": 1},
    "one expert": {"num_local_experts": 1, "num_experts_per_tok": 1},
    "one expert per token": {"num_experts_per_tok": 1},
    "every expert for each token": {"num_experts_per_tok": 3},
    "tied embeddings": {"tie_word_embeddings": True},
    "no biases of attention": {"attention_bias": False},
    "five layers": {"num_hidden_layers": 5},
}


@pytest.mark.parametrize("of", FORMATS)
def test_in_float32_the_logits_are_equal_from_every_format(of, load, checkpoints, expected):
    """Through layers with both kinds of attention, beyond the sliding window of 16."""
    found = logits(load(checkpoints(format=of), dtype="float32"))
    exact = logits(expected())
    assert exact.std() > 0.1
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=0)


@pytest.mark.parametrize("of", FORMATS)
def test_in_bfloat16_they_are_those_of_transformers(of, load, checkpoints, expected):
    """Bit for bit in transformers' model, within the rounding of bfloat16 in TransformerLens's."""
    model = load(checkpoints(format=of))
    found, rounded = logits(model), logits(expected(dtype="bfloat16"))
    assert found.dtype == torch.bfloat16
    if not is_hooked(model):
        assert torch.equal(found, rounded)
    exact = logits(expected())
    rounding = (rounded - exact).abs().mean()
    assert 0 < rounding < 0.1 * exact.std()
    assert (found - exact).abs().mean() < 1.5 * rounding


@pytest.fixture(scope="module")
def shaped(tmp_path_factory):
    """A function from a name in `SHAPES` to a checkpoint, in MXFP4 or dense."""
    folders = {}

    def folder(name, is_mxfp4):
        if (name, is_mxfp4) not in folders:
            save = oracle.save_mxfp4 if is_mxfp4 else oracle.save_dense
            folders[name, is_mxfp4] = save(tmp_path_factory.mktemp("shape"), **SHAPES[name])
        return folders[name, is_mxfp4]

    return folder


@pytest.mark.parametrize("is_mxfp4", [True, False], ids=["mxfp4", "dense"])
@pytest.mark.parametrize("name", SHAPES)
def test_models_of_other_shapes(name, is_mxfp4, load, shaped, expected):
    """Those of dense checkpoints are mapped as they are in transformers' model."""
    folder = shaped(name, is_mxfp4)
    found, exact = logits(load(folder, dtype="float32")), logits(expected(folder))
    assert exact.std() > 0.1
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=0)
    model = load(folder)
    if not is_hooked(model):
        assert torch.equal(logits(model), logits(expected(folder, "bfloat16")))


@pytest.mark.parametrize("num_tokens", [1, 4, 8, 9, 16])
def test_a_few_tokens(num_tokens, load, checkpoints, expected):
    """Up to some number of them, packed rows are multiplied if numba is installed."""
    tokens = TOKENS[1:, :num_tokens]
    found, exact = load(checkpoints(), dtype="float32"), expected()
    torch.testing.assert_close(logits(found, tokens), logits(exact, tokens), atol=1e-5, rtol=0)
    rounded = logits(expected(dtype="bfloat16"), tokens)
    rounding = (rounded - logits(exact, tokens)).abs().mean()
    error = (logits(load(checkpoints()), tokens) - logits(exact, tokens)).abs().mean()
    assert error < 1.5 * rounding


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_with_padding(side, load, checkpoints, expected):
    """Tokens of padding are seen by none, and their own logits mean nothing."""
    mask = torch.ones_like(TOKENS)
    mask[0, : 21 if side == "left" else None] = 0
    if side == "right":
        mask[0, :39] = 1
    model = load(checkpoints(), dtype="float32")
    found = logits(model, attention_mask=mask)
    (length,) = mask[0].sum().unique().tolist()
    alone = TOKENS[:1, mask[0].bool()]
    for peer in (logits(expected(), attention_mask=mask)[0][mask[0].bool()],
                 logits(expected(), alone)[0]):  # fmt: skip
        assert peer.shape[0] == length == 39
        torch.testing.assert_close(found[0][mask[0].bool()], peer, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1], logits(expected())[1], atol=1e-5, rtol=0)


def test_positions_can_be_given(checkpoints, expected):
    """In transformers' model, of which rotary tables are the only part that is not mapped."""
    model = gptoss_stream.load_hf_model(checkpoints(), dtype="float32")
    positions = torch.stack([torch.arange(60) * 3, torch.arange(100, 160)])
    found = logits(model, position_ids=positions)
    torch.testing.assert_close(found, logits(expected(), position_ids=positions), atol=1e-5, rtol=0)
    assert not torch.allclose(found, logits(model), atol=1e-3)


def test_embeddings_instead_of_tokens(checkpoints, expected):
    model = gptoss_stream.load_hf_model(checkpoints(), dtype="float32")
    embeddings = torch.randn(2, 20, 96, generator=torch.Generator().manual_seed(0)) / 8
    found = model(inputs_embeds=embeddings).logits
    peer = expected()(inputs_embeds=embeddings).logits
    torch.testing.assert_close(found, peer, atol=1e-5, rtol=0)


def test_some_layers(load, checkpoints, expected):
    """The model is that of the other layers alone, whose kinds of attention it has."""
    model = load(checkpoints(), dtype="float32", layers="1,2")
    peer = oracle.load_model(checkpoints(), torch.float32)
    peer.model.layers = peer.model.layers[1:3]
    peer.config.layer_types = peer.config.layer_types[1:3]
    peer.config.num_hidden_layers = 2
    torch.testing.assert_close(logits(model), logits(peer, use_cache=False), atol=1e-5, rtol=0)


@pytest.mark.parametrize("of", ["hf", "hf-mxfp4"])
@pytest.mark.parametrize("use_cache", [True, False], ids=["with cache", "without cache"])
def test_generate_gives_the_same_greedy_tokens(use_cache, of, load, checkpoints, expected):
    """With a cache of keys and values, and without; beyond the sliding window."""
    model = load(checkpoints(format=of), dtype="float32")
    prompt, settings = TOKENS[:, :12], {"max_new_tokens": 12, "do_sample": False}
    peer = expected().generate(
        prompt, attention_mask=torch.ones_like(prompt), eos_token_id=None, **settings
    )
    if is_hooked(model):
        own = {"use_past_kv_cache": use_cache, "stop_at_eos": False, "verbose": False}
    else:
        own = {"use_cache": use_cache, "attention_mask": torch.ones_like(prompt)}
        own |= {"eos_token_id": None}
    assert model.generate(prompt, **settings, **own).tolist() == peer.tolist()


def test_a_text_ends_as_the_checkpoint_says(checkpoints, tmp_path):
    """The released ones name three tokens, in a file of their own."""
    folder = shutil.copytree(checkpoints(), tmp_path / "source")
    model = gptoss_stream.load_hf_model(folder)
    usual = model.generate(TOKENS[:1, :5], max_new_tokens=8, do_sample=False)
    assert usual.shape == (1, 13)
    ends = [1000, usual[0, 7].item()]
    settings = {"eos_token_id": ends, "pad_token_id": 1001}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    model = gptoss_stream.load_hf_model(folder)
    assert model.generation_config.eos_token_id == ends
    found = model.generate(TOKENS[:1, :5], max_new_tokens=8, do_sample=False)
    assert found.tolist() == usual[:, : found.shape[1]].tolist()
    assert found.shape[1] <= 8


def test_outputs_of_all_layers(checkpoints, expected):
    """Hidden states, attention and router logits, bit for bit in bfloat16."""
    asked = dict.fromkeys(
        ("output_hidden_states", "output_attentions", "output_router_logits"), True
    )
    with torch.no_grad():
        found = gptoss_stream.load_hf_model(checkpoints())(TOKENS, **asked)
        peer = expected(dtype="bfloat16")(TOKENS, **asked)
    for name, count in (("hidden_states", 5), ("attentions", 4), ("router_logits", 4)):
        assert len(found[name]) == count
        pairs = zip(found[name], peer[name], strict=True)
        assert all(torch.equal(one, other) for one, other in pairs), name
    assert torch.equal(found.aux_loss, peer.aux_loss)


@pytest.mark.slow
@pytest.mark.parametrize("of", ["hf-mxfp4", "openai"])
def test_the_shapes_of_the_20b(of, load, tmp_path):
    """Two layers of them: large matrices are decoded in pieces, by several threads."""
    folders = {
        name: gptoss_stream.synth(
            tmp_path / name, "20b", format=name, layers=2, experts=8, vocab_size=101
        )
        for name in {of, "hf-mxfp4"}
    }
    found = logits(load(folders[of], dtype="float32"), TOKENS)
    exact = logits(oracle.load_model(folders["hf-mxfp4"], torch.float32), TOKENS)
    torch.testing.assert_close(found, exact, atol=1e-5 * exact.std().item(), rtol=1e-5)
