"""The last round: the best by proxy, made on a part of the target and asked about the rest."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

import dery_demo
from dery_cli import dissect
from dery_cli.core.scoring import network_outputs
from dery_cli.core.stitching.network import NetworkBuilder
from dery_cli.core.stitching.probe import HeldOut, judge, stratified_folds
from dery_cli.data.batches import ImageBatches
from dery_cli.data.samples import Split, choose_target
from dery_cli.data.sets import open_data
from dery_cli.stages.assemble import choose as assemble_stage
from dery_cli.stages.assemble import memo
from dery_cli.types import BlockRef

ASSEMBLE = ("assemble", "--max-params", "700k", "--json")


@pytest.fixture
def no_finalists(copied):
    """An effort that pays for a build and for no trial."""
    hint = copied(*ASSEMBLE, "--effort", "0.01").json["error"]["hint"]
    return ("--effort", str(2 * float(hint.split()[1])))


def test_with_no_finalists_the_proxy_decides(copied, tmp_path, no_finalists):
    outcome = copied(*ASSEMBLE, *no_finalists)
    assert outcome.code == 0, outcome.stderr
    result = outcome.json["result"]
    path = tmp_path / "ws" / "assemblies" / "default" / "candidates.json"
    listed = json.loads(path.read_text())["candidates"]
    assert all(entry["held_out"] is None for entry in listed)
    assert result["held_out"] is None
    assert result["proxy"]["score"] == max(entry["proxy"] for entry in listed)
    assert "held" not in outcome.stderr


def test_the_best_of_those_tried_is_picked(pipeline):
    path = pipeline.root / "assemblies" / "default" / "candidates.json"
    listed = json.loads(path.read_text())["candidates"]
    tried = [entry for entry in listed if entry["held_out"] is not None]
    assert len(tried) > 3  # controls are tried too
    best = min(tried, key=lambda entry: entry["held_out_loss"])
    assert pipeline.results["assemble"]["held_out"] == best["held_out"]
    assert pipeline.results["assemble"]["name"] == best["network"]


@pytest.mark.parametrize("role", ["picked", "best whole donor", "random path"])
def test_held_out_accuracy_is_that_of_networks_made_on_the_rest(pipeline, role):
    found = next(r for r in pipeline.results["assemble"]["comparison"] if r["role"] == role)
    assert found["batch_norm"] == "as it is"
    pairs = zip(found["blocks"], found["adapters"], strict=True)
    blocks = [BlockRef(*block, adapter=adapter) for block, adapter in pairs]
    data = open_data(str(pipeline.data))
    names = sorted({block.donor for block in blocks})
    donors = {
        name: dissect(
            dery_demo.zoo.build(name.removeprefix("demo__"), pretrained=True),
            torch.zeros(2, 3, 32, 32),
        )
        for name in names
    }
    split = Split.of(data.train, 0)
    samples = choose_target(data.train, split, samples=2048, fit=512)
    indices, place = samples.indices, {index: i for i, index in enumerate(samples.indices)}
    labels = torch.tensor([int(data.train.labels[index]) for index in indices])
    fold = stratified_folds(2 * labels + 1, 3)
    parts = []
    for asked in range(3):
        known = [index for index in samples.fit_indices if fold[place[index]] != asked]
        made_on = [int(labels[place[index]]) for index in known]
        seen, everything = (
            list(
                ImageBatches(
                    data.train,
                    chosen,
                    dery_demo.zoo.card("resnet").input,
                    crop=0.95,
                    batch_size=100,  # that of dery embed
                    device=torch.device("cpu"),
                )
            )
            for chosen in (known, indices)
        )
        builder = NetworkBuilder(donors, lambda _, v=seen: v, labels=made_on)
        network = builder.build(blocks).network
        parts.append(HeldOut(network_outputs(network, everything), fold == asked))
    assert found["held_out"] == pytest.approx(judge(parts, labels, 10).accuracy, abs=1e-9)


@pytest.mark.slow
def test_a_few_images_hold_nothing_out(copied):
    outcome = copied(*ASSEMBLE, "--target-samples", "39")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["result"]["held_out"] is None


@pytest.mark.slow
def test_what_the_proxy_cannot_score_comes_last(copied, tmp_path, monkeypatch, no_finalists):
    values = itertools.cycle([float("nan"), 0.5, -float("inf"), 1.0])
    monkeypatch.setattr(assemble_stage, "find_proxy", lambda name: lambda inputs: next(values))
    monkeypatch.setattr(memo, "is_built_in", lambda group, name: False)
    outcome = copied(*ASSEMBLE, *no_finalists)
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["result"]["proxy"]["score"] == 1.0
    path = tmp_path / "ws" / "assemblies" / "default" / "candidates.json"
    listed = json.loads(path.read_text(), parse_constant=pytest.fail)["candidates"]
    scores = [entry["proxy"] for entry in listed]
    assert scores[0] == 1.0
    assert None in scores
    assert scores == sorted(scores, key=lambda score: score is None)
    values = itertools.cycle([float("nan"), -float("inf")])
    outcome = copied(*ASSEMBLE, *no_finalists, "--name", "none")
    assert outcome.code == 1
    assert "gives no candidate a finite score" in outcome.json["error"]["message"]
