"""verify finds every difference, reports where it is, and reports nothing else."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from shards import edit_json

import gptoss_stream
from gptoss_stream.cli.main import main
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
def test_a_converted_output_is_equal(dtype, checkpoints, tmp_path, monkeypatch):
    """In one chunk or many, with and without spilled transpositions."""
    source = checkpoints(layers=2)
    report = gptoss_stream.convert(source, tmp_path / "out", dtype=dtype)
    for chunk, spilled in ((8 << 20, 64_000_000), (4096, 1000), (65_536, 1)):
        for module in ("data", "verify"):  # what a step makes, and the buffer that it gets
            monkeypatch.setattr(f"gptoss_stream.verification.{module}.CHUNK_NBYTES", chunk)
        monkeypatch.setattr("gptoss_stream.planning.shards.SPILL_NBYTES", spilled)
        result = gptoss_stream.verify(source, tmp_path / "out")
        assert result.equal
        assert result.tensors == report.tensors
        assert result.nbytes == sum(
            t.nbytes for s in gptoss_stream.plan(source, dtype=dtype).shards for t in s.tensors
        )


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A source and a small output, to be verified a thousand times; do not change them."""
    folder = tmp_path_factory.mktemp("small")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 65, "head_dim": 8}
    gptoss_stream.synth(folder / "source", layers=2, experts=2, **sizes)
    gptoss_stream.convert(folder / "source", folder / "out", max_shard_size="20KB")
    return folder / "source", folder / "out"


