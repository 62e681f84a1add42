"""What commands print: pages, warnings of mistakes, and what to do next."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from runs import assert_clean_error, convert_command, limit_file_size, run, run_in_process

import gptoss_stream
from gptoss_stream.cli.convert import _loading
from gptoss_stream.tensors.raw_tensor import RawTensor


@pytest.fixture(scope="module")
def converted(checkpoints, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "out"
    gptoss_stream.convert(checkpoints(), out)
    return out


def rows_of(page: str) -> dict[str, tuple[str, ...]]:
    """The rows of a page of `inspect`: component, number, dtype and size by the kind's name."""
    rows = re.findall(r"^  (\w+) +(\S+) +(\S+) x  (.*?)  +(\[.*\])  +(.*)$", page, re.M)
    return {name: (component, *rest) for component, name, *rest in rows}


@pytest.mark.parametrize("format", sorted(gptoss_stream.formats.names()))
def test_inspect_prints_a_row_for_each_kind_of_tensor(format, checkpoints, tmp_path):  # noqa: A002
    """All tensors are in one, and every one has a component."""
    source = checkpoints(format=format)
    whole = json.loads(run_in_process("inspect", source, "--json").stdout)["tensors"]
    rows = rows_of(run_in_process("inspect", source).stdout)
    assert sum(int(count) for _, count, *_ in rows.values()) == len(whole)
    components = {component for component, *_ in rows.values()}
    assert components == {"attention", "experts", "router", "embeddings", "norms"}
    assert len(rows) < 35
    assert not any(re.search(r"\.\d+\.", name) for name in rows)
    listed = run_in_process("inspect", source, "--tensors").stdout
    assert all(f"  {name} " in listed for name in whole)


def test_rows_of_an_output(converted):
    rows = rows_of(run_in_process("inspect", converted).stdout)
    name = "blocks.{layer}.mlp.experts.{expert}.W_in.weight"
    assert rows[name] == ("experts", "20", "BF16", "[64, 96]", "246 kB")
    assert rows["blocks.{layer}.attn.W_Q"] == ("attention", "4", "BF16", "[4, 96, 32]", "98 kB")


def test_a_page_of_no_tensors_and_of_several_dtypes(checkpoints, tmp_path, capsys):
    from gptoss_stream.cli._tensor_kinds import print_kinds
    from gptoss_stream.tensors.dtypes import DType

    print_kinds({}, ())
    assert capsys.readouterr().out == ""
    tensors = {
        f"x.{number}.y": RawTensor(f"x.{number}.y", dtype, (number,), "a", 0)
        for number, dtype in enumerate((DType.F32, DType.BF16), 2)
    }
    print_kinds(tensors, ())
    assert capsys.readouterr().out == "  other  x.{layer}.y  2 x  BF16, F32  [2], [3]  14 B\n"


def test_small_models_are_not_parts_of_a_billion(checkpoints):
    assert "719 thousand parameters" in run_in_process("inspect", checkpoints()).stdout


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_plan_without_room_exits_with_3(options, checkpoints, tmp_path, monkeypatch):
    from gptoss_stream.writing import disk_space

    done = run_in_process("plan", checkpoints(), tmp_path / "out", *options)
    assert done.returncode == 0
    monkeypatch.setattr(disk_space, "free_nbytes", lambda folder: 1000)
    done = run_in_process("plan", checkpoints(), tmp_path / "out", *options)
    assert done.returncode == 3
    if options:
        assert json.loads(done.stdout)["disk_free"] == 1000
    else:
        assert f"1 kB free in {tmp_path / 'out'}: NOT ENOUGH" in done.stdout
    done = run_in_process("plan", checkpoints())
    assert done.returncode == 3
    assert "free in the current folder: NOT ENOUGH" in done.stdout


LOADING = {
    "transformer-lens": 'gptoss_stream.load_hooked_transformer("{out}")',
    "hf": 'AutoModelForCausalLM.from_pretrained("{out}", dtype="auto")',
    "hf-mxfp4": 'AutoModelForCausalLM.from_pretrained("{out}", dtype="auto")',
    "hf-unfused": 'gptoss_stream.load_hf_model("{out}")',
    "openai": 'Transformer.from_checkpoint("{out}", device="cuda")',
}


