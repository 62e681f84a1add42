"""The commands `show` and `export`."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from outputs import load_output, same_bits
from runs import ROOT, limit_file_size
from safetensors.torch import load_file, save_file

import gptoss_stream

HOOKED = ("blocks.0.attn.W_Q", "blocks.1.mlp.experts.3.W_in.weight", "unembed.W_U", "embed.W_E")


def cli(*arguments, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gptoss_stream", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def expected(checkpoints, tmp_path_factory):
    """The tensors that `convert` writes."""
    out = tmp_path_factory.mktemp("converted") / "out"
    gptoss_stream.convert(checkpoints(), out)
    return load_output(out)


def test_show_prints_what_torch_computes(checkpoints, expected):
    done = cli("show", checkpoints(), *HOOKED, "blocks.0.ln1.w", "--json")
    assert done.returncode == 0
    assert "as in the format transformer-lens" in done.stderr
    found = json.loads(done.stdout)["tensors"]
    assert [one["name"] for one in found] == [*HOOKED, "blocks.0.ln1.w"]
    for one in found:
        tensor = expected[one["name"]].double()
        assert one["shape"] == list(tensor.shape)
        assert one["dtype"] == "BF16"
        statistics = one["statistics"]
        assert statistics["min"] == tensor.min()
        assert statistics["max"] == tensor.max()
        assert statistics["mean"] == pytest.approx(tensor.mean().item(), abs=1e-12)
        assert statistics["norm"] == pytest.approx(tensor.norm().item())
        assert statistics["nan"] == statistics["infinite"] == 0
        while tensor.ndim > 2:
            tensor = tensor[0]
        corner = tensor[:3, :6] if tensor.ndim == 2 else tensor[:6]
        assert one["corner"] == corner.tolist()


def test_show_prints_a_page(checkpoints, expected):
    done = cli("show", checkpoints(), HOOKED[0], "--to", "transformer-lens")
    lines = done.stdout.splitlines()
    assert lines[0] == f"{HOOKED[0]}  BF16  [4, 96, 32]"
    assert f"max {expected[HOOKED[0]].max().item():.6g}" in lines[1]
    assert len(lines) == 6


def test_show_counts_what_is_not_finite(checkpoints, tmp_path):
    """Of a tensor as it is stored; F8 scales and integers beside it."""
    folder = gptoss_stream.synth(tmp_path / "source", layers=1, max_shard_size="50GB")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.norm.weight"
    tensors[name][:5] = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan, 1.5])
    save_file(tensors, file, {"format": "pt"})
    one = json.loads(cli("show", folder, name, "--json").stdout)["tensors"][0]
    assert (one["statistics"]["nan"], one["statistics"]["infinite"]) == (2, 2)
    assert one["statistics"]["mean"] == pytest.approx(tensors[name][4:].double().mean().item())
    assert one["corner"][:5] == [None, None, None, None, 1.5]
    assert "2 values are nan" in cli("show", folder, name).stdout
    blocks = "model.layers.0.mlp.experts.gate_up_proj_blocks"
    one = json.loads(cli("show", folder, blocks, "--json").stdout)["tensors"][0]
    assert one["dtype"] == "U8"
    assert one["statistics"]["max"] == 255


def test_export_writes_what_convert_writes(checkpoints, expected, tmp_path):
    file = tmp_path / "some.safetensors"
    done = cli("export", checkpoints(), *HOOKED, file)
    assert done.returncode == 0, done.stderr
    found = load_file(file)
    assert {*found} == {*HOOKED}
    assert all(same_bits(found[name], expected[name]) for name in HOOKED)
    assert file.stat().st_mode & 0o777 == 0o666 & ~current_umask()
    assert [*tmp_path.iterdir()] == [file]


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


@pytest.mark.parametrize("name", HOOKED)
def test_export_to_numpy(name, checkpoints, expected, tmp_path):
    """bfloat16 as float32; without a cast by convert, any other dtype as it is."""
    done = cli("export", checkpoints(), name, tmp_path / "one.npy")
    assert "bfloat16 is written as float32" in done.stderr
    found = np.load(tmp_path / "one.npy")
    assert found.dtype == np.float32
    assert np.array_equal(found, expected[name].float().numpy())
    options = ("--to", "transformer-lens", "--dtype", "float16", "--overwrite")
    assert cli("export", checkpoints(), name, tmp_path / "one.npy", *options).returncode == 0
    assert np.array_equal(np.load(tmp_path / "one.npy"), expected[name].half().numpy())


def test_export_with_an_adapter(checkpoints, tmp_path):
    adapter = gptoss_stream.synth_adapter(tmp_path / "adapter")
    gptoss_stream.convert(checkpoints(), tmp_path / "out", to="hf", adapters=adapter)
    expected = load_output(tmp_path / "out")
    names = ("model.layers.1.self_attn.q_proj.weight", "model.layers.2.mlp.experts.down_proj")
    options = ("--to", "hf", "--adapter", adapter)
    done = cli("export", checkpoints(), *names, tmp_path / "x.safetensors", *options)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "x.safetensors")
    assert all(same_bits(found[name], expected[name]) for name in names)


BAD = {
    "an unknown name": (
        ("show", "{source}", "blocks.0.attn.W_q"),
        "did you mean blocks.0.attn.W_Q",
    ),
    "a name like none": (("show", "{source}", "zzz"), "inspect --json lists the names"),
    "not in the format": (
        ("show", "{source}", "embed.W_E", "--to", "hf"),
        "no tensor 'embed.W_E' in the format hf",
    ),
    "names of two formats": (
        ("show", "{source}", "embed.W_E", "lm_head.weight"),
        "no format has all of them",
    ),
    "no such folder": (("show", "{source}/x", "a"), "there is no such folder"),
    "an unknown format": (("show", "{source}", "a", "--to", "gguf"), "gguf"),
    "an unknown dtype": (("show", "{source}", "a", "--dtype", "int8"), "unknown dtype 'int8'"),
    "an adapter without a format": (
        ("show", "{source}", "a", "--adapter", "{source}"),
        "add --to, such as --to hf",
    ),
    "a cache that is no size": (
        ("show", "{source}", "a", "--cache", "much"),
        "'much' is not a size",
    ),
    "another kind of file": (
        ("export", "{source}", "embed.W_E", "x.bin"),
        "ends in .safetensors or",
    ),
    "several tensors for numpy": (
        ("export", "{source}", "embed.W_E", "unembed.W_U", "{tmp}/x.npy"),
        "holds one tensor; write .safetensors",
    ),
    "no such folder to write to": (
        ("export", "{source}", "embed.W_E", "{tmp}/no/x.npy"),
        "there is no such folder; create it",
    ),
    "a file that exists": (
        ("export", "{source}", "embed.W_E", "{tmp}/there.npy"),
        "exists; add --overwrite",
    ),
    "a folder of that name": (
        ("export", "{source}", "embed.W_E", "{tmp}/folder.npy", "--overwrite"),
        "is not a file",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_what_is_wrong_is_said_in_one_line(arguments, message, checkpoints, tmp_path):
    (tmp_path / "there.npy").write_bytes(b"mine")
    (tmp_path / "folder.npy").mkdir()
    before = sorted(tmp_path.iterdir())
    texts = [one.format(source=checkpoints(), tmp=tmp_path) for one in arguments]
    done = cli(*texts, "--quiet")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert done.stdout == ""
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "there.npy").read_bytes() == b"mine"


def test_a_full_disk_leaves_no_file(checkpoints, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"before")
    done = cli(
        "export", checkpoints(), "embed.W_E", tmp_path / "x.safetensors", "--overwrite",
        preexec_fn=limit_file_size(100_000),
    )  # fmt: skip
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith("gptoss_stream: error: writing")
    assert [*tmp_path.iterdir()] == [tmp_path / "x.safetensors"]
    assert (tmp_path / "x.safetensors").read_bytes() == b"before"


def test_neither_needs_torch(checkpoints, tmp_path):
    code = (
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        "from gptoss_stream.cli.main import main\n"
        "assert main(['show', sys.argv[1], 'blocks.0.attn.W_Q', '--quiet']) == 0\n"
        "assert main(['export', sys.argv[1], 'unembed.W_U', sys.argv[2], '--quiet']) == 0\n"
    )
    command = [sys.executable, "-c", code, checkpoints(), tmp_path / "x.safetensors"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


MEMORY = """
import sys
from gptoss_stream._utils.memory import peak_rss_nbytes
from gptoss_stream.cli.main import main
assert main(sys.argv[1:]) == 0
print(peak_rss_nbytes())
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["embed.W_E", "unembed.W_U"])
def test_memory_is_bounded(name, tmp_path):
    """Of a tensor of 1.16 GB, also one that is transposed."""
    source = gptoss_stream.synth(tmp_path / "source", "20b", layers=1)
    for arguments in (
        ("show", source, name, "--quiet"),
        ("export", source, name, tmp_path / "x.npy", "--quiet", "--overwrite"),
    ):
        command = [sys.executable, "-c", MEMORY, *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peak = int(done.stdout.split()[-1])
        print(f"{arguments[0]} {name}: {peak / 1e6:.0f} MB")
        assert peak < 450e6
    assert np.load(tmp_path / "x.npy", mmap_mode="r").shape in ((201088, 2880), (2880, 201088))
