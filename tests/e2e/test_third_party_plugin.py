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

EXAMPLE = Path(__file__).parent / "third_party"
README = Path(__file__).parents[2] / "README.md"


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
    text = README.read_text()
    for name in ("pyproject.toml", "dery_birds.py"):
        assert (EXAMPLE / name).read_text().strip() in text


def test_it_is_found_checked_and_added(python, tmp_path):
    def dery(*words, code=0):
        done = _run([python, "-m", "dery_cli", *words, "--json"], tmp_path, code=code)
        return json.loads(done.stdout)

    found = [p for p in dery("zoo", "plugins")["result"]["plugins"] if p["name"] == "birds"]
    assert [(p["distribution"], p["version"], p["models"], p["error"]) for p in found] == [
        ("dery-birds", "1.0", 2, None)
    ]

    checked = dery("zoo", "check", "--all", "birds")["result"]
    assert [m["spec"] for m in checked["models"]] == ["birds/large", "birds/small"]
    assert checked["models"][0]["units"] == 8
    assert all(c["ok"] for m in checked["models"] for c in m["checks"])

    missing = dery("zoo", "add", "birds/small", code=1)["error"]
    assert "cannot get the weights of birds/small" in missing["message"]
    added = dery("zoo", "add", "birds/small", "--no-pretrained")["result"]["added"]
    assert (added[0]["license"], added[0]["task"]) == ("unknown", "unknown")  # random weights
    near = dery("zoo", "add", "birds/smal", code=2)["error"]
    assert near["hint"] == "did you mean birds/small?"


def test_its_contract_is_proven_from_python(python, tmp_path):
    script = (
        "import dery_birds\n"
        "from dery_cli.testing import check_plugin\n"
        "print([r.ok for r in check_plugin(dery_birds.zoo, ['small'])])\n"
    )
    assert _run([python, "-c", script], tmp_path).stdout.strip() == "[True]"
