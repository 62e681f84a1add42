"""Adapters that cannot be merged are refused in one line, before anything is written."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from adapter_cases import CASES, Case
from peft_rewrites import read, write
from runs import assert_clean_error, run_in_process

L = "base_model.model.model.layers.0."
ATTENTION, EXPERTS = "attention", "experts"


def without(name):
    def change(tensors, config):
        del tensors[name]

    return change


def extra(name, shape=(3, 3)):
    def change(tensors, config):
        tensors[name] = torch.zeros(shape)

    return change


def set_to(**settings):
    def change(tensors, config):
        config |= settings

    return change


def filled(name, value, position=0):
    def change(tensors, config):
        tensors[name].reshape(-1)[position] = value

    return change


def cut(name, rows):
    def change(tensors, config):
        tensors[name] = tensors[name][:rows].clone()

    return change


def as_dtype(name, dtype):
    def change(tensors, config):
        tensors[name] = tensors[name].to(dtype)

    return change


def renamed(old, new):
    def change(tensors, config):
        for name in [*tensors]:
            if old in name:
                tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def turned(name):
    def change(tensors, config):
        tensors[name] = tensors[name].T.contiguous()

    return change


Q_A, Q_B = f"{L}self_attn.q_proj.lora_A.weight", f"{L}self_attn.q_proj.lora_B.weight"
MAGNITUDE = f"{L}self_attn.k_proj.lora_magnitude_vector"
Q_BIAS = f"{L}self_attn.q_proj.lora_B.bias"
DOWN_A = f"{L}mlp.experts.lora_A.weight"
GATE_UP_A, GATE_UP_B = (f"{L}mlp.experts.base_layer.lora_{x}.weight" for x in "AB")
DAMAGES = {
    "missing B": (ATTENTION, without(Q_B), f"tensor {Q_A!r} has no lora_B beside it"),
    "missing A": (ATTENTION, without(Q_A), f"tensor {Q_B!r} has no lora_A beside it"),
    "missing half of the experts": (EXPERTS, without(DOWN_A), "has no lora_A beside it"),
    "extra tensor": (ATTENTION, extra("base_model.model.vision.weight"), "1 tensor of the adapter"),
    "a magnitude without DoRA's layer": (
        EXPERTS,
        extra(f"{L}mlp.experts.w1.lora_magnitude_vector", (3,)),
        "has no other half beside it",
    ),
    "rank that disagrees": (ATTENTION, set_to(r=4), "of rank 8; adapter_config.json calls for 4"),
    "rank of experts that disagrees": (EXPERTS, set_to(r=2), "with rank 2 of adapter_config.json"),
    "rank of one layer": (ATTENTION, cut(Q_A, 5), "of rank 5; adapter_config.json calls for 8"),
    "A and B exchanged": (ATTENTION, turned(Q_A), "of rank 64; adapter_config.json calls for 8"),
    "not a number": (ATTENTION, filled(Q_B, float("nan"), 7), f"{Q_B!r} has values that are NaN"),
    "infinite": (EXPERTS, filled(GATE_UP_B, float("-inf"), -1), "NaN or infinite"),
    "too large": (EXPERTS, set_to(lora_alpha=1e42), "merged, values are NaN or infinite"),
    "another dtype": (ATTENTION, as_dtype(Q_A, torch.float64), "is F64; an adapter's tensors"),
    "a layer too many": (ATTENTION, renamed("layers.1.", "layers.7."), "is of layer 7, and the"),
    "two names for one": (
        ATTENTION,
        extra("model.layers.0.self_attn.q_proj.lora_A.weight", (8, 64)),
        "are the same but for what is before their names",
    ),
    "one adapter of two": (
        EXPERTS,
        lambda tensors, config: (
            without(GATE_UP_A)(tensors, config),
            without(GATE_UP_B)(tensors, config),
        ),
        "is the only adapter of layer 0's experts, and target_parameters names two",
    ),
    "another parameter than named": (
        "gate_up",
        set_to(target_parameters=["mlp.experts.down_proj"]),
        "down_proj of the base model has 96 inputs and 64 outputs: it was trained on another",
    ),
    "orientations that differ": (
        EXPERTS,
        lambda tensors, config: tensors.update(
            {
                GATE_UP_A: torch.zeros(tensors[GATE_UP_A].shape[0], 192),
                GATE_UP_B: torch.zeros(64, tensors[GATE_UP_B].shape[1]),
            }
        ),
        "correct the program that saved them",
    ),
    "PiSSA": (ATTENTION, set_to(init_lora_weights="pissa_niter_4"), "init_lora_weights is 'pissa"),
    "OLoRA": (ATTENTION, set_to(init_lora_weights="olora"), "'olora': the adapter was trained on"),
    "CorDA": (ATTENTION, set_to(init_lora_weights="corda"), "'corda': the adapter was trained on"),
    "LoftQ": (ATTENTION, set_to(init_lora_weights="loftq"), "'loftq': the adapter was trained on"),
    "replicated layers": (ATTENTION, set_to(layer_replication=[[0, 2]]), "layer_replication is"),
    "another method": (ATTENTION, set_to(peft_type="LOHA"), "peft_type is 'LOHA'; only LORA"),
    "rank in words": (ATTENTION, set_to(r="8"), "r is '8'; a rank is an integer"),
    "broken pattern": (ATTENTION, set_to(rank_pattern={"q_(": 8}), "pattern 'q_('"),
    "patterns that take for ever": (ATTENTION, set_to(rank_pattern={"(a+)+b": 8}), "too complex"),
    "no magnitudes": (ATTENTION, set_to(use_dora=True), "is of a layer without lora_magnitude_"),
    "a magnitude less": ("DoRA", without(MAGNITUDE), "is of a layer without lora_magnitude_vector"),
    "magnitudes of no DoRA": ("DoRA", set_to(use_dora=False), "is of a layer with lora_magnitude_"),
    "a bias less": ("lora_bias", without(Q_BIAS), "is of a layer without lora_B.bias, and"),
    "a bias of stacked experts": (
        EXPERTS,
        extra(f"{L}mlp.experts.lora_B.bias", (64,)),
        "is a lora_B.bias of stacked experts, which have none in PEFT",
    ),
    "no router": (
        ATTENTION,
        set_to(modules_to_save=["router"]),
        "modules_to_save in adapter_config.json names 'model.layers.0.mlp.router.weight'",
    ),
    "a router less": (
        "router and head saved",
        without("base_model.model.model.layers.1.mlp.router.bias"),
        "modules_to_save in adapter_config.json names 'model.layers.1.mlp.router.bias'",
    ),
    "no tokens": (
        ATTENTION,
        set_to(trainable_token_indices=[3]),
        "trainable_token_indices in adapter_config.json names 'embed_tokens'",
    ),
    "tokens twice": (
        "tokens",
        set_to(trainable_token_indices={"embed_tokens": [1], "model.embed_tokens": [2]}),
        "trainable_token_indices names embed_tokens twice",
    ),
    "experts of no layer": (
        ATTENTION,
        set_to(target_parameters=["mlp.experts.down_proj"]),
        "target_parameters in adapter_config.json names 'model.layers.0.mlp.experts.down_proj'",
    ),
    "a module less": (
        ATTENTION,
        lambda tensors, config: (without(Q_A)(tensors, config), without(Q_B)(tensors, config)),
        "target_modules in adapter_config.json names 'model.layers.0.self_attn.q_proj'",
    ),
    "no tensors": (ATTENTION, lambda tensors, config: tensors.clear(), "no tensors in it"),
    "unsloth without a mark": (
        EXPERTS,
        set_to(base_model_name_or_path="unsloth/gpt-oss-20b"),
        "add --lora-b-layout grouped_by_expert if",
    ),
    "unknown layout": (EXPERTS, set_to(lora_B_layout="by_moon"), "lora_B_layout is 'by_moon'"),
}


@pytest.fixture
def damaged(made, tmp_path):
    """Makes an adapter of the plain model with a change."""

    def make(adapter, change, base="plain"):
        folder = made.adapter(Case(adapter, base=base), torch.float32)
        tensors, config = read(folder)
        change(tensors, config)
        return write(tmp_path / "damaged", tensors, config)

    return make


def refuse(made, adapter, out, *options, base="plain"):
    """Return the message with which a merge is refused, having written nothing that looks done."""
    done = run_in_process(
        "convert", made.base(torch.float32, base), out, "--to", "hf", "--adapter", adapter, *options
    )
    assert_clean_error(done, 2)
    assert not (out / "model.safetensors.index.json").exists()
    return done.stderr


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_adapter(name, made, damaged, tmp_path):
    adapter, change, message = DAMAGES[name]
    assert message in refuse(made, damaged(adapter, change), tmp_path / "out")


def test_an_expert_less(made, tmp_path):
    """Of unsloth's modules for each expert."""
    folder = made.adapter(CASES["expert by expert"], torch.float32)
    tensors, config = read(folder)
    for name in [*tensors]:
        if "layers.1.mlp.experts.down_projs.3." in name:
            del tensors[name]
    message = refuse(made, write(tmp_path / "less", tensors, config), tmp_path / "out")
    assert "expert 3 of layer 1 has no adapter, and other experts have one" in message


