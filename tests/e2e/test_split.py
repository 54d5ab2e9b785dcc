"""One split: nothing is chosen on what it was fitted on, in assemble, finetune and teachers."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from dery_cli import load_assembly
from dery_cli.core.scoring import network_outputs, top1
from dery_cli.data.batches import ImageBatches
from dery_cli.data.samples import Split
from dery_cli.data.sets import open_data
from dery_cli.io.artifacts import Workspace
from dery_cli.training import tuned_trial
from dery_cli.training.tuned_trial import TunedTrials
from tests.conftest import run_dery

DONORS = ("mobilenetv3", "resnext")
CLASSES, TRAIN, TEST = 10, 104, 12
EFFORT = ("--effort", "1")


def write_shuffled(folder, *, train, test, seed=0):
    """The demo's digits in class folders drawn without regard to what they show."""
    data = open_data("demo:")
    generator = random.Random(seed)
    for name, split, each in (("train", data.test, train), ("test", data.train, test)):
        chosen = generator.sample(range(len(split)), CLASSES * each)
        for place, index in enumerate(chosen):
            path = folder / name / f"class{place % CLASSES}"
            path.mkdir(parents=True, exist_ok=True)
            split.image(index).save(path / f"{index:04d}.png")
    return folder


@pytest.fixture(scope="module")
def meaningless(tmp_path_factory):
    """A workspace whose target has labels that mean nothing, and enough images to split."""
    base = tmp_path_factory.mktemp("permuted")
    data = write_shuffled(base / "data", train=TRAIN, test=TEST)
    root = base / "ws"
    for words in (
        ["zoo", "add", *(f"demo/{name}" for name in DONORS)],
        ["embed", "--data", str(data), "--samples", "64", "--batch-size", "128"],
        ["assemble", "--max-params", "700k", *EFFORT],
    ):
        outcome = run_dery(*words, "--workspace", str(root), "--json")
        assert outcome.code == 0, outcome.stderr
    return root, data


def at_chance(accuracy, images):
    """Whether an accuracy is within four standard errors of guessing."""
    return abs(accuracy - 0.1) < 4 * math.sqrt(0.09 / images)


def record_of(root, folder):
    path = next((root / folder).glob("*.json"), None)
    name = "run.json" if folder.startswith("runs") else "assembly.json"
    assert path is not None
    return json.loads((root / folder / name).read_text())


def test_figures_for_unseen_images_are_at_chance_in_assemble(meaningless):
    root, _ = meaningless
    data = record_of(root, "assemblies/default")["data"]
    valid = CLASSES * round(0.2 * TRAIN)
    assert data["fitted_on"] == "fit"
    for row in data["comparison"]:
        assert at_chance(row["test_top1"], CLASSES * TEST), row["role"]
        assert at_chance(row["held_out"], valid), row["role"]
        assert at_chance(row["proxy"], CLASSES * TRAIN - valid), row["role"]


def test_fine_tuned_trials_are_asked_about_images_they_have_not_seen(meaningless, monkeypatch):
    """Few updates, so that the small allowance pays for several networks; what they say decides."""
    root, _ = meaningless
    monkeypatch.setattr(tuned_trial, "FEWEST_UPDATES", 2)
    line = ("assemble", "--max-params", "700k", *EFFORT, "--name", "tuned", "--json")
    outcome = run_dery(*line, "--workspace", str(root))
    assert outcome.code == 0, outcome.stderr
    data = outcome.json["result"]
    valid = CLASSES * round(0.2 * TRAIN)
    rows = [row for row in data["comparison"] if row["tuned"] is not None]
    assert data["builds"]["tuned"] >= len({row["network"] for row in rows}) > 2
    assert data["comparison"][0]["tuned_loss"] == min(row["tuned_loss"] for row in rows)
    for row in rows:
        assert at_chance(row["tuned"], valid), row["role"]
    assert not Workspace(root).scratch.exists()
    monkeypatch.setattr(TunedTrials, "ask", None)  # all is remembered
    (root / "assemblies" / "tuned" / "assembly.json").unlink()
    again = run_dery(*line, "--workspace", str(root))
    assert again.code == 0, again.stderr
    assert again.json["result"] == data


