"""What joins the blocks: ``--stitch`` and ``--match``, on the real path."""

from __future__ import annotations

import json

import pytest
import torch

import dery_cli
from dery_cli.core.cost.flops import count_flops, count_params
from dery_cli.core.stitching.class_weight import CLASS_WEIGHTS
from tests.e2e.conftest import write_images

ASSEMBLE = (
    "assemble",
    "--max-params",
    "1.5M",
    "--space",
    "paper",
    "--no-whole",
    "--include",
    "demo__mobilenetv3",
    "--include",
    "demo__resnext",
    "--fit-samples",
    "32",
    "--effort",
    "1",
    "--json",
)


@pytest.mark.parametrize("kind", ["linear", "mlp", "paper"])
def test_every_kind_is_counted_written_and_loaded(copied, tmp_path, kind):
    limits = () if kind == "paper" else ("--max-memory", "1G", "--max-latency", "10s")
    outcome = copied(*ASSEMBLE, "--stitch", kind, *limits)
    assert outcome.code == 0, outcome.stderr
    result = outcome.json["result"]
    assert (result["comparison"][0]["memory_bytes"] or 0) > 0 or kind == "paper"
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


def test_an_unknown_kind_is_refused_with_the_kinds(copied):
    outcome = copied("assemble", "--stitch", "conv", "--json")
    assert outcome.code == 2
    assert "--stitch is 'conv'" in outcome.json["error"]["message"]
    assert "linear, mlp, paper" in outcome.json["error"]["hint"]


@pytest.mark.slow
def test_matching_and_another_target_change_the_stitches_alone(copied, tmp_path):
    """The zoo was embedded with digits; clothes are another target, with other stitches."""
    folder = tmp_path / "ws" / "assemblies"
    assert copied(*ASSEMBLE, "--name", "plain").code == 0
    outcome = copied(*ASSEMBLE, "--name", "matched", "--match")
    assert outcome.code == 0, outcome.stderr
    result = outcome.json["result"]
    assert result["match"]["after"] > result["match"]["before"]
    assert result["match"]["kept"]
    plain, matched = (
        dery_cli.load_assembly(folder / name).network.state_dict() for name in ("plain", "matched")
    )
    changed = {name for name in plain if not torch.equal(plain[name], matched[name])}
    assert {name.split(".")[0] for name in changed} == {"stitches", "head"}

    clothes = write_images(tmp_path / "clothes", "demo:fashion")
    outcome = copied(*ASSEMBLE, "--name", "clothes", "--data", str(clothes))
    assert outcome.code == 0, outcome.stderr
    weights = json.loads(outcome.stdout)["result"]["network"]["joints"]
    chosen = [joint["class_weight"] for joint in weights if joint is not None]
    assert all(weight in CLASS_WEIGHTS for weight in chosen)
    networks = [dery_cli.load_assembly(folder / name) for name in ("plain", "clothes")]
    blocks = [network.record.data["network"]["blocks"] for network in networks]
    if [b["donor"] for b in blocks[0]] == [b["donor"] for b in blocks[1]]:
        first, second = (next(iter(n.network.stitches.values())) for n in networks)
        assert not torch.equal(first.output.weight, second.output.weight)
