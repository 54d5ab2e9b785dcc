"""Scoring, trying and picking with fakes in place of networks; the plan; the memo."""

from __future__ import annotations

import dataclasses
import types

import pytest

from dery_cli.core.stitching.probe import Judgement
from dery_cli.errors import DeryError, UsageError
from dery_cli.io.artifacts import Workspace
from dery_cli.runtime.terminal import Terminal
from dery_cli.stages.assemble import choose, plan
from dery_cli.stages.assemble.candidates import Candidate, Scored
from dery_cli.stages.assemble.choose import ADAPTED, WHOLE, Chooser, Control, whole_controls
from dery_cli.stages.assemble.config import AssembleConfig, Budget, parse_budgets
from dery_cli.stages.assemble.memo import Memo
from dery_cli.training.tuned_trial import TunedTrial, images_seen, trial_config
from dery_cli.types import BlockRef, InputSpec


def candidate(name, params=10, *, whole=False, reestimated=False):
    stop = 4 if whole else 2
    return Candidate(
        refs=(BlockRef(name, 0, stop),),
        sets=None,
        params=params,
        flops=params,
        program_score=None,
        whole=whole,
        reestimated=reestimated,
    )


def judgement(accuracy):
    return Judgement(accuracy, 1.0, 1.0, 1 - accuracy)


class Builder:
    """Gives what a table says, and counts."""

    can_try = True
    trial_builds = 3
    stand_in = None

    def __init__(self, proxies, held_out):
        self.proxies, self.trials, self.built, self.tried = proxies, held_out, [], []
        self.fine_tuned = []

    def score(self, candidate, proxy):
        self.built.append(candidate)
        return Scored(
            candidate=candidate, proxy=self.proxies[candidate.refs[0].donor], fits=(None,)
        )

    def tune_out(self, entries):
        self.fine_tuned += [entry.candidate.refs[0].donor for entry in entries]
        losses = [TUNED[donor] for donor in self.fine_tuned[-len(entries) :]]
        return [TunedTrial(accuracy=0.5, cross_entropy=loss) for loss in losses]

    def try_out(self, candidates, advance):
        self.tried += candidates
        return [judgement(self.trials[c.refs[0].donor]) for c in candidates]


class Setting:
    def __init__(self, builder, config=None, flops=10):
        self.builder = builder
        self.config = config or AssembleConfig()
        donor = types.SimpleNamespace(
            weights_sha256="0" * 64,
            input=InputSpec(image_size=(8, 8)),
            anatomy=types.SimpleNamespace(num_units=4, flops=lambda a, b: flops),
        )
        self.zoo = FakeZoo(donor)
        self.target = types.SimpleNamespace(
            labels=[0, 1],
            crop=0.95,
            batch_size=4,
            indices=range(100),
            fit_indices=range(50),
            all_indices=range(100),
        )

    def priced(self, refs, *, reestimated=False):
        return Candidate(
            refs=tuple(refs),
            sets=None,
            params=10 + len(refs),
            flops=10,
            program_score=None,
            whole=len(refs) == 1,
            reestimated=reestimated,
        )

    def admits(self, candidate):
        return self.config.budget.admits(candidate.params, candidate.flops)


class FakeZoo:
    def __init__(self, donor):
        self.donor = donor

    def names(self):
        return ["a", "b", "c"]

    def __len__(self):
        return 3

    def __getitem__(self, name):
        return self.donor


@pytest.fixture
def chooser_of(tmp_path, monkeypatch):
    monkeypatch.setattr(choose, "find_proxy", lambda name: name)

    def make(builder, **options):
        setting = Setting(builder, **options)
        memo = Memo(Workspace(tmp_path).builds("digits-1"), setting, "1" * 64)
        return Chooser(Terminal(quiet=True), setting, "probe", memo)

    return make


PROXIES = {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.1}
HELD_OUT = {"a": 0.5, "b": 0.6, "c": 0.7, "d": 0.65}


def test_the_trial_decides_among_the_best_by_proxy_and_all_controls(chooser_of):
    builder = Builder(PROXIES, HELD_OUT)
    made = [candidate(name) for name in "abc"]
    control = Control(role="best slice", candidates=[candidate("d")])
    found = chooser_of(builder).choose(made, [control], num_finalists=2)
    assert found.compared[0][1].candidate.refs[0].donor == "d"  # a control that wins is the pick
    assert {c.refs[0].donor for c in builder.tried} == {"a", "b", "d"}
    assert dict(found.compared)["best slice"].held_out == 0.65
    assert found.tried == 3


TUNED = {"a": 0.3, "b": 0.4, "c": 0.2, "d": None}
"""Cross-entropy after a few updates; d's loss rose."""


