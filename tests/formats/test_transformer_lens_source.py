"""State dicts of TransformerLens as sources: outputs of this tool, edited ones, and a user's."""

from __future__ import annotations

import json
import shutil

import independent
import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import gptoss_stream
from gptoss_stream.errors import CheckpointError, ConfigError

TOKENS = torch.arange(40)[None] * 25 % 101


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Return an unquantized model that transformers wrote, in float32."""
    return oracle.save_dense(tmp_path_factory.mktemp("hf") / "hf", torch.float32)


@pytest.fixture
def converted(original, tmp_path):
    """Return the original converted by this tool, to be edited."""
    gptoss_stream.convert(original, tmp_path / "tl", dtype="keep")
    return tmp_path / "tl"


def edit(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)


def edit_json(file, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def logits_of(folder) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits


def ablate(tensors) -> None:
    """Set the output of an expert and of a head to zero, and change a bias."""
    tensors["blocks.0.mlp.experts.1.W_out.weight"].zero_()
    tensors["blocks.0.mlp.experts.1.W_out.bias"].zero_()
    tensors["blocks.1.attn.W_O"][2].zero_()
    tensors["blocks.1.attn.b_Q"].add_(0.5)


@pytest.mark.parametrize("target", ["hf", "hf-unfused"])
def test_an_edited_state_dict_converts_back(target, original, converted, tmp_path):
    """transformers then computes what the edited HookedTransformer computes."""
    hooked = oracle.hooked_model(original, torch.float32)
    ablate(hooked.state_dict())
    edit(converted, ablate)
    out = tmp_path / "out"
    report = gptoss_stream.convert(converted, out, to=target)
    assert report.dtype == "keep"
    if target == "hf-unfused":
        config = independent.config_of(out)
        out = independent.save(tmp_path / "hf", independent.read_hf_unfused(out), config=config)
    with torch.no_grad():
        expected = hooked(TOKENS)
    found = logits_of(out)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    assert (found - logits_of(original)).abs().max() > 1e-3


@pytest.mark.parametrize("index", [True, False])
def test_a_users_state_dict_converts_back(index, original, tmp_path):
    """Saved by `save_file(model.state_dict())` with all buffers, and with `model.cfg`."""
    hooked = oracle.hooked_model(original, torch.float32)
    ablate(hooked.state_dict())
    fields = hooked.cfg.to_dict()
    source = independent.save(tmp_path / "source", hooked.state_dict(), tl_config=fields)
    assert any(name.endswith("rotary_sin") for name in hooked.state_dict())
    if index:
        weight_map = dict.fromkeys(hooked.state_dict(), "model.safetensors")
        index_text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (source / "model.safetensors.index.json").write_text(index_text)
    plan = gptoss_stream.plan(source, to="hf")
    assert (plan.source_format, plan.unmapped) == ("transformer-lens", ())
    gptoss_stream.convert(source, tmp_path / "out", to="hf")
    with torch.no_grad():
        expected = hooked(TOKENS)
    torch.testing.assert_close(logits_of(tmp_path / "out"), expected, atol=2e-6, rtol=0)


def test_the_configuration_converts_back(original, converted, tmp_path):
    """From source_config.json with all keys, from tl_config.json with the same meaning."""
    gptoss_stream.convert(converted, tmp_path / "both", to="hf")
    before, after = (independent.config_of(folder) for folder in (original, tmp_path / "both"))
    rope = before["rope_parameters"]
    assert after == before | {
        "dtype": "float32",
        "torch_dtype": "float32",
        "experts_per_token": before["num_experts_per_tok"],
        "initial_context_length": rope["original_max_position_embeddings"],
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {key: rope[key] for key in rope if key != "rope_theta"},
    }
    without = shutil.copytree(converted, tmp_path / "without")
    (without / "source_config.json").unlink()
    gptoss_stream.convert(without, tmp_path / "fields", to="hf")
    configs = [AutoConfig.from_pretrained(f) for f in (original, tmp_path / "fields")]
    for key in (*oracle.SMALL, "rope_parameters", "layer_types", "rms_norm_eps", "attention_bias"):
        assert getattr(configs[0], key) == getattr(configs[1], key), key
    assert torch.equal(logits_of(tmp_path / "fields"), logits_of(original))


def test_a_folder_that_was_converted_from_openai(checkpoints, tmp_path):
    """It converts to Hugging Face's configuration, and keeps OpenAI's as its source's."""
    source = checkpoints(format="openai", layers=2)
    gptoss_stream.convert(source, tmp_path / "tl")
    gptoss_stream.convert(source, tmp_path / "direct", to="hf")
    gptoss_stream.convert(tmp_path / "tl", tmp_path / "around", to="hf")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "around" / name).read_bytes() == (
            tmp_path / "direct" / name
        ).read_bytes()
    gptoss_stream.convert(tmp_path / "tl", tmp_path / "again")
    for name in ("tl_config.json", "source_config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "tl" / name).read_bytes()


def test_one_of_the_configurations_is_enough(converted, tmp_path):
    gptoss_stream.convert(converted, tmp_path / "both", to="hf")
    for name in ("tl_config.json", "source_config.json"):
        source = shutil.copytree(converted, tmp_path / name)
        (source / name).unlink()
        gptoss_stream.convert(source, tmp_path / f"{name}-out", to="hf")
        assert (tmp_path / f"{name}-out/model.safetensors").read_bytes() == (
            tmp_path / "both/model.safetensors"
        ).read_bytes()


def test_a_config_json_is_read_too(original, converted, tmp_path):
    """Hugging Face's configuration under its usual name does not make the folder that format."""
    (converted / "source_config.json").rename(converted / "config.json")
    plan = gptoss_stream.plan(converted, to="hf")
    assert plan.source_format == "transformer-lens"
    edit_json(converted / "tl_config.json", yarn_factor=16.0)
    with pytest.raises(ConfigError, match=r"/config.json: it calls for yarn_factor = 32"):
        gptoss_stream.plan(converted, to="hf")


CONTRADICTIONS = {
    "d_model": 65,
    "num_experts": 4,
    "window_size": 16,
    "attn_types": ["global", "local"],
    "eps": 1e-6,
    "rotary_base": 10_000.0,
    "yarn_factor": 16.0,
    "yarn_attention_factor": 1.0,
    "yarn_truncate": True,
    "use_yarn_rope": False,
}


@pytest.mark.parametrize("key", CONTRADICTIONS)
def test_configurations_that_contradict_each_other_are_refused(key, converted, tmp_path):
    edit_json(converted / "tl_config.json", **{key: CONTRADICTIONS[key]})
    with pytest.raises(ConfigError, match=rf"source_config.json: it calls for {key} = .*tl_config"):
        gptoss_stream.convert(converted, tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("values", [{"n_ctx": 64}, {"dtype": "float16"}, {"model_name": "mine"}])
def test_fields_that_change_nothing_computed_may_differ(values, converted, tmp_path):
    edit_json(converted / "tl_config.json", **values)
    gptoss_stream.convert(converted, tmp_path / "out", to="hf")
    config = independent.config_of(tmp_path / "out")
    assert (config["max_position_embeddings"], config["dtype"]) == (4096, "float32")


REFUSED_FIELDS = {
    "no layers": ({"n_layers": None}, "n_layers is null"),
    "unknown types": ({"attn_types": ["x", "y"]}, "attn_types must be a list of local and glob"),
    "no rotary embedding": ({"positional_embedding_type": "standard"}, "'standard'; gpt-oss has"),
    "a part of a head": ({"rotary_dim": 8}, "rotary_dim is '8'; gpt-oss has 24"),
    "processed norms": ({"normalization_type": "RMSPre"}, "'RMSPre'; gpt-oss has 'RMS'"),
    "no sinks": ({"use_attention_sinks": False}, "use_attention_sinks is 'False'"),
    "another activation": ({"act_fn": "gelu"}, "hidden_act is gelu"),
    "more layers than types": ({"n_layers": 3}, "2 layer_types for 3 layers"),
    "windows without a size": ({"window_size": None}, "but no sliding_window"),
    "unused windows": ({"use_local_attn": False}, "but no sliding_window"),
    "another scale": ({"attn_scale": 1.0}, "attn_scale is 1.0; gpt-oss has 4.898"),
    **{
        key: ({key: value}, f"{key} is '{value}'; gpt-oss has")
        for key, value in {
            "use_attn_scale": False,
            "attention_dir": "bidirectional",
            "attn_only": True,
            "parallel_attn_mlp": True,
            "post_embedding_ln": True,
            "use_normalization_before_and_after": True,
            "use_qk_norm": True,
            "rotary_adjacent_pairs": True,
            "rotary_base_local": 10_000,
            "yarn_global_attn_only": True,
            "use_NTK_by_parts_rope": True,
            "clip_qkv": 0.1,
            "attn_scores_soft_cap": 5.0,
            "output_logits_soft_cap": 1.0,
            "scale_attn_by_inverse_layer_idx": True,
        }.items()
    },
}


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(("values", "words"), REFUSED_FIELDS.values(), ids=REFUSED_FIELDS.keys())
def test_fields_of_another_model_are_refused(values, words, alone, converted):
    """Each changes what TransformerLens computes, with or without the source's configuration."""
    if alone:
        (converted / "source_config.json").unlink()
    edit_json(converted / "tl_config.json", **values)
    with pytest.raises(ConfigError, match=words) as refusal:
        gptoss_stream.plan(converted, to="hf")
    assert str(refusal.value).startswith(f"{converted}/tl_config.json: ")


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("use_attention_sinks", "use_attention_sinks is 'False'"),
        ("use_local_attn", "but no sliding_window"),
        ("normalization_type", "normalization_type is 'LN'"),
        ("rotary_dim", "rotary_dim is 'None'"),
    ],
)
def test_a_missing_field_has_transformer_lenss_default(field, words, converted):
    (converted / "source_config.json").unlink()
    fields = json.loads((converted / "tl_config.json").read_text())
    del fields[field]
    (converted / "tl_config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=words):
        gptoss_stream.plan(converted, to="hf")


def test_missing_yarn_fields_have_transformer_lenss_defaults(original, converted, tmp_path):
    """Its default attention factor is 1; that of transformers follows from the factor."""
    (converted / "source_config.json").unlink()
    fields = json.loads((converted / "tl_config.json").read_text())
    del fields["yarn_attention_factor"]
    (converted / "tl_config.json").write_text(json.dumps(fields))
    gptoss_stream.convert(converted, tmp_path / "out", to="hf")
    hooked = oracle.hooked_model(original, torch.float32, yarn_attention_factor=1.0)
    with torch.no_grad():
        expected = hooked(TOKENS)
    torch.testing.assert_close(logits_of(tmp_path / "out"), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    "values",
    [
        {"attn_scale": -1.0},
        {"attn_scale": 24**0.5},
        {"d_vocab_out": -1},
        {"d_vocab_out": None},
        {"tokenizer_name": "mine", "seed": 3, "device": "cuda"},
    ],
)
def test_fields_that_mean_the_same(values, converted, tmp_path):
    edit_json(converted / "tl_config.json", **values)
    assert gptoss_stream.convert(converted, tmp_path / "out", to="hf").complete


def test_local_attention_without_a_local_layer(tmp_path):
    """TransformerLens's own configuration has it for a model whose layers have no window."""
    kinds = ["full_attention"] * 2
    source = oracle.save_dense(
        tmp_path / "hf", torch.float32, layer_types=kinds, sliding_window=None
    )
    gptoss_stream.convert(source, tmp_path / "tl", dtype="keep")
    edit_json(tmp_path / "tl/tl_config.json", use_local_attn=True)
    gptoss_stream.convert(tmp_path / "tl", tmp_path / "out", to="hf")
    assert independent.config_of(tmp_path / "out")["sliding_window"] is None


def test_the_configuration_of_another_model_is_refused(converted):
    edit_json(converted / "source_config.json", model_type="llama")
    with pytest.raises(ConfigError, match=r"source_config.json: a model of type 'llama'"):
        gptoss_stream.plan(converted, to="hf")


def test_processed_weights_are_refused(converted, tmp_path):
    """`fold_ln` removes the weights of the norms."""

    def fold(tensors):
        for name in [name for name in tensors if name.endswith((".ln1.w", ".ln2.w"))]:
            del tensors[name]

    edit(converted, fold)
    with pytest.raises(CheckpointError, match=r"ln1.w' is missing, so the weights were processed"):
        gptoss_stream.convert(converted, tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [1e-30, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bias_that_the_target_lacks_is_refused(value, dtype, converted, tmp_path):
    """Unless it is zero, and before anything is written. TransformerLens itself stores it."""

    def change(tensors):
        bias = tensors["unembed.b_U"].to(getattr(torch, dtype))
        bias[100] = value
        tensors["unembed.b_U"] = bias

    edit(converted, change)
    for target in ("hf", "hf-unfused"):
        with pytest.raises(
            CheckpointError, match=f"'unembed.b_U' is not zero, and the format {target} cannot"
        ):
            gptoss_stream.convert(converted, tmp_path / "out", to=target)
        assert not (tmp_path / "out").exists()
    gptoss_stream.convert(converted, tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")["unembed.b_U"]
    assert torch.equal(found.isnan(), torch.arange(101) == (100 if value != value else -1))
    assert found[:100].count_nonzero() == 0


def test_a_bias_of_negative_zero_is_zero(converted, tmp_path):
    edit(converted, lambda tensors: tensors["unembed.b_U"].fill_(-0.0))
    assert gptoss_stream.convert(converted, tmp_path / "out", to="hf").complete


def test_a_part_of_a_model_is_not_converted(original, tmp_path):
    """It is not a checkpoint, in either format."""
    part = gptoss_stream.Selection(layers="0")
    gptoss_stream.convert(original, tmp_path / "tl", selection=part)
    with pytest.raises(
        CheckpointError,
        match=r"layer 1.* missing that source_config.json calls for.*part of a model",
    ):
        gptoss_stream.convert(tmp_path / "tl", tmp_path / "out", to="hf")
    gptoss_stream.convert(original, tmp_path / "hf", to="hf", selection=part)
    with pytest.raises(CheckpointError, match=r"config.json: missing; .* a part of a model"):
        gptoss_stream.convert(tmp_path / "hf", tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()
