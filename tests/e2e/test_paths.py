"""The free space from the command line: networks as they are written, pins, budgets, kills."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time

import pytest
import torch

import dery_cli
from dery_cli.core.assembly.notation import merged, parse_network
from dery_cli.core.cost.flops import count_flops, count_params
from dery_cli.types import BlockRef, Donor
from tests.conftest import run_dery
from tests.e2e.conftest import snapshot

FEW = ("--effort", "1", "--json")
FIT = ("--fit-samples", "60", "--target-samples", "80")


def blocks_of(result):
    return [(b["donor"], b["start"], b["stop"]) for b in result["network"]["blocks"]]


def test_blocks_builds_exactly_that_network(copied, tmp_path):
    text = "demo__mobilenetv3[:2] + demo__vit_cls[3:5] ~ demo__vit_cls[5:6]"
    outcome = copied("assemble", "--blocks", text, *FIT, "--json")
    assert outcome.code == 0, outcome.stderr
    result = outcome.json["result"]
    assert result["name"] == "demo__mobilenetv3[0:2] + demo__vit_cls[3:5] ~ demo__vit_cls[5:6]"
    network, _ = dery_cli.load_assembly(tmp_path / "ws" / "assemblies" / "default")
    assert len(network.stitches) == 2
    assert count_params(network) == result["params"]
    assert count_flops(network, torch.zeros(1, 3, 32, 32)) == result["flops"]
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert network(x).shape == (3, 10)
    assert copied("eval", "assemblies/default", "--json").code == 0
    tuned = copied("finetune", "--steps", "2", "--effort", "0", "--json")
    assert tuned.code == 0, tuned.stderr
    assert tuned.json["result"]["start"] == result["name"]


def test_whatever_is_printed_can_be_pasted(pipeline):
    zoo = json.loads((pipeline.root / "zoo.json").read_text())["data"]["donors"]
    anatomies = {entry["name"]: Donor.from_json(entry).anatomy for entry in zoo}
    listed = json.loads((pipeline.root / "assemblies" / "default" / "candidates.json").read_text())
    rows = [*pipeline.results["assemble"]["comparison"], *listed["candidates"]]
    assert len(rows) > 10
    for row in rows:
        refs = parse_network(row["network"], anatomies)
        pairs = zip(row["blocks"], row["adapters"], strict=True)
        assert refs == merged([BlockRef(*block, adapter=adapter) for block, adapter in pairs])


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (("--blocks", "demo__resnext[0:99]"), "demo__resnext has nodes 0 to", "dery zoo show"),
        (("--blocks", "demo__resnet"), "there is no donor demo__resnet", "did you mean"),
        (("--start", "demo__swin[2:4]"), "a network begins at a donor's node 0", "[0:4]"),
        (("--require", "demo__swin[4:2]"), "has no unit", "has nodes 0 to"),
        (("--exclude", "nobody[0:1]"), "there is no donor nobody", "dery zoo list"),
    ],
)
def test_a_wrong_piece_is_named(copied, words, message, hint):
    outcome = copied("assemble", *words, "--json")
    assert outcome.code == 2
    assert message in outcome.json["error"]["message"]
    assert hint in outcome.json["error"]["hint"]


def test_pins_hold_and_impossible_ones_are_named(copied):
    pins = ("--start", "demo__swin[0:2]", "--end", "demo__resnext", "--max-params", "1M")
    outcome = copied("assemble", *pins, "--exclude", "demo__resnext[0:3]", *FIT, *FEW)
    assert outcome.code == 0, outcome.stderr
    found = blocks_of(outcome.json["result"])
    controls = {row["role"] for row in outcome.json["result"]["comparison"]}
    assert "random path" in controls
    listing = [row for row in outcome.json["result"]["comparison"] if row["role"] == "random path"]
    for blocks in (listing[0]["blocks"],):
        assert (blocks[0][0], blocks[0][1]) == ("demo__swin", 0)
        assert blocks[0][2] >= 2
        assert blocks[-1][0] == "demo__resnext"
        assert all(start >= 3 for donor, start, _ in blocks if donor == "demo__resnext")
    assert found
    outcome = copied("assemble", "--start", "demo__swin", "--exclude", "demo__swin[0:1]", *FEW)
    assert outcome.code == 3
    assert "--start 'demo__swin'" in " ".join(outcome.json["error"]["details"]["sentences"])
    outcome = copied("assemble", "--blocks", "demo__swin", "--max-params", "10k", "--json")
    assert outcome.code == 3
    assert "is not within at most 10.00k params" in outcome.json["error"]["message"]


def test_a_dry_run_counts_and_writes_nothing(copied, tmp_path):
    before = snapshot(tmp_path / "ws")
    outcome = copied("assemble", "--max-params", "300k", "--dry-run", "--json")
    assert outcome.code == 0, outcome.stderr
    told = outcome.json["result"]
    assert told["networks"] > told["within_budget"] > 1000
    assert told["builds"] > 0
    assert told["multiply_adds"] > 0
    assert told["seconds"] > 0
    assert told["bytes"] > 0
    assert snapshot(tmp_path / "ws") == before


@pytest.mark.slow
def test_several_budgets_share_what_is_built(copied, tmp_path):
    outcome = copied("assemble", "--max-params", "500k,600k", "--name", "two", *FIT, *FEW)
    assert outcome.code == 0, outcome.stderr
    found = outcome.json["result"]["assemblies"]
    assert set(found) == {"two-500k", "two-600k"}
    for name, most in (("two-500k", 500_000), ("two-600k", 600_000)):
        assert found[name]["params"] <= most
        assert (tmp_path / "ws" / "assemblies" / name / "assembly.json").is_file()
    first, second = (
        {e["network"] for e in json.loads(path.read_text())["candidates"]}
        for path in sorted((tmp_path / "ws" / "assemblies").glob("two-*/candidates.json"))
    )
    assert first & second
    # the second found what the first had built: each figure is there once
    figures = [p.read_text() for p in (tmp_path / "ws" / "builds").rglob("*.json")]
    keys = [json.dumps(json.loads(text)["options"], sort_keys=True) for text in figures]
    assert len(set(keys)) == len(keys)


@pytest.mark.slow
def test_a_killed_assemble_goes_on_with_its_builds_to_the_same_bytes(pipeline, tmp_path):
    line = ["assemble", "--max-params", "600k", "--effort", "3", *FIT, "--name", "cut"]
    roots = [tmp_path / name for name in ("one", "other")]
    for root in roots:
        shutil.copytree(pipeline.root, root)
    assert run_dery(*line, "--workspace", str(roots[0])).code == 0
    builds = roots[1] / "builds"
    known = len(list(builds.rglob("*.json")))
    command = [sys.executable, "-m", "dery_cli", *line, "--workspace", str(roots[1])]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and len(list(builds.rglob("*.json"))) < known + 2:
            time.sleep(0.05)
        process.kill()
    assert not (roots[1] / "assemblies" / "cut" / "assembly.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in builds.rglob("*.json")}
    assert len(kept) > known
    assert run_dery(*line, "--workspace", str(roots[1])).code == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert snapshot(roots[0]) == snapshot(roots[1])


def test_a_zoo_of_one_donor_has_slices(copied):
    for name in ("resnext", "swin", "vit_cls"):
        assert copied("zoo", "remove", f"demo__{name}").code == 0
    outcome = copied("assemble", "--max-params", "150k", *FIT, *FEW)
    assert outcome.code == 0, outcome.stderr
    result = outcome.json["result"]
    assert {donor for donor, _, _ in blocks_of(result)} == {"demo__mobilenetv3"}
    assert not result["whole"]
    assert "best slice" in {row["role"] for row in result["comparison"]}
