"""Smaller models of some layers and experts: the same slices, numbered anew, and they load."""

from __future__ import annotations

import json
import os

import independent
import oracle
import pytest
import torch
from format_pairs import FORMATS, MXFP4_FORMATS
from independent import EXPERTS
from runs import assert_clean_error, digests, run_in_process

import gptoss_stream
from gptoss_stream.errors import OptionError, TensorError

LAYERS, KEPT = [0, 3], {0: [1, 3, 4], 3: [0, 2, 4]}
"""Of a model with 4 layers and 5 experts."""
ROUTER = ("router.weight", "router.bias")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder in a format, of a model with 4 layers and 5 experts."""
    base = oracle.save_mxfp4(
        tmp_path_factory.mktemp("base") / "base",
        num_hidden_layers=4,
        num_local_experts=5,
        num_experts_per_tok=3,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    folders = {"hf-mxfp4": base}

    def folder(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name) / name
            gptoss_stream.convert(base, folders[name], to=name)
        return folders[name]

    return folder


def pruned(tensors: independent.Tensors, kept: dict[int, list[int]]) -> independent.Tensors:
    """Return some layers and experts of tensors with Hugging Face's names."""
    out = {}
    for name, tensor in tensors.items():
        if not name.startswith("model.layers."):
            out[name] = tensor
            continue
        _, _, number, rest = name.split(".", 3)
        if int(number) not in kept:
            continue
        if ".experts." in name or name.endswith(ROUTER):
            tensor = tensor[kept[int(number)]]
        out[f"model.layers.{list(kept).index(int(number))}.{rest}"] = tensor
    return out


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
def test_every_pair(source, target, model, tmp_path, monkeypatch):
    """The tensors are slices of the whole model's, in chunks of any size; verify agrees."""
    layers, kept = ("0,3", KEPT) if target != "openai" else ("0-1", {0: KEPT[0], 1: [0, 1, 3]})
    folder = model(source)
    monkeypatch.setattr("gptoss_stream.writing.executor.CHUNK_NBYTES", 8192)
    out = tmp_path / "out"
    report = gptoss_stream.convert(
        folder, out, to=target, keep_layers=layers, keep_experts=kept, max_shard_size="60KB"
    )
    assert report.unmapped == ()
    assert not report.partial
    assert gptoss_stream.verify(folder, out).equal
    whole = independent.load_folder(model("hf"))
    expected = pruned(whole, {layer: kept[layer] for layer in kept})
    if target == "transformer-lens":
        gptoss_stream.convert(out, tmp_path / "hf", to="hf")
        found = independent.load_folder(tmp_path / "hf")
    else:
        found = independent.READERS[target](out)
    assert set(found) == set(expected)
    assert [n for n in expected if not torch.equal(found[n], expected[n])] == []


@pytest.mark.parametrize("source", MXFP4_FORMATS)
def test_mxfp4_stays_packed(source, model, tmp_path):
    """Also in a source whose scales are not canonical: not one byte is decoded."""
    report = gptoss_stream.convert(
        model(source), tmp_path / "out", to="hf-mxfp4", keep_layers="0,3", keep_experts=KEPT
    )
    assert report.mxfp4 is None
    expected = pruned(independent.load_folder(model("hf-mxfp4")), KEPT)
    found = independent.load_folder(tmp_path / "out")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_floats_are_encoded_with_the_reference_of_the_whole_model(model, tmp_path):
    report = gptoss_stream.convert(
        model("hf"),
        tmp_path / "out",
        to="hf-mxfp4",
        reference=model("hf-mxfp4"),
        keep_layers="0,3",
        keep_experts=KEPT,
    )
    expected = pruned(independent.load_folder(model("hf-mxfp4")), KEPT)
    found = independent.load_folder(tmp_path / "out")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert report.mxfp4["total"]["blocks_encoded"] == 0
    assert gptoss_stream.verify(model("hf"), tmp_path / "out").equal


