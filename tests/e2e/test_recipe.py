"""Recipes on a real workspace: nothing twice, and what a changed line redoes; init; a workflow."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dery_cli.stages.recipe.config import SHIPPED
from tests.conftest import make_images, run_dery
from tests.e2e.conftest import DONORS, STAGES

ROOT = Path(__file__).parents[2]
WORKFLOW = SHIPPED / "github-actions.yml"
RECIPE = """\
data = "{data}"
[zoo]
specs = {specs}
[embed]
batch-size = 100
[sim]
[partition]
blocks = 3
eps = 0.5
restarts = 20
[assemble]
max-params = "700k"
effort = 1
[finetune]
steps = 8
batch-size = 32
effort = 0
[eval]
"""


@pytest.fixture
def recipe(copied, pipeline, tmp_path):
    """Write the pipeline's own lines as a recipe, changed, and run it on a copy."""

    def run(*changes: tuple[str, str], dry: bool = False):
        text = RECIPE.format(data=pipeline.data, specs=[f"demo/{name}" for name in DONORS])
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "recipe.toml").write_text(text)
        return copied("run", "recipe.toml", "--json", *(["--dry-run"] if dry else []))

    return run


def states(outcome) -> list[str]:
    assert outcome.code == 0, outcome.stderr
    return [step["state"] for step in outcome.json["result"]["steps"]]


def test_the_same_recipe_does_nothing_and_a_changed_line_what_depends_on_it(recipe, pipeline):
    assert "steps 8" in STAGES["finetune"]  # the recipe below says the same as the pipeline's lines
    first = recipe()
    assert states(first) == [*["up to date"] * 6, "done"]
    assert first.json["result"]["steps"][6]["result"]["top1"] == pipeline.results["eval"]["top1"]
    assert states(recipe()) == ["up to date"] * 7
    assert states(recipe(dry=True)) == ["up to date"] * 7
    changed = ("steps = 8", "steps = 2")
    told = recipe(changed, dry=True)
    assert states(told) == [*["up to date"] * 5, "would run", "would run"]
    assert states(recipe(dry=True)) == ["up to date"] * 7  # a dry run did nothing
    assert states(recipe(changed)) == [*["up to date"] * 5, "done", "done"]


def test_a_failed_stage_ends_the_run_with_its_code_and_its_section(recipe):
    found = recipe(("700k", "1k"))
    assert found.code == 3
    assert found.json["error"]["code"] == "infeasible"
    assert found.json["error"]["message"].startswith("recipe.toml:11: assemble: ")
    assert found.json["error"]["details"]["section"] == "assemble"
    assert len(found.json["error"]["details"]["steps"]) == 4


def test_what_is_up_to_date_takes_no_torch(recipe, tmp_path):
    whole = recipe()
    assert whole.code == 0
    text = (tmp_path / "recipe.toml").read_text()
    (tmp_path / "short.toml").write_text(text[: text.index("[assemble]")])
    script = (
        "import sys\n"
        "from dery_cli.cli import run\n"
        "code = run(['run', 'short.toml', '--quiet', '--workspace', 'ws'])\n"
        "print(code, sorted({'torch', 'timm', 'mip'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "0 []\n"


def test_a_page_is_written_once(copied, pipeline, tmp_path):
    pytest.importorskip("jinja2")
    (tmp_path / "recipe.toml").write_text(
        f'data = "{pipeline.data}"\n[embed]\nbatch-size = 100\n[report]\nto = "page.html"\n'
    )
    first = copied("run", "recipe.toml", "--json")
    assert states(first) == ["up to date", "done"]
    page = tmp_path / "page.html"
    before = page.stat().st_mtime_ns
    assert states(copied("run", "recipe.toml", "--json")) == ["up to date"] * 2
    assert page.stat().st_mtime_ns == before
    page.unlink()
    assert states(copied("run", "recipe.toml", "--json")) == ["up to date", "done"]
    assert page.is_file()


def test_ctrl_c_ends_the_run_and_the_next_goes_on(pipeline, tmp_path):
    """While images are embedded, which takes a second or two."""
    (tmp_path / "recipe.toml").write_text(
        f'data = "{pipeline.data}"\n[zoo]\nspecs = ["demo/resnext", "demo/swin"]\n[embed]\n[sim]\n'
    )
    line = [sys.executable, "-m", "dery_cli", "run", "recipe.toml", "--workspace", "own"]
    with subprocess.Popen(
        line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while not (tmp_path / "own" / "embeddings").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert err.rstrip().endswith("error: interrupted")
    again = run_dery(*line[3:], "--json", cwd=tmp_path)
    assert states(again)[0] == "up to date"
    assert (tmp_path / "own" / "similarity" / "cka.json").is_file()


def test_init_writes_a_recipe_that_is_right(tmp_path):
    make_images(tmp_path / "photos" / "train", ["cat", "dog"], 2)
    make_images(tmp_path / "photos" / "val", ["cat", "dog"], 1)
    make_images(tmp_path / ".hidden", ["a", "b", "c"], 1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "Model 1.safetensors").write_bytes(b"")
    (tmp_path / "mine" / "config.json").write_text('{"architecture": "resnet18"}')
    (tmp_path / "old.pth").write_bytes(b"")
    wrote = run_dery("init", "--json", cwd=tmp_path)
    assert wrote.code == 0, wrote.stderr
    assert wrote.json["result"]["images"] == {"photos": 2}
    found = {"old.pth": None, "mine/Model 1.safetensors": "resnet18"}
    assert wrote.json["result"]["checkpoints"] == found
    again = run_dery("init", cwd=tmp_path)
    assert again.code == 2
    assert "--force" in again.stderr
    assert run_dery("init", "--force", cwd=tmp_path).code == 0
    told = run_dery("run", "recipe.toml", "--dry-run", "--json", cwd=tmp_path)
    assert told.code == 0, told.stderr
    lines = [step["command"] for step in told.json["result"]["steps"]]
    assert "--weights 'mine/Model 1.safetensors' --as model_1 -- timm/resnet18" in lines[1]
    assert "--data photos" in lines[2]


def run_steps(text: str) -> list[str]:
    """The scripts of a workflow's ``run:`` keys."""
    found = re.findall(r"^( +)run: (?:\|\n((?:\1  .*\n)+)|(.+)\n)", text, re.MULTILINE)
    return [
        "\n".join(line[len(indent) + 2 :] for line in block.splitlines()) if block else line
        for indent, block, line in found
    ]


@pytest.mark.slow
def test_the_workflow_for_ci_runs(pipeline, tmp_path):
    scripts = [script for script in run_steps(WORKFLOW.read_text()) if "pip install" not in script]
    assert len(scripts) == 5
    (tmp_path / "dery").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dery_cli "$@"\n')
    (tmp_path / "dery").chmod(0o755)
    paths = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {
        "PATH": paths, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "plugins")]),
        "ZOO": "demo/mobilenetv3 demo/resnext", "DATA": str(pipeline.data), "BUDGET": "700k",
        "LEAST_TOP1": "0.05", "EFFORT": "1", "STEPS": "2",
    }  # fmt: skip
    for script in scripts:
        line = ["bash", "-e", "-c", script]
        done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "eval.json").read_text())["ok"] is True
