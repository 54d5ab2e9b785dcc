"""``dery assemble --explain``: what it says is so, and it changes nothing."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import STAGES, snapshot

LINE = STAGES["assemble"].split()
LIMIT = 700_000


def test_it_explains_what_is_up_to_date(copied, pipeline, tmp_path):
    before = snapshot(tmp_path / "ws")
    found = copied(*LINE, "--explain", "--json")
    assert found.code == 0, found.stderr
    assert "is up to date" in found.stderr
    assert snapshot(tmp_path / "ws") == before
    result, made = found.json["result"], pipeline.results["assemble"]
    why = result["explanation"]
    assert {k: v for k, v in result.items() if k not in ("explanation", "folder")} == {
        k: v for k, v in made.items() if k != "folder"
    }
    assert why["network"] == made["name"]
    assert why["learnt"]
    parts = sum(share["value"] for share in why["shares"])
    assert parts + why["offset"] == pytest.approx(why["predicted"])
    assert why["measured"] == made["comparison"][0]["proxy"]
    foreseen = made["program"]["score"]
    assert foreseen is None or why["predicted"] == pytest.approx(foreseen)
    # the program's own optimum, which the record holds
    assert why["now"]["predicted"] == pytest.approx(made["program"]["upper_bound"], abs=2e-6)
    larger, smaller = why["budgets"]
    assert smaller["predicted"] <= why["now"]["predicted"] <= larger["predicted"]
    assert larger["params"] <= LIMIT * 1.1
    assert smaller["params"] <= LIMIT * 0.9
    assert "770.00k" in larger["budget"]
    donors = {row["donor"] for row in made["network"]["blocks"]}
    assert donors <= {one["donor"] for one in why["missed"]}
    losses = [one["lost"] for one in why["missed"]]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] >= 0
    for one in why["missed"]:
        assert one["donor"] not in one["best"]["network"]
        kept = why["now"]["predicted"] - one["best"]["predicted"]
        assert one["lost"] == pytest.approx(kept)


def test_what_is_built_and_explained_at_once_is_the_same(copied, pipeline, tmp_path):
    wanted = snapshot(tmp_path / "ws")
    for path in (tmp_path / "ws/assemblies/default").iterdir():
        path.unlink()
    found = copied(*LINE, "--explain")
    assert found.code == 0, found.stderr
    assert snapshot(tmp_path / "ws") == wanted
    told = found.stdout[found.stdout.index("why ") :]
    tables = told[: told.index("would be missed")]
    assert max(map(len, tables.splitlines())) <= 80


def test_without_a_learnt_objective_it_says_so(copied):
    line = ("assemble", "--max-params", "700k", "--proxy", "params", "--effort", "0.2")
    found = copied(*line, "--name", "other", "--explain", "--json")
    assert found.code == 0, found.stderr
    why = found.json["result"]["explanation"]
    assert not why["learnt"]
    assert why["offset"] == 0
    assert sum(share["value"] for share in why["shares"]) == pytest.approx(why["predicted"])
    assert "the weights are those of the formula" in found.stderr


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("--space", "paper"), "--space paper"),
        (("--preset", "paper"), "--space paper"),
        (("--blocks", "resnext[0:9]"), "--blocks"),
        (("--pareto",), "--pareto"),
        (("--dry-run",), "--dry-run"),
    ],
)
def test_there_must_be_something_to_explain(dery, words, option):
    found = dery("assemble", "--max-params", "700k", "--explain", *words, "--json")
    assert found.code == 2
    assert f"and {option} picks none so" in found.json["error"]["message"]
    assert found.json["error"]["hint"] == f"leave out --explain, or {option}"
