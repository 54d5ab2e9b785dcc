"""Folders that timm, the hub and ``load_assembly`` read; and the hub, by a stand-in."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from dery_cli import load_assembly
from dery_cli.errors import DeryError, UsageError
from dery_cli.io.files import file_sha256
from dery_cli.zoo.hub_card import hub_card
from dery_cli.zoo.timm_folder import write_timm_folder
from tests.conftest import run_dery
from tests.unit.zoo.assemblies import assembly, dissected_once

LOAD = """
import sys, torch, dery_cli
network, transform = dery_cli.load_assembly(sys.argv[1])
print(float(network(torch.ones(1, 3, 32, 32)).sum()))
"""


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with dissected_once():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("hub") / "cut"
    write_timm_folder(assembly("cut", target="/home/somebody/photos"), place, repo="me/cut")
    return place


@pytest.mark.slow  # a process of its own
def test_a_moved_folder_needs_no_workspace(folder, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    words = [sys.executable, "-c", LOAD, str(moved)]
    said = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    network, _ = load_assembly(folder)
    with torch.no_grad():
        wanted = float(network(torch.ones(1, 3, 32, 32)).sum())
    assert float(said.stdout) == pytest.approx(wanted, abs=1e-5)
    assert not list(tmp_path.rglob(".dery"))


def test_no_place_on_this_machine_is_told(folder):
    for path in folder.iterdir():
        assert b"somebody" not in path.read_bytes()
    record = load_assembly(folder).record
    assert record.data["target"] == record.options["data"] == "photos"
    assert json.loads((folder / "config.json").read_text())["architecture"] == "dery_assembly"


def test_a_folder_that_is_there_is_kept(folder, tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(UsageError, match="is there already"):
        write_timm_folder(load_assembly(folder), tmp_path / "x")
    write_timm_folder(load_assembly(folder), tmp_path / "x", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]
    assert load_assembly(tmp_path / "x").classes == ("one", "two", "three")


def test_names_that_no_longer_match_name_the_versions(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "old")
    weights = tmp_path / "old" / "model.safetensors"
    state = load_file(weights)
    state["blocks.0.renamed.weight"] = state.pop("blocks.0.conv_stem.weight")
    save_file(state, weights)
    record = load_assembly(folder).record
    files = {"model.safetensors": file_sha256(weights)}
    old = dataclasses.replace(record, files=files, libraries={"timm": "0.9.1"})
    (tmp_path / "old" / "assembly.json").write_bytes(old.to_bytes())
    with pytest.raises(DeryError) as caught:
        load_assembly(tmp_path / "old")
    assert "(missing: blocks.0.conv_stem.weight)" in caught.value.message
    assert "it was written with timm 0.9.1, installed are timm 1" in caught.value.message


@pytest.mark.parametrize("missing", ["model.safetensors", "assembly.json"])
def test_a_file_that_is_missing_is_named(folder, tmp_path, missing):
    shutil.copytree(folder, tmp_path / "x")
    (tmp_path / "x" / missing).unlink()
    with pytest.raises(DeryError, match=missing if "model" in missing else "no assembly"):
        load_assembly(tmp_path / "x")


def test_the_card_is_in_the_hubs_format(folder):
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("timm", "image-classification")
    assert card.data.license == "unknown"
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.9)
    for said in ("at most 400.00k params", "top-1 of photos on test images: 0.9000", "hf:me/cut"):
        assert said in card.text
    assert "the licence 'unknown' is not known" in card.text


def test_conflicting_licences_stand_in_the_card():
    record = assembly("cut", licences=("GPL-3.0", "CC-BY-NC-4.0"), target="hf:me/photos").record
    text = hub_card("cut", record.data, {"timm": "1.0"}, "me/cut")
    front = huggingface_hub.ModelCard(text).data
    assert (front.license, front.datasets) == ("other", ["me/photos"])
    assert front.license_name == "CC-BY-NC-4.0 and GPL-3.0"
    assert "forbids further restrictions" in text


class Hub:
    """A folder that takes the part of the hub."""

    def __init__(self, root):
        self.root, self.calls = root, []

    def __call__(self, **_options):
        return self

    def create_repo(self, repo, *, private, repo_type, exist_ok):
        self.calls.append(("create", repo, private))

    def create_branch(self, repo, *, branch, exist_ok):
        self.calls.append(("branch", repo, branch))

    def upload_folder(self, *, repo_id, folder_path, revision, commit_message):
        shutil.copytree(folder_path, self.root / repo_id / (revision or "main"))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def snapshot_download(self, repo, *, revision, allow_patterns):
        place = self.root / repo / (revision or "main")
        if not place.is_dir():
            raise OSError(f"no repository {repo}")
        return str(place)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    stand_in = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", stand_in)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in.snapshot_download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return stand_in


def test_what_is_pushed_loads_from_the_hub(folder, hub, tmp_path):
    words = ["push", str(folder), "me/net", "--private", "--revision", "v1", "--json"]
    said = run_dery(*words, cwd=tmp_path).json
    assert said["ok"], said
    assert said["result"]["url"] == "https://hub/me/net/commit/1"
    assert hub.calls == [("create", "me/net", True), ("branch", "me/net", "v1")]
    names = ["README.md", "assembly.json", "config.json", "model.safetensors"]
    assert [file["name"] for file in said["result"]["files"]] == names
    assert any("licences: " in warning for warning in said["warnings"])
    network, _ = load_assembly("hf:me/net@v1")
    own, _ = load_assembly(folder)
    with torch.no_grad():
        assert torch.equal(network(torch.ones(1, 3, 32, 32)), own(torch.ones(1, 3, 32, 32)))
    with pytest.raises(DeryError, match="cannot fetch me/other: no repository me/other"):
        load_assembly("hf:me/other")


def test_a_dry_run_sends_nothing(folder, hub, tmp_path):
    said = run_dery("push", str(folder), "me/net", "--dry-run", cwd=tmp_path)
    assert said.code == 0, said.stderr
    assert "pipeline_tag: image-classification" in said.stdout
    assert "nothing was sent to me/net" in said.stdout
    assert (hub.calls, hub.root.exists()) == ([], False)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["push", "FOLDER", "me/net"], 1, "HF_HUB_OFFLINE is set"),
        (["push", "FOLDER", "net"], 2, "'net' is not OWNER/REPO"),
        (["push", "FOLDER", "me/a..b"], 2, "is no name on the hub"),
        (["push", "nobody", "me/net"], 2, "no such run or assembly: nobody"),
    ],
)
def test_what_cannot_be_pushed_is_said(folder, hub, monkeypatch, tmp_path, words, code, says):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = run_dery(*[str(folder) if w == "FOLDER" else w for w in words], cwd=tmp_path)
    assert (said.code, hub.calls) == (code, [])
    assert says in said.stderr
