"""The partition of Eq. 2-5 against enumeration of every cut, assignment and anchor."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

from dery_cli.core.partition.blocks import block_table, forward, smallest_eps
from dery_cli.core.partition.bound import Budget, gains, reduce, relax, tighten, whole
from dery_cli.core.partition.integer import improve
from dery_cli.core.partition.search import (
    Incumbent,
    alternate,
    anchor_step,
    partition_step,
    seeds,
    values,
)
from dery_cli.core.partition.solve import Partition, PartitionProblem, partition
from dery_cli.errors import InfeasibleError, UsageError


def make_problem(units, *, kind="random", seed=0, num_blocks=3, eps=0.5, size="nodes", sizes=None):
    rng = np.random.default_rng(seed)
    num_nodes = sum(units) + len(units)
    sim = rng.random((num_nodes, num_nodes))
    if kind == "ties":  # few values, so that many answers are equal
        sim = rng.integers(0, 3, sim.shape) / 2
    if kind == "equal":
        sim = np.full(sim.shape, 0.5)
    if kind == "wild":  # asymmetric, outside [0, 1], diagonal not 1, node 0 not as Definition 3
        sim = rng.normal(0.4, 0.6, sim.shape)
    else:
        sim = np.maximum(sim, sim.T)
        np.fill_diagonal(sim, 1.0)
    return PartitionProblem(
        sim_PP=sim,
        units=tuple(units),
        names=tuple(f"donor{m}" for m in range(len(units))),
        num_blocks=num_blocks,
        eps=eps,
        size=size,
        sizes=sizes,
    )


def all_cuts(problem, m):
    """Every cut of donor m that the size limit allows, by the words of DESIGN.md."""
    n, num_blocks, eps = problem.units[m], problem.num_blocks, problem.eps
    for inner in itertools.combinations(range(1, n), num_blocks - 1):
        cut = (0, *inner, n)
        if problem.size == "nodes":
            cap = max(math.floor((1 + eps) * n / num_blocks + 1e-9), math.ceil(n / num_blocks))
            fits = all(b - a <= cap for a, b in itertools.pairwise(cut))
        else:
            sizes = problem.sizes[m]
            total = max(sizes.sum(), 1)
            share = [sizes[a:b].sum() / total for a, b in itertools.pairwise(cut)]
            fits = all(s <= (1 + eps) / num_blocks + 1e-9 for s in share)
        if fits:
            yield cut


def brute_force(problem):
    """The optimum by enumerating all cuts of all donors and all sets of anchors among them."""
    first = np.concatenate([[0], np.cumsum(np.asarray(problem.units) + 1)])
    sim = np.clip(problem.sim_PP, 0, 1)
    for a, b in itertools.product(range(len(sim)), repeat=2):
        if a in first[:-1] or b in first[:-1]:
            sim[a, b] = float(a in first[:-1] and b in first[:-1])
    best = -1.0
    per_donor = [list(all_cuts(problem, m)) for m in range(len(problem.units))]
    for cuts in itertools.product(*per_donor):
        ends = np.array(
            [
                (first[m] + a, first[m] + b)
                for m, cut in enumerate(cuts)
                for a, b in itertools.pairwise(cut)
            ]
        )
        pair = sim[np.ix_(ends[:, 0], ends[:, 0])] + sim[np.ix_(ends[:, 1], ends[:, 1])]
        anchors = np.array(list(itertools.combinations(range(len(ends)), problem.num_blocks)))
        top = pair[:, anchors].max(axis=2)  # (blocks, sets of anchors)
        for k in range(problem.num_blocks):  # an anchor is a member of its own set
            top[anchors[:, k], np.arange(len(anchors))] = pair[anchors[:, k], anchors[:, k]]
        best = max(best, float(top.sum(axis=0).max()))
    return best


def check(problem, result: Partition):
    """The answer keeps every rule of Eq. 2-5, and its objective is what it says."""
    first = np.concatenate([[0], np.cumsum(np.asarray(problem.units) + 1)])
    sim = block_table(problem).sim_PP
    num_blocks = problem.num_blocks
    total = []
    for m, cut in enumerate(result.cuts):
        assert cut in set(all_cuts(problem, m))
        assert len(result.sets[m]) == num_blocks
        for k in range(num_blocks):
            owner, start, stop = result.anchors[result.sets[m][k]]
            similarity = (
                sim[first[m] + cut[k], first[owner] + start]
                + sim[first[m] + cut[k + 1], first[owner] + stop]
            )
            assert result.similarity[m][k] == similarity
            total.append(similarity)
    for index, (owner, start, stop) in enumerate(result.anchors):
        stage = result.cuts[owner].index(start)
        assert result.cuts[owner][stage + 1] == stop
        assert result.sets[owner][stage] == index
    assert {s for row in result.sets for s in row} == set(range(num_blocks))
    assert result.objective == math.fsum(total)
    assert result.upper_bound >= result.objective


RANDOM_ZOOS = [
    (units, kind, num_blocks, eps)
    for units in ((5,), (4, 6), (3, 5, 4), (6, 6, 5))
    for kind in ("random", "ties", "equal", "wild")
    for num_blocks, eps in ((1, 0.2), (2, 0.5), (3, 0.0), (3, 0.5))
]


@pytest.mark.parametrize(("units", "kind", "num_blocks", "eps"), RANDOM_ZOOS)
def test_equals_brute_force(units, kind, num_blocks, eps):
    problem = make_problem(units, kind=kind, seed=len(units), num_blocks=num_blocks, eps=eps)
    result = partition(problem, restarts=8)
    check(problem, result)
    assert result.objective == pytest.approx(brute_force(problem), abs=1e-9)
    assert result.optimal
    assert result.gap == 0.0


def test_equals_brute_force_at_four_models_of_eight_nodes():
    problem = make_problem((7, 7, 7, 7), seed=3, num_blocks=3, eps=0.5)
    result = partition(problem)
    check(problem, result)
    assert result.objective == pytest.approx(brute_force(problem), abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["random", "ties", "wild"])
def test_bound_and_branching_without_enumeration(monkeypatch, seed, kind):
    """One restart, few steps, no set-by-set leaves: the branching alone must find the optimum."""
    monkeypatch.setattr("dery_cli.core.partition.bound.LEAF_WORK", 0)
    problem = make_problem((5, 4, 5), kind=kind, seed=seed, num_blocks=3, eps=0.5)
    result = partition(problem, restarts=1, bound_steps=5, seed=seed)
    check(problem, result)
    assert result.objective == pytest.approx(brute_force(problem), abs=1e-9)
    assert result.optimal


@pytest.mark.parametrize("size", ["macs", "params"])
@pytest.mark.parametrize("seed", range(6))
def test_share_limits_equal_brute_force(size, seed):
    rng = np.random.default_rng(seed)
    units = (5, 6, 4)
    problem = make_problem(
        units,
        seed=seed,
        num_blocks=2,
        eps=0.4,
        size=size,
        sizes=tuple(rng.integers(1, 5, n) for n in units),
    )
    if any(not list(all_cuts(problem, m)) for m in range(3)):
        with pytest.raises(InfeasibleError):
            partition(problem)
        return
    result = partition(problem)
    check(problem, result)
    assert result.objective == pytest.approx(brute_force(problem), abs=1e-9)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kind", ["random", "wild"])
def test_any_multipliers_bound_the_optimum(seed, kind):
    problem = make_problem((4, 5, 3), kind=kind, seed=seed, num_blocks=2, eps=0.5)
    table = block_table(problem)
    optimum = brute_force(problem)
    rng = np.random.default_rng(seed)
    sub = whole(table, np.array([0, 1]))
    for _ in range(20):
        relaxed = relax(sub, rng.uniform(-1, 3, len(table)))
        assert relaxed.value >= optimum - 1e-9


def test_gain_is_the_best_cut_through_the_anchor():
    """G_a by enumeration of every donor's cuts."""
    problem = make_problem((4, 5), seed=1, num_blocks=2, eps=0.5)
    table = block_table(problem)
    multipliers = np.random.default_rng(2).uniform(0, 3, len(table))
    everyone = np.arange(len(table))
    found = gains(table, everyone, multipliers)
    place = {
        (int(d), int(a), int(b)): i
        for i, (d, a, b) in enumerate(zip(table.donor_C, table.start_C, table.stop_C, strict=True))
    }
    for anchor in everyone:
        expected = 0.0
        for m in range(2):
            options = []
            for cut in all_cuts(problem, m):
                blocks = [place[m, a, b] for a, b in itertools.pairwise(cut)]
                if table.donor_C[anchor] == m and anchor not in blocks:
                    continue
                terms = [float(table.similarity(b, anchor) - multipliers[b]) for b in blocks]
                options.append(
                    sum(
                        t if b == anchor else max(t, 0.0)
                        for b, t in zip(blocks, terms, strict=True)
                    )
                )
            expected += max(options)
        assert found[anchor] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", ["random", "ties", "wild"])
