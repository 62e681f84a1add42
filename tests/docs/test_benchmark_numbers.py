"""What the documentation says of the benchmarks is what `docs/benchmarks.json` has."""

from __future__ import annotations

import json
import re

import everything
import pytest
import tables
from runs import ROOT

FOUND = json.loads((ROOT / "docs/benchmarks.json").read_text())
PLACEHOLDER = re.compile(r"^<!-- benchmark: (.+) -->$", re.MULTILINE)


def pair(results, name="hf-mxfp4 to transformer-lens"):
    """The medians of a pair of formats."""
    return next(r for r in tables.of_pairs(results) if f"{r['source']} to {r['target']}" == name)


def first_logits(way):
    return lambda results: results[way]["median"]["open to first logits"]


def samples(place):
    """The peak of a program, in order of time: the slower one is the other tool."""

    def peak(results):
        series = sorted(results["samples"].values(), key=lambda one: one["wall"])
        return series[place]["peak_rss"]

    return peak


def share_of_time(results):
    """The processor's time with numba, in per cent of that without; None if that is missing."""
    row = pair(results, "hf-mxfp4 to hf")
    without = row.get("cpu_without_numba")
    return None if without is None else 100 * row["cpu"] / without


def merging(results):
    return max(result["rows"]["convert and merge"]["peak_rss"] for result in results)


PEAKS = r"flat near (\d+) MB", r"TransformerLens up to (\d+) GB"
NUMBERS = [
    ("README.md", r"first logits (\d+) s after", "inference-20b", first_logits("direct"), 1),
    ("README.md", r"bfloat16 folder takes (\d+) s", "inference-20b", first_logits("bfloat16"), 1),
    *(
        (page, pattern, "memory", samples(place), unit)
        for page in ("README.md", "docs/index.md", "docs/benchmarks.md")
        for place, (pattern, unit) in enumerate(zip(PEAKS, (1e6, 1e9), strict=True))
    ),
    ("docs/index.md", r"\((\d+) MB with 3 threads", "memory", samples(0), 1e6),
    ("docs/index.md", r"20b writes ([\d.]+) GB", "conversions-20b",
     lambda results: pair(results)["bytes_out"], 1e9),
    ("docs/index.md", r"took (\d+) s on", "conversions-20b",
     lambda results: pair(results)["wall"], 1),
    ("docs/quickstart/transformer-lens.md", r"\(([\d.]+) GB\nto convert two", "memory",
     samples(1), 1e9),
    ("docs/quickstart/hub-to-hub.md", r"two shards \(([\d.]+) GB", "remote",
     lambda results: results["peak_disk"], 1e9),
    ("docs/convert.md", r"in some (\d0) % of the processor", "conversions-numpy", share_of_time, 1),
    ("docs/adapters.md", r"about (\d+0) MB of memory", "adapters-peft", merging, 1e6),
    ("docs/inference.md", r"([\d.]+) GB in MXFP4", "conversions-20b",
     lambda results: pair(results)["bytes_in"], 1e9),
    ("docs/inference.md", r"converts to \(([\d.]+) GB", "conversions-20b",
     lambda results: pair(results)["bytes_out"], 1e9),
]  # fmt: skip
"""A page, the text around a number, the section that it is from, its value there, and its unit.
After "some" and "about" it is rounded to tens."""


def rounded(value: float, text: str, before: str) -> str:
    """Return a value with as many digits as a text has."""
    if re.search(r"(some|about) $", before):
        return f"{round(value, -1):.0f}"
    return f"{value:.{len(text.partition('.')[2])}f}"


@pytest.mark.parametrize(("page", "pattern", "section", "value", "unit"), NUMBERS)
def test_numbers_in_sentences_are_those_of_the_benchmarks(page, pattern, section, value, unit):
    text = (ROOT / page).read_text()
    (match,) = re.finditer(pattern, text)
    entry = FOUND["sections"].get(section)
    if entry is None:
        pytest.skip(f"{section} is not measured yet")
    said = match[1]
    number = value(entry["results"])
    if number is None:
        pytest.skip(f"{section} has not all measurements yet")
    expected = rounded(number / unit, said, text[: match.start(1)])
    assert said == expected, f"{page}: write {expected} for {said} in {match[0]!r}"


def test_each_section_is_shown_and_each_table_has_a_section():
    shown = {
        name for page in ROOT.glob("docs/*.md") for name in PLACEHOLDER.findall(page.read_text())
    }
    assert shown - {"machine"} == everything.SECTIONS.keys() - {"memory"}  # that is a picture


@pytest.mark.parametrize("section", [*everything.SECTIONS, "machine"])
def test_a_section_that_is_not_measured_is_left_out_with_a_sentence(section):
    text = tables.section({"sections": {}}, section)
    assert text.startswith(("Not measured on this machine yet.", "The machine is not known."))


@pytest.mark.parametrize("section", [name for name in FOUND["sections"] if name != "memory"])
def test_tables_say_how_and_when_they_were_measured(section):
    table, caption = tables.section(FOUND, section).rsplit("\n\n", 1)
    assert table.startswith("| ")
    assert re.fullmatch(r"`\w+\.py .+`, \d{4}-\d\d-\d\d(, commit [0-9a-f]+\+?)?", caption)
