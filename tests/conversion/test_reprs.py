"""What public objects look like, at the prompt and in a notebook."""

from __future__ import annotations

import inspect
import pydoc
from html.parser import HTMLParser

import pytest

import gptoss_stream
from gptoss_stream import DType, VerificationError
from gptoss_stream.loading.output_info import read_output_info
from gptoss_stream.storage.http_folder import HttpFolder
from gptoss_stream.storage.object_store import ObjectStore
from gptoss_stream.tensors.html_table import TensorRow, html_table
from gptoss_stream.verification.differences import Difference, Verification

LONG = "a-very-long-name-" * 20


@pytest.fixture(scope="module")
def objects(checkpoints, tmp_path_factory):
    """An object of each public class that has some, by class; also of long names."""
    folder = tmp_path_factory.mktemp("objects") / ("a" * 200)
    source = gptoss_stream.synth(folder / "source", layers=2)
    report = gptoss_stream.convert(source, folder / "output")
    plan = gptoss_stream.plan(
        source, selection={"include": [f"{LONG}{n}" for n in range(9)] + ["*"]}
    )
    weights = gptoss_stream.open_state_dict(source, to="hf", dtype="fp32")
    comparison = gptoss_stream.compare(source, folder / "output")
    found = [
        *(report, plan, weights, comparison, comparison.relations[0], plan.shards[0], plan.model),
        *(plan.info, plan.info.shards[0], plan.selection, weights.get_slice("lm_head.weight")),
        *(plan.shards[0].tensors[0], plan.info.tensors["lm_head.weight"], DType.BF16),
        gptoss_stream.verify(source, folder / "output"),
        gptoss_stream.Selection(range(1000), "0-3", "norms", [LONG], [LONG]),
        gptoss_stream.Adapter(folder, 0.5, "rank_major"),
        Difference("value", LONG, LONG, 1.0, 2.0, (0, 1)),
        gptoss_stream.open_location(source),
        read_output_info(gptoss_stream.open_location(folder / "output")),
        *(HttpFolder("https://user:secret@host/a?secret"), ObjectStore(f"memory://{LONG}")),
    ]
    return {type(one): one for one in found}


def test_reprs_are_one_short_line(objects):
    reprs = [repr(one) for one in objects.values()]
    assert [text for text in reprs if len(text) >= 200 or "\n" in text or " at 0x" in text] == []
    assert [text for text in reprs if "secret" in text] == []
    public = {getattr(gptoss_stream, name) for name in gptoss_stream._MODULES}
    classes = {one for one in public if inspect.isclass(one)}
    errors = {one for one in classes if issubclass(one, Exception)}
    protocols = {one for one in classes if getattr(one, "_is_protocol", False)}
    assert classes - errors - protocols - {gptoss_stream.Resumption} <= objects.keys()


def test_what_reprs_say(objects):
    by_name = {kind.__name__: repr(one) for kind, one in objects.items()}
    assert by_name["StateDict"].startswith("<StateDict: 37 tensors, ")
    assert ", F32, hf, in /" in by_name["StateDict"]
    assert by_name["Report"].startswith("<Report: 90 tensors, ")
    assert by_name["Plan"].startswith("<Plan: 90 tensors, ")
    assert by_name["Verification"].startswith("<Verification: equal, 90 tensors and ")
    assert by_name["HttpFolder"] == "<HttpFolder: https://host/a>"
    assert by_name["RawTensor"] == (
        "<RawTensor: lm_head.weight, BF16, [1009, 96] in model.safetensors>"
    )


def test_a_state_dict_as_it_is_stored(checkpoints):
    with gptoss_stream.open_state_dict(checkpoints()) as weights:
        assert repr(weights).startswith("<StateDict: 79 tensors, 896 kB, BF16, U8, as stored, in ")


class Cells(HTMLParser):
    """The texts of a table's cells; refuses elements that are left open."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert tag in ("table", "caption", "tr", "th", "td")
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] in ("th", "td"):
            self.rows[-1].append(data)


def test_tables_for_notebooks(checkpoints):
    plan = gptoss_stream.plan(checkpoints())
    rows = Cells(plan._repr_html_()).rows
    assert rows[0] == ["tensors", "number", "dtype", "shape", "size"]
    assert ["blocks.*.mlp.experts.*.W_in.weight", "20", "BF16", "[64, 96]", "246 kB"] in rows
    assert sum(int(row[1]) for row in rows[1:]) == plan.num_tensors
    with gptoss_stream.open_state_dict(checkpoints(), dtype="float32") as weights:
        rows = Cells(weights._repr_html_()).rows
    assert ["model.norm.weight", "1", "F32", "[96]", "384 B"] in rows
    assert sum(int(row[1]) for row in rows[1:]) == len(weights)


def test_a_table_escapes_names_and_is_small():
    name = '<script>alert("&")</script>.0'
    rows = [TensorRow(f"{name}.{n}", "F32", (n,), 4 * n) for n in range(2)]
    text = html_table(name, [*rows, *(TensorRow(f"a{n}", "U8", (), 1) for n in range(99))])
    assert "<script" not in text
    found = Cells(text).rows
    assert found[1] == ['<script>alert("&")</script>.*.*', "2", "F32", "[0] or [1]", "4 B"]
    assert found[-1] == ["… and 60 kinds more"]
    assert len(found) == 42


def test_a_verification_is_true_if_equal(checkpoints, tmp_path):
    gptoss_stream.convert(checkpoints(), tmp_path / "out", checksums=True)
    result = gptoss_stream.verify(checkpoints(), tmp_path / "out")
    assert result
    assert result.raise_for_differences() is None
    (tmp_path / "out/config.json").unlink(missing_ok=True)
    (tmp_path / "out/tl_config.json").write_text("{\n}")
    for result in (
        gptoss_stream.verify(checkpoints(), tmp_path / "out"),
        gptoss_stream.verify_checksums(tmp_path / "out"),
    ):
        assert not result
        with pytest.raises(VerificationError, match=r"out: 1 difference: .*tl_config\.json"):
            result.raise_for_differences()


def test_many_differences_are_one_line():
    differences = tuple(Difference("file", f"{LONG}\n{n}", "", "x" * 999, "y") for n in range(9))
    result = Verification("out", "hf", {}, 1, 0, 2, differences)
    with pytest.raises(VerificationError) as caught:
        result.raise_for_differences()
    assert str(caught.value).startswith("out: 9 differences: file: a-very")
    assert str(caught.value).endswith("; …")
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def test_help_shows_the_public_interface():
    text = pydoc.plain(pydoc.render_doc(gptoss_stream))
    assert [name for name in gptoss_stream._MODULES if name not in text] == []
    assert dir(gptoss_stream) == sorted(gptoss_stream.__all__)
