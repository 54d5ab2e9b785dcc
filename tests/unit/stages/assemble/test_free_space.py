"""The free space of a zoo: what it is made of, what options pin, and in which order it is built."""

from __future__ import annotations

import itertools
import types
from typing import ClassVar

import numpy as np
import pytest

from dery_cli.core.assembly.paths import Limits, path_problem
from dery_cli.core.assembly.search import n_best
from dery_cli.core.stitching.stitch import stitch_cost
from dery_cli.errors import UsageError
from dery_cli.stages.assemble import free_space
from dery_cli.stages.assemble.candidates import Candidate
from dery_cli.stages.assemble.config import AssembleConfig
from dery_cli.stages.assemble.free_space import PathScores, build_space, in_turns, pins_of
from dery_cli.types import Anatomy, BlockRef, Layout, Node, SharedParams, StitchKind
from dery_cli.zoo.whole import network_cost


def node(index, channels, side, params=0, prefix=0):
    tokens = (side * side + prefix, channels)
    return Node(
        index=index,
        name=f"n{index}",
        layout=Layout.NLC if prefix else Layout.NCHW if side else Layout.NC,
        shape=tokens if prefix else (channels, side, side) if side else (channels,),
        grid=(side or 1, side or 1),
        num_prefix_tokens=prefix,
        params=params,
        flops=10 * params,
    )


class Zoo:
    """A net whose second and third units share parameters, one with tokens, one of one unit."""

    anatomies: ClassVar = {
        "a": Anatomy(
            nodes=(
                node(0, 3, 8),
                node(1, 4, 4, 100),
                node(2, 8, 2, 250),
                node(3, 8, 2, 30),
                node(4, 8, 0, 7),
            ),
            shared=(SharedParams(count=50, units=(2, 3)),),
        ),
        "b": Anatomy(
            nodes=(node(0, 3, 8), node(1, 6, 2, 80, 1), node(2, 6, 2, 40, 1), node(3, 6, 0, 2))
        ),
        "whole": Anatomy(nodes=(node(0, 3, 8), node(1, 9, 0, 500))),
    }

    def names(self):
        return list(self.anatomies)

    def __getitem__(self, name):
        return types.SimpleNamespace(anatomy=self.anatomies[name])


def stated(**options):
    free = build_space(
        Zoo(), **{"max_stitches": 2, "kind": StitchKind.LINEAR, "num_classes": 5} | options
    )
    return free, path_problem(free.space, {"params": Limits(), "flops": Limits()})


