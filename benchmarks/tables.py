"""Tables of what the benchmarks measured, as Markdown: for the terminal and for the documentation.

Nothing here measures, or needs more than the measurements.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

FLOORS = ("floor, buffered", "floor, direct")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose columns are aligned also as text."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    line = "|".join("-" * (width + 2) for width in widths)
    body = [" | ".join(f"{c:{w}}" for c, w in zip(r, widths, strict=True)) for r in (head, *rows)]
    return "\n".join([f"| {body[0]} |", f"|{line}|", *(f"| {row} |" for row in body[1:])])


def of_pairs(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the medians of each pair of formats that `formats.py` measured.

    The floor of a turn is the faster way of writing it, before and after the pairs that share it.
    Ratios are within a turn.

    Returns:
        For each pair its sizes and, where they were measured: `wall`, `floor`, `to_floor`,
        `to_unlimited`, `to_floor_without_numba`, `cpu`, `cpu_without_numba` and `peak_rss`.
    """
    rows = []
    for pair in found["pairs"].values():
        turns = [
            (turn["runs"][pair["target"]], turn["runs"][pair["floor"]])
            for turn in found["turns"]
            if (turn["source"], turn["layers"]) == (pair["source"], pair["layers"])
        ]
        if not turns:
            continue
        runs = [turn for turn, _ in turns]
        floors = [_floor(of) for _, of in turns]
        walls = [run["convert"]["wall"] for run in runs]
        row = {key: pair[key] for key in ("source", "target", "layers", "bytes_in", "bytes_out")}
        row |= {
            "turns": len(turns),
            "wall": statistics.median(walls),
            "floor": statistics.median(floors),
            "to_floor": statistics.median(w / f for w, f in zip(walls, floors, strict=True)),
            "cpu": statistics.median(run["convert"]["cpu"] for run in runs),
            "peak_rss": max(one["peak_rss"] for run in runs for one in _conversions(run)),
        }
        for name, key, bases in (
            ("convert, limited", "to_unlimited", walls),
            ("without numba", "to_floor_without_numba", floors),
        ):
            pairs = zip(runs, bases, strict=True)
            ratios = [run[name]["wall"] / base for run, base in pairs if name in run]
            if ratios:
                row[key] = statistics.median(ratios)
        without = [run["without numba"]["cpu"] for run in runs if "without numba" in run]
        if without:
            row["cpu_without_numba"] = statistics.median(without)
        rows.append(row)
    return rows


def _floor(runs: Mapping[str, Any]) -> float:
    way = min((way for way in FLOORS if way in runs), key=lambda way: float(runs[way]["wall"]))
    names = way, f"{way}, after"
    return statistics.mean(float(runs[name]["wall"]) for name in names if name in runs)


