"""The assembly program against brute force, on random and on adversarial instances."""

from __future__ import annotations

import dataclasses
import itertools
import math

import mip
import numpy as np
import pytest

from dery_cli.core.assembly.solve import (
    Assembly,
    AssemblyProblem,
    Filter,
    MipAnswer,
    MipStatus,
    Resource,
    SearchResult,
    check_limits,
    cross_check,
    explain,
    n_best,
    pareto,
    random_feasible,
    recount,
    solve,
    violations,
)
from dery_cli.errors import InfeasibleError, UsageError


def make_problem(
    stage_B,
    set_B,
    score_B,
    params_B,
    flops_B,
    *,
    edges=None,
    score_E=0,
    params_E=0,
    flops_E=0,
    donor_B=None,
    max_params=None,
    min_params=None,
    max_flops=None,
    min_flops=None,
    **options,
):
    """A problem from plain lists; by default all blocks of consecutive stages are joined."""
    num_blocks = len(stage_B)
    if edges is None:
        pairs = itertools.product(range(num_blocks), repeat=2)
        edges = [(a, b) for a, b in pairs if stage_B[b] == stage_B[a] + 1]
    edge_EE = np.array(edges, dtype=np.int64).reshape(-1, 2)

    def per_edge(values):
        return np.broadcast_to(np.asarray(values, dtype=np.int64), len(edge_EE)).copy()

    return AssemblyProblem(
        num_stages=max(stage_B) + 1,
        num_sets=options.pop("num_sets", max(set_B) + 1),
        stage_B=np.array(stage_B),
        set_B=np.array(set_B),
        donor_B=np.arange(num_blocks) if donor_B is None else np.array(donor_B),
        score_B=np.array(score_B),
        src_E=edge_EE[:, 0],
        dst_E=edge_EE[:, 1],
        score_E=per_edge(score_E),
        resources=(
            Resource(
                name="params",
                cost_B=np.array(params_B),
                cost_E=per_edge(params_E),
                minimum=min_params,
                maximum=max_params,
            ),
            Resource(
                name="flops",
                cost_B=np.array(flops_B),
                cost_E=per_edge(flops_E),
                minimum=min_flops,
                maximum=max_flops,
            ),
        ),
        **options,
    )


def brute_force(problem):
    """Every assembly that fits, in the promised order, by plain loops over Python integers."""
    leaving = {}
    for edge in range(problem.num_edges):
        leaving.setdefault(int(problem.src_E[edge]), []).append(edge)
    paths = [((int(b),), ()) for b in np.flatnonzero(problem.stage_B == 0)]
    for _ in range(problem.num_stages - 1):
        paths = [
            ((*blocks, int(problem.dst_E[e])), (*edges, e))
            for blocks, edges in paths
            for e in leaving.get(blocks[-1], [])
        ]
    whole = [recount(problem, blocks, edges) for blocks, edges in paths]
    fits = [a for a in whole if not violations(problem, a)]
    return sorted(fits, key=lambda a: (-a.score, a.costs, a.blocks, a.edges))


