"""The command line, run in a process of its own as a user runs it."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
from runs import interrupted

import gptoss_stream

COMMANDS = ("convert", "plan", "inspect", "show", "export", "verify", "synth", "formats")


def run(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "gptoss_stream", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


@pytest.mark.parametrize(
    "arguments", [["--help"], *([name, "--help"] for name in COMMANDS), ["--version"], ["x"], []]
)
def test_help_and_usage_errors_import_no_large_package(arguments):
    code = (
        "import sys, gptoss_stream.cli.main as c\n"
        f"try: c.main({arguments!r})\n"
        "except SystemExit as e: print('exit', e.code)\n"
        "print(sorted({*sys.argv[1].split()} & set(sys.modules)))"
    )
    large = "numpy torch einops tqdm transformers huggingface_hub fsspec"
    done = subprocess.run([sys.executable, "-c", code, large], capture_output=True, text=True)
    assert done.stdout.endswith("[]\n")
    assert "exit" in done.stdout
    assert ("exit 0" in done.stdout) == bool(arguments and arguments[-1].startswith("--"))


def test_converting_imports_no_torch(checkpoints, tmp_path):
    code = (
        "import sys, gptoss_stream as g\n"
        f"g.convert({str(checkpoints())!r}, {str(tmp_path / 'out')!r})\n"
        "print(sorted({'torch', 'transformers', 'tensorflow', 'jax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_convert_prints_a_summary_or_json(checkpoints, tmp_path):
    source = checkpoints()
    done = run("convert", source, tmp_path / "a")
    assert done.returncode == 0
    assert "176 tensors" in done.stdout
    assert done.stderr == ""  # no progress bar in a pipe
    done = run("convert", source, tmp_path / "b", "--json")
    report = json.loads(done.stdout)
    assert report["tensors"] == 176
    assert report["bytes_out"] == sum(report["shards"].values())
    assert report["peak_rss"] > 0
    assert report["seconds"] > 0
    done = run("convert", source, tmp_path / "c", "--quiet")
    assert (done.stdout, done.stderr) == ("", "")


def test_plan_prints_a_summary_or_the_whole_plan_as_json(checkpoints, tmp_path):
    done = run("plan", checkpoints(), tmp_path, "--max-shard-size", "500KB")
    assert done.returncode == 0
    for word in ("4 layers", "5 experts", "176 tensors", "model-00003-of-00003", "free", "at most"):
        assert word in done.stdout
    whole = json.loads(run("plan", checkpoints(), "--json", "--dtype", "float32").stdout)
    tensors = {t["name"]: t for shard in whole["shards"] for t in shard["tensors"]}
    assert len(tensors) == whole["tensors"] == 176
    assert tensors["blocks.3.attn.W_Q"]["shape"] == [4, 96, 32]
    assert tensors["unembed.W_U"]["dtype"] == "F32"
    assert whole["data_bytes"] == sum(t["bytes"] for t in tensors.values())


def test_inspect_describes_a_checkpoint(checkpoints):
    done = run("inspect", checkpoints(), "--tensors")
    assert "hf-mxfp4" in done.stdout
    assert "model.layers.3.mlp.experts.gate_up_proj_blocks" in done.stdout
    whole = json.loads(run("inspect", checkpoints(), "--json").stdout)
    assert whole["format"] == "hf-mxfp4"
    assert whole["tensors"]["lm_head.weight"]["shape"] == [1009, 96]


def test_bad_input_prints_one_line_and_exits_with_2(tmp_path):
    done = run("convert", tmp_path / "nowhere", tmp_path / "out")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("gptoss_stream: error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    ["plan IN --layers 0 OUT", "plan --json IN --layers=-2,-1 OUT", "verify IN --json OUT"],
)
def test_options_may_be_between_positionals(command, checkpoints, tmp_path):
    source, out = checkpoints(layers=2), tmp_path / "out"
    gptoss_stream.convert(source, out)
    done = run(*({"IN": source, "OUT": out}.get(word, word) for word in command.split()))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("url", ["https://host:abc/x", "https://host:99999/x", "https://[x/y"])
def test_invalid_urls(url):
    done = run("inspect", url)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "not an address" in done.stderr


def test_a_number_too_large_for_a_float_is_an_error(checkpoints, tmp_path):
    source = shutil.copytree(checkpoints(format="openai"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["initial_context_length"] = 10**400
    (source / "config.json").write_text(json.dumps(config))
    done = run("inspect", source)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"{source}/config.json: initial_context_length" in done.stderr


def test_a_resumed_run_prints_how_much_was_finished(checkpoints, tmp_path):
    """For an array task, of its own shards. What earlier runs have read is not printed."""
    command = ["convert", checkpoints(), tmp_path / "out", "--max-shard-size", "300KB"]
    task = [*command, "--task-index", "0", "--num-tasks", "2"]
    assert run(*task).returncode == 0
    found = re.search(r"resuming: (\d) of (\d) shards \((.*)\) are", run(*task).stderr)
    shards, total, resumed = found.groups()
    assert shards == total
    done = run(*command)
    assert re.search(rf"resuming: {shards} of \d shards \({resumed}\) are finished", done.stderr)
    assert "\nwrote " in done.stdout
    command[2] = tmp_path / "whole"
    assert "\nread 896 kB and wrote 1.5 MB" in run(*command).stdout


def test_a_full_disk_exits_with_3(checkpoints, tmp_path):
    """A limit on file sizes takes the place of a disk that fills up."""
    done = run(
        "convert",
        checkpoints(),
        tmp_path / "out",
        preexec_fn=lambda: (
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
            __import__("resource").setrlimit(__import__("resource").RLIMIT_FSIZE, (500_000,) * 2),
        ),
    )
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "File too large" in done.stderr
    assert not list((tmp_path / "out").glob("*.safetensors*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_run_soon_with_one_line(number, code, tmp_path):
    source = gptoss_stream.synth(tmp_path / "source", vocab_size=400_000, hidden_size=512, layers=1)
    process = subprocess.Popen(
        [sys.executable, "-m", "gptoss_stream", "convert", source, tmp_path / "out"],
        stderr=subprocess.PIPE,
        text=True,
    )
    work = tmp_path / "out/.gptoss_stream"
    while not list(work.glob("*.safetensors")):
        time.sleep(0.005)
    process.send_signal(number)
    begin = time.monotonic()
    _, stderr = process.communicate(timeout=20)
    assert time.monotonic() - begin < 10
    assert process.returncode == code
    assert stderr.count("\n") == 1
    assert "run the same command again" in stderr
    assert not list((tmp_path / "out").glob("*.safetensors*"))
    assert not list(work.glob("*.safetensors*"))
    done = run("convert", source, tmp_path / "out")
    assert done.returncode == 0, done.stderr


def test_a_progress_bar_is_shown_in_a_terminal(tmp_path):
    source = gptoss_stream.synth(tmp_path / "source", vocab_size=400_000, hidden_size=512, layers=1)
    terminal, process_end = pty.openpty()
    fcntl.ioctl(process_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "gptoss_stream", "convert", source, tmp_path / "out"],
        stderr=process_end,
        stdout=subprocess.DEVNULL,
    )
    assert process.wait(60) == 0
    os.set_blocking(terminal, False)
    seen = os.read(terminal, 100_000).decode(errors="replace")  # may end within a character
    os.close(process_end)
    os.close(terminal)
    assert "/821M" in seen  # total bytes
    assert "B/s" in seen
    assert "%|" in seen


def test_inspect_describes_converted_outputs(checkpoints, tmp_path):
    """Complete, with a file missing, unfinished, and with a damaged record."""
    source, out = checkpoints(), tmp_path / "out"
    options = ["--max-shard-size", "300KB", "--to", "hf", "--layers", "1"]
    assert run("convert", source, out, *options).returncode == 0
    shown = run("inspect", out, "--tensors").stdout
    assert f"{out}: converted, hf in bfloat16 (layers 1)" in shown
    assert (
        f"from {source.resolve()} (hf-mxfp4) by gptoss_stream {gptoss_stream.__version__}" in shown
    )
    assert "shards: complete" in shown
    assert "model.layers.1.mlp.experts.gate_up_proj " in shown
    whole = json.loads(run("inspect", out, "--json").stdout)
    assert (whole["format"], whole["complete"], whole["missing"]) == ("hf", True, [])
    assert len(whole["tensors"]) == 3 + 17
    missing = min(out.glob("*.safetensors"))
    missing.unlink()
    assert f"incomplete, {missing.name} missing; run the same convert command again" in (
        run("inspect", out).stdout
    )
    assert not json.loads(run("inspect", out, "--json").stdout)["complete"]
    interrupted(source, tmp_path / "unfinished")
    shown = run("inspect", tmp_path / "unfinished").stdout
    assert re.search(r"unfinished, model-00001-of-.* missing; run the same convert command", shown)
    (out / "gptoss_stream.json").write_text("{")
    damaged = run("inspect", out)
    assert (damaged.returncode, damaged.stderr.count("\n")) == (2, 1)
    assert "its record is damaged" in damaged.stderr
