"""The structure of the library: imports between rooms, work at import, sizes, words, and where contracts are tested."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest
from helpers import ROOT, environment

FILES = sorted((ROOT / "uoe_jax").rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
FILE_LINES, FUNCTION_LINES, LIBRARY_LINES = 400, 60, 19_000
DEFINING = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)


def name(path) -> str:
    return str(path.relative_to(ROOT))


def test_imports_keep_to_the_rooms():
    """No circle and no import of a higher room, lazily and under TYPE_CHECKING too (`[tool.importlinter]`)."""
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()"],
        cwd=ROOT, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "0 broken" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("path", FILES, ids=name)
def test_importing_only_defines(path):
    """A module's own statements define names. They call nothing for its effect and set nothing of another module."""
    for node in TREES[path].body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            called = node.value.func
            assert isinstance(called, ast.Attribute) and called.attr == "defvjp", node.lineno
        elif isinstance(node, ast.Assign):
            assert all(isinstance(t, (ast.Name, ast.Tuple)) for t in node.targets), node.lineno
        elif isinstance(node, ast.AugAssign):
            assert isinstance(node.target, ast.Name), node.lineno
        elif isinstance(node, ast.If):
            assert ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'")
        elif isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), node.lineno  # a docstring
        else:
            assert isinstance(node, (*DEFINING, ast.Assert)), (node.lineno, type(node))


def test_sizes():
    lines = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {path: n for path, n in lines.items() if n > FILE_LINES}
    exported = "uoe_jax/exchange/hf-code/"  # what `uoe export` copies is data
    assert sum(n for path, n in lines.items() if not path.startswith(exported)) <= LIBRARY_LINES
    long = {
        f"{name(path)}:{node.name}": n
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (n := node.end_lineno - node.lineno + 1) > FUNCTION_LINES
    }
    assert not long


def test_tests_import_from_helpers_and_not_from_each_other():
    for path in (ROOT / "tests").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in getattr(node, "names", [])]
            names.append(getattr(node, "module", None) or "")
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not any(n.startswith("test_") for n in names), (path.name, node.lineno)


def test_every_contract_has_its_tests():
    table = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) .*? \| (.*) \|$", table, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 11))
    for _, tests in rows:
        for test in tests.split(", "):
            file, _, function = test.partition("::")
            text = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert not function or re.search(rf"^def {function}\(", text, re.MULTILINE), test


STANDARD = (
    "load.balancing", "KV cache", "remat policy", "gradient accumulation", "expert.parallel", "capacity factor", "top.k",
)  # fmt: skip
REPLACED = (
    r"first_come|best_first|by_first|lengthened|empty_apart|held_in|of_every_expert|own_tokens|\.drawn\(|"
    r"\b[Tt]old\b|\bmend(ed|s)?\b|turn them round|stands still|left of a row|frame of a block|[Cc]ompared architectures|"
    r"\bpeers\b"
)  # fmt: skip


def test_words_are_those_of_the_field():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    library = "\n".join(path.read_text(encoding="utf-8") for path in FILES)
    docs = "\n".join(path.read_text(encoding="utf-8") for path in pages)
    for term in STANDARD:
        assert re.search(term, docs, re.IGNORECASE) and re.search(term, library, re.IGNORECASE), (
            term
        )
    for path in (*FILES, *pages):
        found = re.findall(rf".*(?:{REPLACED}).*", path.read_text(encoding="utf-8"))
        assert not found, (name(path), found)