def random_problem(seed, *, num_models=None, num_stages=None):
    """Sizes, sets, limits, gaps, ties and parallel edges of all kinds, chosen by the seed."""
    rng = np.random.default_rng(seed)
    num_stages = num_stages or int(rng.integers(1, 5))
    num_models = num_models or int(rng.integers(2, 7))
    num_sets = num_stages + int(rng.choice([0, 0, 1, 2]))
    num_blocks = num_models * num_stages
    stage_B = np.tile(np.arange(num_stages), num_models)
    tied = rng.random() < 0.3
    if rng.random() < 0.5:
        orders = [rng.permutation(num_sets)[:num_stages] for _ in range(num_models)]
        set_B = np.concatenate(orders)
    else:
        set_B = rng.integers(0, num_sets, num_blocks)
    edges = [
        (a, b)
        for a, b in itertools.product(range(num_blocks), repeat=2)
        if stage_B[b] == stage_B[a] + 1
        for _ in range(1 + (rng.random() < 0.1))
    ]
    edges = [e for e in edges if rng.random() < rng.choice([1.0, 0.8])]
    params_B = rng.integers(1, 4, num_blocks) if tied else rng.lognormal(0, 1, num_blocks) * 1e6
    flops_B = rng.integers(1, 4, num_blocks) if tied else rng.lognormal(0, 1, num_blocks) * 1e9
    params_B, flops_B = params_B.astype(np.int64), flops_B.astype(np.int64)
    score_B = rng.integers(-2, 2, num_blocks) if tied else rng.integers(-9, 10**6, num_blocks)
    limits = {}
    for name, cost_B in (("params", params_B), ("flops", flops_B)):
        blocks = [int(rng.choice(np.flatnonzero(stage_B == k))) for k in range(num_stages)]
        near = int(cost_B[blocks].sum())
        if rng.random() < 0.7:
            limits[f"max_{name}"] = max(1, int(near * rng.choice([1.0, 1.3])))
        if rng.random() < 0.4:
            limits[f"min_{name}"] = max(1, int(near * rng.choice([0.6, 1.0])))
    filters = ()
    if rng.random() < 0.3:
        filters = (Filter(name="--exclude x", allowed_B=rng.random(num_blocks) < 0.8),)
    return make_problem(
        stage_B,
        set_B,
        score_B,
        params_B,
        flops_B,
        edges=edges,
        score_E=rng.integers(-2, 1, len(edges)) * (1 if tied else 10**5),
        params_E=rng.integers(0, 2 if tied else 50_000, len(edges)),
        flops_E=rng.integers(0, 2 if tied else 10**8, len(edges)),
        donor_B=np.repeat(np.arange(num_models), num_stages),
        num_sets=num_sets,
        filters=filters,
        max_donors=None if rng.random() < 0.6 else int(rng.integers(1, 4)),
        **limits,
    )


# two stages, two sets; block numbers 0, 1 | 2, 3
TINY = {
    "stage_B": [0, 0, 1, 1],
    "set_B": [0, 1, 1, 0],
    "score_B": [500_000, 100_000, 300_000, 200_000],
    "params_B": [10, 4, 20, 5],
    "flops_B": [100, 100, 100, 300],
}


class TestByHand:
    def test_all_assemblies_of_a_tiny_zoo(self):
        problem = make_problem(**TINY, params_E=1, flops_E=2, score_E=-50_000)
        result = n_best(problem, 10)
        # blocks 0 and 3 share set 0, blocks 1 and 2 share set 1
        assert [(a.blocks, a.score, a.costs) for a in result.assemblies] == [
            ((0, 2), 750_000, (31, 202)),
            ((1, 3), 250_000, (10, 402)),
        ]
        assert result.complete
        assert result.proven
        assert result.upper_bound == 750_000

    @pytest.mark.parametrize(
        ("limits", "best"),
        [
            ({"max_params": 31}, (0, 2)),
            ({"max_params": 30}, (1, 3)),
            ({"min_params": 31}, (0, 2)),
            ({"min_params": 10, "max_params": 10}, (1, 3)),
            ({"min_flops": 203}, (1, 3)),
            ({"max_params": 30, "max_flops": 401}, None),
        ],
    )
    def test_budgets_are_inclusive_to_the_unit(self, limits, best):
        problem = make_problem(**TINY, params_E=1, flops_E=2, **limits)
        found, answer = n_best(problem, 1).best, solve(problem)
        assert (found.blocks if found else None) == best
        assert (answer.assembly.blocks if answer.assembly else None) == best
        assert answer.status is (MipStatus.OPTIMAL if best else MipStatus.INFEASIBLE)

    def test_missing_edge_is_not_used(self):
        problem = make_problem(**TINY, edges=[(0, 3), (1, 2), (1, 3)])
        assert [a.blocks for a in n_best(problem, 10).assemblies] == [(1, 3)]

    def test_ties_go_to_the_cheaper_then_to_the_first(self):
        stage_B, set_B = [0, 0, 0, 0, 1], [0, 0, 0, 0, 1]
        problem = make_problem(stage_B, set_B, [7] * 5, [5, 4, 4, 4, 1], [1, 3, 2, 2, 1])
        order = [a.blocks[0] for a in n_best(problem, 4).assemblies]
        assert order == [2, 3, 1, 0]
        assert [a.blocks[0] for a in n_best(problem, 2).assemblies] == [2, 3]

    def test_single_stage(self):
        problem = make_problem([0, 0, 0], [0, 0, 0], [1, 3, 2], [1, 9, 2], [1, 1, 1], max_params=8)
        assert [a.blocks for a in n_best(problem, 5).assemblies] == [(2,), (0,)]
        assert solve(problem).assembly.blocks == (2,)

    def test_parallel_edges_are_different_assemblies(self):
        problem = make_problem([0, 1], [0, 1], [0, 0], [1, 1], [1, 1], edges=[(0, 1)] * 2)
        problem = dataclasses.replace(problem, score_E=np.array([5, 9]))
        assert [a.edges for a in n_best(problem, 5).assemblies] == [(1,), (0,)]
        assert solve(problem).assembly.edges == (1,)


