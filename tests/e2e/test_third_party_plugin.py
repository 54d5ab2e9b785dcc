"""The plugin of the README, really installed with pip into an environment of its own."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.pages import PLUGINS

EXAMPLE = Path(__file__).parent / "third_party"


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An environment that sees what this one has, and has the plugin besides."""
    root = tmp_path_factory.mktemp("third_party")
    venv.create(root / "env", with_pip=False, symlinks=True)
    there = root / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    purelib = Path(_run([there, "-c", where], root).stdout.strip())
    outer = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
    lines = [f"import site; site.addsitedir({path!r})" for path in sorted(outer)]
    (purelib / "outer.pth").write_text("\n".join(lines) + "\n")
    shutil.copytree(EXAMPLE, root / "dery-birds")
    pip = [sys.executable, "-m", "pip", "--python", there, "install", "--quiet", "--no-deps"]
    _run([*pip, "--no-build-isolation", root / "dery-birds"], root)
    assert (purelib / "dery_birds.py").is_file()
    return there


def _run(words, cwd, *, code=0):
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        list(map(str, words)), cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_the_readme_shows_this_very_plugin():
    for name in ("pyproject.toml", "dery_birds.py"):
        assert (EXAMPLE / name).read_text().strip() in PLUGINS


LINES = {
    "zoo plugins": 0,
    "zoo check --all birds": 0,
    "zoo add birds/small": 1,
    "zoo add birds/small --no-pretrained": 0,
    "zoo add birds/smal": 2,
}
"""What is asked of the environment, in one process, and the exit codes."""

SCRIPT = """
import json, sys
import dery_birds
from dery_cli.cli import run
from dery_cli.runtime import terminal
from dery_cli.testing import check_plugin

for line, code in json.loads(sys.argv[1]).items():
    terminal.use_terminal(terminal.Terminal(json=True))
    assert run([*line.split(), "--json"]) == code, line
print(json.dumps([r.ok for r in check_plugin(dery_birds.zoo, ["small"])]))
"""


def test_it_is_found_checked_and_added(python, tmp_path):
    done = _run([python, "-c", SCRIPT, json.dumps(LINES)], tmp_path)
    *answers, proven = map(json.loads, done.stdout.splitlines())
    said = dict(zip(LINES, answers, strict=True))
    found = [p for p in said["zoo plugins"]["result"]["plugins"] if p["name"] == "birds"]
    assert [(p["distribution"], p["version"], p["models"], p["error"]) for p in found] == [
        ("dery-birds", "1.0", 2, None)
    ]

    checked = said["zoo check --all birds"]["result"]
    assert [m["spec"] for m in checked["models"]] == ["birds/large", "birds/small"]
    assert checked["models"][0]["units"] == 8
    assert all(c["ok"] for m in checked["models"] for c in m["checks"])

    missing = said["zoo add birds/small"]["error"]
    assert "cannot get the weights of birds/small" in missing["message"]
    added = said["zoo add birds/small --no-pretrained"]["result"]["added"]
    assert (added[0]["license"], added[0]["task"]) == ("unknown", "unknown")  # random weights
    assert said["zoo add birds/smal"]["error"]["hint"] == "did you mean birds/small?"
    assert proven == [True]  # by ``check_plugin``, from Python