@pytest.mark.parametrize(
    ("affords", "tuned", "picked"),
    [(1, [], "d"), (2, ["d", "c"], "c"), (3, ["d", "c", "b"], "c"), (9, [*"dcba"], "c")],
)
def test_where_the_allowance_pays_a_short_fine_tuning_decides(chooser_of, affords, tuned, picked):
    """The best so far and the controls' first, then the others in order; one decides nothing."""
    builder = Builder(PROXIES, HELD_OUT | {"d": 0.9})
    control = Control(role="best slice", candidates=[candidate("c")])
    each = candidate("a").flops * images_seen(trial_config(0))
    made = [candidate(n) for n in "abd"]
    found = chooser_of(builder).choose(made, [control], num_finalists=3, tuning=affords * each)
    assert builder.fine_tuned == tuned
    assert found.tuned == len(tuned)
    assert found.compared[0][1].candidate.refs[0].donor == picked
    again = chooser_of(builder).choose(made, [control], num_finalists=3, tuning=affords * each)
    assert builder.fine_tuned == tuned  # remembered, a loss that rose too
    assert again == found


def test_without_finalists_the_proxy_decides(chooser_of):
    builder = Builder(PROXIES, HELD_OUT)
    found = chooser_of(builder).choose([candidate(n) for n in "cba"], [], num_finalists=0)
    assert found.compared[0][1].candidate.refs[0].donor == "a"
    assert not builder.tried
    assert found.compared[0][1].held_out is None


def test_a_given_network_is_picked_whatever_the_controls_come_to(chooser_of):
    builder = Builder(PROXIES, HELD_OUT)
    control = Control(role="x", candidates=[candidate("d")])
    found = chooser_of(builder).choose([candidate("a")], [control], num_finalists=1, forced=True)
    assert found.compared[0][1].candidate.refs[0].donor == "a"
    assert found.compared[0][1].held_out == 0.5


@pytest.mark.parametrize(("worth", "left"), [(0.0, 1), (0.01, 3)])
def test_an_adapter_that_does_not_beat_its_removal_is_dropped(chooser_of, worth, left):
    class Worth(Builder):
        def try_out(self, candidates, advance):
            return [judgement(0.5 + worth * len(c.refs)) for c in candidates]

    adapted = dataclasses.replace(
        candidate("a"),
        refs=(
            BlockRef("a", 0, 1),
            BlockRef("a", 1, 3, adapter=True),
            BlockRef("a", 3, 4, adapter=True),
        ),
    )
    found = chooser_of(Worth(PROXIES, {})).choose([adapted], [], num_finalists=1)
    assert len(found.compared[0][1].candidate.refs) == left
    assert found.compared[0][1].candidate.refs[-1].stop == 4


def test_the_largest_is_shown_and_tried(chooser_of):
    builder = Builder(PROXIES, HELD_OUT)
    made = [candidate("a"), candidate("c", params=99)]
    found = chooser_of(builder).choose(made, [], num_finalists=1)
    assert dict(found.compared)["largest candidate"].held_out == 0.7


def test_a_proxy_that_scores_nothing_is_an_error(chooser_of):
    builder = Builder(dict.fromkeys("abcd", -float("inf")), HELD_OUT)
    with pytest.raises(DeryError, match="gives no candidate a finite score"):
        chooser_of(builder).choose([candidate("a")], [], num_finalists=0)


def test_what_was_built_once_is_not_built_again_and_comes_to_the_same(chooser_of):
    control = Control(role="best slice", candidates=[candidate("d")])
    made = [candidate(name) for name in "abc"]
    first = chooser_of(Builder(PROXIES, HELD_OUT)).choose(made, [control], num_finalists=2)
    again = Builder({}, {})
    second = chooser_of(again).choose(made, [control], num_finalists=2)
    assert not again.built
    assert not again.tried
    assert second == first
    # a killed run had some of them
    more = Builder(PROXIES, HELD_OUT)
    other = [*made, candidate("d", reestimated=True)]
    chooser_of(more).choose(other, [control], num_finalists=2)
    assert [c.reestimated for c in more.built] == [True]


@pytest.mark.parametrize(
    "change", [{"fit_samples": 100}, {"seed": 1}, {"match": True}, {"stitch": "mlp"}]
)
def test_other_options_are_other_builds(chooser_of, change):
    made = [candidate("a")]
    chooser_of(Builder(PROXIES, HELD_OUT)).choose(made, [], num_finalists=1)
    again = Builder(PROXIES, HELD_OUT)
    chooser_of(again, config=AssembleConfig(**change)).choose(made, [], num_finalists=1)
    assert again.built
    assert again.tried


def test_another_budget_shares_builds(chooser_of):
    made = [candidate("a")]
    chooser_of(Builder(PROXIES, HELD_OUT)).choose(made, [], num_finalists=1)
    again = Builder({}, {})
    budget = Budget(max_params=1000)
    chooser_of(again, config=AssembleConfig(budget=budget)).choose(made, [], num_finalists=1)
    assert not again.built


