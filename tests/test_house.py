"""The rules of CONTRIBUTING.md that a machine can check."""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import hybrid_sleep

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("hybrid_sleep", "kernels", "training", "eval")
PACKAGE = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PYTHON = [*PACKAGE, ROOT / "setup.py", *sorted((ROOT / "tests").rglob("*.py"))]
TEXT = {path: path.read_text() for path in PYTHON}
TREES = {path: ast.parse(TEXT[path], str(path)) for path in PACKAGE}

LINES = {"kernels": 600}
LINES_ELSEWHERE = 500

# Lowest first. A module imports from its own level and from lower ones, never from a higher one.
# The longest name that fits a module decides: eval.tasks lies lower than the rest of eval.
LEVELS = (
    ("support", "validation"),
    ("kernels",),
    ("sleep",),
    ("configuration",),
    ("layers",),
    ("pretrained", "registration"),
    ("modeling",),
    ("eval.tasks",),
    ("training",),
    ("parametric",),
    ("eval",),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(LEVELS) for name in names}

OPTIONAL = {"fla", "mamba_ssm", "causal_conv1d", "flash_attn", "triton", "deepspeed", "lm_eval"}
OPTIONAL |= {"datasets", "tensorboard", "peft", "sklearn"}
OPTIONAL |= {"cryptography", "datasketch", "detect_secrets"}
# Import name -> name of the distribution, where they differ.
DISTRIBUTION = {"yaml": "pyyaml"}
# Never imported here, but transformers.Trainer does not start without it.
REQUIRED_BY_OTHERS = {"accelerate"}


class Import(NamedTuple):
    """One imported name; `lazy` where importing the module does not run it."""

    line: int
    name: str
    lazy: bool
    typing: bool


def imports(statements: list, lazy: bool = False, typing: bool = False) -> Iterator[Import]:
    """Everything that statements and those inside them import, by its dotted name."""
    for node in statements:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, lazy, typing)
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            for alias in node.names:
                yield Import(node.lineno, f"{source}.{alias.name}", lazy, typing)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports(node.body, lazy, True)
            yield from imports(node.orelse, lazy, typing)
        else:
            inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for field in ("body", "orelse", "finalbody", "handlers", "cases"):
                yield from imports(getattr(node, field, []), inside, typing)


IMPORTS = {path: tuple(imports(tree.body)) for path, tree in TREES.items()}


def where(path: Path, line: int | None = None) -> str:
    file = path.relative_to(ROOT).as_posix()
    return file if line is None else f"{file}:{line}"