@pytest.mark.parametrize(
    ("layers", "experts", "kept"),
    [
        ("0,3", KEPT, KEPT),
        ("1-2", None, {1: [0, 1, 2, 3, 4], 2: [0, 1, 2, 3, 4]}),
        (None, "0-2", {layer: [0, 1, 2] for layer in range(4)}),
        ("-1", "4", {3: [4]}),
        (None, {n: [n, 4] for n in range(4)}, {n: [n, 4] for n in range(4)}),
    ],
)
def test_logits_are_those_of_the_model_pruned_in_memory(layers, experts, kept, model, tmp_path):
    out = tmp_path / "out"
    gptoss_stream.convert(model("hf-mxfp4"), out, to="hf", keep_layers=layers, keep_experts=experts)
    config = json.loads((out / "config.json").read_text())
    count = len(next(iter(kept.values())))
    assert config["num_hidden_layers"] == len(kept)
    assert config["num_local_experts"] == count
    assert config["num_experts_per_tok"] == config["experts_per_token"] == min(3, count)
    kinds = ["sliding_attention", "full_attention"] * 2
    assert config["layer_types"] == [kinds[layer] for layer in kept]

    whole = oracle.load_model(model("hf"))
    whole.model.layers = torch.nn.ModuleList([whole.model.layers[layer] for layer in kept])
    whole.config.layer_types = [kinds[layer] for layer in kept]
    whole.model.config.layer_types = whole.config.layer_types
    for number, (layer, some) in enumerate(zip(whole.model.layers, kept.values(), strict=True)):
        layer.self_attn.layer_idx = number
        for part in (layer.mlp.experts, layer.mlp.router):
            for name, parameter in list(part.named_parameters()):
                setattr(part, name, torch.nn.Parameter(parameter[some], requires_grad=False))
        layer.mlp.experts.num_experts = layer.mlp.router.num_experts = count
        layer.mlp.router.top_k = min(3, count)
    whole.config.num_hidden_layers = whole.model.config.num_hidden_layers = len(kept)
    tokens = torch.arange(1, 14)[None]
    with torch.no_grad():
        expected = whole(tokens, use_cache=False).logits
        found = oracle.load_model(out)(tokens, use_cache=False).logits
    assert torch.isfinite(expected).all()
    assert torch.equal(found, expected)


def test_a_hooked_transformer_of_what_is_kept(model, tmp_path):
    """TransformerLens computes what transformers does, within the rounding of bfloat16."""
    options = {"keep_layers": "1-2", "keep_experts": "0,3"}
    gptoss_stream.convert(model("openai"), tmp_path / "tl", dtype="float32", **options)
    gptoss_stream.convert(model("openai"), tmp_path / "hf", to="hf", dtype="float32", **options)
    tokens = torch.arange(1, 14)[None]
    with torch.no_grad():
        found = gptoss_stream.load_hooked_transformer(tmp_path / "tl")(tokens)
        expected = oracle.load_model(tmp_path / "hf", torch.float32)(tokens).logits
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_is_kept_has_its_new_numbers_in_a_selection(model, tmp_path):
    gptoss_stream.convert(
        model("hf-mxfp4"),
        tmp_path / "out",
        keep_layers="2-3",
        keep_experts="3,4",
        selection=gptoss_stream.Selection(layers="1", experts="0", only=("experts",)),
    )
    found = independent.load_folder(tmp_path / "out")
    assert {name.split(".W_")[0].split(".b_")[0] for name in found} == {"blocks.1.mlp.experts.0"}
    whole = independent.load_folder(model("hf"))[EXPERTS.format(3) + "down_proj"][3]
    assert torch.equal(found["blocks.1.mlp.experts.0.W_out.weight"], whole.T)
    assert gptoss_stream.verify(model("hf-mxfp4"), tmp_path / "out").equal


def test_keeping_everything_is_the_plain_conversion(model, tmp_path):
    for name, options in (("a", {}), ("b", {"keep_layers": "0-3", "keep_experts": "0-4"})):
        gptoss_stream.convert(model("hf-mxfp4"), tmp_path / name, **options)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_other_choices_are_other_runs(model, tmp_path):
    source, out = model("hf-mxfp4"), tmp_path / "out"
    gptoss_stream.convert(source, out, to="hf", keep_experts="0,2,4")
    for options in ((), ("--keep-experts", "0,2,3"), ("--keep-layers", "0", "--keep-experts", "0")):
        done = run_in_process("convert", source, out, "--to", "hf", *options)
        assert_clean_error(done, 2)
        assert "pruning" in done.stderr
    file = out / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.write_bytes(data)
    assert not gptoss_stream.verify(source, out).equal