def test_the_objective_never_falls(kind):
    problem = make_problem((9, 7, 11, 8), kind=kind, seed=4, num_blocks=3, eps=0.5)
    table = block_table(problem)
    _, history = alternate(table, seeds(table, 50, np.random.default_rng(0)))
    assert len(history) > 2
    for before, after in itertools.pairwise(history):
        assert (after >= before).all()
    result = partition(problem, restarts=3)
    # phases in a row; the answer is re-summed at the end, so only to rounding
    found = [value for _, value in result.history]
    assert found == sorted(found)
    assert result.objective == pytest.approx(found[-1], abs=1e-9)


def test_both_steps_are_exact():
    """The partition step against all cuts, the anchor step against all members."""
    problem = make_problem((4, 5, 6), seed=6, num_blocks=2, eps=0.5)
    table = block_table(problem)
    answers = partition_step(table, seeds(table, 6, np.random.default_rng(1)))
    ids = list(zip(table.donor_C, table.start_C, table.stop_C, strict=True))
    better = anchor_step(table, answers)
    for r in range(6):
        anchors = answers.anchors_KR[:, r].tolist()
        total = 0.0
        for m in range(3):
            options = []
            for cut in all_cuts(problem, m):
                blocks = [ids.index((m, a, b)) for a, b in itertools.pairwise(cut)]
                if any(table.donor_C[a] == m and a not in blocks for a in anchors):
                    continue
                options.append(sum(max(table.similarity(b, a) for a in anchors) for b in blocks))
            total += max(options)
        assert answers.value_R[r] == pytest.approx(total, abs=1e-12)
        blocks, sets = answers.blocks_MKR[..., r].ravel(), answers.sets_MKR[..., r].ravel()
        for k in range(2):
            members = blocks[sets == k]
            score = [sum(table.similarity(b, a) for b in members) for a in members]
            mine = sum(table.similarity(b, better[k, r]) for b in members)
            assert better[k, r] in members
            assert mine == pytest.approx(max(score), abs=1e-12)