def regions(output) -> dict[str, list[tuple]]:
    """Every byte of an output by its kind, as (file, offset, None or tensor and its begin)."""
    found: dict[str, list[tuple]] = {}
    for shard in sorted(output.glob("*.safetensors")):
        raw = shard.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        written = len(raw[:start].rstrip(b" "))
        metadata = raw.index(b"__metadata__"), raw.index(b"}") + 1
        parts = {"length": (0, 8), "header": (8, written), "padding": (written, start)}
        for part, (first, end) in {**parts, "metadata": metadata}.items():
            found.setdefault(part, []).extend((shard, at, None) for at in range(first, end))
        for name, entry in json.loads(raw[8:start]).items():
            if name != "__metadata__":
                first, end = (start + offset for offset in entry["data_offsets"])
                places = {"first": [first], "last": [end - 1], "data": range(first, end)}
                for part, ats in {**places, "middle": [(first + end) // 2]}.items():
                    found.setdefault(part, []).extend((shard, at, (name, first)) for at in ats)
    for name in (INDEX, "tl_config.json", "source_config.json", "generation_config.json"):
        found[name] = [(output / name, at, None) for at in range((output / name).stat().st_size)]
    return found


@pytest.mark.parametrize("spilled", [64_000_000, 1000])
@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_found(spilled, count, small, monkeypatch):
    """In data: with tensor, element and value. Elsewhere: with the file or the tensor."""
    monkeypatch.setattr("gptoss_stream.planning.shards.SPILL_NBYTES", spilled)
    source, output = small
    rng, parts = random.Random(spilled + count), regions(output)
    tensors = {n: t for f in output.glob("*.safetensors") for n, t in load_file(f).items()}
    missed = []
    for number in range(count):
        part = list(parts)[number % len(parts)]
        file, at, tensor = rng.choice(parts[part])
        original = file.read_bytes()
        data = bytearray(original)
        data[at] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        differences = gptoss_stream.verify(source, output, workers=1).differences
        file.write_bytes(original)
        if tensor is not None:
            name, first = tensor
            index = np.unravel_index((at - first) // 2, tensors[name].shape)
            known = [
                (d.kind, d.name, d.shard, d.index, d.expected, str(d.found) != str(d.expected))
                for d in differences
            ]
            value = tensors[name][tuple(index)].item()
            if known != [("value", name, file.name, tuple(index), value, True)]:
                missed.append((part, name, index, known))
        elif not any(d.name in tensors or file.name in (d.name, d.shard) for d in differences):
            missed.append((part, file.name, at, bytes(data[max(0, at - 30) : at + 30])))
    assert missed == []
    assert gptoss_stream.verify(source, output).equal


@pytest.mark.parametrize("count", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_an_intact_copy_is_equal(count, tmp_path, monkeypatch):
    """Of random checkpoints, with random options, and compared in chunks of random sizes."""
    rng = random.Random(count)
    for number in range(count):
        sizes = {"layers": rng.randrange(1, 4), "experts": rng.randrange(1, 4), "hidden_size": 32}
        source = gptoss_stream.synth(
            tmp_path / f"source{number}",
            seed=number,
            vocab_size=rng.randrange(2, 300),
            head_dim=rng.choice((8, 16, 26)),
            intermediate_size=rng.choice((32, 64, 96)),
            max_shard_size=rng.choice(("5GB", "30KB", "7KB")),
            **sizes,
        )
        out = tmp_path / f"out{number}"
        gptoss_stream.convert(
            source,
            out,
            dtype=rng.choice(("bfloat16", "float16", "float32")),
            max_shard_size=rng.choice(("5GB", "100KB", "9KB", 1)),
            workers=rng.randrange(1, 5),
        )
        copied = shutil.copytree(out, tmp_path / f"copy{number}")
        with monkeypatch.context() as patch:
            chunk = rng.choice((4096, 65_536))
            for module in ("data", "verify"):
                patch.setattr(f"gptoss_stream.verification.{module}.CHUNK_NBYTES", chunk)
            patch.setattr(
                "gptoss_stream.planning.shards.SPILL_NBYTES", rng.choice((100, 64_000_000))
            )
            assert gptoss_stream.verify(source, copied, workers=rng.randrange(1, 5)).equal
            assert gptoss_stream.verify(source, copied, sample=3, seed=number).equal


def first_shard(output):
    return min(output.glob("*.safetensors"))


def replace_tensors(output, change):
    shard = first_shard(output)
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, {"format": "pt"})


def swap(one, other):
    one.rename(one.with_suffix(".aside"))
    other.rename(one)
    one.with_suffix(".aside").rename(other)


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
    "two shards swapped": (lambda o: swap(*sorted(o.glob("*.safetensors"))[:2]), "index"),
    "a tensor missing": (lambda o: replace_tensors(o, lambda t: t.popitem()), "missing"),
    "an additional tensor": (
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
    "an index that is not JSON": (lambda o: (o / INDEX).write_text("x"), "index"),
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
def test_every_damage_to_files_is_found(damage, kind, copy, capsys):
    source, output = copy
    damage(output)
    kinds = {difference.kind for difference in gptoss_stream.verify(source, output).differences}
    assert kind in kinds
    assert main(["verify", str(source), str(output)]) == 1
    printed = capsys.readouterr().out
    assert f"{kind}: " in printed
    assert "difference" in printed


def test_every_missing_file_is_reported(small):
    """Except for the record, since the options in it are the defaults here, and the model card,
    which its users edit."""
    source, output = small
    for file in sorted(output.iterdir()):
        if file.name not in ("gptoss_stream.json", "README.md"):
            data = file.read_bytes()
            file.unlink()
            differences = gptoss_stream.verify(source, output).differences
            file.write_bytes(data)
            lost = {d.name for d in differences} & {file.name, INDEX}
            assert lost, (file.name, differences)
    assert gptoss_stream.verify(source, output).equal


def test_swapped_experts_are_found(copy):
    """Shapes, sizes and header are valid: only the data differ."""
    source, output = copy
    names = ["blocks.1.mlp.experts.0.W_in.weight", "blocks.1.mlp.experts.1.W_in.weight"]
    for shard in output.glob("*.safetensors"):
        tensors = load_file(shard)
        if set(names) <= set(tensors):
            tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
            save_file(tensors, shard, {"format": "pt"})
    differences = gptoss_stream.verify(source, output).differences
    assert [(d.kind, d.name) for d in differences] == [("value", name) for name in names]


def test_a_sample_compares_that_many_tensors(pair, capsys):
    source, output = pair
    result = gptoss_stream.verify(source, output, sample=5, seed=1)
    assert (result.equal, result.tensors) == (True, 5)
    assert main(["verify", str(source), str(output), "--sample", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == 3
    with pytest.raises(OptionError):
        gptoss_stream.verify(source, output, sample=0)


def test_a_folder_without_an_output(checkpoints, tmp_path):
    for output in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(OutputError, match=str(output)):
            gptoss_stream.verify(checkpoints(layers=2), output)


@pytest.mark.parametrize("selection", ["x", [], 3, {"layers": 1.5}, {"other": []}])
def test_a_damaged_record_is_not_used(selection, checkpoints, tmp_path):
    """The defaults are used instead."""
    gptoss_stream.convert(checkpoints(), tmp_path / "out")
    edit_json(tmp_path / "out/gptoss_stream.json", lambda r: r.update(selection=selection))
    assert gptoss_stream.verify(checkpoints(), tmp_path / "out").equal