def test_other_base(made, tmp_path):
    """Of another size."""
    adapter = made.adapter(Case("down", base="square"), torch.float32)
    message = refuse(made, adapter, tmp_path / "out")
    assert "down_proj of the base model has 96 inputs and 64 outputs: it was trained on" in message


def test_square_down_needs_a_word(made, tmp_path):
    adapter = made.adapter(Case("down", base="square"), torch.float32)
    message = refuse(made, adapter, tmp_path / "out", base="square")
    assert "add --lora-orientation normal" in message


@pytest.mark.parametrize(
    ("peft", "transformers", "expected"),
    [
        ("0.18.1", "", "normal"),
        ("0.19.0", "5.0.0", "swapped"),
        ("0.19.1", "5.2.0", "normal"),
        ("0.19.1", "4.57.1", "swapped"),
        ("0.19.0", "4.57.1", None),
        ("0.21.2", "", None),
    ],
)
def test_square_down_by_versions(peft, transformers, expected, damaged, made):
    adapter = damaged("down", set_to(peft_version=peft), base="square")
    card = f"---\ntags:\n- lora\n---\n### Framework versions\n\n- PEFT {peft}\n"
    (adapter / "README.md").write_text(
        card + (f"- Transformers: {transformers}\n" if transformers else "")
    )
    done = run_in_process("inspect", adapter, "--json")
    assert json.loads(done.stdout)["orientation"]["value"] == expected