def test_figures_for_unseen_images_are_at_chance_in_finetune(meaningless):
    root, _ = meaningless
    outcome = run_dery(
        "finetune", "--steps", "6", "--workspace", str(root), "--name", "a", "--json"
    )
    assert outcome.code == 0, outcome.stderr
    valid = CLASSES * round(0.2 * TRAIN)
    lines = (root / "runs" / "a" / "metrics.jsonl").read_text().splitlines()
    scores = [json.loads(line).get("valid_top1") for line in lines]
    assert any(score is not None for score in scores)
    for score in scores:
        assert score is None or at_chance(score, valid)
    assert at_chance(outcome.json["result"]["test_top1"], CLASSES * TEST)


@pytest.mark.parametrize("fraction", [pytest.param("0.3", marks=pytest.mark.slow), "0.2"])
def test_a_share_held_out_of_an_assembly_that_knows_all_images_is_forgotten(
    meaningless, tmp_path, fraction
):
    root, _ = meaningless
    few = write_shuffled(tmp_path / "few", train=30, test=4, seed=1)
    words = ["--workspace", str(root), "--json", "--name", "few"]
    made = run_dery("assemble", "--max-params", "700k", "--data", str(few), *EFFORT, *words)
    assert made.code == 0, made.stderr
    assert record_of(root, "assemblies/few")["data"]["fitted_on"] == "all"
    trained = run_dery(
        "finetune", "--steps", "2", "--assembly", "few", "--valid-fraction", fraction, *words
    )
    assert trained.code == 0, trained.stderr
    lines = (root / "runs" / "few" / "metrics.jsonl").read_text().splitlines()
    scores = [json.loads(line)["valid_top1"] for line in lines]
    for score in scores:  # the assembly itself is right on most of them
        assert at_chance(score, 300 * float(fraction))


@pytest.mark.slow
def test_what_is_delivered_for_use_as_it_is_knows_all_images(meaningless):
    """Labels without meaning are known where they were fitted, and nowhere else."""
    root, data = meaningless
    whole = run_dery(
        "assemble",
        "--max-params",
        "700k",
        "--for",
        "untrained",
        "--name",
        "whole",
        *EFFORT,
        "--workspace",
        str(root),
        "--json",
    )
    assert whole.code == 0, whole.stderr
    images = open_data(str(data)).train
    split = Split.of(images, 0)
    _, held_out = split.parts(images)
    known = {}
    for name in ("default", "whole"):
        network, transform = load_assembly(root / "assemblies" / name)
        batches = ImageBatches(
            images,
            held_out,
            transform.input,
            crop=transform.crop,
            batch_size=64,
            device=torch.device("cpu"),
        )
        labels = torch.tensor(batches.labels)
        known[name] = float(top1(network_outputs(network, batches), labels))
    assert at_chance(known["default"], len(held_out))
    assert known["whole"] > 0.2
    run = run_dery(
        "finetune", "--steps", "1", "--assembly", "whole", "--workspace", str(root), "--json"
    )
    assert run.code == 0, run.stderr
    assert "valid_top1" not in run.json["result"]["best"]


def test_a_teacher_that_knows_the_images_to_choose_on_is_refused(meaningless):
    root, _ = meaningless
    words = ("--workspace", str(root), "--json", "--steps", "1", "--name", "taught")
    same = run_dery("finetune", "--teacher", "assemblies/default", *words)
    assert same.code == 0, same.stderr
    other = run_dery(
        "finetune",
        "--teacher",
        "runs/taught",
        "--valid-fraction",
        "0.4",
        "--workspace",
        str(root),
        "--json",
        "--steps",
        "1",
        "--name",
        "other",
    )
    assert other.code == 2
    assert "holds out to choose on" in other.json["error"]["message"]