def test_the_program_finds_anchors_that_the_start_missed():
    """python-mip over all blocks lifts a deliberately bad start to the optimum."""
    problem = make_problem((4, 4, 4), seed=0, num_blocks=2, eps=0.5)
    table = block_table(problem)
    tries = np.array(list(itertools.combinations(range(len(table)), 2))).T
    value = values(table, tries)
    worst = int(np.argmin(np.where(np.isfinite(value), value, np.inf)))
    incumbent = Incumbent(table=table, answer=partition_step(table, tries[:, [worst]]))
    before = incumbent.value
    assert improve(whole(table, tries[:, worst]), incumbent, np.arange(len(table)))
    assert incumbent.value > before
    assert incumbent.value == pytest.approx(brute_force(problem), abs=1e-6)


def test_dropped_anchors_are_in_no_better_answer():
    """Reduced-cost fixing against the value of every set of anchors."""
    problem = make_problem((6, 5, 6), seed=9, num_blocks=3, eps=0.5)
    table = block_table(problem)
    tries = np.array(list(itertools.combinations(range(len(table)), 3))).T
    value = values(table, tries)
    order = np.argsort(-value)
    dropped = 0
    for rank in (10, 100, 1000):
        floor = float(value[order[rank]])
        incumbent = Incumbent(table=table, answer=partition_step(table, tries[:, order[[rank]]]))
        sub = whole(table, tries[:, order[rank]])
        for steps in (1, 5, 20):  # multipliers that bound loosely and tightly
            tuned, _ = tighten(sub, incumbent, steps, Budget(work=1e9))
            lambda_C = np.full(len(table), 1.2)
            lambda_C[tuned.ids_C] = tuned.lambda_C
            kept = reduce(sub, relax(sub, lambda_C), lambda_C, floor)
            left = set(kept.ids_C[kept.open_A].tolist())
            dropped += len(table) - len(left)
            for better in tries[:, value > floor + 1e-9].T.tolist():
                assert set(better) <= left
    assert dropped > 0