def module_name(path: Path) -> str:
    """Import name of a file of the package."""
    name = where(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return name if name.partition(".")[0] == "hybrid_sleep" else f"hybrid_sleep.{name}"


def inner_imports(path: Path) -> Iterator[tuple[Import, str]]:
    """What a file imports of this package, as `sleep.cache`; lazy exports by their module."""
    for found in IMPORTS[path]:
        if found.name.startswith("hybrid_sleep."):
            inner = found.name.removeprefix("hybrid_sleep.")
            yield found, hybrid_sleep._exports.get(inner, inner)


def rank(inner: str) -> int | None:
    """Level of a module of the package, without its first name; None where LEVELS lacks it."""
    while inner and inner not in RANK:
        inner = inner.rpartition(".")[0]
    return RANK.get(inner)


def none(wrong: list[str]) -> None:
    assert not wrong, "\n" + "\n".join(wrong)


def test_files_are_short_enough_to_read():
    wrong = []
    for path, text in TEXT.items():
        lines = len(text.splitlines())
        limit = LINES.get(path.relative_to(ROOT).parts[0], LINES_ELSEWHERE)
        if lines > limit:
            wrong.append(f"{where(path)} has {lines} lines; the limit is {limit}")
    none(wrong)


def upward_imports() -> Iterator[str]:
    """Imports of what lies higher, each with why it must not be."""
    for path in PACKAGE:
        own = module_name(path).removeprefix("hybrid_sleep").removeprefix(".")
        for found, inner in inner_imports(path) if own else ():
            top, imported = own.partition(".")[0], inner.partition(".")[0]
            if top == "sleep" and imported in ("configuration", "modeling"):
                why = "the mechanism knows no model class, not even for a type checker"
            elif top == "training" and imported == "eval" and rank(inner) > rank(own):
                why = "of eval, training imports the tasks alone"
            elif not found.typing and (rank(inner) or 0) > rank(own):
                why = "that lies higher in LEVELS"
            else:
                continue
            yield f"{where(path, found.line)} imports {inner}: {why}"


def test_every_module_has_a_level():
    names = (module_name(path).partition(".")[2] for path in PACKAGE)
    none([f"give {name} a place in LEVELS" for name in names if name and rank(name) is None])


def test_imports_go_one_way():
    none(list(upward_imports()))


def test_no_module_imports_itself_by_way_of_others():
    names = {module_name(path) for path in PACKAGE}
    edges = {}
    for path in PACKAGE:
        at_once = [name for found, name in inner_imports(path) if not (found.lazy or found.typing)]
        asked = [f"hybrid_sleep.{name}" for name in at_once]
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


def test_names_that_are_loaded_late_are_known_to_type_checkers():
    found = IMPORTS[ROOT / "hybrid_sleep" / "__init__.py"]
    typed = {name.rpartition(".")[2] for _, name, _, typing in found if typing}
    assert typed == set(hybrid_sleep._exports)


def test_errors_that_a_type_checker_must_ignore_are_explained():
    # mypy itself demands the code in brackets.
    silent = re.compile(r"#\s*type:\s*ignore(?!\[[\w, -]+\]\s+#\s*\w)")
    none(
        [
            f"{where(path, number)}: say behind it why: {line.strip()}"
            for path in PACKAGE
            for number, line in enumerate(TEXT[path].splitlines(), 1)
            if silent.search(line)
        ]
    )


def test_own_modules_are_imported_by_their_full_name():
    beside = {"kernels", "training", "eval", "configs", "tests", ""}
    none(
        [
            f"{where(path, found.line)} imports {found.name!r}; start it with hybrid_sleep"
            for path in PACKAGE
            for found in IMPORTS[path]
            if found.name.partition(".")[0] in beside
        ]
    )


def test_optional_packages_are_not_imported_at_import_time():
    wrong = []
    for path in PACKAGE:
        # A kernel file needs Triton's decorators at its top level; its op imports it when called.
        allowed = {"triton"} if path.name.startswith("triton") else set()
        for found in IMPORTS[path]:
            at_once = not (found.lazy or found.typing)
            if at_once and found.name.partition(".")[0] in OPTIONAL - allowed:
                wrong.append(f"{where(path, found.line)} imports {found.name} at its top level")
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
        "a banner": re.compile(r"(?P<mark>[^\w\s.])(?P=mark){3}"),
        "unfinished work": re.compile(r"\b(TODO|FIXME|XXX|HACK)\b"),
    }
    # Tokenizing tells a comment from a string, but takes seconds for all files.
    suspects = re.compile("#.*(" + "|".join(f"(?:{p.pattern})" for p in banned.values()) + ")")
    wrong = []
    for path, text in TEXT.items():
        if not suspects.search(text):
            continue
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                for what, pattern in banned.items():
                    if pattern.search(token.string):
                        wrong.append(f"{where(path, token.start[0])}: {what}: {token.string}")
    none(wrong)


def test_dependencies_are_what_the_code_imports():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=!~;\[ ]", line)[0] for line in project["dependencies"]}
    tops = {name.partition(".")[0] for path in PACKAGE for _, name, *_ in IMPORTS[path]}
    used = tops - set(sys.stdlib_module_names) - OPTIONAL - {"hybrid_sleep"}
    assert {DISTRIBUTION.get(name, name) for name in used} == declared - REQUIRED_BY_OTHERS
