"""Rules of the house that a machine checks: short bodies, and tests that go in by the door."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST_LINES = 60
"""Of a function's body, its docstring apart."""
PRIVATE = {
    "_exit": "os._exit ends a process as a crash does; its name is public",
    "_forward_hooks": "torch shows hooks that were left behind in no other way",
    "_forward_pre_hooks": "likewise",
    "_make_wrapper_subclass": "how torch makes a tensor that pretends to be elsewhere",
    "_schema": "what an operator of torch takes is told nowhere else",
    "_parameters": "a pretended device replaces tensors of modules in place, as torch does",
    "_buffers": "likewise",
    "_tensor_file": "the one moment between a file's hash and its opening by the library",
}
"""Names with an underscore that a test may use, and why."""


def long_bodies(package: Path) -> list[str]:
    """Functions whose body is too long, as ``file:name``."""
    return [
        f"{path.relative_to(package).as_posix()}:{node.name}"
        for path in sorted(package.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and body_lines(node) > MOST_LINES
    ]


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement that is no docstring to the end."""
    body = function.body[ast.get_docstring(function) is not None :]
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name.strip("_") != ""


def reaches(source: str) -> Iterator[str]:
    """Private names that a file takes from elsewhere: imported, as attributes, or patched."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names if private(alias.name))
        elif isinstance(node, ast.Attribute) and private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "delattr")):
            words = [a.value for a in node.args if isinstance(a, ast.Constant)]
            names = [word.rpartition(".")[2] for word in words if isinstance(word, str)]
            yield from filter(private, names[:1])


def test_bodies_are_short():
    assert not set(long_bodies(ROOT / "dery_cli"))


def test_a_long_body_is_found_and_a_long_docstring_is_none(tmp_path):
    def function(name: str, lines: int, text: str = "") -> str:
        return f'def {name}():\n    """One.\n\n{text}    """\n' + "    x = 1\n" * lines

    source = function("long", MOST_LINES + 1) + function("told", MOST_LINES, "    so\n" * 99)
    (tmp_path / "file.py").write_text(source)
    assert long_bodies(tmp_path) == ["file.py:long"]


def test_tests_reach_for_no_private_name():
    """``tests/bench`` too; what they need has a public name, or a reason above."""
    found = {
        f"{path.relative_to(ROOT).as_posix()}: {name}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for name in reaches(path.read_text(encoding="utf-8"))
        if name not in PRIVATE
    }
    assert found == set()


def test_a_private_name_is_found_however_it_is_reached():
    source = (
        "from dery_cli.io.look import _one\n"
        "from dery_cli import sizes\n"
        "sizes._two()\n"
        "monkeypatch.setattr(sizes, '_three', None)\n"
        "monkeypatch.setattr('dery_cli.sizes._four', None)\n"
        "self._own, sizes.__name__, sizes.public\n"
    )
    assert set(reaches(source)) == {"_one", "_two", "_three", "_four"}