def test_words_against_the_files(made, tmp_path):
    adapter = made.adapter(Case("experts"), torch.float32)
    message = refuse(made, adapter, tmp_path / "out", "--lora-orientation", "swapped")
    assert "shows that the adapter is normal; remove the option" in message
    message = refuse(made, adapter, tmp_path / "out", "--lora-b-layout", "moon")
    assert "choose one of rank_major, grouped_by_expert" in message


def test_tied_head(made, tmp_path):
    base = tmp_path / "tied"
    shutil.copytree(made.base(torch.float32), base)
    tensors, _ = read_model(base)
    del tensors["lm_head.weight"]
    write_model(base, tensors, tie_word_embeddings=True)
    for adapter in ("head", "router and head saved"):
        folder = made.adapter(Case(adapter), torch.float32)
        done = run_in_process("convert", base, tmp_path / "out", "--to", "hf", "--adapter", folder)
        assert_clean_error(done, 2)
        assert "changes lm_head, and the base model has tied embeddings" in done.stderr


def test_bias_that_is_not_there(made, tmp_path):
    adapter = made.adapter(Case("lora_bias"), torch.float32)
    message = refuse(made, adapter, tmp_path / "out", base="no biases")
    assert "lora_bias cannot be merged there" in message


def test_dora_of_an_embedding(made, tmp_path):
    adapter = made.adapter(Case("DoRA of embedding"), torch.float32)
    assert "is DoRA of an embedding" in refuse(made, adapter, tmp_path / "out")


def test_files(made, tmp_path):
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    shutil.copytree(made.adapter(Case("attention"), torch.float32), adapter)
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert "adapter_model.safetensors" in refuse(made, adapter, out)
    weights.rename(adapter / "adapter_model.bin")
    assert "a pickle, which can run any code and is never opened" in refuse(made, adapter, out)
    (adapter / "adapter_model.bin").unlink()
    assert "adapter_model.safetensors: missing" in refuse(made, adapter, out)
    (adapter / "adapter_config.json").unlink()
    assert "adapter_config.json: missing" in refuse(made, adapter, out)
    assert "a whole checkpoint and no adapter" in refuse(made, made.base(torch.float32), out)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "loop" in refuse(made, tmp_path / "loop", out)
    assert "there is no such" in refuse(made, tmp_path / "nowhere", out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter-scale", "2"], "--adapter-scale is for adapters"),
        (["--merge-like-peft"], "--merge-like-peft is for adapters"),
        (["--lora-b-layout", "rank_major"], "--lora-b-layout is for adapters"),
        (["--adapter", "x", "--adapter-scale", "nan"], "it must be a finite number"),
        (["--adapter", "x", *["--adapter-scale", "1"] * 2], "2 times --adapter-scale for 1"),
    ],
)
def test_options(options, message, made, tmp_path):
    done = run_in_process("convert", made.base(torch.float32), tmp_path / "out", *options)
    assert_clean_error(done, 2)
    assert message in done.stderr


def read_model(folder):
    """Return a checkpoint's tensors and configuration."""
    from independent import load_folder

    return load_folder(folder), json.loads((folder / "config.json").read_text())


def write_model(folder, tensors, **settings):
    """Write a checkpoint's tensors and configuration."""
    from safetensors.torch import save_file

    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