class TestAgainstBruteForce:
    @pytest.mark.parametrize("first", range(0, 400, 50))
    def test_n_best_is_the_head_of_the_sorted_enumeration(self, first):
        feasible = 0
        for seed in range(first, first + 50):
            problem = random_problem(seed)
            wanted = brute_force(problem)
            feasible += bool(wanted)
            for count in (1, 4, 10_000):
                result = n_best(problem, count)
                assert list(result.assemblies) == wanted[:count], f"seed {seed}, {count} best"
                assert result.complete
                assert result.proven
                used = {e for a in result.assemblies for e in a.edges}
                assert result.kept_E[sorted(used)].all(), (
                    f"seed {seed}: an answer's edge was left out"
                )
        assert feasible > 10

    def test_eight_stages(self):
        for seed in range(3):
            problem = random_problem(1000 + seed, num_models=3, num_stages=8)
            problem = dataclasses.replace(problem, max_donors=None, filters=())
            wanted = brute_force(problem)
            assert list(n_best(problem, 50).assemblies) == wanted[:50]

    @pytest.mark.parametrize("seed", range(40))
    def test_program_finds_the_optimum(self, seed):
        problem = random_problem(seed)
        wanted = brute_force(problem)
        answer = solve(problem)
        agreement = cross_check(answer, n_best(problem, 8))
        assert agreement.agrees, agreement.reason
        assert answer.broken == ()
        if answer.assembly is None:
            assert answer.status is MipStatus.INFEASIBLE
            assert not any(all(row.allows(a) for row in answer.rows) for a in wanted)
        else:
            visible = [a for a in wanted if all(row.allows(a) for row in answer.rows)]
            assert answer.assembly.score == visible[0].score

    def test_zoo_of_24_models(self):
        problem = random_problem(7, num_models=24, num_stages=4)
        rng = np.random.default_rng(0)
        problem = dataclasses.replace(problem, max_donors=None, filters=())
        problem = problem.with_limits(params=(None, 5_000_000), flops=(3 * 10**9, 9 * 10**9))
        problem = dataclasses.replace(problem, score_B=rng.integers(0, 10**6, problem.num_blocks))
        # an independent reference: the scores of every path by outer sums
        path_score, path_params, path_flops, path_mask = _all_paths(problem)
        fits = (path_params <= 5_000_000) & (path_flops >= 3 * 10**9) & (path_flops <= 9 * 10**9)
        fits &= path_mask
        wanted = np.sort(path_score[fits])[::-1][:500]
        result = n_best(problem, 500)
        assert [a.score for a in result.assemblies] == wanted.tolist()
        assert result.complete


