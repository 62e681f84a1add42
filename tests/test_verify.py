"""verify finds what differs, says where, and raises no false alarm."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import gptoss_stream
from gptoss_stream.cli import main
from gptoss_stream.errors import OptionError, OutputError

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def pair(checkpoints, tmp_path_factory):
    source = checkpoints(layers=2)
    output = tmp_path_factory.mktemp("verified") / "out"
    gptoss_stream.convert(source, output, max_shard_size="300KB")
    return source, output


@pytest.fixture
def copy(pair, tmp_path):
    return pair[0], shutil.copytree(pair[1], tmp_path / "copy")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_convert_made_is_equal(dtype, checkpoints, tmp_path, monkeypatch):
    """In one piece and in pieces, transposed in segments and in blocks."""
    source = checkpoints(layers=2)
    report = gptoss_stream.convert(source, tmp_path / "out", dtype=dtype)
    for segment, staged in ((8 << 20, 64_000_000), (4096, 1000), (65_536, 1)):
        monkeypatch.setattr("gptoss_stream.verifier.SEGMENT_NBYTES", segment)
        monkeypatch.setattr("gptoss_stream.planner.STAGED_NBYTES", staged)
        result = gptoss_stream.verify(source, tmp_path / "out")
        assert result.equal
        assert result.tensors == report.tensors
        assert result.nbytes == sum(
            t.nbytes for s in gptoss_stream.plan(source, dtype=dtype).shards for t in s.tensors
        )


@pytest.mark.parametrize("staged", [64_000_000, 1000])
def test_every_flipped_bit_is_found_where_it_is(staged, copy, monkeypatch):
    monkeypatch.setattr("gptoss_stream.planner.STAGED_NBYTES", staged)
    source, output = copy
    rng = random.Random(staged)
    shards = sorted(output.glob("*.safetensors"))
    for _ in range(60):
        shard = rng.choice(shards)
        data = bytearray(shard.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        at = rng.randrange(start, len(data))
        data[at] ^= 1 << rng.randrange(8)
        before = {n: t.clone() for n, t in load_file(shard).items()}
        original = shard.read_bytes()
        shard.write_bytes(data)
        after = load_file(shard)
        (name,) = (
            n for n in before if not before[n].view(torch.int16).equal(after[n].view(torch.int16))
        )
        (place,) = (before[name].view(torch.int16) != after[name].view(torch.int16)).nonzero()
        (difference,) = gptoss_stream.verify(source, output).differences
        assert (difference.kind, difference.name, difference.shard) == ("value", name, shard.name)
        assert difference.index == tuple(place.tolist())
        assert difference.expected == before[name][difference.index].item()
        shard.write_bytes(original)
    assert gptoss_stream.verify(source, output).equal


def first_shard(output):
    return min(output.glob("*.safetensors"))


def replace_tensors(output, change):
    shard = first_shard(output)
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, {"format": "pt"})


def edit_index(output, change):
    index = json.loads((output / INDEX).read_text())
    change(index)
    (output / INDEX).write_text(json.dumps(index))


NORM = "blocks.0.ln1.w"
DAMAGES = {
    "a shard missing": (lambda o: first_shard(o).unlink(), "missing"),
    "a shard truncated": (
        lambda o: first_shard(o).write_bytes(first_shard(o).read_bytes()[:-1]),
        "file",
    ),
    "a shard longer": (
        lambda o: first_shard(o).write_bytes(first_shard(o).read_bytes() + b"x"),
        "file",
    ),
    "a shard empty": (lambda o: first_shard(o).write_bytes(b""), "file"),
    "a page zeroed": (
        lambda o: first_shard(o).write_bytes(
            (d := first_shard(o).read_bytes())[:40_000] + bytes(4096) + d[44_096:]
        ),
        "value",
    ),
    "a tensor missing": (lambda o: replace_tensors(o, lambda t: t.popitem()), "missing"),
    "a tensor too many": (
        lambda o: replace_tensors(o, lambda t: t.update(extra=t["embed.W_E"][:1].clone())),
        "unexpected",
    ),
    "another dtype": (
        lambda o: replace_tensors(o, lambda t: t.update({"embed.W_E": t["embed.W_E"].float()})),
        "dtype",
    ),
    "another shape": (
        lambda o: replace_tensors(
            o, lambda t: t.update({"embed.W_E": t["embed.W_E"].T.contiguous()})
        ),
        "shape",
    ),
    "no index": (lambda o: (o / INDEX).unlink(), "index"),
    "an index that is no JSON": (lambda o: (o / INDEX).write_text("x"), "index"),
    "another total": (
        lambda o: edit_index(o, lambda i: i["metadata"].update(total_size=1)),
        "index",
    ),
    "a damaged configuration": (lambda o: (o / "tl_config.json").write_text("garbage"), "file"),
    "no source_config.json": (lambda o: (o / "source_config.json").unlink(), "missing"),
    "an unfinished run": (lambda o: (o / ".gptoss_stream").mkdir(), "unexpected"),
    "a name missing": (lambda o: edit_index(o, lambda i: i["weight_map"].popitem()), "index"),
    "a tensor in two shards": (
        lambda o: shutil.copy(first_shard(o), o / "again.safetensors"),
        "unexpected",
    ),
}


@pytest.mark.parametrize(("damage", "kind"), DAMAGES.values(), ids=DAMAGES.keys())
def test_every_other_damage_is_found(damage, kind, copy, capsys):
    source, output = copy
    damage(output)
    kinds = {difference.kind for difference in gptoss_stream.verify(source, output).differences}
    assert kind in kinds
    assert main(["verify", str(source), str(output)]) == 1
    printed = capsys.readouterr().out
    assert f"{kind}: " in printed
    assert "difference" in printed


def test_swapped_experts_are_found(copy):
    """Equal shapes, equal sizes, a sound file: only the bytes tell."""
    source, output = copy
    names = ["blocks.1.mlp.experts.0.W_in.weight", "blocks.1.mlp.experts.1.W_in.weight"]
    for shard in output.glob("*.safetensors"):
        tensors = load_file(shard)
        if set(names) <= set(tensors):
            tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
            save_file(tensors, shard, {"format": "pt"})
    differences = gptoss_stream.verify(source, output).differences
    assert [(d.kind, d.name) for d in differences] == [("value", name) for name in names]


def test_a_sample_looks_at_that_many(pair, capsys):
    source, output = pair
    result = gptoss_stream.verify(source, output, sample=5, seed=1)
    assert (result.equal, result.tensors) == (True, 5)
    assert main(["verify", str(source), str(output), "--sample", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == 3
    with pytest.raises(OptionError):
        gptoss_stream.verify(source, output, sample=0)


def test_an_output_that_is_none(checkpoints, tmp_path):
    for output in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(OutputError, match=str(output)):
            gptoss_stream.verify(checkpoints(layers=2), output)
