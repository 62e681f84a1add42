"""Files and reports say which version of their structure they have; those without it are read."""

from __future__ import annotations

import json

import pytest
from runs import stop_run
from shards import edit_json

import gptoss_stream
from gptoss_stream.cli.main import main
from gptoss_stream.errors import OutputError
from gptoss_stream.loading.output_info import read_output_info
from gptoss_stream.tensors.encoding_loss import EncodingLoss
from gptoss_stream.writing.encoding_report import losses_as_text, parse_losses

RECORD, RUN, REPORT = "gptoss_stream.json", ".gptoss_stream/run.json", "mxfp4_encoding.json"


@pytest.fixture(scope="module")
def source(checkpoints, tmp_path_factory):
    """A checkpoint in floats, so that writing MXFP4 encodes them."""
    folder = tmp_path_factory.mktemp("floats")
    gptoss_stream.convert(checkpoints(layers=1), folder, to="hf")
    return folder


@pytest.fixture
def output(source, tmp_path):
    gptoss_stream.convert(source, tmp_path / "output", to="hf-mxfp4")
    return tmp_path / "output"


def test_files_and_reports_have_a_schema(source, output, tmp_path, capsys):
    report = gptoss_stream.convert(source, output, to="hf-mxfp4")  # it was finished before
    found = [json.loads((output / name).read_text()) for name in (RECORD, REPORT)]
    found += [report.as_dict(), gptoss_stream.verify(source, output).as_dict()]
    found += [gptoss_stream.compare(source, output).as_dict()]
    found += [read_output_info(gptoss_stream.open_location(output)).as_dict()]
    commands = ["plan", str(source)], ["inspect", str(source)], ["formats"]
    for command in (*commands, ["show", str(source), "lm_head.weight"]):
        assert main([*command, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    stop_run(source, tmp_path / "run", 0, to="hf-mxfp4")
    found.append(json.loads((tmp_path / "run" / RUN).read_text()))
    assert [one["schema"] for one in found] == [1] * len(found)


def test_an_output_without_a_schema_is_read(source, output):
    for name in (RECORD, REPORT):
        edit_json(output / name, lambda record: record.pop("schema"))
    assert read_output_info(gptoss_stream.open_location(output)).complete
    assert gptoss_stream.verify(source, output).equal
    assert len(gptoss_stream.open_state_dict(output, to="hf"))
    report = gptoss_stream.convert(source, output, to="hf-mxfp4")
    assert report.bytes_resumed == report.bytes_out
    assert report.mxfp4["total"]["blocks"] > 0


def test_a_run_without_a_schema_is_resumed(source, tmp_path):
    """Its record stays as it is: array tasks of one run compare it."""
    out, options = tmp_path / "run", {"to": "hf-mxfp4", "max_shard_size": "100KB"}
    stop_run(source, out, 0, **options)
    edit_json(out / RUN, lambda state: state.pop("schema"))
    expected = json.loads((out / RUN).read_text())
    assert gptoss_stream.convert(source, out, **options).complete
    assert json.loads((out / RECORD).read_text()) == expected
    assert gptoss_stream.verify(source, out).equal


@pytest.mark.parametrize("schema", [2, "1.5", None, []])
def test_another_schema_is_refused(schema, source, output):
    edit_json(output / RECORD, lambda record: record.update(schema=schema))
    for function in (
        lambda: read_output_info(gptoss_stream.open_location(output)),
        lambda: gptoss_stream.verify(source, output),
        lambda: gptoss_stream.convert(source, output, to="hf-mxfp4"),
        lambda: gptoss_stream.convert(source, output, to="hf-mxfp4", overwrite=True),
    ):
        with pytest.raises(OutputError, match=r"another version of gptoss_stream \(schema "):
            function()


def test_losses_that_earlier_versions_kept():
    losses = {"a": EncodingLoss(blocks=3, squared_norm=1.0)}
    text = json.loads(losses_as_text(losses))
    assert parse_losses(json.dumps(text).encode()) == losses
    assert parse_losses(json.dumps(text["losses"]).encode()) == losses
    assert parse_losses(json.dumps({**text, "schema": 2}).encode()) == {}
