"""What joins the blocks: ``--stitch`` and ``--match``, on the real path."""

from __future__ import annotations

import json

import pytest
import torch

import dery_cli
from dery_cli.core.cost.flops import count_flops, count_params
from dery_cli.core.stitching.class_weight import CLASS_WEIGHTS

ASSEMBLE = (
    "assemble",
    "--max-params",
    "1.5M",
    "--space",
    "paper",
    "--no-whole",
    "--effort",
    "1",
    "--json",
)


@pytest.mark.parametrize("kind", ["linear", "mlp", "paper"])
def test_every_kind_is_counted_written_and_loaded(copied, tmp_path, kind):
    outcome = copied(*ASSEMBLE, "--stitch", kind)
    assert outcome.code == 0, outcome.stderr
    result = outcome.json["result"]
    joints = [joint for joint in result["network"]["joints"] if joint is not None]
    assert joints
    assert {joint["stitch"] for joint in joints} == {kind}
    assert all((joint["r2"] is None) == (kind == "paper") for joint in joints)
    folder = tmp_path / "ws" / "assemblies" / "default"
    network, _ = dery_cli.load_assembly(folder)
    assert count_params(network) == result["params"]
    assert count_flops(network, torch.zeros(1, 3, 32, 32)) == result["flops"]
    assert {stitch.kind for stitch in network.stitches.values()} == {kind}
    assert "stitch R2" in (folder / "README.md").read_text()
    tuned = copied("finetune", "--steps", "2", "--effort", "0", "--json")
    assert tuned.code == 0, tuned.stderr


def test_latency_and_memory_are_those_of_the_kind(copied):
    sizes = {}
    for kind in ("linear", "mlp"):
        limits = ("--max-memory", "1G", "--max-latency", "10s")
        outcome = copied(*ASSEMBLE, "--stitch", kind, *limits)
        assert outcome.code == 0, outcome.stderr
        sizes[kind] = outcome.json["result"]["comparison"][0]["memory_bytes"]
    assert all(size > 0 for size in sizes.values())


def test_an_unknown_kind_is_refused_with_the_kinds(copied):
    outcome = copied("assemble", "--stitch", "conv", "--json")
    assert outcome.code == 2
    assert "--stitch is 'conv'" in outcome.json["error"]["message"]
    assert "linear, mlp, paper" in outcome.json["error"]["hint"]


def test_matching_is_reported_and_changes_the_stitches_alone(copied, tmp_path):
    folder = tmp_path / "ws" / "assemblies"
    same = ASSEMBLE  # which of them is best may change with the matching
    assert copied(*same, "--name", "plain").code == 0
    outcome = copied(*same, "--name", "matched", "--match")
    assert outcome.code == 0, outcome.stderr
    result = outcome.json["result"]
    assert result["match"]["after"] > result["match"]["before"]
    assert result["match"]["kept"]
    plain, matched = (
        dery_cli.load_assembly(folder / name).network.state_dict() for name in ("plain", "matched")
    )
    changed = {name for name in plain if not torch.equal(plain[name], matched[name])}
    assert {name.split(".")[0] for name in changed} == {"stitches", "head"}


def test_stitches_are_fitted_on_the_targets_images(copied, tmp_path):
    """The zoo was embedded with digits; clothes are another target, with other stitches."""
    assert copied(*ASSEMBLE, "--name", "digits").code == 0
    outcome = copied(*ASSEMBLE, "--name", "clothes", "--data", "demo:fashion")
    assert outcome.code == 0, outcome.stderr
    weights = json.loads(outcome.stdout)["result"]["network"]["joints"]
    chosen = [joint["class_weight"] for joint in weights if joint is not None]
    assert all(weight in CLASS_WEIGHTS for weight in chosen)
    folder = tmp_path / "ws" / "assemblies"
    networks = [dery_cli.load_assembly(folder / name) for name in ("digits", "clothes")]
    blocks = [network.record.data["network"]["blocks"] for network in networks]
    if [b["donor"] for b in blocks[0]] == [b["donor"] for b in blocks[1]]:
        first, second = (next(iter(n.network.stitches.values())) for n in networks)
        assert not torch.equal(first.output.weight, second.output.weight)
