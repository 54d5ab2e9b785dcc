"""Latency and memory of parts: hand-checked peaks, fake clocks, and the program by enumeration."""

from __future__ import annotations

import dataclasses
import types
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from dery_cli.core.assembly.paths import Limits, path_problem
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
from dery_cli.stages.assemble.config import Budget
from dery_cli.stages.assemble.costs import LatencyTable, block_resources
from dery_cli.stages.assemble.free_space import build_space, with_costs
from dery_cli.types import Anatomy, BlockRef, Layout, Node, StitchKind
from tests.unit.core.assembly.test_solve import brute_force, random_problem


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


def node(index, channels, side, params=0):
    return Node(
        index=index,
        name=f"n{index}",
        layout=Layout.NCHW if side else Layout.NC,
        shape=(channels, side, side) if side else (channels,),
        grid=(side or 1, side or 1),
        params=params,
        flops=10 * params,
    )


class Zoo:
    """Two donors of three and two units."""

    anatomies: ClassVar = {
        "a": Anatomy(nodes=(node(0, 3, 8), node(1, 4, 4), node(2, 8, 2), node(3, 8, 0))),
        "b": Anatomy(nodes=(node(0, 3, 8), node(1, 6, 4), node(2, 5, 0))),
    }

    def names(self):
        return list(self.anatomies)

    def __getitem__(self, name):
        return types.SimpleNamespace(anatomy=self.anatomies[name])


class TestLatencyTable:
    # shapes in order: a0, a1, a2, a3, b1, b2
    stitches = tuple(tuple(10 * a + b for b in range(6)) for a in range(6))
    table = LatencyTable(
        Zoo(), 10, {"a": [100, 200, 300], "b": [1000, 2000]}, {4: 1, 8: 2, 6: 3, 5: 4},
        stitches, None,
    )  # fmt: skip

    def test_units_stitches_and_the_head_add_up(self):
        assert self.table.network([BlockRef("a", 0, 3)]) == 600 + 2
        mixed = [BlockRef("a", 0, 1), BlockRef("b", 1, 2)]
        assert self.table.network(mixed) == 100 + 14 + 2000 + 4
        back = [BlockRef("b", 0, 1), BlockRef("a", 1, 2)]
        assert self.table.network(back) == 1000 + 41 + 200 + 2

    def test_neighbours_need_no_stitch_but_an_adapter_is_one(self):
        plain = [BlockRef("a", 0, 1), BlockRef("a", 1, 3)]
        assert self.table.network(plain) == self.table.network([BlockRef("a", 0, 3)])
        adapted = [plain[0], BlockRef("a", 1, 3, adapter=True)]
        assert self.table.network(adapted) == self.table.network(plain) + 11

    def test_json_keeps_all(self):
        again = LatencyTable.from_json(self.table.to_json(), Zoo(), 10)
        assert again.to_json() == self.table.to_json()

    def test_the_free_space_has_the_same_costs(self):
        free = build_space(Zoo(), max_stitches=1, kind=StitchKind.LINEAR, num_classes=10)
        space = with_costs(free.space, "latency", self.table.parts(free.space))
        limits = {"params": Limits(), "latency": Limits()}
        stated = path_problem(space, limits)
        found = n_best(stated.problem, 1000).assemblies
        assert len(found) > 10
        for answer in found:
            assert answer.costs[1] == self.table.network(stated.network(answer))

    def test_the_papers_blocks_have_the_same_costs(self):
        refs = [BlockRef("a", 0, 1), BlockRef("b", 0, 1), BlockRef("a", 1, 3), BlockRef("b", 1, 2)]
        stage_B = np.array([0, 0, 1, 1])
        pairs = [(0, 2), (0, 3), (1, 2), (1, 3)]
        budget = Budget(max_latency=20)
        [latency] = block_resources(self.table, None, budget, refs, stage_B, pairs)
        for number, (a, b) in enumerate(pairs):
            total = latency.cost_B[a] + latency.cost_B[b] + latency.cost_E[number]
            assert total == self.table.network([refs[a], refs[b]])
        assert (latency.name, latency.maximum) == ("latency", 20)
        assert block_resources(None, None, budget, refs, stage_B, pairs) == []


@pytest.mark.parametrize("maximum", [0, -3])
def test_a_limit_that_is_not_positive_names_its_option(maximum):
    from dery_cli.errors import UsageError

    one = np.array([1])
    with pytest.raises(UsageError, match=f"^--max-memory {maximum} is not positive"):
        peak_resources("memory", one, one[:0], one, one * 0, maximum)