@pytest.mark.parametrize("seed", range(4))
def test_anchors_are_dropped_by_the_bound_that_forces_them(seed):
    """An anchor stays exactly where L with it as a fixed anchor, on its own cut, is above."""
    problem = make_problem((6, 5, 6), seed=seed, num_blocks=3, eps=0.5)
    table = block_table(problem)
    lambda_C = np.random.default_rng(seed).uniform(0.8, 1.6, len(table))
    sub = whole(table, np.array([0, 1, 2]))
    forced = []
    for anchor in range(len(table)):
        others = np.delete(np.arange(len(table)), anchor)
        with_it = dataclasses.replace(sub, fixed=np.array([anchor]), open_A=others)
        through = lambda_C[:, None].copy()
        through[table.overlaps(np.array([anchor]))[0]] = -np.inf
        paths = forward(table, through)[-1, table.last_M, 0].sum()
        relaxed = relax(with_it, lambda_C)
        forced.append(relaxed.value - relaxed.paths + paths)
    for floor in np.quantile(forced, [0.2, 0.5, 0.8]) + 1e-6:
        kept = reduce(sub, relax(sub, lambda_C), lambda_C, float(floor))
        assert kept.ids_C[kept.open_A].tolist() == np.flatnonzero(np.array(forced) > floor).tolist()


def test_node_0_is_like_node_0_and_nothing_else():
    """By hand: two donors of two units, K = 2; every stem pairs with the other stem fully."""
    sim = np.zeros((6, 6))
    sim[1, 4] = sim[4, 1] = 0.5  # the middle nodes
    sim[2, 5] = sim[5, 2] = 0.25  # the last nodes
    sim[0, 1] = sim[3, 4] = 0.9  # must not count
    np.fill_diagonal(sim[1:3, 1:3], 1.0)
    np.fill_diagonal(sim[4:6, 4:6], 1.0)
    problem = PartitionProblem(sim_PP=sim, units=(2, 2), names=("a", "b"), num_blocks=2, eps=0.0)
    result = partition(problem)
    assert result.cuts == ((0, 1, 2), (0, 1, 2))
    assert result.sets == ((0, 1), (0, 1))
    assert result.anchors == ((0, 0, 1), (0, 1, 2))
    assert result.similarity == ((2.0, 2.0), (1.5, 0.75))
    assert result.objective == 6.25
    assert result.forced == (True, True)
    assert result.admits_assembly


def test_one_stage_in_every_set_admits_no_assembly():
    fields = {
        "cuts": ((0, 1, 2), (0, 1, 2)),
        "anchors": ((0, 0, 1), (0, 1, 2)),
        "similarity": ((2.0, 2.0), (2.0, 2.0)),
        "objective": 8.0,
        "upper_bound": 8.0,
        "gap": 0.0,
        "optimal": True,
        "forced": (True, True),
        "history": (),
    }
    assert not Partition(sets=((0, 0), (0, 0)), **fields).admits_assembly
    assert Partition(sets=((0, 0), (1, 1)), **fields).admits_assembly
    assert Partition(sets=((0, 1), (0, 1)), **fields).members(1) == ((0, 1), (1, 1))


@pytest.mark.parametrize("seed", range(40))
def test_an_assembly_is_admitted_where_some_order_of_sets_is_offered(seed):
    rng = np.random.default_rng(seed)
    donors, stages = int(rng.integers(1, 4)), int(rng.integers(2, 6))
    sets = tuple(tuple(row) for row in rng.integers(stages, size=(donors, stages)).tolist())
    fields = dict.fromkeys(
        ("cuts", "similarity", "objective", "upper_bound", "gap", "optimal", "forced", "history")
    )
    anchors = ((0, 0, 1),) * stages
    offered = [{row[k] for row in sets} for k in range(stages)]
    possible = any(
        all(index in offered[k] for k, index in enumerate(order))
        for order in itertools.permutations(range(stages))
    )
    assert Partition(sets=sets, anchors=anchors, **fields).admits_assembly is possible


def test_k_of_one_and_k_of_all_units():
    one = partition(make_problem((4, 3), num_blocks=1))
    assert one.cuts == ((0, 4), (0, 3))
    assert one.sets == ((0,), (0,))
    every = partition(make_problem((4, 4), num_blocks=4, seed=2))
    assert every.cuts == ((0, 1, 2, 3, 4), (0, 1, 2, 3, 4))
    assert every.forced == (True, True)


def test_forced_donors_are_marked():
    """8 units at K=4, eps=0.2: at most 2 each, one way; 9 units: at most 3 each, many ways."""
    result = partition(make_problem((8, 9), num_blocks=4, eps=0.2))
    assert result.forced == (True, False)
    assert result.cuts[0] == (0, 2, 4, 6, 8)


@pytest.mark.parametrize("n", [5, 6, 9, 10, 13])
def test_the_node_limit_never_leaves_a_donor_without_a_cut(n):
    result = partition(make_problem((n,), num_blocks=4, eps=0.2))
    assert max(b - a for a, b in itertools.pairwise(result.cuts[0])) <= max(
        math.floor(1.2 * n / 4 + 1e-9), math.ceil(n / 4)
    )


