"""What pyproject declares is what is imported, and nothing is imported that it does not declare."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

from dery_lite.zoo import DONORS

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
SCRIPTS = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["exclude"]

MODULES = {"pillow": "PIL", "pytest-xdist": "xdist", "scikit-learn": "sklearn"}
"""The module of a distribution where it is not the distribution's own name."""
TOOLS = {"hatchling", "mypy", "pytest-xdist", "ruff"}
"""Run, never imported."""
OPTIONAL = {"torch_cka"}
"""What a bench compares with where it is installed."""
STAND_INS = {"torch.utils.tensorboard": "tensorboard", "torch.onnx": "onnxscript"}
"""Modules of one distribution that need another."""


def imports(text: str) -> set[str]:
    """Modules a file imports, wherever in it; its own package's relative ones are left out."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            found.update(a.value for a in node.args if isinstance(a, ast.Constant))
    return found | {other for module, other in STAND_INS.items() if module in found}


def third_party(paths: Iterable[Path]) -> set[str]:
    """Top-level modules that these files import and that are neither Python's nor ours."""
    tops = {
        module.split(".")[0]
        for path in paths
        for module in imports(path.read_text(encoding="utf-8"))
    }
    ours = {path.stem for path in ROOT.glob("plugins/*")} | {"dery_cli", "tests", "my_plugin"}
    ours |= {path.stem for path in ROOT.glob("tests/bench/*.py")}
    return tops - set(sys.stdlib_module_names) - ours


def distributions(requirements: Iterable[str]) -> Iterator[str]:
    """Names of what is required; our own extras are followed."""
    for requirement in requirements:
        name, chosen = re.match(r"([A-Za-z0-9._-]+)(?:\[([\w,]+)\])?", requirement).groups()
        if name == PROJECT["name"]:
            for extra in chosen.split(","):
                yield from distributions(EXTRAS[extra])
        else:
            yield name


def modules(names: Iterable[str]) -> set[str]:
    return {MODULES.get(name, name.replace("-", "_")) for name in names}


def shipped() -> list[Path]:
    files = [*ROOT.glob("dery_cli/**/*.py"), *ROOT.glob("plugins/**/*.py")]
    return [path for path in files if path.relative_to(ROOT).as_posix() not in SCRIPTS]


APART = ("executorch",)
"""Extras that `all` leaves out: each release of executorch is built for one release of torch."""
USED = {*PROJECT["dependencies"], "dery-cli[all]", *(f"dery-cli[{extra}]" for extra in APART)}


def test_what_is_shipped_imports_only_what_it_declares():
    assert third_party(shipped()) - modules(distributions(USED)) == set()


def test_what_it_declares_it_imports():
    by_name = {donor.module for donor in DONORS.values()}
    assert modules(distributions(USED)) - third_party(shipped()) - by_name == set()


def test_tests_benches_and_scripts_import_only_what_dev_declares():
    files = [*ROOT.glob("tests/**/*.py"), *(ROOT / script for script in SCRIPTS)]
    declared = modules(distributions([*PROJECT["dependencies"], "dery-cli[dev]"]))
    assert third_party(files) - declared - OPTIONAL == set()


def test_what_dev_adds_is_imported_or_run():
    files = [*ROOT.glob("tests/**/*.py"), *(ROOT / script for script in SCRIPTS)]
    added = set(distributions(EXTRAS["dev"])) - set(distributions(EXTRAS["all"])) - TOOLS
    assert modules(added) - third_party(files) == set()


def test_all_holds_every_optional_part_and_dev_includes_it():
    parts = {
        name
        for extra, names in EXTRAS.items()
        if extra not in {"dev", *APART}
        for name in distributions(names)
    }
    assert set(distributions(EXTRAS["all"])) == parts
    assert parts <= set(distributions(EXTRAS["dev"]))


def test_imports_are_found_wherever_they_are():
    text = "def f():\n    import a.b\n    from c import d\n    importlib.import_module('e')\n"
    assert imports(text + "from torch.utils.tensorboard import S") == {
        "a.b", "c", "e", "torch.utils.tensorboard", "tensorboard",
    }  # fmt: skip
