"""The progress bar in a terminal, its lines elsewhere, and messages meanwhile."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
from runs import ROOT, run_in_process

import gptoss_stream
from gptoss_stream.cli import _progress

# Sleeps at the first callbacks, so that the run can be looked at, and warns at the third, as the
# library does of long waits.
SLOW = """
import itertools, logging, sys, time
from gptoss_stream.cli import _progress
from gptoss_stream.cli.main import main
advance, numbers = _progress._Bar.advance, itertools.count()
def slowly(bar, nbytes):
    advance(bar, nbytes)
    number = next(numbers)
    if number == 2:
        logging.getLogger("gptoss_stream.storage").warning("a long wait")
        time.sleep({pause})
    if number < 10:
        time.sleep(0.1)
_progress._Bar.advance = slowly
sys.exit(main())
"""


class Terminal:
    """A process with a terminal as its stderr, 100 columns wide."""

    def __init__(self, *arguments: object, pause: float = 0) -> None:
        self.end, process_end = pty.openpty()
        fcntl.ioctl(process_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        command = [sys.executable, "-c", SLOW.format(pause=pause), *map(str, arguments)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stderr=process_end, stdout=subprocess.DEVNULL
        )
        os.close(process_end)
        self.output = b""

    def read(self) -> bool:
        """Read what is there; return False at the end."""
        try:
            self.output += os.read(self.end, 100_000)
        except OSError:
            return False
        return True

    def read_until(self, text: str) -> None:
        while text.encode() not in self.output:
            assert self.read(), self.output

    def finish(self) -> int:
        while self.read():
            pass
        os.close(self.end)
        return self.process.wait(30)

    @property
    def lines(self) -> list[str]:
        """What the terminal shows in the end: a carriage return begins a line again."""
        lines = []
        for line in self.output.decode(errors="replace").replace("\r\n", "\n").split("\n"):
            shown: list[str] = []
            for part in line.split("\r"):
                cleared = part.startswith("\x1b[K")
                part = part.removeprefix("\x1b[K")
                shown = [*part, *([] if cleared else shown[len(part) :])]
            lines.append("".join(shown).rstrip())
        return [line for line in lines if line]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint of 17 chunks in 5 shards."""
    folder = tmp_path_factory.mktemp("source") / "source"
    return gptoss_stream.synth(folder, vocab_size=100_000, hidden_size=256, layers=1, seed=1)


@pytest.mark.parametrize("command", ["convert", "verify"])
def test_a_bar_with_phase_and_shards_is_cleared_at_the_end(command, source, tmp_path):
    options = ["--max-shard-size", "30MB"] if command == "convert" else []
    if command == "verify":
        gptoss_stream.convert(source, tmp_path / "out")
    terminal = Terminal(command, source, tmp_path / "out", *options)
    assert terminal.finish() == 0
    seen = terminal.output.decode(errors="replace")
    assert "MB/s" in seen
    assert "%|" in seen
    assert re.search(r"\d\d:\d\d<\d\d:\d\d", seen)  # time so far, and left
    if command == "convert":
        assert "writing, shard 1 of " in seen
        assert re.search(r"writing, shard (\d+) of \1:", seen)
    else:
        assert "comparing:" in seen
    assert terminal.lines == ["gptoss_stream: a long wait"]


def test_a_message_is_above_the_bar(source, tmp_path):
    terminal = Terminal("convert", source, tmp_path / "out", pause=1)
    terminal.read_until("a long wait")
    terminal.read_until("a long wait\r\n")
    while len(terminal.lines) < 2:
        assert terminal.read()
    message, bar = terminal.lines
    assert message == "gptoss_stream: a long wait"
    assert bar.startswith("writing, shard 1 of 1:")
    assert terminal.finish() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_clears_the_bar(number, source, tmp_path):
    """Also where the terminal shows ^C after it."""
    terminal = Terminal("convert", source, tmp_path / "out", pause=1)
    terminal.read_until("a long wait\r\n")
    if number == signal.SIGINT:
        shown = terminal.lines[-1]
        terminal.output += b"^C"  # what a terminal shows of the key
        assert len(shown) + 2 < 100
    terminal.process.send_signal(number)
    assert terminal.finish() == 128 + number
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert terminal.lines == [
        "gptoss_stream: a long wait",
        f"gptoss_stream: {word}; run the same command again to resume",
    ]


@pytest.mark.parametrize("options", [["--quiet"], ["--progress", "none"]])
def test_no_bar(options, source, tmp_path):
    terminal = Terminal("convert", source, tmp_path / "out", *options)
    assert terminal.finish() == 0
    assert terminal.output == b""


def test_a_bar_that_is_asked_for_where_there_is_no_terminal(source, tmp_path):
    done = run_in_process("convert", source, tmp_path / "out", "--progress", "bar")
    assert done.returncode == 0
    assert "writing, shard 1 of 1:" in done.stderr


@pytest.mark.parametrize("command", ["convert", "synth"])
def test_lines_where_there_is_no_terminal(command, source, tmp_path, monkeypatch):
    """Every 30 seconds, which is 0 here."""
    monkeypatch.setattr(_progress, "_LOG_SECONDS", 0.0)
    places = [source, tmp_path / "out"][command == "synth" :]
    done = run_in_process(command, *places, "--max-shard-size", "30MB")
    assert done.returncode == 0
    lines = done.stderr.splitlines()
    line = r"gptoss_stream: writing, shard \d+ of \d+: .* of .* \(\d+%\), .*B/s, \d:\d\d:\d\d left"
    assert lines
    assert all(re.fullmatch(line, one) for one in lines)
    assert "(100%)" in lines[-1]


def test_a_resumed_run_measures_its_own_rate(monkeypatch, capsys):
    clock = iter([100.0, 110.0, 140.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    lines = _progress._Lines("writing")
    lines.start(10_000_000, 4_000_000)
    lines.advance(1_000_000)  # after 10 seconds: nothing is printed
    lines.advance(1_000_000)
    assert capsys.readouterr().err == (
        "gptoss_stream: writing: 6.0 MB of 10.0 MB (60%), 50 kB/s, 0:01:20 left\n"
    )


def test_verbose_prints_what_is_logged(checkpoints, tmp_path):
    done = run_in_process("convert", checkpoints(), tmp_path / "out", "-v")
    assert "gptoss_stream: converting to " in done.stderr
    assert "shard model.safetensors is written\n" in done.stderr
    done = run_in_process("verify", checkpoints(), tmp_path / "out")
    assert done.stderr == ""
    assert logging.getLogger("gptoss_stream").level == logging.WARNING
