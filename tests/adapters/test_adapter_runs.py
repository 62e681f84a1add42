"""Runs that merge adapters: resumed, verified, in parts, remote, smaller models, into MXFP4."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import independent
import pytest
import torch
from adapter_cases import CASES, Case
from independent import load_folder
from loopback import FileServer
from outputs import same_bits
from peft_oracles import float64_merged
from peft_rewrites import read, write
from runs import assert_clean_error, digests, run_in_process, stop_run
from safetensors.torch import save_file

import gptoss_stream
from gptoss_stream import Adapter
from gptoss_stream.errors import MachineError, OptionError, OutputError

BOTH = Case("attention and experts")


@pytest.fixture
def base(made):
    return made.base(torch.float32)


@pytest.fixture
def adapter(made):
    return made.adapter(BOTH, torch.float32)


def test_resume(base, adapter, tmp_path):
    """The same adapter gives the same bytes, and any other one is refused."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = {"to": "hf", "max_shard_size": "200KB"}
    gptoss_stream.convert(base, whole, adapters=[Adapter(adapter, scale=0.5)], **options)
    stop_run(base, out, 2, adapters=[Adapter(adapter, scale=0.5)], **options)
    other = tmp_path / "other"
    tensors, config = read(adapter)
    write(other, tensors, config | {"lora_alpha": 17})
    for adapters, words in (
        ([], r"differs in merged \(adapter 1\)"),
        ([adapter], r"differs in merged \(adapter 1: scale\)"),
        ([Adapter(other, scale=0.5)], r"differs in merged \(adapter 1: config"),
        ([Adapter(adapter, 0.5), other], r"differs in merged \(adapter 2\)"),
    ):
        with pytest.raises(OutputError, match=words):
            gptoss_stream.convert(base, out, adapters=adapters, **options)
    with pytest.raises(OutputError, match="merge_like_peft"):
        gptoss_stream.convert(
            base, out, adapters=[Adapter(adapter, 0.5)], merge_like_peft=True, **options
        )
    report = gptoss_stream.convert(base, out, adapters=[Adapter(adapter, scale=0.5)], **options)
    assert report.bytes_resumed > 0
    assert digests(out, "*.safetensors") == digests(whole, "*.safetensors")


def test_verify(base, adapter, tmp_path):
    """It takes the adapters from the record, or those that it is given."""
    out, copy = tmp_path / "out", tmp_path / "copy"
    shutil.copytree(adapter, copy)
    gptoss_stream.convert(base, out, to="hf", adapters=[Adapter(copy, scale=2)])
    assert gptoss_stream.verify(base, out).equal
    (out / "README.md").write_text("# My model\n")
    assert gptoss_stream.verify(base, out).equal
    assert gptoss_stream.verify(base, out, adapters=[adapter]).equal  # the scale is recorded
    assert not gptoss_stream.verify(base, out, adapters=[Adapter(adapter, scale=1.5)]).equal
    assert not gptoss_stream.verify(base, out, adapters=[Adapter(adapter)]).equal
    assert not gptoss_stream.verify(base, out, adapters=[Adapter(copy, 2)] * 2).equal
    assert not gptoss_stream.verify(base, out, merge_like_peft=True, adapters=[adapter, copy]).equal
    shutil.rmtree(copy)
    done = run_in_process("verify", base, out)
    assert_clean_error(done, 2)
    assert "names it as the adapter: if it has moved, give it with --adapter" in done.stderr
    assert run_in_process("verify", base, out, "--adapter", adapter, "--quiet").returncode == 0


def test_a_card_that_changes_between_runs(made, tmp_path):
    """What decides the orientation of a square matrix is part of the run."""
    source, adapter, out = made.base(torch.float32, "square"), tmp_path / "a", tmp_path / "out"
    shutil.copytree(made.adapter(Case("down", base="square"), torch.float32), adapter)
    card = "- PEFT 0.21.0\n- Transformers: "
    (adapter / "README.md").write_text(card + "5.1.0\n")
    options = {"to": "hf", "max_shard_size": "200KB", "adapters": [adapter]}
    stop_run(source, out, 2, **options)
    (adapter / "README.md").write_text(card + "4.57.0\n")
    with pytest.raises(OutputError, match=r"differs in merged \(adapter 1: orientation\)"):
        gptoss_stream.convert(source, out, **options)
    (adapter / "README.md").write_text(card + "5.1.0\n")
    gptoss_stream.convert(source, out, **options)
    (adapter / "README.md").unlink()
    assert gptoss_stream.verify(source, out).equal  # as recorded


