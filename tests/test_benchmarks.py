"""What the benchmarks compute from measurements. Nothing is timed, and no test needs root."""

from __future__ import annotations

import adapters
import floor
import formats
import growth
import memory
import numpy as np
import peers
import pictures
import pytest
import tables
import trials
from measure import Failed, Measured
from safetensors.numpy import save_file

import gptoss_stream


@pytest.mark.parametrize("source_format", gptoss_stream.formats.names())
def test_floor_reads_what_a_conversion_reads(checkpoints, source_format):
    source = checkpoints(format=source_format, max_shard_size="500KB")
    planned = gptoss_stream.plan(source)
    reads = trials.reads(planned)
    assert sum(end - begin for _, begin, end in reads) == planned.source_nbytes
    assert len(reads) == len(planned.info.shards)  # no holes between tensors: one range per file


def test_floor_takes_each_chunk_once_and_mixes_them():
    size = 3 * floor.CHUNK + 5
    tasks = floor.tasks([("one", 100, 100 + size), ("other", 8, 9)], 6 * floor.CHUNK)
    read = [(file, end - begin) for file, begin, end in tasks if file is not None]
    assert read == [("one", floor.CHUNK)] * 3 + [("one", 5), ("other", 1)]
    written = [begin for file, begin, _ in tasks if file is None]
    assert written == [i * floor.CHUNK for i in range(6)]
    assert len({file is None for file, _, _ in tasks[:3]}) == 2


def test_ratios_are_to_the_faster_floor_of_the_same_turn():
    walls = [
        {"floor, buffered": 4.0, "floor, direct": 2.0, "convert": 3.0, "convert, limited": 6.0},
        {"floor, buffered": 5.0, "floor, direct": 9.0, "convert": 5.0, "convert, limited": 5.0},
        {"floor, buffered": 1.0, "floor, direct": 2.0, "convert": 2.0, "convert, limited": 3.0},
    ]
    turns = [{name: Measured(wall, 1.0, 7) for name, wall in turn.items()} for turn in walls]
    rows = trials.summary(turns)
    assert rows["floor"]["walls"] == [2.0, 5.0, 1.0]
    assert rows["convert"]["to_floor"] == 1.5
    assert rows["convert, limited"]["to_unlimited"] == 1.5


def test_line_and_its_largest_residual():
    rows = [
        {"layers": n, "bytes_out": n * 10**9, "wall": 2.0 + 3.0 * n + off}
        for n, off in ((1, 0.0), (2, 0.5), (3, -1.0), (4, 0.5))
    ]
    fit = growth.line(rows)
    assert fit["intercept"] == pytest.approx(2.0)
    assert fit["seconds_per_byte"] == pytest.approx(3e-9)
    assert fit["largest_residual"] == pytest.approx(-1.0)
    assert fit["layers_of_largest"] == 3
    assert growth.line(rows[:1]) is None


def test_output_of_a_peer_is_compared_byte_for_byte(tmp_path):
    ours = {"a": np.arange(6, dtype=np.int16).reshape(2, 3), "b": np.ones(2, np.float32)}
    others = {
        "same": ours,
        "value": {**ours, "b": np.array([1, 1.5], np.float32)},
        "shape": {**ours, "a": ours["a"].reshape(3, 2)},
        "name": {"a": ours["a"], "c": ours["b"]},
    }
    for name, tensors in {"ours": ours, **others}.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    found = {
        name: peers.differences(peers.stored(tmp_path / "ours"), peers.stored(tmp_path / name))
        for name in others
    }
    assert found == {"same": [], "value": ["b"], "shape": ["a"], "name": ["b", "c"]}
    assert "as many bytes" in peers.compared(tmp_path / "ours", tmp_path / "name", False)


def test_a_merge_is_compared_with_the_conversion_of_the_same_turn():
    walls = [(2.0, 3.0), (4.0, 4.0), (1.0, 2.0)]
    turns = [
        {
            adapters.MERGE: Measured(merge, 3.0, 9),
            adapters.PLAIN: Measured(plain, 1.0, 7),
        }
        for plain, merge in walls
    ]
    rows = adapters.summary(turns, None)
    assert [*rows] == [adapters.PLAIN, adapters.MERGE]
    assert rows[adapters.PLAIN]["wall"] == 2.0
    assert rows[adapters.MERGE]["to_plain"] == 1.5
    assert rows[adapters.MERGE]["peak_rss"] == 9


def test_values_that_peft_rounds_the_other_way_are_counted(tmp_path):
    ours = {"a": np.arange(6, dtype=np.uint16).reshape(2, 3), "b": np.ones(2, np.uint16)}
    others = {
        "same": (ours, "2 tensors, 2 equal to ours; 0 of 8 values differ (0.0e+00)"),
        "value": (
            {**ours, "b": np.array([1, 2], np.uint16)},
            "2 tensors, 1 equal to ours; 1 of 8 values differ (1.2e-01)",
        ),
        "shape": ({**ours, "a": ours["a"].T.copy()}, "1 of 2 tensors are not ours, such as a"),
        "name": ({"a": ours["a"]}, "1 of 1 tensors are not ours, such as b"),
    }
    for name, (tensors, _) in {"ours": (ours, ""), **others}.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    for name, (_, text) in others.items():
        assert adapters.compared(tmp_path / "ours", tmp_path / name) == text


