"""Rules that a machine checks: who may import whom, and what must not be imported early."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dery_cli"

# from the bottom up; a file may import its own layer and those below
LAYERS = [
    {"errors", "types", "sizes"},
    {"core"},
    {"io", "runtime"},
    {"zoo"},
    {"data"},
    {"training"},
    {"stages"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
FACES = {"", "plugin", "testing", "timm"}
"""Public names for other people's code; ``dery_cli`` itself imports nothing from them."""
PLUGIN_FACES = {"errors", "types", "plugin", "testing"}
"""All that a plugin may know of dery."""
HEAVY = {"torch", "timm", "torchvision", "numpy", "scipy", "mip", "accelerate", "safetensors"}
HEAVY |= {"datasets", "pyarrow", "pandas"}


def _imports(path: Path) -> set[str]:
    """Every module a file imports, wherever it does; what is for the type checker is left out."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports by a relative name"
            found.update({str(node.module), *(f"{node.module}.{a.name}" for a in node.names)})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def modules(package: Path) -> dict[str, Path]:
    """The files of a package by their dotted name below it; '' is its own ``__init__``."""
    return {
        ".".join(path.relative_to(package).with_suffix("").parts)
        .removesuffix("__init__")
        .rstrip("."): path
        for path in sorted(package.rglob("*.py"))
    }


def import_graph(package: Path) -> dict[str, set[str]]:
    """Which file of a package imports which; ``__init__`` files are empty and left out."""
    files = modules(package)
    prefix = f"{package.name}."
    return {
        name: {
            module.removeprefix(prefix)
            for module in _imports(path)
            if module.startswith(prefix)
            and (file := files.get(module.removeprefix(prefix)))
            and file.name != "__init__.py"
        }
        for name, path in files.items()
    }


def arrows_back(graph: dict[str, set[str]]) -> list[str]:
    """Imports that do not go down the layers, or go from one stage into the steps of another."""
    number = {part: level for level, layer in enumerate(LAYERS) for part in layer}
    found = []
    for name, imported in graph.items():
        if name in FACES:
            continue
        own = name.split(".")
        for other in sorted(imported):
            parts = other.split(".")
            if parts[0] in FACES or number[parts[0]] > number[own[0]]:
                found.append(f"{name} imports {other}")
            across = own[0] == parts[0] == "stages" and own[1:2] != parts[1:2]
            if across and parts[2:] != ["store"]:  # stages meet on disk
                found.append(f"{name} imports {other}, which is another stage's own")
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The files of a circle of imports, in order; empty where there is none."""
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name not in done:
            for other in sorted(graph[name]):
                if found := visit(other, [*trail, name]):
                    return found
            done.add(name)
        return []

    for name in sorted(graph):
        if found := visit(name, []):
            return found
    return []


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
GRAPH = import_graph(PACKAGE)
PLUGINS = sorted(
    folder for folder in (ROOT / "plugins").iterdir() if (folder / "__init__.py").is_file()
)


def test_every_file_is_in_a_layer():
    known = {part for layer in LAYERS for part in layer} | FACES
    assert {name.split(".")[0] for name in GRAPH} <= known


def test_no_arrow_points_back():
    assert arrows_back(GRAPH) == []


def test_no_circle_of_files():
    assert circle(GRAPH) == []


def test_few_files_lie_flat():
    assert len([path for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]) <= 9


def test_inner_packages_are_empty():
    """``dery_cli.zoo`` and the like must cost nothing on the way to one of their files."""
    assert [p for p in PACKAGE.rglob("*/__init__.py") if p.read_text().strip()] == []


def test_a_planted_arrow_and_a_planted_circle_are_found(tmp_path):
    """The rules above can fail: a circle through a function's import, and an arrow up."""
    package = tmp_path / "dery_cli"
    for name, text in {
        "__init__.py": "",
        "sizes.py": "",
        "core/__init__.py": "",
        "core/low.py": "def f():\n    from dery_cli.core import middle\n",
        "core/middle.py": "from dery_cli.core.low import f\n",
        "io/__init__.py": "",
        "io/high.py": "",
        "core/up.py": "def f():\n    import dery_cli.io.high\n",
        "stages/__init__.py": "",
        "stages/a/__init__.py": "",
        "stages/a/run.py": "from dery_cli.stages.b import run\n",
        "stages/b/__init__.py": "",
        "stages/b/run.py": "",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    graph = import_graph(package)
    assert circle(graph) == ["core.low", "core.middle", "core.low"]
    assert arrows_back(graph) == [
        "core.up imports io.high",
        "stages.a.run imports stages.b.run, which is another stage's own",
    ]


@pytest.mark.parametrize("folder", PLUGINS, ids=lambda p: p.name)
def test_a_plugin_knows_the_public_faces_alone(folder):
    assert circle(import_graph(folder)) == []
    for path in folder.rglob("*.py"):
        inner = {
            module.split(".")[1] for module in _imports(path) if module.startswith("dery_cli.")
        }
        assert inner <= PLUGIN_FACES, path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_dery_never_imports_a_plugin(path):
    for module in _imports(path):
        plugins = ("dery_demo", "dery_huggingface", "dery_lite", "dery_timm", "dery_torchvision")
        assert not module.startswith(plugins), module


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "core").rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_the_core_touches_no_files_and_prints_nothing(path):
    for module in _imports(path):
        assert module.split(".")[0] not in {"pathlib", "os", "io", "typer", "rich", "shutil"}
    names = {
        node.func.id
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not names & {"print", "open", "input"}


@pytest.mark.parametrize(
    "line",
    [
        "--help",
        "assemble --help",
        "zoo add --help",
        "assemble --max-params 30Q",
        "zoo add nosuch",
        "embed --data demo --crop 3",
        "finetune --help",
        "finetune --mode half",
        "finetune --distill-logits 0.5",
        "frobnicate",
    ],
)
def test_help_and_usage_errors_import_nothing_heavy(line, tmp_path):
    script = (
        "import sys\n"
        "from dery_cli.cli import run\n"
        f"run({line.split()!r})\n"
        f"heavy = sorted({HEAVY!r} & set(sys.modules))\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-300:]


def test_no_pickle_is_read_or_written():
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]:
        source = path.read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                call = ast.unparse(node)
                assert not call.startswith(("torch.save", "pickle.dump", "pickle.load(")), path
                if call.startswith("torch.load"):
                    assert "weights_only=True" in call, path
