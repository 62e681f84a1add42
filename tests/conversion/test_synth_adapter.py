"""Random adapters are those that PEFT saves, and PEFT loads them."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import gptoss_stream
from gptoss_stream.errors import OptionError, OutputError

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TARGETS = {
    "attention": (MODULES, None),
    "experts": (None, EXPERTS),
    "router": (None, ["mlp.router.weight"]),
    "attention,experts": (MODULES, EXPERTS),
    "experts,router,lm_head,attention": ([*MODULES, "lm_head"], ["mlp.router.weight", *EXPERTS]),
}


@pytest.fixture
def base(checkpoints):
    source = checkpoints(format="hf", layers=2, vocab_size=211)
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)


def synth_adapter(folder, targets, **options):
    return gptoss_stream.synth_adapter(
        folder, layers=2, vocab_size=211, rank=3, targets=targets, **options
    )


@pytest.mark.parametrize("targets", TARGETS)
def test_the_files_are_those_of_peft(base, tmp_path, targets):
    """Names, shapes, dtypes, their order, and each entry of the configuration."""
    ours = synth_adapter(tmp_path / "ours", targets)
    modules, parameters = TARGETS[targets]
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=modules, target_parameters=parameters,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    # PEFT would add the weights of a changed lm_head.
    get_peft_model(base, config).save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    assert {file.name for file in ours.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "gptoss_stream.json",
    }  # fmt: skip
    headers, configs = [], []
    for folder in (ours, tmp_path / "peft"):
        file = (folder / "adapter_model.safetensors").read_bytes()
        length = int.from_bytes(file[:8], "little")
        headers.append(list(json.loads(file[8 : 8 + length]).items()))
        configs.append(json.loads((folder / "adapter_config.json").read_text()))
        configs[-1]["target_modules"] = sorted(configs[-1]["target_modules"] or ())
        configs[-1]["base_model_name_or_path"] = None
    assert headers[0] == headers[1]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("targets", TARGETS)
def test_peft_loads_every_tensor(base, tmp_path, targets):
    folder = synth_adapter(tmp_path / "adapter", targets, alpha=5)
    stored = load_file(folder / "adapter_model.safetensors")
    model = PeftModel.from_pretrained(base, folder)
    loaded = {n.replace(".default", ""): t for n, t in model.named_parameters() if ".lora_" in n}
    assert loaded.keys() == stored.keys()
    assert all(loaded[name].equal(stored[name]) for name in stored)
    found = model.load_adapter(folder, "again")
    assert not found.unexpected_keys
    assert not [name for name in found.missing_keys if "lora_" in name]


def test_a_merge_changes_every_weight_a_little(base, tmp_path):
    folder = synth_adapter(tmp_path / "adapter", "attention,experts,router")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, folder).merge_and_unload()
    changed = []
    for name, tensor in merged.state_dict().items():
        ratio = float((tensor - before[name]).norm() / before[name].norm())
        if ratio:
            changed.append(name)
            assert 0.001 < ratio < 0.1, name
    assert len(changed) == 2 * 7


def test_the_values_are_like_those_of_an_adapter(tmp_path):
    folder = gptoss_stream.synth_adapter(tmp_path / "a", targets=["router", "experts"])
    for tensor in load_file(folder / "adapter_model.safetensors").values():
        assert tensor.abs().max() <= 2**-6
        assert 0.008 < tensor.std() < 0.01
        assert abs(tensor.mean()) < 0.002
        assert len(tensor.unique()) > 0.99 * tensor.numel()


def test_a_seed_gives_the_same_bytes(tmp_path):
    first = gptoss_stream.synth_adapter(tmp_path / "a", seed=7, workers=1)
    again = gptoss_stream.synth_adapter(tmp_path / "b", seed=7, workers=4)
    other = gptoss_stream.synth_adapter(tmp_path / "c", seed=8)
    names = ("adapter_model.safetensors", "adapter_config.json")
    bytes_of = [[(folder / n).read_bytes() for n in names] for folder in (first, again, other)]
    assert bytes_of[0] == bytes_of[1]
    assert bytes_of[0][0] != bytes_of[2][0]
    # In chunks of other sizes too: a tensor's values depend on its name alone.
    part = gptoss_stream.synth_adapter(tmp_path / "d", seed=7, targets="experts")
    whole, some = (load_file(f / "adapter_model.safetensors") for f in (first, part))
    assert len(some) == 4 * 4
    assert all(some[name].equal(whole[name]) for name in some)


def test_a_finished_adapter_is_left_alone_and_another_refused(tmp_path):
    folder = gptoss_stream.synth_adapter(tmp_path / "a")
    written = (folder / "adapter_model.safetensors").stat().st_mtime_ns
    gptoss_stream.synth_adapter(folder)
    assert (folder / "adapter_model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(OutputError, match=r"differs in rank \(was 16, now 8\)"):
        gptoss_stream.synth_adapter(folder, rank=8)
    gptoss_stream.synth_adapter(folder, rank=8, overwrite=True)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 8
    # A checkpoint in its place leaves nothing of it.
    gptoss_stream.synth(folder, overwrite=True)
    assert not list(folder.glob("adapter_*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank 0: it must be an integer in 1 to 65,536"),
        ({"rank": 2.0}, "rank 2.0"),
        ({"rank": True}, "rank True"),
        ({"alpha": math.inf}, "alpha inf"),
        ({"targets": "attention,mlp"}, "unknown target 'mlp'; choose some of attention, router"),
        ({"targets": ""}, "unknown target ''"),
        ({"targets": []}, "no targets"),
        ({"seed": -1}, "seed -1"),
        ({"layers": 0}, "num_layers is 0"),
        ({"preset": "7b"}, "unknown preset '7b'"),
    ],
)
def test_impossible_options_are_refused(options, message, tmp_path):
    with pytest.raises(OptionError, match=message):
        gptoss_stream.synth_adapter(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def run(*arguments):
    command = [sys.executable, "-m", "gptoss_stream", "synth", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command_writes_what_the_function_writes(tmp_path):
    options = ("--adapter", "--rank", 4, "--alpha", 12, "--targets", "router,attention")
    done = run(tmp_path / "a", *options, "--layers", 1, "--seed", 3)
    assert done.stdout == (
        f"{tmp_path / 'a'}: random adapter (tiny, rank 4, router,attention, seed 3)\n"
    )
    gptoss_stream.synth_adapter(
        tmp_path / "b", rank=4, alpha=12, targets=("attention", "router"), layers=1, seed=3
    )
    for name in ("adapter_config.json", "adapter_model.safetensors", "gptoss_stream.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "4"], "--rank has no meaning for a checkpoint; add --adapter, or remove it"),
        (["--adapter", "--format", "hf"], "--format has no meaning with --adapter; remove one"),
        (["--adapter", "--max-shard-size", "5GB"], "--max-shard-size has no meaning"),
    ],
)
def test_options_of_the_other_kind_are_refused(options, message, tmp_path):
    done = run(tmp_path / "a", *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "a").exists()
