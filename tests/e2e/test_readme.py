"""The snippets and the walk of README, run as they stand on a small workspace."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from tests.conftest import run_dery
from tests.pages import PAGES, README

ROOT = Path(__file__).parents[2]
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", PAGES, re.MULTILINE | re.DOTALL)
SHORT = {
    "embed": "--samples 60",
    "partition": "--restarts 10",
    "assemble": "--target-samples 60 --effort 0.5",
    "finetune": "--effort 0",
}
"""What is added to the lines of the walk, so that each takes seconds."""


def snippet(words: str) -> str:
    """The one snippet that has these words."""
    [found] = [text for text in SNIPPETS if words in text]
    return found


def test_a_network_is_loaded_and_a_model_dissected(pipeline, tmp_path, monkeypatch):
    (tmp_path / ".dery").symlink_to(pipeline.root)
    monkeypatch.chdir(tmp_path)
    model = timm.create_model("resnet18", num_classes=3)
    names = {
        "image": Image.open(next((pipeline.data / "test").rglob("*.png"))),
        "model": model,
        "example": torch.zeros(2, 3, 64, 64),
    }
    exec(snippet("load_assembly"), names)
    assert names["logits"].shape == (1, len(list((pipeline.data / "test").iterdir())))
    assert len(names["dissection"].anatomy.nodes) > 5
    assert isinstance(names["block"], nn.Module)
    own = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in names["block"].parameters()} < own


def test_it_is_a_timm_model_from_a_folder_and_from_the_hub(copied, tmp_path, monkeypatch):
    """The hub is this folder; who serves the files is all that is put in its place."""
    out = tmp_path / "out"
    line = ("export", "assemblies/default", "--to", str(out), "--format", "safetensors")
    assert copied(*line).code == 0
    asked = []

    def download(repo_id, filename, **_options):
        asked.append((repo_id, filename))
        return str(out / filename)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    names = {}
    exec(snippet("import timm, dery_cli.timm").replace("local-dir:DIR", f"local-dir:{out}"), names)
    size = names["model"].pretrained_cfg["input_size"]
    assert names["model"](torch.zeros(2, *size)).shape == (2, 5)
    assert {repo for repo, _ in asked} == {"me/my-network"}
    maps = names["features"](torch.zeros(2, *size))
    assert len(maps) == len(names["features"].feature_info.channels())
    assert all(one.ndim == 4 for one in maps)
    exec(snippet("RetinaNet").replace("224", str(size[-1])), names)
    box = {"boxes": torch.tensor([[4.0, 4.0, 20.0, 20.0]]), "labels": torch.tensor([1])}
    losses = names["detector"]([torch.rand(size)] * 2, [box] * 2)
    sum(losses.values()).backward()
    bare = [n for n, p in names["detector"].named_parameters() if p.grad is None]
    assert bare == []


@pytest.mark.slow
def test_a_plugins_own_test_passes(tmp_path):
    """In a folder with the plugin itself, which README shows before."""
    (tmp_path / "dery_birds.py").write_text(snippet("class BirdZoo"))
    (tmp_path / "test_birds.py").write_text(snippet("def test_contract"))
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_birds.py"],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def test_every_snippet_is_one_of_these():
    assert len(SNIPPETS) == 5


@pytest.mark.slow
def test_the_walk_without_a_network(tmp_path):
    """Line by line as shown, in one folder; samples and trials are few."""
    shown = README.partition("with no network:\n\n")[2].partition("\n\n")[0]
    lines = [shlex.split(line) for line in shown.splitlines()]
    assert [words[1] for words in lines] == [
        "zoo", "embed", "sim", "partition", "assemble", "finetune", "eval",
    ]  # fmt: skip
    for _, *words in lines:
        done = run_dery(*words, *SHORT.get(words[0], "").split(), cwd=tmp_path)
        assert done.code == 0, (words, done.stderr)
    assert "top-1" in done.stdout
