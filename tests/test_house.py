"""The rules of CONTRIBUTING.md that a machine can check."""

from __future__ import annotations

import ast
import copy
import io
import re
import sys
import tokenize
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import hybrid_sleep

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("hybrid_sleep", "kernels", "training", "eval")
PACKAGE = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PYTHON = [*PACKAGE, ROOT / "setup.py", *sorted((ROOT / "tests").rglob("*.py"))]
TREES = {path: ast.parse(path.read_text(), str(path)) for path in PYTHON}

LINES = {"kernels": 600}
LINES_ELSEWHERE = 400

# Lowest first. A module imports from its own level and from lower ones, never from a higher one.
LEVELS = (
    ("support", "validation", "configuration", "registration"),
    ("kernels",),
    ("sleep", "layers", "arguments", "pretrained"),
    ("modeling",),
    ("training", "eval"),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(LEVELS) for name in names}

OPTIONAL = {"fla", "mamba_ssm", "causal_conv1d", "flash_attn", "triton", "deepspeed", "lm_eval"}
OPTIONAL |= {"datasets", "tensorboard"}
# Import name -> name of the distribution, where they differ.
DISTRIBUTION = {"yaml": "pyyaml"}
# Never imported here, but transformers.Trainer does not start without it.
REQUIRED_BY_OTHERS = {"accelerate"}


def where(path: Path, line: int | None = None) -> str:
    file = path.relative_to(ROOT).as_posix()
    return file if line is None else f"{file}:{line}"


def module_name(path: Path) -> str:
    """Import name of a file of the package."""
    name = where(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return name if name.partition(".")[0] == "hybrid_sleep" else f"hybrid_sleep.{name}"


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a tree imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def own_imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Those of `imports` that name this package, lazy exports resolved to their module."""
    for line, name in imports(tree):
        if name.startswith("hybrid_sleep."):
            inner = name.removeprefix("hybrid_sleep.")
            yield line, f"hybrid_sleep.{hybrid_sleep._exports.get(inner, inner)}"


def without(tree: ast.Module, drop: Callable[[ast.AST], bool]) -> ast.Module:
    """A copy of the tree without the statements that `drop` names."""

    class Prune(ast.NodeTransformer):
        def generic_visit(self, node):
            return ast.Pass() if drop(node) else super().generic_visit(node)

    return Prune().visit(copy.deepcopy(tree))


def at_run_time(tree: ast.Module) -> ast.Module:
    """The tree without what only a type checker reads."""
    return without(
        tree, lambda node: isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    )


def at_import_time(tree: ast.Module) -> ast.Module:
    """The tree without what importing the module does not run."""
    functions = ast.FunctionDef | ast.AsyncFunctionDef
    return without(at_run_time(tree), lambda node: isinstance(node, functions))


def none(wrong: list[str]) -> None:
    assert not wrong, "\n" + "\n".join(wrong)


def test_files_are_short_enough_to_read():
    wrong = []
    for path in PYTHON:
        lines = len(path.read_text().splitlines())
        limit = LINES.get(path.relative_to(ROOT).parts[0], LINES_ELSEWHERE)
        if lines > limit:
            wrong.append(f"{where(path)} has {lines} lines; the limit is {limit}")
    none(wrong)


def test_imports_go_one_way():
    wrong = []
    for path in PACKAGE:
        _, *parts = module_name(path).split(".")
        if not parts:
            continue
        if parts[0] not in RANK:
            wrong.append(f"{where(path)}: give {parts[0]!r} a place in LEVELS")
            continue
        for line, name in own_imports(at_run_time(TREES[path])):
            if RANK.get(name.split(".")[1], -1) > RANK[parts[0]]:
                wrong.append(f"{where(path, line)} imports {name}, which lies above it")
    none(wrong)


def test_no_module_imports_itself_by_way_of_others():
    names = {module_name(path) for path in PACKAGE}
    edges = {}
    for path in PACKAGE:
        asked = [name for _, name in own_imports(at_import_time(TREES[path]))]
        targets = {name if name in names else name.rpartition(".")[0] for name in asked}
        edges[module_name(path)] = targets & names - {module_name(path)}
    finished: set[str] = set()

    def visit(name: str, trail: list[str]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in finished:
            for target in sorted(edges[name]):
                visit(target, [*trail, name])
            finished.add(name)

    for name in sorted(edges):
        visit(name, [])


def test_own_modules_are_imported_by_their_full_name():
    beside = {"kernels", "training", "eval", "configs", "tests", ""}
    none(
        [
            f"{where(path, line)} imports {name!r}; start it with hybrid_sleep"
            for path in PACKAGE
            for line, name in imports(TREES[path])
            if name.partition(".")[0] in beside
        ]
    )


def test_optional_packages_are_not_imported_at_import_time():
    wrong = []
    for path in PACKAGE:
        # A kernel file needs Triton's decorators at its top level; its op imports it when called.
        allowed = {"triton"} if path.name.startswith("triton") else set()
        for line, name in imports(at_import_time(TREES[path])):
            if name.partition(".")[0] in OPTIONAL - allowed:
                wrong.append(f"{where(path, line)} imports {name} at its top level")
    none(wrong)


def test_public_names_have_docstrings():
    wrong = []
    for path in PACKAGE:
        tree = TREES[path]
        if tree.body and not ast.get_docstring(tree):
            wrong.append(f"{where(path, 1)}: the module")
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                if not node.name.startswith("_") and not ast.get_docstring(node):
                    wrong.append(f"{where(path, node.lineno)}: {node.name}")
    none(wrong)


def test_comments_say_why():
    banned = {
        "a banner": re.compile(r"([^\w\s.])\1{3}"),
        "unfinished work": re.compile(r"\b(TODO|FIXME|XXX|HACK)\b"),
    }
    wrong = []
    for path in PYTHON:
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            if token.type == tokenize.COMMENT:
                for what, pattern in banned.items():
                    if pattern.search(token.string):
                        wrong.append(f"{where(path, token.start[0])}: {what}: {token.string}")
    none(wrong)


def test_dependencies_are_what_the_code_imports():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=!~;\[ ]", line)[0] for line in project["dependencies"]}
    tops = {name.partition(".")[0] for path in PACKAGE for _, name in imports(TREES[path])}
    used = tops - set(sys.stdlib_module_names) - OPTIONAL - {"hybrid_sleep"}
    assert {DISTRIBUTION.get(name, name) for name in used} == declared - REQUIRED_BY_OTHERS