def _all_paths(problem):
    """Score, params, FLOPs and set-validity of every path, one entry each, by joining edges."""
    last = np.flatnonzero(problem.stage_B == 0)
    totals = [problem.score_B[last], *(r.cost_B[last] for r in problem.resources)]
    mask = 1 << problem.set_B[last]
    valid = np.ones(len(last), dtype=bool)
    for stage in range(problem.num_stages - 1):
        edges = np.flatnonzero(problem.stage_B[problem.src_E] == stage)
        row, col = np.nonzero(last[:, None] == problem.src_E[edges][None, :])
        edge = edges[col]
        last = problem.dst_E[edge]
        steps = [
            problem.score_B[last] + problem.score_E[edge],
            *(r.cost_B[last] + r.cost_E[edge] for r in problem.resources),
        ]
        totals = [t[row] + s for t, s in zip(totals, steps, strict=True)]
        bit = 1 << problem.set_B[last]
        valid = valid[row] & ((mask[row] & bit) == 0)
        mask = mask[row] | bit
    return (*totals, valid)


class TestAdversarial:
    """Budgets of 5e9 where the attractive choices are one multiply-add over."""

    BUDGET = 5 * 10**9

    def problem(self, seed, *, exact_fit, num_models=5, num_stages=4):
        rng = np.random.default_rng(seed)
        num_blocks = num_models * num_stages
        stage_B = np.tile(np.arange(num_stages), num_models)
        flops_B = self.BUDGET // num_stages + rng.integers(-500, 500, num_blocks)
        chosen = [int(rng.choice(np.flatnonzero(stage_B == k))) for k in range(num_stages)]
        # score rises with FLOPs: the best want to be just over
        score_B = (flops_B - flops_B.min()) * 100 + rng.integers(0, 100, num_blocks)
        limit = int(flops_B[chosen].sum())
        return make_problem(
            stage_B,
            stage_B,
            score_B,
            rng.integers(1, 10**6, num_blocks),
            flops_B,
            max_flops=limit,
            min_flops=limit if exact_fit else None,
        )

    @pytest.mark.parametrize("exact_fit", [False, True])
    def test_search_and_program(self, exact_fit):
        for seed in range(15):
            problem = self.problem(seed, exact_fit=exact_fit)
            wanted = brute_force(problem)
            result = n_best(problem, 20)
            assert wanted
            assert list(result.assemblies) == wanted[:20]
            answer = solve(problem)
            # the room above each stage's least is small, so that the program is exact here
            assert answer.assembly is not None
            assert answer.assembly.score == wanted[0].score
            assert cross_check(answer, result).reason == "same score"

    def test_one_unit_over_is_over(self):
        scores, params = [9, 1, 0], [1, 1, 1]
        flops = [2 * 10**9 + 1, 2 * 10**9, 3 * 10**9]
        problem = make_problem([0, 0, 1], [0, 0, 1], scores, params, flops, max_flops=self.BUDGET)
        assert n_best(problem, 1).best.blocks == (1, 2)
        assert solve(problem).assembly.blocks == (1, 2)
        looser = problem.with_limits(flops=(None, self.BUDGET + 1))
        assert n_best(looser, 1).best.blocks == (0, 2)

    def test_score_is_the_cost(self):
        """Subset sums: budgets prune nothing until the last block."""
        for seed in range(5):
            problem = self.problem(seed, exact_fit=False)
            flops = problem.resources[1]
            problem = dataclasses.replace(problem, score_B=flops.cost_B)
            assert list(n_best(problem, 30).assemblies) == brute_force(problem)[:30]

    def test_all_scores_equal(self):
        problem = random_problem(3, num_models=6, num_stages=3)
        problem = dataclasses.replace(
            problem, score_B=problem.score_B * 0, score_E=problem.score_E * 0
        )
        problem = problem.without_limits()
        assert list(n_best(problem, 25).assemblies) == brute_force(problem)[:25]

    def test_huge_numbers_do_not_overflow(self):
        rng = np.random.default_rng(0)
        stage_B, set_B = np.tile(np.arange(3), 4), np.tile(np.arange(3), 4)
        big = 2**49
        problem = make_problem(
            stage_B,
            set_B,
            rng.integers(-big, big, 12),
            rng.integers(1, big, 12),
            rng.integers(1, big, 12),
            max_params=big,
            max_flops=2 * big,
        )
        assert list(n_best(problem, 20).assemblies) == brute_force(problem)[:20]

    def test_totals_beyond_exact_counting_are_refused(self):
        with pytest.raises(UsageError, match="flops: totals reach 2\\^53"):
            make_problem([0, 1], [0, 1], [0, 0], [1, 1], [2**60, 1])