def test_a_damaged_figure_is_found_anew(chooser_of, tmp_path):
    made = [candidate("a")]
    chooser_of(Builder(PROXIES, HELD_OUT)).choose(made, [], num_finalists=1)
    for path in (tmp_path / "builds" / "digits-1").glob("*.json"):
        path.write_text(path.read_text()[:-20])
    again = Builder(PROXIES, HELD_OUT)
    found = chooser_of(again).choose(made, [], num_finalists=1)
    assert again.built
    assert found.compared[0][1].held_out == 0.5


def test_another_ones_proxy_is_asked_again(chooser_of, monkeypatch):
    monkeypatch.setattr("dery_cli.stages.assemble.memo.is_built_in", lambda group, name: False)
    for _ in range(2):
        builder = Builder(PROXIES, HELD_OUT)
        chooser_of(builder).choose([candidate("a")], [], num_finalists=0)
        assert builder.built


def test_a_whole_donor_is_tried_plain_re_estimated_and_with_adapters():
    setting = Setting(Builder(PROXIES, HELD_OUT))
    entries = [
        Scored(candidate=candidate(name, whole=True), proxy=PROXIES[name], fits=(None,))
        for name in "cb"
    ]
    whole, adapted = whole_controls(setting, entries)
    assert (whole.role, adapted.role) == (WHOLE, ADAPTED)
    assert [c.reestimated for c in whole.candidates] == [False, True]
    assert [str(c) for c in adapted.candidates] == [
        "b[0:1] ~ b[1:4]", "b[0:2] ~ b[2:4]", "b[0:3] ~ b[3:4]",
    ]  # fmt: skip
    tight = Setting(Builder(PROXIES, HELD_OUT), AssembleConfig(budget=Budget(max_params=11)))
    assert whole_controls(tight, entries)[1].candidates == []
    assert whole_controls(setting, []) == []


class TestPlan:
    def test_the_allowance_pays_for_builds_and_trials(self):
        setting = Setting(Builder({}, {}), AssembleConfig(effort=8))
        # a pass of twelve donors of 10 multiply-adds over 100 images, half of eight times
        half = 8 / 2 * 12 * 10 * 100
        made = [candidate("a")] * 1000
        found = plan.planned(setting, made, "probe")
        build = 10 * (100 + 3 * 50)
        assert found.builds == half // build == 19
        assert found.finalists == half // (6 * build)
        tried = found.finalists + plan.CONTROLS
        assert found.work == (found.builds + plan.CONTROLS) * build + tried * 6 * build
        assert found.tuned == 0  # the allowance pays for one, which would decide nothing

    def test_more_effort_is_more_work_up_to_a_limit(self):
        made = [candidate("a")] * 1000
        counts = [
            plan.planned(Setting(Builder({}, {}), AssembleConfig(effort=e)), made, "probe").builds
            for e in (1, 4, 8, 1000)
        ]
        assert counts == sorted(counts)
        assert counts[-1] == plan.MOST_BUILDS

    def test_another_proxy_decides_alone(self):
        setting = Setting(Builder({}, {}))
        assert plan.planned(setting, [candidate("a")], "params").finalists == 0

    def test_an_effort_that_pays_for_nothing_says_what_would(self):
        setting = Setting(Builder({}, {}), AssembleConfig(effort=0.1))
        with pytest.raises(UsageError, match=r"--effort 0.1 pays for no build") as caught:
            plan.planned(setting, [candidate("a")], "probe")
        enough = float(caught.value.hint.split()[1])
        setting.config = AssembleConfig(effort=enough)
        assert plan.planned(setting, [candidate("a")], "probe").builds == 1


class TestBudgets:
    def test_one_has_no_name(self):
        assert parse_budgets(max_params="30M", max_flops="5G") == {
            "": Budget(max_params=30_000_000, max_flops=5_000_000_000)
        }
        assert parse_budgets() == {"": Budget()}

    def test_several_are_named_by_what_tells_them_apart(self):
        found = parse_budgets(max_params="10M,30M", max_flops="5G")
        assert list(found) == ["10m", "30m"]
        assert found["30m"] == Budget(max_params=30_000_000, max_flops=5_000_000_000)
        found = parse_budgets(max_params="10M, 30M", max_latency="8ms,20ms")
        assert list(found) == ["10m-8ms", "30m-20ms"]
        assert found["30m-20ms"].max_latency == 20_000_000

    def test_a_wrong_one_is_named(self):
        with pytest.raises(UsageError, match="--max-params: '30X' is not a size"):
            parse_budgets(max_params="10M,30X")
        with pytest.raises(UsageError, match="differ in number"):
            parse_budgets(max_params="10M,30M", max_flops="1G,2G,3G")