def test_mixed_dtypes(made, base, adapter, tmp_path):
    """Gate and up of one expert may have different dtypes."""
    unfused, out = tmp_path / "unfused", tmp_path / "out"
    gptoss_stream.convert(base, unfused, to="transformer-lens", dtype="float32")
    tensors = load_folder(unfused)
    for name in tensors:
        if "W_gate" in name:
            tensors[name] = tensors[name].bfloat16()
    save_file(tensors, unfused / "model.safetensors", {"format": "pt"})
    gptoss_stream.convert(unfused, out, to="hf", dtype="float32", adapters=[adapter])
    assert gptoss_stream.verify(unfused, out).equal
    found, exact = load_folder(out), float64_merged(base, adapter)
    for name in exact:
        torch.testing.assert_close(found[name].double(), exact[name], rtol=0, atol=1e-3)


def test_record_and_card(base, adapter, tmp_path):
    out = tmp_path / "out"
    report = gptoss_stream.convert(base, out, to="hf", adapters=[Adapter(adapter, scale=0.25)])
    record = json.loads((out / "gptoss_stream.json").read_text())
    assert record["adapters"] == [{"adapter": str(adapter), "scale": 0.25}] == [*report.adapters]
    assert f"merged {adapter}\n" in run_in_process("inspect", out).stdout
    card = (out / "README.md").read_text()
    assert "| adapter | not on the Hub |  | 0.25 |" in card
    assert "| source | not on the Hub |" in card
    assert str(adapter.parent) not in card  # paths of this machine are nobody's business


@pytest.mark.parametrize("workers", [1, 5])
def test_threads_and_shards(workers, base, adapter, tmp_path):
    """They change no value."""
    one, other = tmp_path / "one", tmp_path / "other"
    gptoss_stream.convert(base, one, to="hf", adapters=[adapter])
    gptoss_stream.convert(
        base, other, to="hf", adapters=[adapter], workers=workers, max_shard_size="50KB"
    )
    one, other = load_folder(one), load_folder(other)
    assert all(same_bits(one[name], other[name]) for name in one)


TINY = {
    "transforms.tiles._ADAPTED_ELEMENTS": 400,
    "transforms.tiles._ADAPTED_ROWS": 32,
    "transforms.changes._MAX_NUMBERS": 7,
    "transforms.adapted_operand._NORM_TILE_NBYTES": 1000,
    "tensors.low_rank._BLOCK_ELEMENTS": 50,
    "checkpoint.regrouping_reader._TILE_NBYTES": 100,
    "checkpoint.regrouping_reader.KEPT_TENSORS": 1,
}


@pytest.mark.parametrize(
    ("to", "cached"), [("hf", 0), ("transformer-lens", 1 << 20), ("hf-mxfp4", 0)]
)
@pytest.mark.parametrize("name", ["attention, experts and head", "DoRA", "Tinker", "embedding"])
def test_tiles(name, to, cached, made, tmp_path, monkeypatch):
    """Sums are exact, so that no size of a tile or block changes a bit."""
    case = CASES.get(name, Case(name))
    adapter, source = made.adapter(case, torch.float32), made.base(torch.float32)
    whole, out = tmp_path / "whole", tmp_path / "out"
    gptoss_stream.convert(source, whole, to=to, adapters=[adapter])
    for key, value in TINY.items():
        monkeypatch.setattr(f"gptoss_stream.{key}", value)
    monkeypatch.setattr("gptoss_stream.transforms.factors._CACHED_NBYTES", cached)
    monkeypatch.setattr("gptoss_stream.transforms.factors._CACHE_NBYTES", cached)
    gptoss_stream.convert(source, out, to=to, adapters=[adapter], workers=3)
    assert digests(out, "*.safetensors") == digests(whole, "*.safetensors")


