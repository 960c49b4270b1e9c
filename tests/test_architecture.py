"""The shape of the package: imports point one way, files and functions stay small."""

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "gtalign_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
# Which parts of the package each part may import, besides itself. Modules of the package's own
# directory (main, config, export …) are the top: they may import all of it, nobody imports them.
MAY_IMPORT = {
    "game": set(),
    "model": set(),
    "data": {"game"},
    "reward": {"game", "data"},
    "rollout": {"model", "game", "data"},
    "serving": {"game", "data", "model", "rollout"},
    "pod": set(),
    "training": {"game", "data", "reward", "model", "rollout", "evaluation", "pod"},
    "evaluation": {"game", "data", "reward", "model", "rollout", "training", "pod"},
    "report": {"game", "data", "reward", "training", "evaluation"},
    # What compiles a whole run's programs without running it has to know what a run is made of.
    "aot": {"game", "data", "reward", "model", "rollout", "training", "evaluation", "top"},
}


def part_of(file: Path) -> str:
    inside = file.relative_to(PACKAGE).parts
    return inside[0] if len(inside) > 1 else "top"


def imported_parts(tree: ast.AST) -> set[str]:
    """The parts of the package that a module imports, wherever in it the import stands."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    ours = [name.split(".")[1] for name in names if name.startswith("gtalign_jax.")]
    return {name if name in MAY_IMPORT else "top" for name in ours}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_a_file_is_small_and_imports_only_what_lies_below_it(file):
    source = file.read_text(encoding="utf-8")
    tree = ast.parse(source)
    assert source.count("\n") <= 400, "files have at most 400 lines"
    assert ast.get_docstring(tree), "a module says what it is"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 60, f"{node.name} has {lines} lines, at most 60 are allowed"
    part = part_of(file)
    if part != "top":
        above = imported_parts(tree) - MAY_IMPORT[part] - {part}
        assert not above, f"{part} must not import {sorted(above)}"


def test_what_the_package_imports_is_in_the_runtime_requirements_and_torch_is_not():
    requirements = (PACKAGE.parent / "requirements.txt").read_text(encoding="utf-8")
    declared = {
        canonical(match[0]) for match in re.finditer(r"^[A-Za-z][\w-]*", requirements, re.M)
    }
    assert "torch" not in declared
    owners = importlib.metadata.packages_distributions()
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in {name.split(".")[0] for name in names}:
                if name == "gtalign_jax" or name in sys.stdlib_module_names:
                    continue
                packages = {canonical(package) for package in owners[name]}
                assert packages & declared, f"{file} imports {name}, of {packages}"


# What runs, or may run, whatever a file or a peer hands over.
RUNS_INPUT = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch"}
RUNS_ARGUMENT = {"eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load",
                 "os.system", "os.popen"}
TRUSTING = {"allow_pickle", "trust_remote_code", "shell"}


def trusting(tree: ast.AST) -> list[str]:
    """Imports and calls by which a file or a peer could choose what runs."""
    found = []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        found += [name for name in names if name.split(".")[0] in RUNS_INPUT]
        if isinstance(node, ast.Call):
            found += [name for name in [ast.unparse(node.func)] if name in RUNS_ARGUMENT]
            found += [
                word.arg for word in node.keywords
                if word.arg in TRUSTING and ast.unparse(word.value) != "False"
            ]
    return found


def test_nothing_that_is_read_chooses_what_runs():
    sources = {file: file.read_text(encoding="utf-8") for file in FILES}
    assert {file: t for file, text in sources.items() if (t := trusting(ast.parse(text)))} == {}


@pytest.mark.parametrize("line", [
    "import pickle", "from pickle import Unpickler", "import torch.serialization", "eval('1')",
    "numpy.load(f, allow_pickle=True)", "load(p, trust_remote_code=key)", "yaml.load(f, Loader)",
])
def test_what_would_let_it_choose_is_found(line):
    assert trusting(ast.parse(f"def f():\n    {line}"))


def canonical(package: str) -> str:
    return package.lower().replace("_", "-")
