"""``dery zoo rank``: the donors by what they know of a target, with nothing but the zoo."""

from __future__ import annotations

import json

import pytest

from tests.conftest import make_images, run_dery
from tests.e2e.conftest import snapshot


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A zoo of two donors, and nothing else."""
    folder = tmp_path_factory.mktemp("rank")
    assert run_dery("zoo", "add", "demo/mobilenetv3", "demo/resnext", cwd=folder).code == 0
    return folder


def test_what_assemble_looked_at_is_found_and_ordered(copied, tmp_path):
    before = snapshot(tmp_path / "ws")
    found = copied("zoo", "rank", "--data", "DATA", "--json", "--verbose")
    assert found.code == 0, found.stderr
    assert "the target's features are those of an earlier run" in found.stderr
    assert snapshot(tmp_path / "ws") == before
    ranked, classes = found.json["result"]["donors"], found.json["result"]["classes"]
    order = [(-one["accuracy"], one["cross_entropy"]) for one in ranked]
    assert order == sorted(order)
    assert len(set(order)) == len(ranked) == 4
    for one in ranked:
        shown = copied("zoo", "show", one["donor"], "--json").json["result"]["donor"]
        nodes = shown["anatomy"]["nodes"]
        head = nodes[-1]["shape"][-1] * classes
        assert one["params"] == sum(node["params"] for node in nodes) + head + classes
        assert one["flops"] == sum(node["flops"] for node in nodes) + head
        assert one["best_accuracy"] >= one["accuracy"]
    # the same of the networks that assemble built, fitted and counted by other code
    listed = json.loads((tmp_path / "ws/assemblies/default/candidates.json").read_text())
    built = {
        row["blocks"][0][0]: row
        for row in listed["candidates"]
        if row["whole"] and row["batch_norm"] == "as it is"
    }
    assert built
    for one in ranked:
        if (row := built.get(one["donor"])) is not None:
            assert (one["params"], one["flops"]) == (row["params"], row["flops"])
            assert one["accuracy"] == pytest.approx(row["proxy"], abs=0.03)


def test_a_second_run_computes_nothing_and_half_precision_is_kept_apart(small):
    line = ("zoo", "rank", "--data", "demo", "--target-samples", "60", "--json", "--verbose")
    first = run_dery(*line, cwd=small)
    assert first.code == 0, first.stderr
    assert "looking at the target" in first.stderr
    half = run_dery(*line, "--precision", "bf16", cwd=small)
    assert half.code == 0, half.stderr
    again = run_dery(*line, "--precision", "fp32", cwd=small)
    assert "looking at the target" not in again.stderr
    assert again.json["result"] == first.json["result"]
    losses = [
        {one["donor"]: one["cross_entropy"] for one in outcome.json["result"]["donors"]}
        for outcome in (first, half)
    ]
    assert losses[0] != losses[1]
    assert all(abs(losses[0][name] - losses[1][name]) < 0.2 for name in losses[0])
    assert {one["images"] for one in (first.json["result"], half.json["result"])} == {60}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "--data is missing"),
        (("--data", "flat"), 2, "have no labels"),
        (("--data", "one"), 2, "only one class folder"),
        (("--data", "few"), 2, "have 4 training images"),
        (("--data", "demo", "--precision", "int8"), 2, "--precision"),
        (("--data", "demo", "--target-samples", "3"), 2, "--target-samples"),
        (("--data", "demo", "--workspace", "empty"), 4, "the zoo in empty is empty"),
    ],
)
def test_what_cannot_be_ranked_says_why(small, words, code, message):
    make_images(small / "one", ["cat"], 2)
    make_images(small / "few", ["cat", "dog"], 3)
    make_images(small / "flat", [""], 3)
    found = run_dery("zoo", "rank", *words, "--json", cwd=small)
    assert found.code == code, found.stderr
    assert message in found.json["error"]["message"]
    assert "Traceback" not in found.stderr