def test_a_merge_that_fails_is_noted_in_one_line():
    """And does not end the benchmark, also if it has failed in one turn of several."""
    error = Failed(["convert"], 1, "Traceback:\n  …\nerror: no adapter\n")
    note = adapters.failure(error)
    assert note == "failed with 1: error: no adapter"
    plain = Measured(2.0, 1.0, 7)
    turns = [{adapters.PLAIN: plain, adapters.MERGE: plain}, {adapters.PLAIN: plain}]
    rows = adapters.summary(turns, note)
    assert rows[adapters.MERGE] == {"note": note}
    peft = {adapters.PEFT: adapters.trials.medians([plain]) | {"note": "equal"}}
    sizes = {"bytes_in": 1, "bytes_out": 2, "adapter_bytes": 3}
    text = tables.adapters([{"target": "hf", **sizes, "rows": rows | peft}])
    cells = [[cell.strip() for cell in line.split("|")][2:-1] for line in text.splitlines()[-2:]]
    assert cells[0][1:] == [*["–"] * 5, note]
    assert cells[1][1] == "2.0 s"
    assert cells[1][-1] == "equal"


def run_of(wall: float) -> dict[str, float]:
    return {"wall": wall, "cpu": 2 * wall, "peak_rss": 10**8}


def conversions(turns: list[dict[str, dict[str, float]]]) -> dict:
    """What formats.py finds for one pair, with a wall time for each command of each turn."""
    runs = [{name: run_of(wall) for name, wall in turn.items()} for turn in turns]
    pair = {"source": "hf", "target": "hf", "layers": 1, "bytes_in": 10**9, "bytes_out": 4 * 10**9}
    return {
        "arguments": {"preset": "20b"},
        "pairs": {"hf to hf": pair | {"floor": "hf"}},
        "turns": [{"source": "hf", "layers": 1, "runs": {"hf": one}} for one in runs],
    }


def test_medians_of_pairs_are_of_ratios_within_a_turn():
    first = {"floor, buffered": 4.0, "floor, direct": 2.0, "convert": 3.0, "convert, limited": 6.0}
    later = [{"floor, direct": f, "convert": 6.0, "convert, limited": 6.0} for f in (6.0, 2.0)]
    later[1]["floor, direct, after"] = 4.0  # the mean of both is 3
    [row] = tables.of_pairs(conversions([first, *later]))
    assert (row["wall"], row["floor"], row["to_floor"]) == (6.0, 3.0, 1.5)
    assert row["to_unlimited"] == 1.0
    assert "to_floor_without_numba" not in row
    lines = tables.conversions(conversions([first, *later])).splitlines()
    assert lines[-1] == "Turns: 3."
    assert lines[-3].split(" | ") == [
        "| `hf` to `hf`", "1.0, 4.0 GB", "6.0 s  ", "3.0 s", "1.50          ",
        "1.00                       ", "3.00 s            ", "100 MB   |",
    ]  # fmt: skip


def test_a_floor_that_was_much_slower_is_left_out_of_later_turns():
    turns = conversions([{"floor, buffered": 2.5, "floor, direct": 2.0}])["turns"]
    assert formats.ways([]) == formats.WAYS
    assert formats.ways(turns) == ["direct"]
    turns[0]["runs"]["hf"]["floor, buffered"]["wall"] = 2.3
    assert formats.ways(turns) == ["buffered", "direct"]


def test_pairs_of_the_same_sizes_share_a_floor():
    sizes = {"a": (100, 300), "b": (100, 100), "c": (100, 302), "d": (102, 300)}
    found = formats.owners({t: {"bytes_in": i, "bytes_out": o} for t, (i, o) in sizes.items()})
    assert found == {"a": "a", "b": "b", "c": "a", "d": "d"}


def test_the_same_numbers_give_the_same_pictures(tmp_path):
    samples = {"wall": 1.0, "peak_rss": 10**8, "seconds": [0.0, 0.5], "megabytes": [0, 100]}
    both = {memory.OURS: samples, memory.PEER.title: samples}
    keys = ("open to first logits", "64 tokens, warm", "256 tokens, warm", "a new token")
    results = {
        "memory": {"preset": "20b", "layers": 1, "samples": both},
        "conversions-20b": conversions([{"floor, direct": 1.0, "convert": 1.5}]),
        "inference-20b": {
            way: {"median": dict.fromkeys(keys, 1.0)} for way in ("direct", "bfloat16")
        },
    }
    found = {"sections": {name: {"results": result} for name, result in results.items()}}
    drawn = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        pictures.draw(found, folder)
        drawn.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert drawn[0] == drawn[1]
    names = ("inference", "memory", "throughput")
    assert sorted(drawn[0]) == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    assert b"<text" in drawn[0]["memory.svg"]
