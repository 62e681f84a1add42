"""The rooms: imports go one way, each room says what it is for, and names are where users look."""

from __future__ import annotations

import ast
import inspect
import re
import typing
from pathlib import Path

import pytest

import gptoss_stream

PACKAGE = Path(gptoss_stream.__file__).parent

# From the bottom: a room may import those of lower rows only, at import time or later.
ROWS = [
    {"errors"},
    {"_utils"},
    {"tensors", "model"},
    {"storage"},
    {"checkpoint"},
    {"transforms"},
    {"formats"},
    {"adapters"},
    {"planning"},
    {"writing"},
    {"distributed", "loading", "verification"},
    {"inference"},
    {"random_checkpoint"},
    {"random_adapter"},
    {"conversion", "export", "synthesis"},
    {"cli", "examples"},
    {"__main__"},
]
RANK = {room: rank for rank, rooms in enumerate(ROWS) for room in rooms}
ROOMS = sorted(room for room in RANK if (PACKAGE / room).is_dir())
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def imported(file: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it: "room.module"."""
    folder = file.relative_to(PACKAGE).parent.parts
    found = set()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*folder[: len(folder) - node.level + 1]]
            if node.module:
                found.add(".".join([*base, *node.module.split(".")]))
            else:
                found |= {".".join([*base, alias.name]) for alias in node.names}
    return found - {"__version__"}


@pytest.mark.parametrize("file", [f for f in FILES if f != PACKAGE / "__init__.py"], ids=str)
def test_imports_go_down(file):
    room = room_of(file)
    others = {name.split(".")[0] for name in imported(file)} - {room}
    upward = {other for other in others if RANK[other] >= RANK[room]}
    assert upward == set()


@pytest.mark.parametrize("room", ROOMS)
def test_no_cycle_within_a_room(room):
    """Imports for type checkers alone are left out."""
    edges = {}
    for file in (PACKAGE / room).glob("*.py"):
        tree = tree_of(file)
        tree.body = [
            node
            for node in tree.body
            if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        ]
        names = {
            alias.name if node.module is None else node.module
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.level == 1
            for alias in node.names
        }
        edges[file.stem] = names
    left = dict(edges)
    while left:
        free = [name for name, needs in left.items() if not needs & left.keys()]
        assert free, f"a cycle among {sorted(left)}"
        for name in free:
            del left[name]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_does(room):
    """And imports no room that it does not name."""
    text = ast.get_docstring(tree_of(PACKAGE / room / "__init__.py")) or ""
    lines = dict(re.findall(r"^(Does|May import|Must not know): (.+(?:\n    .+)*)$", text, re.M))
    assert list(lines) == ["Does", "May import", "Must not know"]
    if room == "examples":  # uses the package as a user does
        return
    actual = {
        name.split(".")[0] for f in (PACKAGE / room).rglob("*.py") for name in imported(f)
    } - {room}
    named = set(re.findall(r"\w+", lines["May import"]))
    if "everything" in named or "every" in named:
        return
    assert actual <= named


def test_only_formats_know_what_tensors_are_called():
    """Outside `formats` no code that reads, plans or writes holds the name of a stored tensor."""
    for room in ("checkpoint", "transforms", "planning", "writing", "distributed"):
        for file in (PACKAGE / room).glob("*.py"):
            tree = without_docstrings(tree_of(file))
            texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
            for word in ("blocks.", "layers.", "q_proj", "lm_head", "W_U"):
                speaks = any(isinstance(text, str) and word in text for text in texts)
                assert not speaks, f"{file} speaks of {word}"
    for name in gptoss_stream.formats.names():
        for file in [*(PACKAGE / "writing").glob("*.py"), PACKAGE / "planning/mapping.py"]:
            code = ast.unparse(without_docstrings(tree_of(file)))
            assert repr(name) not in code, f"{file} speaks of {name}"


def without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            node.body = [
                s
                for s in node.body
                if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
            ] or [ast.Pass()]
    return tree


# --- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_module_is_read_in_one_sitting(file):
    """Some 300 lines, and functions that fit a screen without their docstring."""
    text = file.read_text()
    assert len(text.splitlines()) <= 310
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first, *others = node.body
            is_documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            body = others if is_documented and others else node.body
            length = int(node.end_lineno or 0) - body[0].lineno + 1
            assert length <= 66, f"{node.name} has {length} lines"


@pytest.mark.parametrize("file", sorted(Path(__file__).parent.rglob("*.py")), ids=str)
def test_a_test_file_is_read_in_one_sitting(file):
    assert len(file.read_text().splitlines()) <= 420


# --- the public face ----------------------------------------------------------------------------


def public() -> dict[str, object]:
    return {n: getattr(gptoss_stream, n) for n in gptoss_stream.__all__ if n != "__version__"}


def test_only_public_names_are_shown():
    assert dir(gptoss_stream) == sorted(gptoss_stream.__all__)
    assert dir(gptoss_stream.formats) == sorted(gptoss_stream.formats.__all__)
    with pytest.raises(AttributeError):
        _ = gptoss_stream.nothing


def test_type_checkers_see_the_same_names():
    (block,) = (n for n in tree_of(PACKAGE / "__init__.py").body if isinstance(n, ast.If))
    found = {
        alias.asname: f"{node.module or ''}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert found == gptoss_stream._MODULES


def test_every_error_that_a_docstring_promises_is_public():
    for name, found in public().items():
        for member in [found, *vars(found).values()] if inspect.isclass(found) else [found]:
            raises = (inspect.getdoc(member) or "").partition("Raises:")[2]
            for error in re.findall(r"^\s+(\w+Error): ", raises, re.MULTILINE):
                assert error in gptoss_stream.__all__, f"{name} raises {error}"


def test_every_type_that_a_public_signature_shows_is_public():
    """How an output tensor is made (its segments) is not public."""
    shown = {}
    for name, found in public().items():
        members = [found]
        if inspect.isclass(found):
            shown |= dict.fromkeys(types_in(hints(found)), name)
            members = [m for n, m in vars(found).items() if n[0] != "_"]
        for member in members:
            function = member.fget if isinstance(member, property) else member
            if inspect.isfunction(function):
                shown |= dict.fromkeys(types_in(hints(function)), name)
    hidden = {
        f"{found.__name__} ({name})"
        for found, name in shown.items()
        if found.__module__.startswith("gptoss_stream") and found not in public().values()
    }
    allowed = {
        "Segment (OutputTensor)",
        "Segment (PlannedShard)",
        "Origin (OutputTensor)",
        "Merge (Plan)",
    }
    assert hidden <= allowed


def hints(found: object) -> list[object]:
    """The types of an object's annotations; of those for optional packages, none."""
    names = {**dict.fromkeys(("torch", "distributed", "np", "HookedTransformer"), object)}
    module = inspect.getmodule(found)
    try:
        return [*typing.get_type_hints(found, {**vars(module), **vars(typing)}, names).values()]
    except (NameError, AttributeError, TypeError):  # TypeError: an alias that is a text
        texts = getattr(found, "__annotations__", {}).values()
        words = {word for text in texts for word in re.findall(r"\w+", str(text))}
        return [value for word, value in vars(module).items() if word in words]


def types_in(annotations: list[object]) -> set[type]:
    found = set()
    for annotation in annotations:
        if inspect.isclass(annotation) and not typing.get_args(annotation):
            found.add(annotation)
        found |= types_in([*typing.get_args(annotation)])
    return found
