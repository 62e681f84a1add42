"""Progress of the long functions: the same callbacks everywhere, a bar, and what is logged."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys

import pytest
from runs import stop_run

import gptoss_stream
from gptoss_stream import OptionError

LONG = ("convert", "verify", "verify_checksums", "compare", "synth", "synth_adapter")


@pytest.fixture(scope="module")
def calls(checkpoints, tmp_path_factory):
    """A function from a name to a call of that function, which takes some time and options."""
    source, folder = checkpoints(layers=1), tmp_path_factory.mktemp("outputs")
    gptoss_stream.convert(source, folder / "converted", checksums=True)
    numbers = iter(range(1000))

    def call(name, **options):
        if name in ("convert", "verify", "compare"):
            other = folder / ("converted" if name != "convert" else str(next(numbers)))
            return getattr(gptoss_stream, name)(source, other, **options)
        if name == "verify_checksums":
            return gptoss_stream.verify_checksums(folder / "converted", **options)
        return getattr(gptoss_stream, name)(folder / str(next(numbers)), layers=1, **options)

    return call


def test_the_parameters_are_the_same():
    def parameters(name):
        found = inspect.signature(getattr(gptoss_stream, name)).parameters
        return [str(found[one]) for one in ("on_start", "on_progress", "progress")]

    assert parameters("convert")[2] == "progress: 'bool' = False"
    assert all(one.endswith("= None") for one in parameters("convert")[:2])
    assert {name for name in LONG if parameters(name) != parameters("convert")} == set()


@pytest.mark.parametrize("name", LONG)
def test_callbacks_and_the_bar_see_all_bytes(name, calls, capsys):
    started, done = [], []
    calls(name, on_start=lambda *sizes: started.append(sizes), on_progress=done.append)
    assert capsys.readouterr().err == ""
    ((total, before),) = started
    assert (sum(done), before) == (total, 0)
    assert total > 1000
    again = []
    calls(name, progress=True, on_progress=again.append)
    assert sum(again) == total
    shown = capsys.readouterr().err
    assert "100%" in shown
    assert shown.count("\n") == 1  # it is closed


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("callback", ["on_start", "on_progress"])
def test_what_cannot_be_called(callback, name, calls):
    for wrong in (3, "x", [print]):
        with pytest.raises(OptionError, match=f"{callback} .*: it must be a function"):
            calls(name, **{callback: wrong})


def test_the_bar_of_a_run_that_fails_is_closed(checkpoints, tmp_path, capsys):
    def fail(nbytes):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        gptoss_stream.convert(checkpoints(), tmp_path / "o", progress=True, on_progress=fail)
    assert capsys.readouterr().err.endswith("\n")


def test_a_resumed_run_is_logged(checkpoints, tmp_path, caplog):
    caplog.set_level(logging.INFO, "gptoss_stream")
    out, options = tmp_path / "out", {"max_shard_size": "500KB"}
    stop_run(checkpoints(), out, 2, **options)
    first = caplog.messages
    assert first[0].startswith(f"converting to {out}: 176 tensors, 1.5 MB in 3 shards, ")
    caplog.clear()
    report = gptoss_stream.convert(checkpoints(), out, **options)
    written = [one for one in first + caplog.messages if one.endswith(" is written")]
    assert sorted(written) == [f"{out}: shard {name} is written" for name in report.shards]
    assert f"resuming {out}: {len(first) - 1} of 3 shards are finished" in caplog.messages
    caplog.clear()
    gptoss_stream.verify(checkpoints(), out)
    assert caplog.messages == [f"verifying {out}: 176 tensors, 1.4 MB"]
    assert {record.levelname for record in caplog.records} == {"INFO"}


def test_nothing_is_shown_unless_it_is_asked_for(checkpoints, tmp_path):
    """Neither what is logged nor that nobody handles it."""
    code = "import sys, gptoss_stream as g; g.convert(sys.argv[1], sys.argv[2])"
    command = [sys.executable, "-c", code, str(checkpoints()), str(tmp_path / "out")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")