@pytest.mark.parametrize("like_peft", [False, True])
@pytest.mark.parametrize(
    "name", ["head", "DoRA of head", "router and head saved", "tokens of embedding and head"]
)
def test_through_a_spill_file(name, like_peft, made, base, tmp_path, monkeypatch):
    """An unembedding that is merged and transposed on the disk has the same bytes."""
    adapter = made.adapter(Case(name), torch.float32)
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = {"adapters": [adapter], "merge_like_peft": like_peft}
    gptoss_stream.convert(base, whole, **options)
    monkeypatch.setattr("gptoss_stream.planning.shards.SPILL_NBYTES", 100)
    assert gptoss_stream.plan(base, **options).spill_nbytes >= 101 * 64 * 4
    gptoss_stream.convert(base, out, **options)
    assert digests(out, "*.safetensors") == digests(whole, "*.safetensors")
    assert gptoss_stream.verify(base, out).equal


@pytest.mark.parametrize("to", ["hf", "transformer-lens", "hf-unfused"])
def test_smaller_model(to, made, base, tmp_path):
    """As if the adapter had been merged first."""
    adapter = made.adapter(Case("router and experts"), torch.float32)
    smaller = {"keep_layers": "1", "keep_experts": "1,3"}
    merged, pruned, direct = (tmp_path / name for name in ("merged", "pruned", "direct"))
    gptoss_stream.convert(base, merged, to="hf", adapters=[adapter])
    gptoss_stream.convert(merged, pruned, to=to, dtype="float32", **smaller)
    gptoss_stream.convert(base, direct, to=to, dtype="float32", adapters=[adapter], **smaller)
    expected, found = load_folder(pruned), load_folder(direct)
    assert expected.keys() == found.keys()
    assert all(same_bits(found[name], expected[name]) for name in found)
    assert gptoss_stream.verify(base, direct).equal


