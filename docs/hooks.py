"""Makes the parts of the site that follow from the code: tables of formats, API, the notebook.

MkDocs calls `on_page_markdown` with the text of each page. A line in it that is one of `PARTS` is
replaced by what its function returns, and a line such as `<!-- benchmark: peers -->` by the table
of this section of `benchmarks.json`.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gptoss_stream
from gptoss_stream import formats
from gptoss_stream.formats import Row, rows_by_name
from gptoss_stream.random_checkpoint import PRESETS

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import tables

AXES = {
    "v": ("V", "tokens in the vocabulary", "vocab_size"),
    "m": ("H", "hidden size", "hidden_size"),
    "i": ("I", "hidden size of an expert", "intermediate_size"),
    "e": ("E", "experts in a layer", "num_local_experts"),
    "n": ("nh", "query heads", "num_attention_heads"),
    "k": ("nk", "key/value heads", "num_key_value_heads"),
    "h": ("hd", "size of a head", "head_dim"),
}
"""Each axis of the model: its symbol in `inspect --json`, its meaning, its name in config.json."""

SYMBOLS = {axis: symbol for axis, (symbol, _, _) in AXES.items()} | {"t": "2"}

NOTEBOOK = Path(__file__).with_name("notebook.ipynb")
BENCHMARKS = Path(__file__).with_name("benchmarks.json")


def on_page_markdown(markdown: str, **page: Any) -> str:
    """Replace the lines of a page that stand for a generated part.

    Args:
        markdown: The text of the page.
        page: What else MkDocs says of it.

    Returns:
        The text with these parts.
    """
    return "\n".join(map(_line, markdown.splitlines(keepends=False)))


def _line(line: str) -> str:
    """Return a line of a page, or the part that it stands for."""
    if match := re.fullmatch(r"<!-- benchmark: (.+) -->", line):
        return tables.section(json.loads(BENCHMARKS.read_text()), match[1])
    return PARTS[line]() if line in PARTS else line


def format_tables() -> str:
    """Return a table of the tensors of each format."""
    parts = []
    for name in formats.names():
        parts += [f"### `{name}` {{ #{name} }}\n", "| tensor | shape | dtype |", "|---|---|---|"]
        for stored, shape, dtypes in tensors(name):
            parts.append(f"| `{stored}` | [{', '.join(shape)}] | {', '.join(dtypes)} |")
        ignored = formats.ignored(formats.load(name))
        if ignored:
            parts.append(f"\nNot read: {', '.join(f'`{name}`' for name in ignored)}.")
        parts.append("")
    return "\n".join(parts)


def sizes() -> str:
    """Return the rows of a table: each symbol, its meaning, and its size in the released models."""
    models = [PRESETS[name].model().sizes for name in ("20b", "120b")]
    rows = []
    for axis, (symbol, meaning, setting) in AXES.items():
        numbers = " | ".join(f"{model[axis]:,}" for model in models)
        rows.append(f"| {symbol} | {meaning} | `{setting}` | {numbers} |")
    return "\n".join(rows)


def tensors(name: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield the name, the shape in symbols and the dtypes of each tensor that a format stores."""
    for stored, rows in rows_by_name(formats.load(name).TABLE).items():
        lengths, others = zip(*(_split(row) for row in rows), strict=True)
        first = " + ".join(lengths)
        shape = [f"({first})" if len(rows) > 1 else first, *others[0]]
        # Of an encoding only the blocks along the last axis depend on sizes.
        for component in rows[0].encoding.components((*[1] * (len(shape) - 1), 32)):
            groups = component.shape[len(shape) - 1 :]
            last = shape[-1:] if groups == (32,) else [f"{shape[-1]} / 32", *map(str, groups[1:])]
            dtypes = [dtype.name for dtype in component.dtypes]
            yield stored + component.suffix, [*shape[:-1], *last], dtypes


def _split(row: Row) -> tuple[str, list[str]]:
    """Return the size of the first stored axis of a row, and those of the others."""
    first, *others = (" · ".join(SYMBOLS[axis] for axis in group) for group in row.groups)
    return first, others


def api() -> str:
    """Return directives of mkdocstrings for all public names, by kind."""
    kinds: dict[str, list[str]] = {"Functions": [], "Classes": [], "Types": [], "Errors": []}
    for name in gptoss_stream.__all__:
        value = getattr(gptoss_stream, name)
        if inspect.isfunction(value):
            kind = "Functions"
        elif inspect.isclass(value):
            kind = "Errors" if issubclass(value, Exception) else "Classes"
        elif inspect.ismodule(value) or name == "__version__":
            continue
        else:
            kind = "Types"
        kinds[kind].append(f"::: gptoss_stream.{name}\n")
    return "\n".join(line for kind, names in kinds.items() for line in (f"## {kind}\n", *names))


def notebook() -> str:
    """Return the notebook as Markdown, with the outputs that its file holds."""
    parts = []
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![Output](data:image/png;base64,{data['image/png'].strip()})")
            else:
                text = "".join(output.get("text", data.get("text/plain", "")))
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts)


PARTS = {
    "<!-- format tables -->": format_tables,
    "<!-- sizes -->": sizes,
    "<!-- api -->": api,
    "<!-- notebook -->": notebook,
}
