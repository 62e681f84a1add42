"""A HookedTransformer of a converted output computes what the Hugging Face model computes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import oracle
import pytest
import torch
from runs import ROOT
from transformer_lens.config import hooked_transformer_config

import gptoss_stream
from gptoss_stream import Selection
from gptoss_stream.errors import ConfigError, MissingPackageError, OptionError, OutputError

TOKENS = torch.arange(60)[None] * 25 % 1009  # longer than the sliding window of 16


@pytest.fixture(scope="module")
def source(checkpoints, tmp_path_factory):
    """A checkpoint with a tokenizer."""
    folder = shutil.copytree(checkpoints(), tmp_path_factory.mktemp("source") / "source")
    oracle.save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    """The converted source in each dtype."""
    outputs = {}

    def output(dtype="float32"):
        if dtype not in outputs:
            outputs[dtype] = tmp_path_factory.mktemp("converted") / dtype
            gptoss_stream.convert(source, outputs[dtype], dtype=dtype, max_shard_size="1MB")
        return outputs[dtype]

    return output


@torch.no_grad()
def test_the_logits_equal_the_hugging_face_models(source, converted):
    """In float32, through layers with both kinds of attention and beyond the sliding window."""
    model = gptoss_stream.load_hooked_transformer(converted())
    assert {block.attn.attn_type for block in model.blocks} == {"local", "global"}
    expected = oracle.load_model(source, torch.float32)(TOKENS).logits
    assert expected.std() > 1e-3
    torch.testing.assert_close(model(TOKENS), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_in_bfloat16_the_logits_agree_within_rounding(source, converted):
    found = gptoss_stream.load_hooked_transformer(converted("bfloat16"))(TOKENS).float()
    exact = oracle.load_model(source, torch.float32)(TOKENS).logits
    rounded = oracle.load_model(source)(TOKENS).logits.float()
    rounding = (rounded - exact).abs().mean()
    assert 0 < rounding < 0.1 * exact.std()
    assert (found - exact).abs().mean() < 1.5 * rounding


@torch.no_grad()
@pytest.mark.parametrize(("stored", "dtype"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_dtype_is_converted_to(stored, dtype, converted):
    """From bfloat16 to float32 without a loss, since the checkpoint is no more precise."""
    model = gptoss_stream.load_hooked_transformer(converted(stored), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    same = gptoss_stream.load_hooked_transformer(converted(dtype))
    assert torch.equal(model(TOKENS), same(TOKENS))


@torch.no_grad()
def test_the_hooks_of_transformer_lens_work(converted):
    model = gptoss_stream.load_hooked_transformer(converted())
    logits, cache = model.run_with_cache(TOKENS)
    assert torch.equal(logits, model(TOKENS))
    for layer in range(4):
        assert cache["resid_post", layer].shape == (1, 60, 96)
        assert cache["pattern", layer].shape == (1, 4, 60, 60)
        assert cache["pattern", layer].sum(-1).max() < 1  # the sink has the remainder
    assert set(cache) == set(model.hook_dict) - {n for n in model.hook_dict if n not in cache}

    def silence(tensor, hook):
        return torch.zeros_like(tensor)

    silenced = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.hook_mlp_out", silence)])
    assert not torch.allclose(silenced, logits)


@torch.no_grad()
def test_generate_gives_the_same_greedy_tokens(source, converted):
    model = gptoss_stream.load_hooked_transformer(converted())
    peer = oracle.load_model(source, torch.float32)
    prompt = TOKENS[:, :10]
    found = model.generate(prompt, max_new_tokens=20, do_sample=False, verbose=False,
                           stop_at_eos=False)  # fmt: skip
    expected = peer.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert found.tolist() == expected.tolist()


@torch.no_grad()
def test_the_tokenizer_is_that_of_the_output(converted):
    model = gptoss_stream.load_hooked_transformer(converted())
    assert model.to_tokens("w7 w1000", prepend_bos=False).tolist() == [[7, 1000]]
    text = model.generate("w7 w8", max_new_tokens=3, do_sample=False, verbose=False)
    assert text.startswith("w7 w8")


def test_no_memory_is_allocated_for_weights(converted):
    """Every parameter is a view of a mapped file and needs no gradient; buffers have values."""
    model = gptoss_stream.load_hooked_transformer(converted())
    lines = Path("/proc/self/maps").read_text().splitlines()
    maps = [line.split() for line in lines if "safetensors" in line]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in maps]
    for name, parameter in model.named_parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in ranges), name
        assert not parameter.requires_grad
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert not model.training


@torch.no_grad()
def test_a_longer_or_shorter_context(converted):
    whole = gptoss_stream.load_hooked_transformer(converted())
    short = gptoss_stream.load_hooked_transformer(converted(), n_ctx=64)
    assert (whole.cfg.n_ctx, short.cfg.n_ctx) == (16384, 64)
    assert torch.equal(short(TOKENS), whole(TOKENS))


@torch.no_grad()
def test_a_model_of_some_layers(converted):
    """It computes what the whole model computes without the other layers."""
    whole = gptoss_stream.load_hooked_transformer(converted())
    part = gptoss_stream.load_hooked_transformer(converted(), layers="1,-1")
    assert part.cfg.n_layers == 2
    assert part.cfg.attn_types == ["global", "global"]
    whole.blocks = torch.nn.ModuleList([whole.blocks[1], whole.blocks[3]])
    assert torch.equal(part(TOKENS), whole(TOKENS))
    with pytest.raises(OptionError, match="layer 4: there are layers 0 to 3"):
        gptoss_stream.load_hooked_transformer(converted(), layers="4")


@torch.no_grad()
def test_a_partial_output(source, converted, tmp_path):
    """Gives a model of its layers; the error for others names the layers that it has."""
    gptoss_stream.convert(
        source, tmp_path / "part", dtype="float32", selection=Selection(layers="0-1")
    )
    part = gptoss_stream.load_hooked_transformer(tmp_path / "part", layers="0-1")
    whole = gptoss_stream.load_hooked_transformer(converted(), layers="0-1")
    assert torch.equal(part(TOKENS), whole(TOKENS))
    with pytest.raises(OutputError, match=r"lacks \d+ tensors .* of the layers 0, 1: choose"):
        gptoss_stream.load_hooked_transformer(tmp_path / "part")
    gptoss_stream.convert(source, tmp_path / "few", selection=Selection(experts="0"))
    with pytest.raises(OutputError, match=r"experts\.1\.W_gate\.weight"):
        gptoss_stream.load_hooked_transformer(tmp_path / "few", layers="0")


def test_a_damaged_configuration_is_refused(converted, tmp_path):
    folder = shutil.copytree(converted(), tmp_path / "out")
    for text in ("", "[]", '{"n_layers": "x"}', json.dumps({"n_layers": 4})):
        (folder / "tl_config.json").write_text(text)
        with pytest.raises((ConfigError, OutputError), match=r"tl_config\.json: (damaged|not )"):
            gptoss_stream.load_hooked_transformer(folder)


def test_unsupported_versions_of_transformer_lens_are_refused(converted, monkeypatch):
    """Without attention sinks (its logits would be wrong), without the class, and not installed."""

    class OldConfig:
        __dataclass_fields__ = {}  # noqa: RUF012

    with monkeypatch.context() as patch:
        patch.setattr(hooked_transformer_config, "HookedTransformerConfig", OldConfig)
        with pytest.raises(MissingPackageError, match="does not support attention sinks"):
            gptoss_stream.load_hooked_transformer(converted())
    monkeypatch.setattr("gptoss_stream.inference.hooked_transformer.version", lambda name: "4.3.0")
    with pytest.raises(MissingPackageError, match=r"4\.3\.0 has no HookedTransformer"):
        gptoss_stream.load_hooked_transformer(converted())

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("gptoss_stream.inference.hooked_transformer.version", absent)
    with pytest.raises(MissingPackageError, match=r"gptoss_stream\[transformer-lens\]"):
        gptoss_stream.load_hooked_transformer(converted())


@pytest.mark.parametrize("found", ["4.57.6", "6.0.0"])
def test_unsupported_versions_of_transformers_are_refused(found, source, monkeypatch):
    monkeypatch.setattr("transformers.__version__", found)
    word = "old" if found < "5" else "new"
    message = rf"transformers {found} is too {word}.*pip install 'gptoss_stream\[transformers\]'"
    with pytest.raises(MissingPackageError, match=message):
        gptoss_stream.load_hf_model(source)


@pytest.mark.parametrize(
    ("absent", "call", "extra"),
    [
        ("torch", "load_hf_model", "transformers"),
        ("transformers", "load_hf_model", "transformers"),
        ("torch", "load_hooked_transformer", "transformer-lens"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(absent, call, extra, source):
    """In a process that cannot import it."""
    code = (
        "import sys\n"
        f"sys.modules[{absent!r}] = None\n"
        "import gptoss_stream\n"
        f"try: gptoss_stream.{call}(sys.argv[1])\n"
        "except gptoss_stream.MissingPackageError as error: print(error)"
    )
    command = [sys.executable, "-c", code, source]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert f"{absent} is not installed; run: pip install 'gptoss_stream[{extra}]'" in done.stdout


MEMORY = """
import sys, gptoss_stream, torch, transformer_lens
from pathlib import Path
def anonymous():
    return int(Path("/proc/self/smaps_rollup").read_text().split("Anonymous:")[1].split()[0]) * 1024
before = anonymous()
model = gptoss_stream.load_hooked_transformer(sys.argv[1], n_ctx=256)
opened = anonymous() - before
with torch.no_grad(): model(torch.arange(8)[None])
print(opened, anonymous() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_layers(tmp_path):
    """With gpt-oss-20b's shapes, where 4 layers are 8 GB, opening takes some megabytes."""
    opened = []
    for layers in (2, 4):
        gptoss_stream.synth(tmp_path / "source", "20b", layers=layers, overwrite=True)
        gptoss_stream.convert(tmp_path / "source", tmp_path / "out", overwrite=True)
        command = [sys.executable, "-c", MEMORY, tmp_path / "out"]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
        at_first, used = map(int, done.stdout.split()[-2:])
        print(f"{layers} layers: {at_first / 1e6:.0f} MB opened, {used / 1e6:.0f} MB used")
        assert at_first < 60e6
        assert used < 500e6
        opened.append(at_first)
    assert opened[1] < opened[0] + 20e6
