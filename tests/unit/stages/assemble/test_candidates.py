"""Which candidates are tried, and which is picked."""

from __future__ import annotations

from dery_cli.core.stitching.probe import Judgement
from dery_cli.stages.assemble.candidates import Candidate, Scored, finalists, pick
from dery_cli.types import BlockRef


def entry(name, proxy, *, whole=False, params=10, held_out=None) -> Scored:
    refs = (BlockRef(name, 0, 4),) if whole else (BlockRef(name, 0, 2), BlockRef("tail", 2, 4))
    candidate = Candidate(
        refs=refs,
        sets=None if whole else (0, 1),
        params=params,
        flops=1,
        program_score=None,
        whole=whole,
    )
    trial = None if held_out is None else Judgement(held_out, 1.0, 1.0, 1 - held_out)
    return Scored(candidate=candidate, proxy=proxy, fits=(None,) * len(refs), trial=trial)


def test_the_best_by_proxy_are_tried_and_the_best_whole_model_with_them():
    a, b, c = entry("a", 0.9), entry("b", 0.8), entry("c", 0.7)
    good, poor = entry("good", 0.3, whole=True), entry("poor", 0.2, whole=True)
    assert finalists([poor, c, good, a, b], 2) == [a, b, good]
    assert finalists([good, a], 2) == [a, good]
    assert finalists([a, b, c], 2) == [a, b]


def test_one_sequence_of_donors_sends_two():
    same = [entry("a", 0.9 - place / 100, params=place) for place in range(1, 5)]
    other = entry("b", 0.5)
    assert finalists([*same, other], 3) == [*same[:2], other]


def test_without_a_trial_the_proxy_decides():
    assert pick([entry("a", 0.5), entry("b", 0.6)]).candidate.refs[0].donor == "b"


def test_what_was_tried_decides_over_what_was_not():
    tried, worse = entry("a", 0.5, held_out=0.4), entry("b", 0.9, held_out=0.3)
    untried = entry("c", 1.0)
    assert pick([untried, worse, tried]) is tried
    assert pick([untried, entry("d", 0.1, held_out=0.0)]).candidate.refs[0].donor == "d"


def test_ties_go_to_the_proxy_then_to_the_smaller_then_by_name():
    same = [entry("b", 0.5, held_out=0.4), entry("a", 0.6, held_out=0.4)]
    assert pick(same).candidate.refs[0].donor == "a"
    assert pick([entry("a", 0.5, params=9), entry("b", 0.5, params=8)]).candidate.params == 8
    assert pick([entry("b", 0.5), entry("a", 0.5)]).candidate.refs[0].donor == "a"