@pytest.mark.parametrize("to", sorted(gptoss_stream.formats.names()))
def test_convert_says_how_to_load_the_output(to, checkpoints, tmp_path):
    """In the words of a line of Python."""
    out = tmp_path / "out"
    last = run_in_process("convert", checkpoints(), out, "--to", to).stdout.splitlines()[-1]
    code = last.removeprefix("load it: ")
    assert code.endswith(LOADING[to].format(out=out))
    compile(code, "", "exec")
    if "import" in code:
        assert re.match(r"from [\w.]+ import (\w+); \1\.", code)


def test_how_to_load_a_part_and_nothing_that_is_not_complete(checkpoints, tmp_path):
    source, size = checkpoints(), ["--max-shard-size", "300KB"]
    part = run_in_process("convert", source, tmp_path / "part", "--only", "norms").stdout
    line = f'load it: gptoss_stream.open_state_dict("{tmp_path / "part"}")'
    assert part.splitlines()[-1] == line
    for index, expected in ((0, False), (1, True)):
        task = ["--task-index", index, "--num-tasks", 2]
        done = run_in_process("convert", source, tmp_path / "tasks", *size, *task)
        assert ("load it" in done.stdout) == expected
    for options in (["--quiet"], ["--json"]):
        done = run_in_process("convert", source, tmp_path / options[0], *options)
        assert "load it" not in done.stdout
    done = run_in_process("convert", source, "memory://out", "--to", "hf")
    assert done.stdout.splitlines()[-1] == 'load it: gptoss_stream.open_state_dict("memory://out")'


@pytest.mark.parametrize(
    ("to", "output", "expected"),
    [
        ("hf", "hf://user/name", 'from_pretrained("user/name", dtype="auto")'),
        ("hf", "hf://user/name/folder", 'open_state_dict("hf://user/name/folder")'),
        ("hf", "s3://bucket/name", 'open_state_dict("s3://bucket/name")'),
        ("transformer-lens", "hf://user/name", 'open_state_dict("hf://user/name")'),
        ("hf-unfused", 'a "b"', 'load_hf_model("a \\"b\\"")'),
    ],
)
def test_how_to_load_what_is_elsewhere(to, output, expected, checkpoints, tmp_path):
    report = gptoss_stream.convert(checkpoints(), tmp_path / "out", to=to)
    assert _loading(replace(report, output=output)).endswith(f".{expected}")


def test_short_runs_have_a_time(checkpoints, tmp_path):
    done = run_in_process("convert", checkpoints(), tmp_path / "out")
    assert re.search(r"wrote 1\.5 MB in [1-9]\d* ms \(", done.stdout)


@pytest.mark.parametrize("command", ["convert", "plan", "verify"])
def test_swapped_arguments(command, checkpoints, converted, tmp_path):
    """A converted output as SOURCE and its source as OUTPUT, or a new folder as SOURCE."""
    source = shutil.copytree(checkpoints(), tmp_path / "source")
    (source / "gptoss_stream.json").unlink(missing_ok=True)  # as a download
    for output in (source, checkpoints()):
        done = run_in_process(command, converted, output)
        assert_clean_error(done, 2)
        assert f"{converted} is already a converted output (transformer-lens)" in done.stderr
        assert "did you swap SOURCE and OUTPUT?" in done.stderr
        done = run_in_process(command, tmp_path / "new", output)
        assert_clean_error(done, 2)
        assert "does not exist" in done.stderr
        assert "did you swap SOURCE and OUTPUT?" in done.stderr


def test_what_only_looks_swapped(checkpoints, converted, tmp_path):
    """A conversion of an output, a run that is repeated, unfinished or of an unknown kind."""
    out = tmp_path / "out"
    for _ in range(2):
        done = run_in_process("convert", converted, out, "--to", "hf")
        assert done.returncode == 0, done.stderr
    assert run_in_process("verify", converted, out).returncode == 0
    (out / "gptoss_stream.json").unlink()
    assert run_in_process("verify", converted, out, "--to", "hf").returncode == 1  # the record
    done = run(convert_command(converted, tmp_path / "two"), preexec_fn=limit_file_size(150_000))
    assert_clean_error(done, 3)
    assert run(convert_command(converted, tmp_path / "two")).returncode == 0
    (tmp_path / "two/gptoss_stream.json").write_text("{")
    done = run_in_process("convert", converted, tmp_path / "two")
    assert_clean_error(done, 2)
    assert "damaged" in done.stderr


