"""Filters, the frontier and the proof of ``dery assemble``."""

from __future__ import annotations

import csv
import json

import dery_cli
from dery_cli.stages.assemble.config import preset_options
from tests.e2e.conftest import DONORS, snapshot


def _frontier(copied, *words):
    outcome = copied("assemble", "--pareto", *words, "--json")
    assert outcome.code == 0, outcome.stderr
    return [point["network"] for point in outcome.json["result"]["frontier"]]


def _named(networks):
    return {name for name in DONORS if any(f"demo__{name}" in network for network in networks)}


def test_include_and_exclude(copied):
    every = _named(_frontier(copied))
    assert len(every) > 1
    left_out = min(every)
    assert _named(_frontier(copied, "--exclude", f"demo__{left_out}")) <= set(DONORS) - {left_out}
    only = ("--include", f"demo__{left_out}")
    assert _named(_frontier(copied, *only)) == {left_out}


def test_a_filter_that_leaves_nothing_is_named(copied):
    outcome = copied("assemble", "--license", "GPL-3.0", "--json")
    assert outcome.code == 3
    assert "--license GPL-3.0" in outcome.json["error"]["message"]
    outcome = copied("assemble", "--image-size", "224", "--json")
    assert outcome.code == 3
    assert "--image-size 224" in outcome.json["error"]["message"]


def test_max_donors(copied):
    """Of the paper's blocks, which are of more donors otherwise."""
    outcome = copied(
        "assemble",
        "--space",
        "paper",
        "--max-donors",
        "2",
        "--no-whole",
        "--effort",
        "1",
        "--json",
    )
    if outcome.code == 3:
        assert "--max-donors 2" in outcome.json["error"]["message"]
        return
    blocks = outcome.json["result"]["network"]["blocks"]
    assert len({block["donor"] for block in blocks}) == 2


def test_another_assembly_of_parts_alone(copied, tmp_path):
    """Other filters, another budget, another name: with the scores of the first, and beside it."""
    kept, first = tmp_path / "ws" / "targets", tmp_path / "ws" / "assemblies" / "default"
    before = snapshot(kept), snapshot(first)
    words = ("--no-whole", "--exclude", "demo__resnext", "--max-params", "1M", "--name", "other")
    outcome = copied("assemble", *words, "--effort", "1", "-v", "--json")
    assert outcome.code == 0, outcome.stderr
    assert "those of an earlier run" in outcome.stderr
    assert (snapshot(kept), snapshot(first)) == before
    result = outcome.json["result"]
    assert not result["whole"]
    assert all("demo__resnext" not in row["network"] for row in result["comparison"])
    assert "best whole donor" not in {row["role"] for row in result["comparison"]}
    folder = tmp_path / "ws" / "assemblies" / "other"
    record = json.loads((folder / "assembly.json").read_text())
    assert record["data"]["network"]["blocks"]
    card = (folder / "README.md").read_text().replace("\\", "")
    for block in record["data"]["network"]["blocks"]:
        assert block["donor"] in card
        assert block["license"] in card


def test_the_frontier(copied, tmp_path):
    outcome = copied("assemble", "--pareto", "--max-params", "2M", "--name", "front", "--json")
    assert outcome.code == 0
    points = outcome.json["result"]["frontier"]
    assert points == sorted(points, key=lambda p: -p["score"])
    assert all(p["params"] <= 2_000_000 for p in points)
    for one in points:
        for other in points:
            beaten = (
                other["score"] >= one["score"]
                and other["params"] <= one["params"]
                and other["flops"] <= one["flops"]
            )
            assert not beaten or other is one or other == one
    with (tmp_path / "ws" / "assemblies" / "front" / "pareto.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["params"]) for row in rows] == [p["params"] for p in points]
    assert not (tmp_path / "ws" / "assemblies" / "front" / "assembly.json").exists()
    rows = {row["name"]: row for row in copied("status", "--json").json["result"]["stages"]}
    assert rows["front"]["state"] == "done"  # and not an assembly that is missing


def test_the_best_score_within_a_budget_never_falls_with_it(copied):
    scores = []
    for budget in ("500k", "700k", "1M", "3M"):
        outcome = copied("assemble", "--pareto", "--max-params", budget, "--json")
        if outcome.code == 0:
            scores.append(outcome.json["result"]["frontier"][0]["score"])
    assert scores == sorted(scores)
    assert len(scores) > 1


def test_the_papers_own_procedure(copied, tmp_path):
    outcome = copied("assemble", "--preset", "paper", "--effort", "2", "--seed", "1", "--json")
    assert outcome.code == 0, outcome.stderr
    result = outcome.json["result"]
    assert result["proxy"]["name"] == "naswot"
    assert result["program"]["agreement"] == "candidates were drawn at random"
    assert {joint["stitch"] for joint in result["network"]["joints"] if joint} <= {"paper"}
    assert result["network"]["stem"]["source"]["index"] == 0
    assert all(not row["whole"] for row in result["comparison"])
    assert result["builds"]["without_score"] == 0
    network, _ = dery_cli.load_assembly(tmp_path / "ws" / "assemblies" / "default")
    assert sum(p.numel() for p in network.parameters()) == result["params"]
    assert "stem.layers.0.weight" in network.state_dict()
    again = copied("assemble", "--preset", "paper", "--effort", "2", "--seed", "1", "--json")
    assert "up to date" in again.stderr


def test_what_is_given_stands_over_a_preset():
    given = preset_options("paper", stem=None, proxy="params", space=None)
    assert given == {
        "stem": "paper",
        "stitch": "paper",
        "space": "paper",
        "proxy": "params",
        "draw": "random",
    }
    assert preset_options(None, stem="donor", proxy=None) == {"stem": "donor"}