class TestTimeLimit:
    def test_stopped_search_states_a_valid_bound(self):
        problem = random_problem(11, num_models=10, num_stages=4).without_limits()
        problem = problem.with_limits(params=(None, 6_000_000), flops=(None, 6 * 10**9))
        problem = dataclasses.replace(problem, max_donors=None, filters=())
        best = n_best(problem, 1).best
        stopped = n_best(problem, 3, max_seconds=0)
        assert not stopped.complete
        assert stopped.upper_bound >= best.score
        assert stopped.gap is None or stopped.gap >= best.score - stopped.best.score

    def test_program_stopped_by_a_count_of_branches_says_the_same_again(self, monkeypatch):
        """No clock decides: what is told of CBC is hashed into the assembly."""
        seen = []
        optimize = mip.Model.optimize

        def counted(model, max_seconds=math.inf, max_nodes=0, **rest):
            seen.append((max_seconds, max_nodes))
            return optimize(model, max_seconds=max_seconds, max_nodes=max_nodes, **rest)

        monkeypatch.setattr(mip.Model, "optimize", counted)
        monkeypatch.setattr("dery_cli.core.assembly.solve.BRANCH_WORK", 1)
        problem = random_problem(28, num_models=24, num_stages=4).without_limits()
        problem = problem.with_limits(params=(None, 5_000_000), flops=(None, 9 * 10**9))
        answers = [solve(problem) for _ in range(2)]
        assert seen == [(math.inf, 1)] * 2
        assert answers[0].status is MipStatus.STOPPED
        assert answers[0].assembly == answers[1].assembly

    def test_program_stopped_at_once(self):
        problem = random_problem(28, num_models=24, num_stages=4).without_limits()
        problem = problem.with_limits(params=(None, 5_000_000), flops=(None, 9 * 10**9))
        result = n_best(problem, 3)
        answer = solve(problem, max_seconds=0.001)
        assert answer.status is not MipStatus.INFEASIBLE
        assert cross_check(answer, result).agrees

    def test_large_problem_is_reduced_before_it_is_stated(self):
        problem = random_problem(5, num_models=60, num_stages=3)
        problem = dataclasses.replace(problem, max_donors=None, filters=())
        problem = problem.with_limits(params=(None, 4_000_000), flops=(None, 5 * 10**9))
        answer = solve(problem)
        assert answer.num_edges < 1000 < problem.num_edges
        assert cross_check(answer, n_best(problem, 5)).reason == "same score"


