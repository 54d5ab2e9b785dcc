"""``dery assemble`` with budgets for latency and memory."""

from __future__ import annotations

import csv
import json

import pytest

from dery_cli.stages.assemble import build
from dery_cli.stages.assemble.memo import Memo
from tests.e2e.conftest import DONORS, edit_json

FEW = ("--effort", "1")


@pytest.mark.slow
def test_a_latency_budget(copied, tmp_path):
    root = tmp_path / "ws"
    outcome = copied("assemble", "--max-latency", "2s", "--name", "fast", *FEW, "--json")
    assert outcome.code == 0, outcome.stderr
    result = outcome.json["result"]
    latencies = json.loads((root / "latency.json").read_text())
    assert latencies["format"] == "dery/latency"
    assert latencies["version"] == 2
    assert set(latencies["options"]) >= {"device", "batch_size", "threads", "repeats"}
    assert sum(name.startswith("weights/") for name in latencies["parents"]) == len(DONORS)
    # every number is a time, and every unit has one
    units = latencies["data"]["units"]
    zoo = json.loads((root / "zoo.json").read_text())["data"]["donors"]
    assert {n: len(times) for n, times in units.items()} == {
        donor["name"]: len(donor["anatomy"]["nodes"]) - 1 for donor in zoo
    }
    assert all(ns > 1000 for times in units.values() for ns in times)
    # a network's latency is the sum of its parts
    heads = {ns for _, ns in latencies["data"]["heads"]}
    for row in result["comparison"]:
        blocks = sum(sum(units[donor][start:stop]) for donor, start, stop in row["blocks"])
        joints = row["latency_ns"] - blocks
        if len(row["blocks"]) == 1:
            assert joints in heads
        assert joints > 0
    # what was timed of the whole is printed and logged, not hashed
    record = json.loads((root / "assemblies" / "fast" / "assembly.json").read_text())
    assert record["parents"]["latency"] == latencies["sha256"]
    assert "built_network_ns" not in json.dumps(record)
    log = json.loads((root / "assemblies" / "fast" / "assembly.log.json").read_text())["latency"]
    assert log == result["latency"]
    assert log["sum_of_parts_ns"] == result["latency_ns"]
    error = log["sum_of_parts_ns"] / log["built_network_ns"] - 1
    assert log["additive_error"] == pytest.approx(error)

    # again: the times are kept, the assembly is up to date, the additive error still shown
    before = (root / "latency.json").read_bytes()
    line = ("assemble", "--max-latency", "2000ms", "--name", "fast", *FEW, "-v")
    outcome = copied(*line)
    assert outcome.code == 0
    assert "latencies are those of an earlier run" in outcome.stderr
    assert "is up to date" in outcome.stdout
    assert "its parts sum to" in outcome.stdout
    assert (root / "latency.json").read_bytes() == before
    # damaged: measured again, and the assembly that hung on them is made anew
    edit_json(root / "latency.json", lambda d: d["data"]["units"].clear())
    outcome = copied(*line)
    assert outcome.code == 0
    assert "is up to date" not in outcome.stdout
    assert json.loads((root / "latency.json").read_text())["data"]["units"]

    # the frontier has a column for it, and the scores were not made anew for any of this
    outcome = copied("assemble", "--pareto", "--max-latency", "2s", "--name", "front", "-v")
    assert outcome.code == 0
    assert "what joints would lose is known of an earlier run" in outcome.stderr
    with (root / "assemblies" / "front" / "pareto.csv").open() as file:
        rows = list(csv.DictReader(file))
    cells = [tuple(int(row[key]) for key in ("params", "flops", "latency_ns")) for row in rows]
    scores = [float(row["score"]) for row in rows]
    assert len(rows) > 1
    for i, one in enumerate(cells):
        for j, other in enumerate(cells):
            no_worse = all(a <= b for a, b in zip(other, one, strict=True))
            assert i == j or not (scores[j] >= scores[i] and no_worse)

    # infeasible: said in ms, and what is offered fits
    outcome = copied("assemble", "--max-latency", "10us", "--json")
    assert outcome.code == 3
    error = outcome.json["error"]
    assert "--max-latency 0.010 ms: the smallest assembly has " in error["message"]
    assert "the fastest is demo__" in error["hint"]
    offered = error["hint"].split()[1]
    outcome = copied("assemble", "--max-latency", offered, "--pareto", "--json")
    assert outcome.code == 0
    assert outcome.json["result"]["frontier"]


