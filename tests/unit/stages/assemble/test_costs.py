"""Latency and memory of parts: hand-checked peaks, fake clocks, and the program by enumeration."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from dery_cli.core.assembly.solve import (
    MipStatus,
    Resource,
    cross_check,
    explain,
    n_best,
    pareto,
    peak_resources,
    random_feasible,
    solve,
    violations,
)
from dery_cli.core.cost.latency import interleaved_medians
from dery_cli.core.cost.memory import activation_peak, weight_bytes
from dery_cli.stages.assemble.costs import MemoryCosts, PartCosts, more_resources, stitch_ends
from dery_cli.stages.assemble.problem import PlacedBlock
from dery_cli.types import BlockRef
from tests.unit.core.assembly.test_solve import brute_force, random_problem

A, B, C, D = BlockRef("a", 0, 3), BlockRef("b", 2, 5), BlockRef("a", 3, 6), BlockRef("b", 0, 2)


class TestActivationPeak:
    def test_an_input_and_what_each_layer_reads_and_writes(self):
        net = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
        assert activation_peak(net, (10,), 1) == 4 * (10 + 20 + 20)

    def test_it_is_proportional_to_the_batch(self):
        net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Flatten())
        assert activation_peak(net, (3, 6, 6), 7) == 7 * activation_peak(net, (3, 6, 6), 1)

    def test_a_shortcut_keeps_its_tensor_alive(self):
        class Shortcut(nn.Module):
            def forward(self, x):
                y = x + 1
                z = torch.cat([y, y], 1)
                z = torch.cat([z, z], 1)
                return z.sum(1, keepdim=True) + y

        # the input, y, z and its double
        assert activation_peak(Shortcut(), (10,), 1) == 4 * (10 + 10 + 20 + 40)

    def test_views_and_work_in_place_take_nothing(self):
        net = nn.Sequential(nn.Unflatten(1, (2, 5)), nn.Flatten(), nn.ReLU(inplace=True))
        assert activation_peak(net, (10,), 1) == 4 * 10

    def test_weights_and_their_views_do_not_count(self):
        class Turned(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.zeros(1000, 10))

            def forward(self, x):
                return torch.mm(x, self.weight.t()[:, :2])

        assert activation_peak(Turned(), (10,), 1) == 4 * (10 + 2)

    def test_the_module_is_not_touched(self):
        net = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout())
        net.train()
        before = {key: value.clone() for key, value in net.state_dict().items()}
        activation_peak(net, (3, 4, 4), 2)
        assert net.training
        assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())


def test_weights_are_parameters_and_buffers_once():
    norm = nn.BatchNorm2d(3)  # 2 x 3 parameters, 2 x 3 running statistics, one 8-byte counter
    linear = nn.Linear(4, 4, bias=False)
    assert weight_bytes(nn.Sequential(norm, linear, linear)) == 4 * 12 + 8 + 4 * 16


class TestMedians:
    def test_rounds_take_turns_and_warmup_does_not_count(self):
        now, calls, rounds = 0, [], []
        spans = {"a": iter([900, 5, 1, 9]), "b": iter([900, 40, 20, 60])}

        def call(name):
            def run():
                nonlocal now
                calls.append(name)
                now += next(spans[name])

            return run

        found = interleaved_medians(
            {"a": call("a"), "b": call("b")},
            repeats=3,
            warmup=1,
            advance=lambda: rounds.append(len(calls)),
            clock=lambda: now,
        )
        assert found == {"a": 5, "b": 40}
        assert "".join(calls) == "abababab"
        assert rounds == [2, 4, 6, 8]

    def test_the_device_is_waited_for_within_the_time(self):
        now, queued = 0, 0

        def launch():
            nonlocal queued
            queued += 70

        def wait():
            nonlocal now, queued
            now, queued = now + queued, 0

        found = interleaved_medians(
            {"x": launch}, repeats=3, warmup=0, synchronise=wait, clock=lambda: now
        )
        assert found == {"x": 70}


def memory_problem(seed, maximum):
    """A random problem with weights and peaks, its own limits lifted."""
    problem = random_problem(seed).without_limits()
    rng = np.random.default_rng(seed)
    weight_B = rng.integers(0, 30, problem.num_blocks)
    weight_E = rng.integers(0, 5, problem.num_edges)
    peak_B = rng.integers(0, 60, problem.num_blocks)
    extra = peak_resources("memory", weight_B, weight_E, peak_B, problem.stage_B, maximum)

    def memory(assembly):
        blocks, edges = list(assembly.blocks), list(assembly.edges)
        return int(weight_B[blocks].sum() + weight_E[edges].sum() + peak_B[blocks].max())

    limited = dataclasses.replace(problem, resources=(*problem.resources, *extra))
    return problem, limited, memory


class TestPeakResources:
    def test_the_best_few_are_those_of_a_plain_enumeration(self):
        bound = 0
        for seed in range(120):
            free, _, _ = memory_problem(seed, None)
            maximum = 20 + seed % 5 * 15
            _, limited, memory = memory_problem(seed, maximum)
            everything = brute_force(free)
            wanted = [a for a in everything if memory(a) <= maximum]
            bound += 0 < len(wanted) < len(everything)
            found = n_best(limited, 7)
            assert found.complete
            assert [a.score for a in found.assemblies] == [a.score for a in wanted[:7]]
            assert all(memory(a) <= maximum for a in found.assemblies)
            assert all(limited.total("memory", a.costs) == memory(a) for a in found.assemblies)
        assert bound > 25

    def test_a_budget_that_fits_exactly(self):
        tried = 0
        for seed in range(15):
            free, _, memory = memory_problem(seed, None)
            everything = brute_force(free)
            if not everything or memory(everything[0]) < 2:
                continue
            tried += 1
            best = everything[0]
            _, exact, _ = memory_problem(seed, memory(best))
            assert n_best(exact, 1).best.score == best.score
            _, short, _ = memory_problem(seed, memory(best) - 1)
            found = n_best(short, 1).best
            assert found is None or memory(found) < memory(best)
        assert tried > 5

    def test_cbc_agrees(self):
        solved = 0
        for seed in range(25):
            _, limited, memory = memory_problem(seed, 60)
            answer, found = solve(limited), n_best(limited, 3)
            assert cross_check(answer, found).agrees
            if answer.status is MipStatus.OPTIMAL:
                assert memory(answer.assembly) <= 60
                solved += 1
        assert solved > 5

    def test_the_explanation_names_the_least_memory(self):
        explained = 0
        for seed in range(60):
            free, limited, memory = memory_problem(seed, 15)
            everything = brute_force(free)
            if not everything or n_best(limited, 1).best is not None:
                continue
            explained += 1
            verdict = explain(limited)
            least = min(memory(a) for a in everything)
            (report,) = verdict.limits
            assert (report.option, report.limit) == ("--max-memory", 15)
            assert report.alone == report.with_rest == least
            assert verdict.hint == f"--max-memory {least} fits"
            assert verdict.sentences == (
                f"--max-memory 15 bytes: the smallest assembly has {least:,} bytes, "
                f"{least - 15:,} bytes over",
            )
        assert explained > 5

    def test_a_random_assembly_keeps_the_limit(self):
        for seed in range(20):
            _, limited, memory = memory_problem(seed, 60)
            drawn = random_feasible(limited, np.random.default_rng(seed))
            assert (drawn is None) == (n_best(limited, 1).best is None)
            assert drawn is None or (memory(drawn) <= 60 and not violations(limited, drawn))

    def test_the_frontier_of_other_resources_keeps_it(self):
        compared = 0
        for seed in range(12):
            free, limited, memory = memory_problem(seed, 70)
            points = pareto(limited, ["params"]).assemblies
            fits = [a for a in brute_force(free) if memory(a) <= 70]
            for params in sorted({a.costs[0] for a in fits}):
                best = max(a.score for a in fits if a.costs[0] <= params)
                assert best == max(a.score for a in points if a.costs[0] <= params)
                compared += 1
        assert compared > 20


def latency_problem(seed, maximum):
    problem = random_problem(seed).without_limits()
    rng = np.random.default_rng(seed)
    latency = Resource(
        name="latency",
        cost_B=rng.integers(10**5, 5 * 10**6, problem.num_blocks),
        cost_E=rng.integers(10**4, 10**5, problem.num_edges),
        maximum=maximum,
    )
    return dataclasses.replace(problem, resources=(*problem.resources, latency))


def test_an_unreachable_latency_is_explained_in_milliseconds_that_fit():
    explained = 0
    for seed in range(20):
        problem = latency_problem(seed, 50_000)
        everything = brute_force(problem.without_limits())
        if not everything:
            continue
        explained += 1
        least = min(a.costs[2] for a in everything)
        verdict = explain(problem)
        assert verdict.sentences[0].startswith("--max-latency 0.050 ms: the smallest assembly has ")
        option, text, fits = verdict.hint.split()
        assert (option, fits) == ("--max-latency", "fits")
        offered = round(float(text.removesuffix("ms")) * 10**6)
        assert least <= offered < least + 1000
        assert n_best(problem.with_limits(latency=(None, offered)), 1).best is not None
        assert verdict.to_json()["limits"][0]["unit"] == "ns"
        assert verdict.to_json()["limits"][0]["alone"] == least
    assert explained > 5


class TestParts:
    blocks = (
        PlacedBlock(ref=A, stage=0, set_index=0),
        PlacedBlock(ref=D, stage=0, set_index=1),
        PlacedBlock(ref=C, stage=1, set_index=1),
        PlacedBlock(ref=B, stage=1, set_index=0),
    )
    costs = PartCosts(
        blocks={A: 5, D: 7, C: 11, B: 13},
        stitches={("a", 3, "b", 2): 1, ("b", 2, "a", 3): 2},
        wholes={"a": 15, "b": 19},
    )

    def test_neighbours_need_no_stitch(self):
        assert stitch_ends(self.blocks) == [("a", 3, "b", 2), ("b", 2, "a", 3)]
        assert self.costs.network([A, C]) == 5 + 11
        assert self.costs.network([A, B]) == 5 + 1 + 13
        memory = MemoryCosts(weights=self.costs, peaks={A: 100, D: 1, C: 1, B: 300})
        assert memory.network([A, B]) == 5 + 1 + 13 + 300
        assert memory.network([A, C]) == 5 + 11 + 100

    def test_json_keeps_all(self):
        assert PartCosts.from_json(self.costs.to_json()) == self.costs

    def test_they_become_resources_by_number(self):
        pairs = [(0, 2), (0, 3), (1, 2), (1, 3)]
        memory = MemoryCosts(weights=self.costs, peaks={A: 100, D: 200, C: 300, B: 400})
        latency, first, second = more_resources(self.blocks, pairs, (self.costs, 20), (memory, 500))
        assert latency.cost_B.tolist() == [5, 7, 11, 13]
        assert latency.cost_E.tolist() == [0, 1, 2, 0]
        assert (latency.name, latency.maximum) == ("latency", 20)
        assert first.cost_B.tolist() == [105, 207, 11, 13]
        assert second.cost_B.tolist() == [5, 7, 311, 413]
        assert {r.option for r in (first, second)} == {"memory"}
        assert more_resources(self.blocks, pairs, None, None) == []


@pytest.mark.parametrize("maximum", [0, -3])
def test_a_limit_that_is_not_positive_names_its_option(maximum):
    from dery_cli.errors import UsageError

    one = np.array([1])
    with pytest.raises(UsageError, match=f"^--max-memory {maximum} is not positive"):
        peak_resources("memory", one, one[:0], one, one * 0, maximum)