class TestCrossCheck:
    def answer(self, score, *, status=MipStatus.OPTIMAL, broken=(), rows=()):
        assembly = None
        if score is not None:
            assembly = Assembly(blocks=(0, 1), edges=(0,), score=score, costs=(1, 1))
        return MipAnswer(
            status=status, assembly=assembly, broken=broken, num_blocks=2, num_edges=1, rows=rows
        )

    def result(self, score, *, complete=True, upper_bound=None):
        found = self.answer(score).assembly
        return SearchResult(
            assemblies=() if found is None else (found,),
            complete=complete,
            upper_bound=score if upper_bound is None else upper_bound,
            kept_E=np.ones(1, dtype=bool),
            partials=0,
        )

    @pytest.mark.parametrize(
        ("answer", "result", "agrees", "reason"),
        [
            ({"score": 5_000}, {"score": 5_001}, True, "same score"),
            ({"score": 4_000}, {"score": 5_000}, False, "CBC stops 0.001000 short"),
            ({"score": None}, {"score": 5_000}, False, "CBC finds nothing"),
            ({"score": 6_000}, {"score": 5_000}, False, "0.001000 above a proven optimum"),
            ({"score": 6_000}, {"score": None}, False, "where the search finds none"),
            ({"score": 5_000, "broken": ("params",)}, {"score": 5_000}, False, "breaks a limit"),
            ({"score": None}, {"score": None}, True, "neither"),
        ],
    )
    def test_verdicts(self, answer, result, agrees, reason):
        agreement = cross_check(self.answer(**answer), self.result(**result))
        assert agreement.agrees is agrees
        assert reason in agreement.reason

    def test_program_that_was_not_stated(self, monkeypatch):
        monkeypatch.setattr("dery_cli.core.assembly.solve.MOST_EDGES", 3)
        problem = make_problem(**TINY)
        answer = solve(problem)
        assert answer.status is MipStatus.TOO_LARGE
        assert "4 edges are left" in cross_check(answer, n_best(problem, 1)).reason

    def test_time_limits_are_no_disagreement(self):
        slow = self.answer(4_000, status=MipStatus.STOPPED)
        assert "CBC stopped at its limit" in cross_check(slow, self.result(5_000)).reason
        unproven = self.result(5_000, complete=False, upper_bound=9_000)
        agreement = cross_check(self.answer(6_000), unproven)
        assert agreement.agrees
        assert agreement.score_gap == -1_000
        assert "search ran out of time" in agreement.reason

    def test_answer_lost_to_rounding(self):
        """A budget of 2^40 in units of 2^20: an exact fit is invisible to the program."""
        limit = 2**40 + 2**19
        problem = make_problem(
            [0, 0, 1, 1, 1],
            [0, 0, 1, 1, 1],
            [9, 1, 9, 1, 5],
            [1] * 5,
            [limit - 9, 1, 10, 1, limit],
            max_flops=limit + 1,
        )
        agreement = cross_check(solve(problem), n_best(problem, 4))
        assert agreement.agrees
        assert agreement.score_gap == 8
        assert "rounding unit" in agreement.reason


class TestBadLimits:
    @pytest.mark.parametrize(
        ("limits", "message"),
        [
            ((None, 0), "--max-params 0 is not positive"),
            ((-5, None), "--min-params -5 is not positive"),
            ((3_000, 2_000), "--min-params 3,000 is above --max-params 2,000"),
        ],
    )
    def test_message_names_the_option_and_value(self, limits, message):
        for check in (
            lambda: check_limits("params", *limits),
            lambda: make_problem(**TINY).with_limits(params=limits),
        ):
            with pytest.raises(UsageError) as caught:
                check()
            assert caught.value.message == message
            assert "--m" in caught.value.hint

    def test_no_donor_allowed(self):
        with pytest.raises(UsageError, match="--max-donors 0 leaves no donor"):
            make_problem(**TINY, max_donors=0)

    def test_edges_join_consecutive_stages(self):
        with pytest.raises(ValueError, match="consecutive"):
            make_problem(**TINY, edges=[(2, 0)])

    def test_recount_refuses_what_is_no_path(self):
        problem = make_problem(**TINY)
        with pytest.raises(ValueError, match="do not join"):
            recount(problem, [0, 2], [1])
        with pytest.raises(ValueError, match="stages"):
            recount(problem, [0, 1], [0])


