"""The free space against brute force: every feature of a path, on hundreds of small random zoos."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dery_cli.core.assembly.frontier import count_assemblies, share_that_fits
from dery_cli.core.assembly.paths import Limits, Parts, Peak, Pin, Space, path_problem
from dery_cli.core.assembly.solve import (
    MipStatus,
    cross_check,
    explain,
    n_best,
    pareto,
    random_feasible,
    recount,
    solve,
    violations,
)
from dery_cli.types import BlockRef

RESOURCES = ("params", "flops", "memory")


def random_space(seed, *, max_stitches=None, num_donors=None):
    """Donors of one to five nodes, shared parameters, missing and parallel stitches, ties."""
    rng = np.random.default_rng(seed)
    num_donors = num_donors or int(rng.integers(1, 4))
    num_nodes = tuple(int(n) for n in rng.integers(2, 5, num_donors))
    donors = tuple(f"d{i}" for i in range(num_donors))
    first = np.concatenate([[0], np.cumsum(num_nodes)])
    tied = rng.random() < 0.4

    def draw(size, high):
        return rng.integers(0, 3 if tied else high, size)

    segments, stitches, heads = [], [], []
    for d, count in enumerate(num_nodes):
        for i in range(count):
            segments += [(first[d] + i, first[d] + j) for j in range(i + 1, count)]
        heads += [
            (first[d] + j, first[d] + j)
            for j in range(1, count)
            if j == count - 1 or rng.random() < 0.6
        ]
        for e, others in enumerate(num_nodes):
            for i in range(1, count):
                for j in range(1, others):
                    if (d != e or j >= i) and rng.random() < 0.7:
                        stitches += [(first[d] + i, first[e] + j)] * int(rng.choice([1, 1, 2]))

    def parts(pairs, high):
        pair = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        # a segment's cost is drawn as a whole: units may share parameters
        costs = {name: draw(len(pair), high) for name in RESOURCES}
        return Parts(src=pair[:, 0], dst=pair[:, 1], score=draw(len(pair), 1000) - 1, costs=costs)

    return Space(
        donors=donors,
        num_nodes=num_nodes,
        segments=parts(segments, 50),
        stitches=parts(stitches, 10),
        heads=parts(heads, 10),
        max_stitches=int(rng.integers(0, 4)) if max_stitches is None else max_stitches,
    )


def all_paths(space):
    """Every path as (refs, score, costs, segment numbers), by plain recursion."""
    first = space.first_D.tolist()
    where = {
        first[d] + i: (name, i)
        for d, name in enumerate(space.donors)
        for i in range(space.num_nodes[d])
    }
    head = {int(v): x for x, v in enumerate(space.heads.src)}
    found = []

    def add(total, parts, number):
        score, costs = total
        return (
            score + int(parts.score[number]),
            tuple(c + int(parts.costs[r][number]) for c, r in zip(costs, RESOURCES, strict=True)),
        )

    def extend(refs, total, used, node, stitches):
        """From ``node``, which a segment must leave."""
        for g in range(len(space.segments)):
            if int(space.segments.src[g]) != node:
                continue
            end = int(space.segments.dst[g])
            donor, start = where[node]
            follows = bool(refs) and (refs[-1].donor, refs[-1].stop) == (donor, start)
            now = (*refs, BlockRef(donor, start, where[end][1], adapter=follows))
            here = add(total, space.segments, g)
            if end in head:
                found.append((now, *add(here, space.heads, head[end]), (*used, g)))
            if stitches == space.max_stitches:
                continue
            for j in range(len(space.stitches)):
                if int(space.stitches.src[j]) == end:
                    after = int(space.stitches.dst[j])
                    extend(now, add(here, space.stitches, j), (*used, g), after, stitches + 1)

    for d in range(len(space.donors)):
        extend((), (0, (0, 0, 0)), (), first[d], 0)
    return found


def random_wishes(seed, space):
    """Limits, pins and donor wishes, by the seed; some leave nothing."""
    rng = np.random.default_rng(seed + 10_000)
    paths = all_paths(space)
    limits = {}
    for place, name in enumerate(RESOURCES[:2]):
        totals = sorted(path[2][place] for path in paths)
        # a limit that is exactly some path's total, so that off-by-ones show
        top = totals[int(rng.integers(len(totals)))] if rng.random() < 0.6 else None
        low = totals[int(rng.integers(len(totals)))] if rng.random() < 0.2 else None
        top, low = top or None, low or None
        if top is not None and low is not None and low > top:
            low = None
        limits[name] = Limits(minimum=low, maximum=top)
    peak = None
    if rng.random() < 0.3:
        peak_G, last_G = rng.integers(0, 30, (2, len(space.segments)))
        most = int(rng.integers(20, 90))
        peak = Peak(option="memory", peak_G=peak_G, last_G=last_G, maximum=most)
    pins = []
    for kind in ("start", "end", "require", "require", "exclude"):
        if rng.random() < 0.2:
            d = int(rng.integers(len(space.donors)))
            pin = Pin(kind=kind, name=f"--{kind} {d} {len(pins)}", donor=space.donors[d])
            if rng.random() < 0.6:
                a, b = sorted(int(x) for x in rng.integers(0, space.num_nodes[d], 2))
                a = 0 if kind == "start" else a
                if a < b:
                    pin = dataclasses.replace(pin, start=a, stop=b)
            pins.append(pin)
    return {
        "limits": limits,
        "peak": peak,
        "pins": tuple(pins),
        "excluded": {"--exclude d0": ("d0",)} if rng.random() < 0.1 else {},
        "whole": bool(rng.random() < 0.8),
        "max_donors": int(rng.integers(1, 3)) if rng.random() < 0.3 else None,
    }


def obeys(space, path, wishes):
    """Whether a path of ``all_paths`` satisfies what ``random_wishes`` asks, spelled out anew."""
    refs, _, costs, segments = path
    for total, name in zip(costs, RESOURCES, strict=True):
        limit = wishes["limits"].get(name, Limits())
        if limit.minimum is not None and total < limit.minimum:
            return False
        if limit.maximum is not None and total > limit.maximum:
            return False
    peak = wishes["peak"]
    if peak is not None:
        peaks = [int(peak.peak_G[g]) for g in segments[:-1]] + [int(peak.last_G[segments[-1]])]
        if costs[2] + max(peaks) > peak.maximum:
            return False
    donors = {ref.donor for ref in refs}
    if wishes["max_donors"] is not None and len(donors) > wishes["max_donors"]:
        return False
    if any(name in donors for names in wishes["excluded"].values() for name in names):
        return False
    full = {n: c - 1 for n, c in zip(space.donors, space.num_nodes, strict=True)}
    if not wishes["whole"] and len(refs) == 1 and (refs[0].start, refs[0].stop) == (0, full[refs[0].donor]):  # noqa: E501 # fmt: skip
        return False
    return all(pinned(refs, pin) for pin in wishes["pins"])


def pinned(refs, pin):
    units = set() if pin.stop is None else set(range(pin.start + 1, pin.stop + 1))

    def covers(ref):
        mine = set(range(ref.start + 1, ref.stop + 1))
        return ref.donor == pin.donor and units <= mine

    if pin.kind == "start":
        return covers(refs[0])
    if pin.kind == "end":
        return covers(refs[-1]) and pin.stop in (None, refs[-1].stop)
    if pin.kind == "require":
        return any(covers(ref) for ref in refs)
    return not any(
        ref.donor == pin.donor
        and (pin.stop is None or units & set(range(ref.start + 1, ref.stop + 1)))
        for ref in refs
    )


@pytest.mark.parametrize("block", range(10))
def test_n_best_is_brute_force_with_every_wish(block):
    fitting = 0
    for seed in range(40 * block, 40 * block + 40):
        space = random_space(seed)
        wishes = random_wishes(seed, space)
        stated = path_problem(space, **wishes)
        fits = sorted(
            ((-p[1], p[2][:2], p[0]) for p in all_paths(space) if obeys(space, p, wishes)),
            key=lambda p: p[:2],
        )
        found = n_best(stated.problem, 7)
        assert found.complete
        assert [(-a.score, a.costs[:2]) for a in found.assemblies] == [p[:2] for p in fits[:7]]
        for answer in found.assemblies:
            network = stated.network(answer)
            assert (-answer.score, answer.costs[:2], network) in fits
            assert not violations(stated.problem, answer)
        everything = n_best(stated.problem, len(fits) + 1)
        assert sorted(map(stated.network, (a for a in everything.assemblies))) == sorted(
            p[2] for p in fits
        )
        fitting += bool(fits)
    assert 10 < fitting < 40 or block > 0


def test_without_a_donor_is_brute_force():
    fitting, gone = 0, 0
    for seed in range(40):
        space = random_space(seed, num_donors=3)
        wishes = random_wishes(seed, space)
        stated = path_problem(space, **wishes)
        for donor in space.donors:
            fits = sorted(
                (-path[1], path[2][:2])
                for path in all_paths(space)
                if obeys(space, path, wishes) and donor not in {ref.donor for ref in path[0]}
            )
            found = n_best(stated.without(donor), 5).assemblies
            assert [(-a.score, a.costs[:2]) for a in found] == fits[:5]
            assert all(donor not in {r.donor for r in stated.network(a)} for a in found)
            fitting, gone = fitting + bool(fits), gone + (not fits)
    assert fitting > 20
    assert gone > 20


def test_cbc_agrees_with_the_search():
    statuses = set()
    for seed in range(60):
        space = random_space(seed)
        stated = path_problem(space, **random_wishes(seed, space))
        answer = solve(stated.problem)
        agreement = cross_check(answer, n_best(stated.problem, 5))
        assert agreement.agrees, (seed, agreement.reason)
        assert not answer.broken
        statuses.add(answer.status)
    assert {MipStatus.OPTIMAL, MipStatus.INFEASIBLE} <= statuses


def test_the_grammar_is_all_there():
    space = random_space(18, max_stitches=3, num_donors=2)
    refs = [path[0] for path in all_paths(space)]
    a, b = space.donors
    assert any([r.donor for r in path] == [a, b, a] for path in refs)
    assert any(path[1:] and path[1].adapter for path in refs)
    assert any(len(p) == 2 and p[0].donor == p[1].donor and p[1].start > p[0].stop for p in refs)
    last = dict(zip(space.donors, (count - 1 for count in space.num_nodes), strict=True))
    assert any(path[-1].stop < last[path[-1].donor] for path in refs)
    free = {name: Limits() for name in RESOURCES[:2]}
    stated = path_problem(space, free)
    found = n_best(stated.problem, len(refs) + 1)
    assert sorted(map(stated.network, found.assemblies)) == sorted(refs)


def test_ties_come_in_a_fixed_order():
    space = random_space(5, max_stitches=2, num_donors=2)
    same = {n: np.zeros_like(c) for n, c in space.stitches.costs.items()}
    space = dataclasses.replace(
        space,
        stitches=dataclasses.replace(space.stitches, score=space.stitches.score * 0, costs=same),
    )
    stated = path_problem(space, {name: Limits() for name in RESOURCES[:2]})
    orders = [[stated.network(a) for a in n_best(stated.problem, 9).assemblies] for _ in range(2)]
    assert orders[0] == orders[1]
    longer = [stated.network(a) for a in n_best(stated.problem, 30).assemblies]
    assert longer[:9] == orders[0]


def test_the_frontier_is_brute_force():
    for seed in range(15):
        space = random_space(seed, max_stitches=1)
        stated = path_problem(space, {name: Limits() for name in RESOURCES[:2]})
        points = {(p[1], p[2][:2]) for p in all_paths(space)}
        best = {
            (s, c)
            for s, c in points
            if not any(
                t >= s and d[0] <= c[0] and d[1] <= c[1] and (t, d) != (s, c) for t, d in points
            )
        }
        found = pareto(stated.problem)
        assert found.complete
        # a cost of 0 is no box: what beats it there is the same assembly
        assert {(a.score, a.costs[:2]) for a in found.assemblies} <= best
        assert {p for p in best if min(p[1]) > 0} <= {
            (a.score, a.costs[:2]) for a in found.assemblies
        }


def test_a_random_path_fits_and_is_decided_by_the_seed():
    space = random_space(10, max_stitches=2, num_donors=3)
    totals = sorted(path[2][0] for path in all_paths(space))
    limits = {"params": Limits(maximum=totals[len(totals) // 3]), "flops": Limits()}
    stated = path_problem(space, limits)
    drawn = {
        random_feasible(stated.problem, np.random.default_rng(seed)).edges for seed in range(20)
    }
    assert len(drawn) > 5
    again = random_feasible(stated.problem, np.random.default_rng(0))
    assert again == random_feasible(stated.problem, np.random.default_rng(0))
    assert not violations(stated.problem, again)


def test_why_nothing_fits():
    space = random_space(8, max_stitches=1, num_donors=2)
    least = min(path[2][0] for path in all_paths(space) if path[2][0] > 0)
    free = {"params": Limits(), "flops": Limits()}
    tight = dict(free, params=Limits(maximum=1, minimum=1))
    reason = explain(path_problem(space, tight).problem)
    if reason is not None:
        assert reason.cause == "budgets"
        assert "--min-params 1" in " ".join(reason.sentences) or least > 0
    pins = (
        Pin(kind="start", name="--start d0", donor="d0"),
        Pin(kind="exclude", name="--exclude d0[0:1]", donor="d0", start=0, stop=1),
    )
    reason = explain(path_problem(space, free, pins=pins).problem)
    assert reason is not None
    assert reason.cause == "filters"
    assert "--start d0" in reason.sentences[0]
    assert "drop or widen" in reason.hint
    assert explain(path_problem(space, free).problem) is None


def test_answers_recount_to_what_they_say():
    space = random_space(11, max_stitches=3)
    stated = path_problem(space, {"params": Limits(), "flops": Limits()})
    for answer in n_best(stated.problem, 20).assemblies:
        assert recount(stated.problem, answer.blocks, answer.edges) == answer


def test_paths_are_counted_exactly_and_their_share_is_estimated():
    for seed in range(30):
        space = random_space(seed)
        wishes = random_wishes(seed, space)
        free = {**wishes, "max_donors": None, "peak": None, "limits": {}}
        paths = all_paths(space)
        wanted = sum(obeys(space, path, free) for path in paths)
        limits = {name: Limits() for name in RESOURCES[:2]}
        assert count_assemblies(path_problem(space, **{**free, "limits": limits}).problem) == wanted
    space = random_space(18, max_stitches=2, num_donors=2)
    totals = sorted(path[2][0] for path in all_paths(space))
    limits = {"params": Limits(maximum=totals[len(totals) // 4]), "flops": Limits()}
    problem = path_problem(space, limits).problem
    within = sum(total <= limits["params"].maximum for total in totals) / len(totals)
    found = share_that_fits(problem, np.random.default_rng(0), 4096)
    assert found == pytest.approx(within, abs=0.03)
