"""Imports go one way, and every module is named in the package's own story."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import gptoss_stream

PACKAGE = Path(gptoss_stream.__file__).parent

# From the bottom: a module may import those of lower rows only, at import time or later.
LAYERS = [
    {"errors"},
    {"dtypes", "strict_json", "memory", "regular_file", "plugins"},
    {
        "safetensors_format",
        "model",
        "patterns",
        "second_reader",
        "cast",
        "checksums",
        "run_state",
        "places",
    },
    {"checkpoint", "mxfp4", "shard_file"},
    {"operands", "companions", "workers", "selection", "blocks"},
    {"recipe", "tables", "converted", "run_folder", "far_folder", "streaming"},
    {"formats", "mapping", "scratch", "uploads"},
    {"planner", "state_dict"},
    {"executor", "hooked", "share"},
    {"output"},
    {"remote_output"},
    {"jobs"},
    {"cluster"},
    {"converter", "verifier"},
    {"synthesis"},
    {"cli", "examples"},
    {"__main__"},
]
RANK = {module: rank for rank, modules in enumerate(LAYERS) for module in modules}


def modules() -> dict[str, list[Path]]:
    """Modules of the package, a folder of plug-ins counting as one."""
    found: dict[str, list[Path]] = {}
    for file in PACKAGE.rglob("*.py"):
        name = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        found.setdefault(name, []).append(file)
    del found["__init__"]
    return found


def imports(file: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it."""
    found = set()
    depth = len(file.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {name.split(".")[0] for name in names}
    return found - {"__version__"}


def test_every_module_has_its_layer():
    assert set(modules()) == set(RANK)


@pytest.mark.parametrize("module", sorted(RANK))
def test_imports_go_down(module):
    for file in modules()[module]:
        upward = {name for name in imports(file) - {module} if RANK[name] >= RANK[module]}
        assert upward == set(), f"{file.name} imports {upward}"


def test_only_formats_know_what_tensors_are_called():
    """Neither the executor nor what lies below it holds a tensor's name, nor does the mapping from
    one format to another; and only `formats` has their names."""
    modules = ("mapping", "executor", "recipe", "operands", "patterns", "scratch", "shard_file")
    for module in modules:
        text = (PACKAGE / f"{module}.py").read_text()
        code = ast.unparse(_without_docstrings(ast.parse(text)))
        for word in ("blocks.", "layers.", "q_proj", "experts", "lm_head", "W_U"):
            assert word not in code, f"{module} speaks of {word}"
        for name in gptoss_stream.formats.names():
            assert repr(name) not in code, f"{module} speaks of {name}"


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            node.body = [
                s
                for s in node.body
                if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
            ] or [ast.Pass()]
    return tree


def test_the_story_names_every_module():
    for module in modules():
        if module != "__main__":
            assert module in (gptoss_stream.__doc__ or ""), module


def test_the_public_names_are_there():
    assert sorted(gptoss_stream.__all__) == gptoss_stream.__all__
    for name in gptoss_stream.__all__:
        assert getattr(gptoss_stream, name) is not None
    with pytest.raises(AttributeError):
        _ = gptoss_stream.nothing
