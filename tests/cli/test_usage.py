"""What users type: other words for options and values, mistakes, help and completion."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from runs import ROOT, assert_clean_error, digests, run_in_process

import gptoss_stream
from gptoss_stream.cli.main import main

COMMANDS = ("convert", "plan", "inspect", "show", "export", "verify", "synth", "formats")


def usage_error(capsys, *arguments: object) -> list[str]:
    """Run a command line that is used wrongly; return the lines on stderr."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    out, error = capsys.readouterr()
    assert out == ""
    return error.splitlines()


def help_of(capsys, *command: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


WRONG = {
    "an abbreviation": (("convert", "a", "b", "--layer", "0"), "did you mean --layers?"),
    "a misspelled option": (("plan", "a", "--max-shard-siz", "1GB"), "mean --max-shard-size?"),
    "another program's option": (("convert", "a", "b", "--layout", "hf"), "did you mean --to?"),
    "nothing like it": (("show", "a", "b", "--zzz"), "no option --zzz; --help lists the options"),
    "an option that takes no value": (("plan", "a", "--json=1"), "does not take a value"),
    "an option without its value": (("plan", "a", "--to"), "requires an argument"),
    "no integer": (("plan", "a", "--workers", "x"), "'x' is not a valid integer"),
    "too many arguments": (("convert", "a", "b", "--layers", "0", "1"), "extra argument (1)"),
    "no source": (("convert",), "SOURCE is missing"),
    "no output": (("convert", "a"), "OUTPUT is missing"),
    "no output of synth": (("synth",), "OUTPUT is missing"),
    "no name": (("show", "a"), "NAME is missing"),
    "no file": (("export", "a", "b"), "NAME or FILE is missing"),
    "a misspelled command": (("conver", "a"), "did you mean convert?"),
    "a command of other programs": (("compare",), "mean inspect SOURCE --against REFERENCE?"),
    "no command like it": (("zzz",), "choose one of convert, plan"),
    "an option before the command": (("--quiet", "plan", "a"), "write it after the command"),
    "an unknown option before it": (("--versio",), "did you mean --version?"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG.keys())
def test_usage_errors_show_the_usage_of_the_command(arguments, message, capsys):
    usage, error = usage_error(capsys, *arguments)
    command = f"{arguments[0]} [OPTIONS]" if arguments[0] in COMMANDS else "[OPTIONS] COMMAND"
    assert usage.startswith(f"Usage: python -m gptoss_stream {command}")
    assert error.startswith("gptoss_stream: error: ")
    assert message in error


def test_no_command_prints_the_help(capsys):
    lines = usage_error(capsys)
    assert lines[0].startswith("Usage: ")
    assert any(line.split()[:1] == ["convert"] for line in lines)


VALUES = {
    "dtype": (["--dtype", "float8"], "unknown dtype 'float8'; choose one of bfloat16, float16"),
    "dtype like one": (["--dtype", "bfloat"], "did you mean bfloat16?"),
    "no dtype": (["--dtype", "mxfp4"], "did you mean --to hf-mxfp4?"),
    "format": (["--to", "huggingface"], "did you mean hf (unquantized) or hf-mxfp4?"),
    "format like one": (["--to", "hf_unfuse"], "did you mean hf-unfused?"),
    "source format": (["--from", "openia"], "did you mean openai?"),
    "rule": (["--mxfp4-rule", "modelop"], "unknown MXFP4 rule 'modelop'"),
    "component": (["--only", "attention,routr"], "unknown group 'routr'; choose one of attention"),
    "component like one": (["--only", "mlp"], "did you mean experts?"),
    "range": (["--layers", "0:2"], "did you mean 0-2? Both ends of a range are included"),
    "open range": (["--experts", "3.."], "did you mean 3--1?"),
    "layers": (["--layers", "all"], "'all' names no layers; write them as 0-3,7"),
    "kept experts": (["--keep-experts", "x"], "'x' names no experts"),
    "size": (["--max-shard-size", "5Gigs"], "'5Gigs' is not a size; write it as 5GB"),
    "layout of lora_B": (["--lora-b-layout", "rank_majr"], "did you mean rank_major?"),
    "orientation": (["--lora-orientation", "x"], "choose one of normal, swapped"),
    "scales": (["--adapter", "a", *["--adapter-scale", "1"] * 2], "times --adapter-scale for 1"),
    "scale": (["--adapter", "a", "--adapter-scale", "nan"], "it must be a finite number"),
}


@pytest.mark.parametrize(("options", "message"), VALUES.values(), ids=VALUES.keys())
def test_values_are_checked_before_anything_is_opened(options, message, tmp_path, monkeypatch):
    """Neither the network, which is not there, nor the output."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    for command in ("convert", "plan"):
        done = run_in_process(command, "openai/gpt-oss-20b", tmp_path / "out", *options)
        assert_clean_error(done, 2)
        assert message in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "20c"], "unknown preset '20c'; choose one of tiny, 20b, 120b"),
        (["--progress", "br"], "did you mean bar?"),
        (["--adapter", "--targets", "attention,lmhead"], "did you mean lm_head?"),
    ],
)
def test_values_of_synth(options, message, tmp_path):
    done = run_in_process("synth", tmp_path / "out", *options)
    assert_clean_error(done, 2)
    assert message in done.stderr


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--to tl --dtype bf16", "--to transformer-lens --dtype bfloat16"),
        ("--to HF --dtype fp32", "--to hf --dtype float32"),
        ("--to hf_mxfp4 --max-shard-size 1MiB", "--to hf-mxfp4 --max-shard-size 1048576"),
        ("--only attn,router --layers -2,-1", "--only attention --only router --layers=2,3"),
        ("--only Norm --only embed", "--only norms,embeddings"),
    ],
)
def test_other_words_for_the_same(given, meant, checkpoints):
    plans = [run_in_process("plan", checkpoints(), "--json", *o.split()) for o in (given, meant)]
    assert plans[0].returncode == plans[1].returncode == 0, plans[0].stderr
    one, other = (re.sub(r'"disk_free": \d+', "", plan.stdout) for plan in plans)
    assert one == other


def test_sizes_of_models_are_named_as_people_do(tmp_path):
    done = run_in_process(
        "synth", tmp_path / "out", "--preset", "20B", "--layers", "1", "--experts", "1",
        "--hidden-size", "64", "--intermediate-size", "64", "--vocab-size", "100",
    )  # fmt: skip
    assert "random checkpoint (20b" in done.stdout, done.stderr


def test_output_by_position_or_by_option(checkpoints, tmp_path, capsys):
    source, out = checkpoints(), tmp_path / "out"
    assert run_in_process("convert", source, "-o", out, "--quiet").returncode == 0
    before = digests(out)
    assert run_in_process("verify", "--output", out, source).returncode == 0
    assert run_in_process("plan", source, "-o", out).returncode == 0
    assert run_in_process("synth", "-o", tmp_path / "new").returncode == 0
    file = tmp_path / "x.safetensors"
    assert run_in_process("export", source, "embed.W_E", "-o", file).returncode == 0
    assert file.exists()
    for command in ("convert", "plan", "verify"):
        _, error = usage_error(capsys, command, source, out, "-o", tmp_path / "other")
        assert f"two outputs are given: {out} and --output {tmp_path / 'other'}" in error
    usage_error(capsys, "export", source, "embed.W_E", file, "-o", tmp_path / "y.npy")
    usage_error(capsys, "synth", tmp_path / "new", "-o", tmp_path / "other")
    assert digests(out) == before
    assert {file.name for file in tmp_path.iterdir()} == {"out", "new", "x.safetensors"}


def test_help_lists_the_choices(capsys):
    """As they are registered."""
    from gptoss_stream.model.selection import GROUPS
    from gptoss_stream.random_checkpoint import PRESETS
    from gptoss_stream.tensors.dtypes import OUTPUT_DTYPES
    from gptoss_stream.tensors.mxfp4_rules import RULES

    shown = " ".join(help_of(capsys, "convert").split())
    for words in (gptoss_stream.formats.names(), [*OUTPUT_DTYPES, "keep"], RULES, GROUPS):
        *most, last = words
        assert f"{', '.join(most)} or {last}" in shown
    assert "tiny, 20b or 120b" in " ".join(help_of(capsys, "synth").split())
    assert len(PRESETS) == 3


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command, capsys):
    """It has examples that can be parsed, -v, and no line that is too long."""
    shown = help_of(capsys, command)
    assert "-v, --verbose" in shown
    assert max(map(len, shown.splitlines())) <= 100
    examples = shown.partition("Examples:\n")[2].splitlines()
    assert examples
    for example in examples:
        with pytest.raises(SystemExit) as ended:
            main([*example.replace("python -m gptoss_stream", "").split(), "--help"])
        assert ended.value.code == 0
        capsys.readouterr()


def test_groups_of_options_are_in_the_order_of_use(capsys):
    shown = help_of(capsys, "convert")
    titles = re.findall(r"^(\w.*):$", shown, re.M)
    assert titles == [
        "Arguments", "Options", "Selection", "LoRA adapters", "Pruning", "Remote source",
        "Remote output", "Distributed", "Examples",
    ]  # fmt: skip


COMPLETIONS = {
    "gptoss-stream ": {*COMMANDS},
    "gptoss-stream ver": {"verify"},
    "gptoss-stream convert --to h": {"hf", "hf-mxfp4", "hf-unfused"},
    "gptoss-stream plan a --dtype ": {"bfloat16", "float16", "float32", "keep"},
    "gptoss-stream convert --only attention,r": {"attention,router"},
    "gptoss-stream convert --layers 0:2 --mxfp4-rule o": {"openai", "ocp"},
    "gptoss-stream convert --lay": {"--layers"},
    "gptoss-stream synth --preset 1": {"120b"},
    "gptoss-stream inspect fol": {"fol"},
}


def script(words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the installed script."""
    code = "import sys; from gptoss_stream.cli.main import main; sys.argv[0] = '/bin/gptoss-stream'"
    command = [sys.executable, "-c", f"{code}; sys.exit(main())", *words.split()]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.mark.parametrize(("line", "expected"), COMPLETIONS.items())
def test_completion(line, expected, capsys, monkeypatch):
    monkeypatch.setenv("_GPTOSS_STREAM_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    monkeypatch.setattr(sys, "argv", ["gptoss-stream"])
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 0
    found = capsys.readouterr().out.splitlines()
    assert {item.partition(",")[2] for item in found} == expected


def test_the_script_names_itself_and_is_completed():
    assert "Usage: gptoss-stream convert [OPTIONS]" in script("convert").stderr
    shown = script("", _GPTOSS_STREAM_COMPLETE="zsh_source")
    assert "compdef _gptoss_stream_completion gptoss-stream" in shown.stdout
    text = (ROOT / "pyproject.toml").read_text()
    assert 'gptoss-stream = "gptoss_stream.cli.main:main"' in text