@pytest.mark.parametrize("kind", list(StitchKind))
def test_every_path_costs_what_its_network_does(kind):
    _, problem = stated(kind=kind)
    found = n_best(problem.problem, 100_000)
    assert found.complete
    assert len(found.assemblies) > 200
    kinds = set()
    for answer in found.assemblies[:: max(1, len(found.assemblies) // 400)]:
        refs = problem.network(answer)
        cost = network_cost(Zoo(), refs, 5, kind)
        assert answer.costs[:2] == (cost.params, cost.flops)
        kinds |= {ref.adapter for ref in refs[1:]}
    assert kinds == {True, False}


def test_no_path_leads_back_or_to_an_image_or_into_a_donor_of_one_unit():
    _, problem = stated()
    for answer in n_best(problem.problem, 100_000).assemblies:
        refs = problem.network(answer)
        assert refs[0].start == 0
        assert all(ref.start > 0 for ref in refs[1:])
        assert all(ref.donor != "whole" for ref in refs[1:])
        for before, after in itertools.pairwise(refs):
            assert before.donor != after.donor or after.start >= before.stop


def test_scores_are_those_of_the_end_the_stitches_and_the_units():
    rng = np.random.default_rng(0)
    count = sum(len(a.nodes) for a in Zoo.anatomies.values())
    scores = PathScores(
        head_V=rng.random(count),
        stitch_VV=-rng.random((count, count)),
        unit_V=rng.random(count),
        last_unit_V=rng.random(count),
    )
    free, problem = stated(scores=scores)
    first = dict(zip(free.space.donors, free.space.first_D.tolist(), strict=False))
    for answer in n_best(problem.problem, 50).assemblies:
        refs = problem.network(answer)
        total = scores.head_V[first[refs[-1].donor] + refs[-1].stop]
        for before, after in itertools.pairwise(refs):
            ends = (first[before.donor] + before.stop, first[after.donor] + after.start)
            total += scores.stitch_VV[ends]
        for ref in refs:
            units = slice(first[ref.donor] + ref.start + 1, first[ref.donor] + ref.stop + 1)
            total += scores.unit_V[units].sum()
        total += scores.last_unit_V[units].sum()
        assert answer.score == pytest.approx(1e6 * total, abs=8)


def test_a_large_zoo_keeps_the_best_partners_and_says_what_it_dropped(monkeypatch):
    everything = build_space(Zoo(), max_stitches=2, kind=StitchKind.LINEAR, num_classes=5)
    monkeypatch.setattr(free_space, "MOST_PAIRS", 10)
    monkeypatch.setattr(free_space, "PARTNERS", 2)
    count = sum(len(a.nodes) for a in Zoo.anatomies.values())
    score_VV = np.random.default_rng(1).random((count, count))
    scores = PathScores(
        head_V=np.zeros(count),
        stitch_VV=score_VV,
        unit_V=np.zeros(count),
        last_unit_V=np.zeros(count),
    )
    free, _ = stated(scores=scores)
    kept = free.space.stitches
    pairs = set(zip(kept.src.tolist(), kept.dst.tolist(), strict=True))
    all_pairs = everything.space.stitches
    dropped = []
    for source in set(all_pairs.src.tolist()):
        mine = all_pairs.dst[all_pairs.src == source].tolist()
        order = sorted(mine, key=lambda target: -score_VV[source, target])
        assert {(source, target) for target in order[:2]} <= pairs
        dropped += [score_VV[source, target] for target in order[2:]]
    assert free.dropped == max(dropped)
    assert everything.dropped is None


def test_stitches_cost_what_the_layer_does():
    free, _ = stated()
    space = free.space
    for j in range(0, len(space.stitches), 3):
        source = free.nodes[int(space.stitches.src[j])]
        target = free.nodes[int(space.stitches.dst[j])]
        cost = stitch_cost(source, target)
        assert space.stitches.costs["params"][j] == cost.params
        assert space.stitches.costs["flops"][j] == cost.flops


def test_pins_are_pieces_of_donors():
    config = AssembleConfig(start="a[0:2]", end="b", require=("a[1:3]",), exclude=("b[1:2]",))
    start, end, require, exclude = pins_of(config, Zoo())
    assert (start.kind, start.donor, start.start, start.stop) == ("start", "a", 0, 2)
    assert (end.kind, end.donor, end.start, end.stop) == ("end", "b", None, None)
    assert (require.start, require.stop, exclude.start, exclude.stop) == (1, 3, 1, 2)
    with pytest.raises(UsageError, match="a network begins at a donor's node 0"):
        pins_of(AssembleConfig(start="a[1:2]"), Zoo())
    with pytest.raises(UsageError, match="a has nodes 0 to 4"):
        pins_of(AssembleConfig(require=("a[1:9]",)), Zoo())


def test_sequences_of_donors_take_turns():
    def candidate(*donors):
        refs = tuple(BlockRef(name, 0 if not i else 1, 2) for i, name in enumerate(donors))
        return Candidate(refs=refs, sets=None, params=1, flops=1, program_score=0.0)

    first = [candidate("a", "b"), candidate("a", "b"), candidate("a", "b"), candidate("c")]
    second = [candidate("a", "b"), candidate("d")]
    order = in_turns([*first, *second])
    assert [c.sequence for c in order] == [
        ("a", "b"), ("c",), ("d",), ("a", "b"), ("a", "b"), ("a", "b"),
    ]  # fmt: skip
    assert order[0] is first[0]
    assert order[3] is first[1]