class TestExplain:
    def test_nothing_to_explain(self):
        assert explain(make_problem(**TINY)) is None

    def test_one_budget_too_small(self):
        verdict = explain(make_problem(**TINY, max_params=8))
        assert verdict.cause == "budgets"
        report = verdict.limits[0]
        assert (report.alone_feasible, report.alone, report.with_rest, report.excess) == (
            False, 9, 9, 1,
        )  # fmt: skip
        assert verdict.sentences == ("--max-params 8: the smallest assembly has 9, 1 over",)
        assert verdict.hint == "--max-params 9 fits"
        error = verdict.to_error()
        assert isinstance(error, InfeasibleError)
        assert error.message.startswith("no assembly fits: --max-params 8: the smallest")
        assert error.details["limits"][0]["excess"] == 1

    def test_two_budgets_that_exclude_each_other(self):
        # (0, 2): 30 params, 200 FLOPs; (1, 3): 9 params, 400 FLOPs
        verdict = explain(make_problem(**TINY, max_params=29, max_flops=399))
        assert verdict.sentences == (
            "every limit can be kept alone, but not all together",
            "--max-flops 399 can be kept alone (down to 200); "
            "with the other limits the nearest is 400, 1 over",
            "--max-params 29 can be kept alone (down to 9); "
            "with the other limits the nearest is 30, 1 over",
        )
        assert verdict.hint == "--max-flops 400 fits"
        assert verdict.closest.blocks == (1, 3)

    def test_both_budgets_hopeless(self):
        verdict = explain(make_problem(**TINY, max_params=3, max_flops=2))
        assert all("still admit nothing" in s for s in verdict.sentences)
        assert verdict.closest is not None
        assert "several limits must give way" in verdict.hint

    def test_minimum_out_of_reach(self):
        verdict = explain(make_problem(**TINY, min_params=31))
        assert verdict.sentences == ("--min-params 31: the largest assembly has 30, 1 under",)

    def test_gap_between_minimum_and_maximum(self):
        verdict = explain(make_problem(**TINY, min_params=10, max_params=29))
        assert [(r.option, r.with_rest, r.excess) for r in verdict.limits] == [
            ("--max-params", 30, 1),
            ("--min-params", 9, 1),
        ]

    def test_figures_equal_brute_force(self):
        explained = 0
        for seed in range(60):
            problem = random_problem(seed)
            if brute_force(problem) or not brute_force(problem.without_limits()):
                continue
            explained += 1
            for report in explain(problem).limits:
                index = [r.name for r in problem.resources].index(report.name)
                pick = min if report.bound == "max" else max
                free = brute_force(problem.without_limits())
                assert report.alone == pick(a.costs[index] for a in free)
                resource = problem.resources[index]
                kept = (
                    (resource.minimum, None) if report.bound == "max" else (None, resource.maximum)
                )
                rest = brute_force(problem.with_limits(**{report.name: kept}))
                nearest = pick((a.costs[index] for a in rest), default=None)
                assert report.with_rest == nearest
        assert explained >= 5

    def test_stages_and_sets_admit_none(self):
        verdict = explain(make_problem(**{**TINY, "set_B": [0, 0, 0, 0]}, num_sets=2))
        assert verdict.cause == "sets"
        assert verdict.sentences == (
            "stages 1, 2 need 2 different equivalence sets, but have blocks of set 1 only",
        )
        assert verdict.candidates_KS == ((2, 0), (2, 0))

    def test_blocks_that_are_never_joined(self):
        verdict = explain(make_problem(**TINY, edges=[(0, 3)]))
        assert verdict.cause == "edges"
        assert "has all its sets different" in verdict.sentences[0]
        verdict = explain(make_problem(**TINY, edges=[]))
        assert verdict.sentences == ("no edge joins blocks of stages 1 and 2",)

    def test_filter_that_empties_a_set(self):
        filters = (
            Filter(name="--license mit", allowed_B=np.array([True, False, False, True])),
            Filter(name="--exclude x", allowed_B=np.array([True, True, True, True])),
        )
        verdict = explain(make_problem(**TINY, filters=filters))
        assert verdict.cause == "filters"
        assert verdict.sentences[0] == "--license mit --exclude x leaves set 2 empty"
        assert "--license mit allows 2 of 4 blocks; without it an assembly exists" in (
            verdict.sentences
        )
        assert verdict.hint == "drop or widen --license mit"

    def test_too_few_donors(self):
        verdict = explain(make_problem(**TINY, max_donors=1))
        assert verdict.cause == "donors"
        assert verdict.sentences == ("--max-donors 1: every assembly takes 2 or more",)
        assert verdict.hint == "use --max-donors 2"

    def test_filter_that_keeps_a_budget_from_being_met(self):
        only_large = Filter(name="--exclude small", allowed_B=np.array([True, False, True, True]))
        verdict = explain(make_problem(**TINY, filters=(only_large,), max_params=20))
        assert verdict.cause == "budgets"
        assert verdict.sentences[-1] == "without --exclude small an assembly fits every budget"