ALMOST = {
    "hf:/user/name": "hf://user/name",
    "hf:user/name": "hf://user/name",
    "huggingface.co/user/name": "hf://user/name",
    "www.huggingface.co/user/name/tree/main": "hf://user/name",
    "hf.co/user/name": "hf://user/name",
    "https:/host/folder": "https://host/folder",
    "s3:/bucket/folder": "s3://bucket/folder",
    "gs:bucket": "gs://bucket",
}


@pytest.mark.parametrize(("name", "meant"), ALMOST.items())
def test_what_is_almost_a_url(name, meant, checkpoints, tmp_path, monkeypatch):
    """As a source and as an output; an existing folder of that name is one."""
    monkeypatch.chdir(tmp_path)
    for command in (("inspect", name), ("convert", checkpoints(), name), ("synth", name)):
        done = run_in_process(*command)
        assert_clean_error(done, 2)
        assert done.stderr.endswith(f": there is no such folder; did you mean {meant}?\n")
    assert not [*tmp_path.iterdir()]
    Path(name).mkdir(parents=True)
    assert run_in_process("convert", checkpoints(), name, "--quiet").returncode == 0
    assert run_in_process("inspect", name).returncode == 0


@pytest.mark.parametrize(
    "name", ["https:/me:secret@host/x?token=secret", "s3:me:secret@b/x", "hf.co/a/b?x=secret"]
)
def test_secrets_in_what_is_almost_a_url(name):
    done = run_in_process("inspect", name)
    assert_clean_error(done, 2)
    assert "did you mean" in done.stderr
    assert "secret" not in done.stderr


def test_differences_are_capped(checkpoints, converted, tmp_path):
    out = shutil.copytree(converted, tmp_path / "out")
    done = run_in_process("verify", checkpoints(layers=2), out)
    *lines, more, summary = done.stdout.splitlines()
    assert done.returncode == 1
    assert len(lines) == 20
    left = int(re.fullmatch(r"and (\d+) more; --json lists all", more)[1])
    assert f": {20 + left} differences; " in summary
    whole = run_in_process("verify", checkpoints(layers=2), out, "--json")
    assert len(json.loads(whole.stdout)["differences"]) == 20 + left


def test_an_output_of_another_format(checkpoints, converted):
    done = run_in_process("verify", checkpoints(), converted, "--to", "hf")
    assert_clean_error(done, 2)
    assert "none of its tensors is one of hf; leave out --to, or name the source" in done.stderr


@pytest.mark.parametrize(
    ("patterns", "advice"),
    [(["attn"], "; --include matches whole names: try '*attn*'"), (["*x", "y"], "")],
)
def test_patterns_that_match_nothing(patterns, advice, checkpoints):
    options = [f"--include={pattern}" for pattern in patterns]
    done = run_in_process("plan", checkpoints(), *options)
    assert_clean_error(done, 2)
    assert done.stderr.endswith(f"matches no tensor of transformer-lens{advice}\n")


def test_other_runs_in_the_output(checkpoints, converted, tmp_path):
    """What differs is said in words, not in hashes."""
    done = run_in_process("synth", converted)
    assert_clean_error(done, 2)
    assert f"{converted}: it holds a conversion; name another output" in done.stderr
    gptoss_stream.synth(tmp_path / "random")
    done = run_in_process("convert", checkpoints(layers=2), tmp_path / "random", "--to", "hf-mxfp4")
    assert_clean_error(done, 2)
    assert "it holds what synth has written" in done.stderr
    done = run_in_process("convert", checkpoints(layers=2), converted)
    assert_clean_error(done, 2)
    assert "a finished run that differs in" in done.stderr
    assert not re.search(r"[0-9a-f]{20}", done.stderr)


def test_a_local_folder_with_the_name_of_a_repository(checkpoints, tmp_path, monkeypatch):
    (tmp_path / "user").mkdir()
    (tmp_path / "user/name").symlink_to(checkpoints())
    monkeypatch.chdir(tmp_path)
    done = run_in_process("plan", "user/name")
    assert "reading the local folder user/name, not a repository of that name" in done.stderr


def test_plan_says_how_often_it_commits_to_the_hub(checkpoints):
    done = run_in_process("plan", checkpoints(), "hf://user/name")
    assert done.returncode == 0, done.stderr
    assert "at most once a minute: the Hub allows 128 commits an hour" in done.stdout
    assert "commits" not in run_in_process("plan", checkpoints(), "out").stdout