def _conversions(runs: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [run for name, run in runs.items() if not name.startswith("floor")]


def conversions(found: Mapping[str, Any]) -> str:
    """Return a row for each pair of formats; a dash stands for what was not measured."""
    rows = of_pairs(found)
    optional = {
        "limited, ratio to unlimited": "to_unlimited",
        "without numba, ratio to floor": "to_floor_without_numba",
    }
    optional = {head: key for head, key in optional.items() if any(key in row for row in rows)}
    head = ["", "in, out", "convert", "floor", "ratio to floor", *optional]
    head += ["CPU per GB written", "peak RSS"]
    body = []
    for row in rows:
        cells = [
            f"`{row['source']}` to `{row['target']}`",
            _sizes(row),
            f"{row['wall']:.1f} s",
            f"{row['floor']:.1f} s",
            f"{row['to_floor']:.2f}",
            *(_ratio(row.get(key)) for key in optional.values()),
        ]
        cells += [f"{row['cpu'] / row['bytes_out'] * 1e9:.2f} s", f"{row['peak_rss'] / 1e6:.0f} MB"]
        body.append(cells)
    turns = {row["turns"] for row in rows}
    return f"{markdown(head, body)}\n\nTurns: {' to '.join(str(n) for n in sorted(turns))}."


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def peers(found: Sequence[Mapping[str, Any]]) -> str:
    """Return a row for each conversion, and for other tools that make the same."""
    head = ["", "", "time", "ratio to ours", "CPU", "peak RSS", "its tensors"]
    body = []
    for result in found:
        pair = f"`{result['source']}` to `{result['target']}`"
        for row in result["rows"].values():
            cells = [pair, row["title"]]
            if "wall" in row:
                cells += [f"{row['wall']:.1f} s", f"{row['to_ours']:.1f}", f"{row['cpu']:.1f} s"]
                cells.append(_memory(row["peak_rss"]))
            else:
                cells += ["–"] * 4
            body.append([*cells, row.get("came_to", "")])
    return markdown(head, body)


def growth(found: Mapping[str, Any]) -> str:
    """Return how time and memory grow with the layers, and a table for limits of memory."""
    parts = []
    if found["sizes"]:
        head = ["layers", "in, out", "time", "off the line", "CPU", "peak RSS"]
        body = [
            [
                f"{row['layers']}",
                _sizes(row),
                f"{row['wall']:.1f} s",
                f"{row['residual']:+.1f} s" if "residual" in row else "–",
                f"{row['cpu']:.1f} s",
                _memory(row["peak_rss"]),
            ]
            for row in found["sizes"]
        ]
        parts.append(markdown(head, body))
    fit = found["line"]
    if fit:
        parts.append(
            f"The line is {fit['intercept']:.2f} s + {fit['seconds_per_byte'] * 1e9:.3f} s for "
            f"each GB written; the largest distance from it is "
            f"{abs(fit['largest_residual_share']):.1%} of the time."
        )
    if found["limits"]:
        head = ["limit", "time", "ratio to no limit", "CPU", "peak RSS"]
        body = []
        for row in found["limits"]:
            limit = "none" if row["limit"] is None else _memory(row["limit"])
            cells = [f"{limit} ({row['failed']} failed)" if row["failed"] else limit]
            if "wall" in row:
                cells += [f"{row['wall']:.1f} s", f"{row['to_unlimited']:.2f}"]
                cells += [f"{row['cpu']:.1f} s", _memory(row["peak_rss"])]
            else:
                cells += ["–"] * 4
            body.append(cells)
        parts.append(markdown(head, body))
    return "\n\n".join(parts)


def adapters(found: Sequence[Mapping[str, Any]]) -> str:
    """Return a row for each conversion without and with an adapter, and for PEFT."""
    head = ["`hf-mxfp4` to", "", "time", "ratio", "CPU", "CPU per GB written", "peak RSS", ""]
    body = []
    for result in found:
        target = f"`{result['target']}` ({result['bytes_out'] / 1e9:.1f} GB)"
        for name, row in result["rows"].items():
            cells = [target, name]
            if "wall" in row:
                per_byte = row["cpu"] / result["bytes_out"]
                cells += [f"{row['wall']:.1f} s", _ratio(row.get("to_plain"))]
                cells += [f"{row['cpu']:.1f} s", f"{per_byte * 1e9:.2f} s"]
                cells.append(_memory(row["peak_rss"]))
            else:
                cells += ["–"] * 5
            body.append([*cells, row.get("note", "")])
    return markdown(head, body)


WAYS = {
    "direct": "`load_hf_model`",
    "hooked": "`load_hooked_transformer`",
    "bfloat16": "transformers, bfloat16 folder",
    "direct, without numba": "`load_hf_model` without numba (once)",
    "direct, limited": "`load_hf_model`, limited memory (once)",
    "bfloat16, limited": "bfloat16 folder, limited memory (once)",
    "offload": "bfloat16 folder, left on the disk by accelerate (once)",
    "dequantized": "transformers, MXFP4 dequantized in memory (once)",
}
"""The ways to run a model that `inference.py` measures."""


def inference(found: Mapping[str, Any]) -> str:
    """Return a row for each way to run a model, with ratios to bfloat16."""
    keys = ("open to first logits", "64 tokens, warm", "256 tokens, warm", "a new token")
    seconds = [key for key in keys if any(key in row["median"] for row in found.values())]
    body, after = [], ""
    for name, title in WAYS.items():
        if name not in found:
            continue
        row, cells = found[name], [title]
        for key in seconds:
            value, ratio = row["median"].get(key), row.get("to bfloat16", {}).get(key)
            text = "–" if value is None else f"{value:.2f} s"
            cells.append(text if ratio is None or name == "bfloat16" else f"{text} ({ratio:.2f})")
        sizes = [_memory(row["median"][key]) for key in ("anonymous", "peak RSS")]
        body.append([*cells, *sizes])
        if "to reading" in row:
            after = (
                f"\n\nA plain loop reads its files in {row['median']['reading']:.1f} s. Opening to "
                f"first logits takes {row['to reading']:.2f} times that."
            )
    return markdown(["", *seconds, "anonymous memory", "peak RSS"], body) + after


def remote(found: Mapping[str, Any]) -> str:
    """Return what a conversion from a Hub to a Hub took."""
    head = ["read, of what is needed", "written", "time", "CPU", "peak RSS", "most disk"]
    shards = "1 shard" if found["shards"] == 1 else f"{found['shards']} shards"
    cells = [
        f"{found['sent'] / 1e9:.2f} GB, {found['traffic']:.4f}",
        f"{found['written'] / 1e9:.2f} GB in {shards}",
        f"{found['wall']:.0f} s",
        f"{found['cpu']:.0f} s",
        _memory(found["peak_rss"]),
        f"{found['peak_disk'] / 1e9:.1f} GB",
    ]
    return markdown(head, [cells])


def opening(found: Sequence[Mapping[str, Any]]) -> str:
    """Return the time and memory in which converted folders open."""
    body = [
        [
            f"{row['layers']}",
            f"{row['bytes'] / 1e9:.1f} GB",
            f"{row['seconds']:.1f} s",
            f"{row['anonymous'] / 1e6:.1f} MB",
        ]
        for row in found
    ]
    return markdown(["layers", "folder", "time", "anonymous memory"], body)


def cores(found: Mapping[str, Any]) -> str:
    """Return what conversions take by one thread, trials beside the model, and its predictions."""
    head = ["for each GB written", "CPU", "lock held", "lock taken", "read", "memory traffic"]
    body = [
        [
            row["case"],
            f"{row['user'] + row['system']:.2f} s",
            f"{row['lock']:.3f} s",
            f"{row['holds']:,.0f} times",
            f"{row['read']:.2f} GB",
            f"{row['traffic']:.1f} GB",
        ]
        for row in found["costs"]
    ]
    parts = [markdown(head, body)]
    rows: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in found["trials"]:
        key = row["case"], row["processors"], row["read"], row["write"]
        rows.setdefault(key, []).append(row)
    threads = ", ".join(str(row["threads"]) for row in next(iter(rows.values())))
    head = ["GB/s", "processors", "disk reads, writes", f"{threads} threads", "predicted"]
    body = [
        [
            case,
            f"{processors:g}",
            f"{read or '–'}, {write or '–'} GB/s",
            *(", ".join(f"{r[key]:.2f}" for r in some) for key in ("measured", "predicted")),
        ]
        for (case, processors, read, write), some in rows.items()
    ]
    parts.append(markdown(head, body))
    head = ["predicted, GB/s", "processors", "by default", "a thread each, and one", "at best"]
    head += ["without the lock", "first bound"]
    body = []
    for row in found["predictions"]:
        bounds = {name: bound for name, bound in row["bounds"].items() if bound}
        speeds = [f"{row[key]:.1f}" for key in ("default", "all", "best", "without_lock")]
        cells = [row["case"], f"{row['processors']}", *speeds, min(bounds, key=bounds.__getitem__)]
        body.append(cells)
    return "\n\n".join([*parts, markdown(head, body)])


def machine(found: Mapping[str, Any] | None) -> str:
    """Return a sentence that names the machine."""
    if found is None:
        return "The machine is not known."
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    return (
        f"{found['processor']} with {found['processors']} processors, "
        f"{found['memory'] / 2**30:.0f} GiB of memory, and a disk that reads "
        f"{found['disk']['read'] / 1e9:.1f} GB/s or writes "
        f"{found['disk']['write'] / 1e9:.1f} GB/s; "
        f"Linux {found['kernel']}, Python {found['python']}, {packages}."
    )


TABLES: dict[str, Callable[[Any], str]] = {
    "conversions": conversions,
    "peers": peers,
    "growth": growth,
    "limits": growth,
    "adapters": adapters,
    "inference": inference,
    "remote": remote,
    "opening": opening,
    "cores": cores,
}
"""The table of each kind of section: the first word of its name."""


def section(found: Mapping[str, Any], name: str) -> str:
    """Return the tables of a section of `benchmarks.json`, and how and when it was measured."""
    if name == "machine":
        return machine(found.get("machine"))
    entry = found["sections"].get(name)
    if entry is None:
        return "Not measured on this machine yet."
    table = TABLES[name.partition("-")[0]](entry["results"])
    commit = f", commit {entry['commit']}" if entry["commit"] else ""
    return f"{table}\n\n`{entry['command']}`, {entry['ended'][:10]}{commit}"


def _sizes(row: Mapping[str, Any]) -> str:
    return f"{row['bytes_in'] / 1e9:.1f}, {row['bytes_out'] / 1e9:.1f} GB"


def _memory(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"
