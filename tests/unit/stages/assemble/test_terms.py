"""Terms of paths: what the program adds up along an answer is what the terms say of the network."""

from __future__ import annotations

import types

import numpy as np
import pytest

from dery_cli.core.assembly.frontier import random_feasible
from dery_cli.core.assembly.paths import Limits, path_problem
from dery_cli.core.assembly.search import n_best
from dery_cli.stages.assemble.features_store import TargetScores
from dery_cli.stages.assemble.free_space import build_space
from dery_cli.stages.assemble.setting import MICRO
from dery_cli.stages.assemble.terms import PathTerms
from dery_cli.types import Anatomy, BlockRef, Layout, Node, StitchKind


def make_zoo():
    donors = {}
    for name, count in (("a", 5), ("b", 4), ("c", 3)):
        nodes = tuple(
            Node(
                index=index,
                name=str(index),
                layout=Layout.NCHW,
                shape=(3 + index, 4, 4),
                grid=(4, 4),
                num_prefix_tokens=0,
                params=10 * index,
                flops=100 * index,
            )
            for index in range(count)
        )
        donors[name] = types.SimpleNamespace(anatomy=Anatomy(nodes=nodes, method="trace"))

    class Zoo(dict):
        def names(self):
            return list(self)

    return Zoo(donors)


@pytest.fixture
def terms():
    zoo = make_zoo()
    nodes = [(name, node.index) for name in zoo for node in zoo[name].anatomy.nodes]
    generator = np.random.default_rng(0)
    count = len(nodes)
    pair_VV = generator.uniform(0.1, 0.9, (4, count, count))
    inner_V = np.array([index > 0 for _, index in nodes])
    pair_VV[:, ~(inner_V[:, None] & inner_V[None])] = np.nan
    scores = TargetScores(
        nodes=tuple(nodes),
        accuracy_V=np.where(inner_V, generator.uniform(0.3, 0.9, count), 0.1),
        cross_entropy_V=np.where(inner_V, generator.uniform(0.2, 2.0, count), 2.3),
        r2_VV=pair_VV[0],
        kl_VV=pair_VV[1],
        joint_cross_entropy_VV=pair_VV[2],
        num_images=100,
        pseudo=False,
        sha256="0" * 64,
    )
    return zoo, PathTerms(zoo, scores), scores


def stated(zoo, scores):
    free = build_space(zoo, max_stitches=3, kind=StitchKind.LINEAR, num_classes=10, scores=scores)
    return path_problem(free.space, {"params": Limits(), "flops": Limits()})


def test_the_program_adds_up_the_terms(terms):
    zoo, paths, _ = terms
    generator = np.random.default_rng(1)
    for _ in range(5):
        weight_F = generator.normal(size=len(paths.names))
        problem = stated(zoo, paths.weighted(weight_F))
        for _ in range(20):
            drawn = random_feasible(problem.problem, generator)
            wanted = float(paths.of(problem.network(drawn)) @ weight_F)
            assert drawn.score / MICRO == pytest.approx(wanted, abs=3e-5)


def test_the_best_of_the_program_is_the_best_by_terms(terms):
    zoo, paths, _ = terms
    weight_F = np.random.default_rng(2).normal(size=len(paths.names))
    problem = stated(zoo, paths.weighted(weight_F))
    found = n_best(problem.problem, 1).best
    best = float(paths.of(problem.network(found)) @ weight_F)
    draws = [random_feasible(problem.problem, np.random.default_rng(k)) for k in range(300)]
    assert best >= max(float(paths.of(problem.network(one)) @ weight_F) for one in draws) - 1e-4


def test_the_formula_is_that_of_its_words(terms):
    _, paths, scores = terms
    refs = (BlockRef("a", 0, 2), BlockRef("b", 1, 3))
    source, target, end = 2, 5 + 1, 5 + 3
    wanted = (
        scores.accuracy_V[end]
        - 0.05 * scores.joint_cross_entropy_VV[source, target] / scores.cross_entropy_V[0]
        - 0.01
    )
    assert float(paths.of(refs) @ paths.formula_F) == pytest.approx(wanted)


def test_pieces_that_follow_on_each_other_are_one(terms):
    _, paths, _ = terms
    split = paths.of((BlockRef("a", 0, 2), BlockRef("a", 2, 4)))
    assert split.tolist() == paths.of((BlockRef("a", 0, 4),)).tolist()
    adapted = paths.of((BlockRef("a", 0, 2), BlockRef("a", 2, 4, adapter=True)))
    assert adapted[paths.names.index("adapters")] == 1


def test_shares_name_every_part_and_add_up(terms):
    zoo, paths, scores = terms
    generator = np.random.default_rng(3)
    weight_F = generator.normal(size=len(paths.names))
    problem = stated(zoo, paths.weighted(weight_F))
    networks = [problem.network(random_feasible(problem.problem, generator)) for _ in range(50)]
    for refs in networks:
        shares = paths.shares(refs, weight_F)
        assert len(shares) == 2 * len(refs)
        assert sum(value for _, value in shares) == pytest.approx(float(paths.of(refs) @ weight_F))
    refs = (BlockRef("a", 0, 2), BlockRef("a", 2, 4, adapter=True), BlockRef("b", 1, 3))
    formula = dict(paths.shares(refs, paths.formula_F))
    assert list(formula) == [
        "a[0:2]",
        "adapter at a's node 2",
        "a[2:4]",
        "stitch from a's node 4 to b's node 1",
        "b[1:3]",
        "head on b's node 3",
    ]
    assert formula["a[2:4]"] == 0
    assert formula["head on b's node 3"] == scores.accuracy_V[5 + 3]
