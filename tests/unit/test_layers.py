"""Rules that a machine checks: who may import whom, and what must not be imported early."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dery_cli"

# from the bottom up; a module may import its own layer and those below
LAYERS = [
    {"errors", "types", "config"},
    {"core"},
    {
        "plugin",
        "launcher",
        "processes",
        "artifacts",
        "stream",
        "data",
        "splits",
        "folders",
        "manifest",
        "checkpoints",
        "zoo",
        "contract",
        "testing",
        "loading",
        "embedder",
        "embeddings",
        "similarity_store",
        "assembly_store",
        "reassembly",
        "inference",
        "model_card",
        "assemble_stage",
        "assembling",
        "making",
        "workshop",
        "candidates",
        "target",
        "training",
        "finetuning",
        "finetune_stage",
        "teacher",
        "terminal",
    },
    {"commands"},
    {"cli"},
    {"__main__"},
]
HEAVY = {"torch", "timm", "torchvision", "numpy", "scipy", "mip", "accelerate", "safetensors"}
HEAVY |= {"datasets", "pyarrow", "pandas"}


def _layer(part: str) -> int:
    for number, layer in enumerate(LAYERS):
        if part in layer:
            return number
    raise AssertionError(f"dery_cli.{part} is in no layer")


def _imports(path: Path) -> list[tuple[str, bool]]:
    """(module, at the top) of every import of a file; type checking blocks left out."""
    found = []
    tree = ast.parse(path.read_text())

    def visit(node: ast.AST, top: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, top))
            found.extend((f"{node.module}.{alias.name}", top) for alias in node.names)
        inner = top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            visit(child, inner)

    visit(tree, True)
    return found


def _is_module(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_arrow_points_back(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for module, _ in _imports(path):
        parts = module.split(".")
        if parts[0] != "dery_cli" or len(parts) < 2 or not _is_module(parts[1]):
            continue
        if own == "commands" and module.startswith("dery_cli.cli"):
            assert path.name == "demo.py", "only the demo runs command lines"
            continue
        assert _layer(parts[1]) <= _layer(own), f"{path.name} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_dery_never_imports_a_plugin(path):
    for module, _ in _imports(path):
        plugins = ("dery_demo", "dery_huggingface", "dery_lite", "dery_timm", "dery_torchvision")
        assert not module.startswith(plugins), module


@pytest.mark.parametrize("path", sorted((PACKAGE / "core").glob("*.py")), ids=lambda p: p.name)
def test_the_core_touches_no_files_and_prints_nothing(path):
    for module, _ in _imports(path):
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
