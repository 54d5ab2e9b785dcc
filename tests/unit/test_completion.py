"""What the shell offers after TAB, in a process that loads neither torch nor numpy."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys
from dery_cli.cli import run
try:
    run([])
finally:
    print("heavy", sorted({"torch", "numpy", "timm", "mip"} & set(sys.modules)))
"""


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / ".dery"
    for kind, record in (("assemblies/small", "assembly.json"), ("runs/tuned", "run.json")):
        (root / kind).mkdir(parents=True)
        (root / kind / record).write_text("{}")
    (root / "runs" / "begun").mkdir()
    donors = [{"name": "demo__swin"}, {"name": "demo__resnet"}, {"name": "other"}]
    (root / "zoo.json").write_text(json.dumps({"data": {"donors": donors}}))
    return tmp_path


def offered(folder, line):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment(line),
        check=False,
    )
    *names, heavy = done.stdout.splitlines()
    assert heavy == "heavy []", done
    return names


def environment(line):
    words = line.split(" ")
    return {
        **os.environ,
        "_DERY_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("dery zoo show demo", ["demo__resnet", "demo__swin"]),
        ("dery finetune --assembly ", ["small"]),
        ("dery eval ", ["assemblies/small", "runs/tuned"]),
        ("dery sim --metric c", ["cka"]),
        ("dery assemble --proxy n", ["naswot"]),
    ],
)
def test_names_are_offered(folder, line, names):
    assert offered(folder, line) == names


def test_a_damaged_zoo_offers_nothing(folder):
    (folder / ".dery" / "zoo.json").write_text("[")
    assert offered(folder, "dery zoo show demo") == [""]  # no more than an end of line