def test_a_latency_budget_holds_for_all_that_is_built(copied, tmp_path, monkeypatch):
    few = ("--include", "demo__mobilenetv3", "--include", "demo__resnext")
    assert copied("assemble", "--pareto", "--max-latency", "2s", *few).code == 0
    units = json.loads((tmp_path / "ws" / "latency.json").read_text())["data"]["units"]
    budget = int(1.2 * sorted(sum(times) for times in units.values())[1])
    line = ("assemble", "--max-latency", f"{budget / 1e6:.6f}ms", "--json", *few, *FEW)
    measured, slow = Memo.whole_latency, set()

    def told(memo, candidate):
        """What is measured, less the noise of a busy machine."""
        return budget + 1 if str(candidate) in slow else min(budget, measured(memo, candidate))

    monkeypatch.setattr(Memo, "whole_latency", told)
    outcome = copied(*line)
    assert outcome.code == 0, outcome.stderr
    path = tmp_path / "ws" / "assemblies" / "default" / "candidates.json"
    listed = json.loads(path.read_text())["candidates"]
    assert listed
    assert all(entry["latency_ns"] <= budget for entry in listed)
    # whose parts sum to less than the whole takes is left out
    first = outcome.json["result"]
    assert first["latency"]["built_network_ns"] <= budget
    slow.add(first["name"])
    outcome = copied(*line, "--name", "second")
    assert outcome.code == 0, outcome.stderr
    second = outcome.json["result"]
    assert second["name"] not in slow
    assert second["builds"]["too_slow"] >= 1
    assert slow.isdisjoint(row["network"] for row in second["comparison"])
    monkeypatch.setattr(Memo, "whole_latency", lambda *_: budget + 1000)
    outcome = copied(*line, "--name", "third")
    assert outcome.code == 3
    assert "runs in that time as a whole" in outcome.json["error"]["message"]


@pytest.mark.slow
def test_a_memory_budget(copied, monkeypatch):
    only = ("--include", "demo__mobilenetv3", "--include", "demo__resnext")
    outcome = copied("assemble", "--max-memory", "1k", *only, "--json")
    assert outcome.code == 3
    error = outcome.json["error"]
    assert "--max-memory 1,000 bytes: the smallest assembly has " in error["message"]
    least = int(error["hint"].split()[1])
    # what is offered fits to the byte; one byte less does not
    line = ("assemble", "--no-whole", "--json", *only, *FEW)
    outcome = copied(*line, "--max-memory", str(least))
    assert outcome.code == 0, outcome.stderr
    result = outcome.json["result"]
    assert result["memory_bytes"] == least
    assert least > 4 * result["params"]
    assert copied(*line, "--max-memory", str(least - 1)).code == 3
    # a larger batch needs more, for activations only
    assert copied(*line, "--max-memory", str(least), "--memory-batch", "8").code == 3
    # the built network is counted again
    monkeypatch.setattr(build, "network_memory", lambda *_: least - 4)
    outcome = copied(*line, "--max-memory", str(least), "--name", "wrong")
    assert outcome.code == 1
    assert "the program counted" in outcome.json["error"]["message"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--max-latency", "8"), "'8' is not a time"),
        (("--max-latency", "0ms"), "not a positive time"),
        (("--max-memory", "0"), "not a positive whole count"),
        (("--latency-batch", "0"), "--latency-batch is 0"),
        (("--memory-batch", "0"), "--memory-batch is 0"),
    ],
)
def test_bad_values(dery, words, said):
    outcome = dery("assemble", *words, "--json")
    assert outcome.code == 2
    assert said in outcome.json["error"]["message"]