def test_duplicated_donors_are_cut_alike():
    base = make_problem((7, 6), seed=5, num_blocks=3, eps=0.5)
    twice = np.concatenate([np.arange(8), np.arange(8), np.arange(8, 15)])
    problem = PartitionProblem(
        sim_PP=base.sim_PP[np.ix_(twice, twice)],
        units=(7, 7, 6),
        names=("a", "a-again", "b"),
        num_blocks=3,
        eps=0.5,
    )
    result = partition(problem)
    check(problem, result)
    assert result.objective == pytest.approx(brute_force(problem), abs=1e-9)


def test_the_same_answer_again():
    problem = make_problem((9, 8, 10, 7, 9), kind="ties", seed=8, num_blocks=3, eps=0.5)
    assert partition(problem, seed=3) == partition(problem, seed=3)


def test_sets_are_numbered_by_depth():
    problem = make_problem((9, 8, 10), seed=8, num_blocks=3, eps=0.5)
    result = partition(problem)
    depth = [
        np.mean([result.cuts[m][k] / problem.units[m] for m, k in result.members(index)])
        for index in range(3)
    ]
    assert depth == sorted(depth)


def test_a_time_limit_still_gives_answer_and_bound():
    problem = make_problem((9, 8, 9, 8), seed=1, num_blocks=3, eps=0.5)
    seen = []
    result = partition(
        problem, max_seconds=1e-6, progress=lambda phase, gap: seen.append((phase, gap))
    )
    check(problem, result)
    assert not result.optimal
    assert 0 < result.gap < 1
    assert result.upper_bound >= partition(problem).objective
    assert seen[0] == ("restarts 25 of 200", math.inf)
    assert seen[-1][1] == pytest.approx(result.gap)


def test_k_too_large_names_the_model():
    with pytest.raises(UsageError) as caught:
        make_problem((9, 3), num_blocks=4)
    assert caught.value.message == "-K 4 is too large: donor1 has only 3 units"
    assert caught.value.hint == "use -K 3 or less, or dery zoo remove donor1"


def test_a_limit_nothing_satisfies_names_model_and_smallest_eps():
    problem = make_problem(
        (4, 4), num_blocks=2, eps=0.2, size="params",
        sizes=(np.array([1, 1, 1, 1]), np.array([1, 1, 7, 1])),
    )  # fmt: skip
    with pytest.raises(InfeasibleError) as caught:
        partition(problem)
    assert caught.value.message == (
        "no partition of donor1 into 2 blocks keeps every block's share of its params "
        "within (1 + 0.2) / 2"
    )
    assert caught.value.hint == (
        "the smallest eps that works is 0.6: dery partition --size params -K 2 --eps 0.6"
    )
    assert caught.value.details == {"model": "donor1", "smallest_eps": 0.6, "size": "params"}


@pytest.mark.parametrize("seed", range(20))
def test_the_smallest_eps_works_and_less_does_not(seed):
    rng = np.random.default_rng(seed)
    sizes = (rng.integers(1, 1000, 7), rng.integers(1, 1000, 6))
    options = {"num_blocks": 3, "size": "macs", "sizes": sizes}
    eps = smallest_eps(make_problem((7, 6), eps=0.0, **options))
    assert partition(make_problem((7, 6), eps=eps, **options), restarts=2).objective > 0
    with pytest.raises(InfeasibleError):
        partition(make_problem((7, 6), eps=eps - 0.002, **options), restarts=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"units": (), "names": ()}, "the zoo has no models to partition"),
        ({"num_blocks": 0}, "cannot cut models into 0 blocks"),
        ({"eps": -0.1}, "--eps -0.1 is not a number of 0 or more"),
        ({"size": "macs"}, "--size macs needs one size a unit for every donor"),
        ({"units": (4, 4)}, "similarity matrix is (9, 9), but the zoo has 10 nodes"),
        ({"sim_PP": np.full((9, 9), np.nan)}, "similarity matrix has entries that are not finite"),
    ],
)
def test_bad_problems(change, message):
    fields = dataclasses.asdict(make_problem((4, 3), num_blocks=2)) | change
    with pytest.raises(UsageError) as caught:
        PartitionProblem(**fields)
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"restarts": 0}, "--restarts 0 is below 1"),
        ({"bound_steps": 0}, "bound steps 0 are below 1"),
        ({"max_seconds": 0.0}, "--max-seconds 0 is not above 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UsageError) as caught:
        partition(make_problem((4, 3), num_blocks=2), **options)
    assert caught.value.message == message