def test_part_of_a_model(base, adapter, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    gptoss_stream.convert(base, whole, to="transformer-lens", adapters=[adapter])
    selection = gptoss_stream.Selection(layers="1", experts="2", only=("experts", "attention"))
    gptoss_stream.convert(
        base, part, to="transformer-lens", adapters=[adapter], selection=selection
    )
    whole, part = load_folder(whole), load_folder(part)
    assert part
    assert all(same_bits(part[name], whole[name]) for name in part)


def test_nothing_added_keeps_every_block(made, tmp_path):
    """With a scale of 0 and the source as the reference, the packed bytes are the source's."""
    source, out = made.mxfp4(), tmp_path / "out"
    adapter = made.adapter(Case("experts"), torch.bfloat16)
    gptoss_stream.convert(
        source, out, to="hf-mxfp4", adapters=[Adapter(adapter, scale=0)], reference=source
    )
    expected, found = load_folder(source), load_folder(out)
    assert all(same_bits(found[name], expected[name]) for name in expected)


def test_layers_without_an_adapter_keep_their_blocks(made, tmp_path):
    source, out = made.mxfp4(), tmp_path / "out"
    adapter = made.adapter(Case("gate_up of one layer"), torch.bfloat16)
    report = gptoss_stream.convert(source, out, to="hf-mxfp4", adapters=[adapter])
    expected, found = load_folder(source), load_folder(out)
    changed = {name for name in expected if not same_bits(found[name], expected[name])}
    assert changed == {f"model.layers.1.mlp.experts.gate_up_proj_{x}" for x in ("blocks", "scales")}
    assert list(report.mxfp4["tensors"]) == ["model.layers.1.mlp.experts.gate_up_proj_blocks"]


def test_no_rule_without_an_expert(made, tmp_path):
    """Attention alone encodes nothing."""
    adapter = made.adapter(Case("attention"), torch.bfloat16)
    with pytest.raises(OptionError, match="the source's experts are in MXFP4 already"):
        gptoss_stream.plan(made.mxfp4(), to="hf-mxfp4", adapters=adapter, mxfp4_rule="even")


def test_remote_adapter(base, adapter, tmp_path, monkeypatch):
    """It is copied to a file without a name, and gives the same bytes."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    local, out = tmp_path / "local", tmp_path / "out"
    gptoss_stream.convert(base, local, to="hf", adapters=[adapter])
    with FileServer(adapter) as server:
        gptoss_stream.convert(base, out, to="hf", adapters=[server.url])
        assert gptoss_stream.verify(base, out).equal
    assert digests(out, "*.safetensors") == digests(local, "*.safetensors")
    assert not [*tmp_path.glob(".gptoss_stream-*"), *out.glob(".gptoss_stream-*")]


def test_tasks(base, adapter, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = {"to": "hf", "max_shard_size": "300KB", "adapters": [adapter]}
    gptoss_stream.convert(base, whole, **options)
    reports = [gptoss_stream.convert(base, out, task=(n, 3), **options) for n in range(3)]
    assert [report.complete for report in reports] == [False, False, True]
    assert digests(out, "*.safetensors") == digests(whole, "*.safetensors")


def test_full_disk_while_regrouping(base, adapter, tmp_path, monkeypatch):
    """It is said in one line, and the run can be resumed."""
    import errno

    from gptoss_stream._utils.temporary_file import TemporaryFile

    def full(self, data, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(TemporaryFile, "write", full)
        with pytest.raises(MachineError, match="the disk is full"):
            gptoss_stream.convert(base, out, to="hf", adapters=[adapter])
    gptoss_stream.convert(base, out, to="hf", adapters=[adapter])
    assert gptoss_stream.verify(base, out).equal


def test_output_in_the_adapter(base, adapter, tmp_path):
    copy = tmp_path / "adapter"
    shutil.copytree(adapter, copy)
    with pytest.raises(OutputError, match="output and adapter"):
        gptoss_stream.convert(base, copy / "out", to="hf", adapters=[copy])


def test_inspect(made, adapter):
    done = run_in_process("inspect", adapter)
    assert done.returncode == 0
    for text in (
        "LoRA, rank 8, alpha 8",
        "experts.gate_up_proj    layers 0-1",
        "orientation of the experts: normal (by the shape of ",
        "layout of lora_B of the experts: rank_major (as PEFT saves it)",
    ):
        assert text in done.stdout
    found = json.loads(run_in_process("inspect", adapter, "--json").stdout)
    assert found["targets"]["q_proj"] == [0, 1]


def test_plan(base, adapter, tmp_path):
    out = tmp_path / "out"
    done = run_in_process("plan", base, out, "--to", "hf", "--adapter", adapter)
    assert f"adapter  {adapter}: LoRA, rank 8, alpha 8, " in done.stdout
    found = json.loads(run_in_process("plan", base, "--adapter", adapter, "--json").stdout)
    assert found["adapters"][0]["orientation"]["value"] == "normal"


def test_unchanged_source_rows(made, tmp_path):
    """What no adapter changes has the bits of a plain conversion."""
    source, adapter = made.mxfp4(), made.adapter(Case("down"), torch.bfloat16)
    plain, out = tmp_path / "plain", tmp_path / "out"
    gptoss_stream.convert(source, plain, to="transformer-lens")
    gptoss_stream.convert(source, out, to="transformer-lens", adapters=[adapter])
    plain, out = independent.load_folder(plain), independent.load_folder(out)
    changed = {name for name in plain if not same_bits(plain[name], out[name])}
    assert changed == {name for name in plain if "experts" in name and "W_out.weight" in name}
    assert Path(adapter).exists()


def test_inspect_says_what_is_there(made):
    """Patterns of parameters match their names, and a mark is read without any sizes."""
    router = made.adapter(Case("router and experts"), torch.float32)
    assert json.loads(run_in_process("inspect", router, "--json").stdout)["ranks"] == [1, 2, 3]
    marked = made.adapter(CASES["grouped by expert, one layer"], torch.float32)
    found = json.loads(run_in_process("inspect", marked, "--json").stdout)
    assert found["b_layout"]["value"] == "grouped_by_expert"