class TestFrontier:
    @staticmethod
    def reference(problem, index):
        """Every point that no other beats, by comparing all pairs."""
        points = {(a.score, *(a.costs[i] for i in index)) for a in brute_force(problem)}

        def beaten(p):
            return any(
                q != p and q[0] >= p[0] and all(y <= x for x, y in zip(p[1:], q[1:], strict=True))
                for q in points
            )

        return {p for p in points if not beaten(p)}

    @pytest.mark.parametrize("names", [["params"], ["flops"], ["params", "flops"]])
    def test_equals_all_pairs(self, names):
        index = [["params", "flops"].index(n) for n in names]
        for seed in range(40, 60):
            problem = random_problem(seed)
            front = pareto(problem, names)
            points = {(a.score, *(a.costs[i] for i in index)) for a in front.assemblies}
            assert points == self.reference(problem, index), f"seed {seed}"
            assert front.complete
            assert len(points) == len(front.assemblies)

    def test_stopped_early_it_is_part_of_the_frontier(self):
        problem = random_problem(46, num_models=8, num_stages=3).without_limits()
        problem = dataclasses.replace(problem, filters=(), max_donors=None)
        whole = {a.order for a in pareto(problem).assemblies}
        some = pareto(problem, max_points=4)
        assert len(some.assemblies) == 4 < len(whole)
        assert {a.order for a in some.assemblies} <= whole
        assert not some.complete


class TestRandomFeasible:
    def test_fits_and_is_reproducible(self):
        for seed in range(40):
            problem = random_problem(seed)
            one = random_feasible(problem, np.random.default_rng(seed))
            two = random_feasible(problem, np.random.default_rng(seed))
            assert one == two
            assert (one is None) == (not brute_force(problem))
            assert one is None or not violations(problem, one)

    def test_uniform_over_what_fits(self):
        problem = make_problem([0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [9, 0, 0, 0, 9], [1] * 5, [1] * 5)
        rng = np.random.default_rng(0)
        drawn = [random_feasible(problem, rng).blocks for _ in range(600)]
        shares = {blocks: drawn.count(blocks) / 600 for blocks in set(drawn)}
        assert set(shares) == {(0, 2), (1, 3), (1, 4)}
        assert all(abs(share - 1 / 3) < 0.07 for share in shares.values())

    def test_found_where_hardly_any_fits(self):
        rng = np.random.default_rng(1)
        stage_B = np.tile(np.arange(5), 12)
        params_B = rng.integers(1, 10**9, 60)
        chosen = [int(rng.choice(np.flatnonzero(stage_B == k))) for k in range(5)]
        total = int(params_B[chosen].sum())
        problem = make_problem(
            stage_B, stage_B, [0] * 60, params_B, [1] * 60, min_params=total, max_params=total
        )
        found = random_feasible(problem, np.random.default_rng(0))
        assert found.costs[0] == total