@pytest.mark.parametrize("as_list", [True, False])
def test_a_file_of_experts(as_list, model, tmp_path):
    lists = [KEPT.get(layer, []) for layer in range(4)]
    content = lists if as_list else {str(layer): some for layer, some in KEPT.items()}
    (tmp_path / "experts.json").write_text(json.dumps(content))
    done = run_in_process(
        "convert", model("hf-mxfp4"), tmp_path / "out", "--to", "hf", "--quiet",
        "--keep-layers", "0,3", "--keep-experts", f"@{tmp_path}/experts.json",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    gptoss_stream.convert(
        model("hf-mxfp4"), tmp_path / "same", to="hf", keep_layers="0,3", keep_experts=KEPT
    )
    assert digests(tmp_path / "out") == digests(tmp_path / "same")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"keep_layers": "4"}, "layers 0 to 3"),
        ({"keep_experts": "5"}, "experts 0 to 4"),
        ({"keep_layers": "none"}, "names no layers"),
        ({"keep_layers": "0,2,1-3"}, "keeps layer 2 twice"),
        ({"keep_experts": "4,0,-1"}, "keeps expert 4 twice"),
        ({"keep_experts": {0: [0], 1: [1], 2: [0, 1], 3: [2]}}, "as many in each"),
        ({"keep_experts": {0: [0], 1: [1], 2: [0]}}, "layer 3 is kept"),
        ({"keep_experts": {n: [1, 1] for n in range(4)}}, "twice"),
        ({"keep_experts": {n: [] for n in range(4)}}, "no expert"),
        ({"keep_experts": {n: [5] for n in range(4)}}, "experts 0 to 4"),
        ({"keep_experts": {7: [1]}}, "layers 0 to 3"),
        ({"keep_experts": {0: [-1]}}, "from 0 on"),
        ({"keep_experts": {0: 3}}, "from 0 on"),
        ({"keep_experts": {0: ["1"]}}, "from 0 on"),
        ({"keep_experts": {0: [True]}}, "from 0 on"),
        ({"keep_experts": [[0, 1]]}, "names no experts"),
        ({"keep_experts": {0.5: [0]}}, "from 0 on"),
        ({"keep_experts": {"0": [0]}}, "from 0 on"),
        ({"keep_experts": b"0"}, "names no experts"),
        ({"keep_experts": ""}, "names no experts"),
        ({"keep_layers": ""}, "names no layers"),
        ({"keep_layers": {0: 1}}, "names no layers"),
        ({"keep_layers": "0,2", "to": "openai"}, "of what is kept"),
    ],
)
def test_what_cannot_be_kept_is_refused(options, reason, model, tmp_path):
    with pytest.raises(OptionError, match=reason):
        gptoss_stream.convert(model("hf-mxfp4"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3",
        '"0"',
        "[1, 2]",
        '{"a": [0]}',
        "[[0], null]",
        None,
        '{"0": [0], "00": [1]}',
        '{" 0": [0]}',
        '{"1_0": [0]}',
    ],
)
def test_a_damaged_file_of_experts_is_refused(text, model, tmp_path):
    if text is not None:
        (tmp_path / "experts.json").write_text(text)
    done = run_in_process(
        "convert",
        model("hf-mxfp4"),
        tmp_path / "out",
        "--keep-experts",
        f"@{tmp_path}/experts.json",
    )
    assert_clean_error(done, 2)
    assert "experts.json" in done.stderr


def test_a_file_of_experts_that_is_none(model, tmp_path):
    """A pipe and a device are not read, which would never end."""
    os.mkfifo(tmp_path / "pipe")
    for file in (tmp_path / "pipe", "/dev/zero", tmp_path):
        done = run_in_process("plan", model("hf-mxfp4"), "--keep-experts", f"@{file}")
        assert_clean_error(done, 2)
        assert f"{file}: not a regular file" in done.stderr


SETTINGS = {
    "layer_scales": [1.0, 2.0, 3.0, 4.0],
    "expert_names": ["a", "b", "c", "d", "e"],
    "extra": {"moe": [1, 2, 3, 4, 5]},
    "by_number": {"0": 1, "3": 2},
}


@pytest.mark.parametrize("target", FORMATS)
def test_settings_of_single_layers_and_experts_are_not_left(target, model, tmp_path):
    """They would be about others. The count of experts may have its other spelling."""
    tensors = independent.load_folder(model("hf-mxfp4"))
    config = json.loads((model("hf-mxfp4") / "config.json").read_text())
    config["num_experts"] = config.pop("num_local_experts")
    harmless = {"eos_token_id": [1, 2, 3, 4], "house_style": "plain"}
    source = independent.save(tmp_path / "source", tensors, config=config | SETTINGS | harmless)
    out = tmp_path / "out"
    layers = "0-1" if target == "openai" else "1-2"
    report = gptoss_stream.convert(source, out, to=target, keep_layers=layers, keep_experts="1,4")
    assert any("without layer_scales, expert_names, extra, …" in note for note in report.notes)
    written = [json.loads(file.read_text()) for file in out.glob("*config.json")]
    assert not any(config.keys() & SETTINGS.keys() for config in written)
    if target != "openai":
        assert any(config.items() >= harmless.items() for config in written)
    again = gptoss_stream.plan(out, to="hf").model
    assert (again.num_layers, again.num_experts, again.experts_per_token) == (2, 2, 2)
    assert gptoss_stream.verify(source, out).equal


def test_a_stray_tensor_of_a_layer_that_is_not_kept_is_refused_still(model, tmp_path):
    """The source must be understood as a whole."""
    tensors = independent.load_folder(model("hf-mxfp4"))
    tensors["model.layers.3.mlp.experts.gate_up_proj_zeros"] = torch.zeros(3)
    config = json.loads((model("hf-mxfp4") / "config.json").read_text())
    folder = independent.save(tmp_path / "source", tensors, config=config)
    with pytest.raises(TensorError, match="_zeros"):
        gptoss_stream.plan(folder, to="hf", keep_layers="0-1")
