"""From candidates to the pick: built, ranked by a proxy, the best tried, controls beside them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from dery_cli.core.assembly.frontier import random_feasible
from dery_cli.core.assembly.notation import merged
from dery_cli.errors import DeryError, InfeasibleError
from dery_cli.runtime.terminal import Terminal
from dery_cli.sizes import show_time
from dery_cli.stages.assemble.candidates import (
    Candidate,
    Scored,
    finalists,
    pick,
    ranked,
    unique,
)
from dery_cli.stages.assemble.memo import Memo
from dery_cli.stages.assemble.plan import num_tuned
from dery_cli.stages.assemble.setting import SearchSpace, Setting
from dery_cli.types import BlockRef
from dery_cli.zoo.plugin import find_proxy

ADAPTERS = 3
"""Places, evenly spread over a whole donor, that an adapter is tried at."""

PICKED = "picked"

Key = tuple[object, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What was built and tried, and what came of it.

    Args:
        scored: All that was built.
        compared: The pick, then the controls, each with its role.
        tried: How many were tried on images that they were not fitted on.
        tuned: How many of those were fine-tuned for it.
        too_slow: How many were timed as a whole and left out, though their parts sum to less than
            the budget.
    """

    scored: list[Scored]
    compared: list[tuple[str, Scored]]
    tried: int
    tuned: int
    too_slow: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Control:
    """What the pick is compared with: the best of these, by the same trial.

    Args:
        role: In words.
        candidates: All within the budget.
    """

    role: str
    candidates: list[Candidate]


class Chooser:
    """Scores, tries and picks.

    Args:
        terminal: Shows progress.
        setting: Donors, target, options.
        proxy: Name of what ranks built networks.
        memo: What earlier builds came to.
    """

    def __init__(self, terminal: Terminal, setting: Setting, proxy: str, memo: Memo) -> None:
        self._terminal, self._setting, self._memo = terminal, setting, memo
        self._proxy_name, self._proxy = proxy, find_proxy(proxy)
        self._too_slow: dict[Key, int] = {}

    def score(self, candidates: Sequence[Candidate], what: str) -> list[Scored]:
        """Build each with closed-form stitches and ask the proxy."""
        builder = self._setting.builder
        with self._terminal.progress(what, len(candidates)) as bar:
            found = []
            for candidate in candidates:
                scored = self._memo.scored(candidate, self._proxy_name)
                if scored is None:
                    scored = builder.score(candidate, self._proxy)
                    self._memo.keep_scored(scored, self._proxy_name)
                found.append(scored)
                bar.advance()
        return found

    def try_out(self, entries: Sequence[Scored]) -> list[Scored]:
        """The same with what their trials came to."""
        known = {e.candidate.key: self._memo.trial(e.candidate) for e in entries}
        missing = [e.candidate for e in entries if known[e.candidate.key] is None]
        if missing:
            builder = self._setting.builder
            with self._terminal.progress(
                "trying the best", builder.trial_builds * len(missing)
            ) as bar:
                values = builder.try_out(missing, bar.advance)
            for candidate, value in zip(missing, values, strict=True):
                self._memo.keep_trial(candidate, value)
                known[candidate.key] = value
        return [dataclasses.replace(e, trial=known[e.candidate.key]) for e in entries]

    def tune_out(self, entries: Sequence[Scored]) -> list[Scored]:
        """The same with what a short fine-tuning came to."""
        known = {entry.candidate.key: self._memo.tuned(entry) for entry in entries}
        missing = [entry for entry in entries if known[entry.candidate.key] is None]
        if missing:
            values = self._setting.builder.tune_out(missing)
            with self._terminal.progress("fine-tuning the best", len(missing)) as bar:
                for entry, value in zip(missing, values, strict=True):
                    self._memo.keep_tuned(entry.candidate, value)
                    known[entry.candidate.key] = value
                    bar.advance()
        return [dataclasses.replace(e, tuned=known[e.candidate.key]) for e in entries]

    def _in_time(self, entry: Scored) -> bool:
        """Whether a network as a whole holds a budget of latency: the sum of its parts may err.

        Where the parts were measured on another machine their sum stands.
        """
        config, key = self._setting.config, entry.candidate.key
        limit = config.budget.max_latency
        if limit is None or config.latency_from is not None:
            return True
        taken = self._memo.whole_latency(entry.candidate)
        if taken > limit:
            self._too_slow[key] = taken
        return taken <= limit

    def _first_in_time(self, entries: Sequence[Scored]) -> Scored | None:
        """The first of ``ranked`` that is in time; None where none is."""
        return next(filter(self._in_time, ranked(entries)), None)

    def _pick(self, entries: Sequence[Scored]) -> Scored:
        """The first in time.

        Raises:
            InfeasibleError: There is none.
        """
        best = self._first_in_time(entries)
        if best is None:
            least = show_time(min(self._too_slow.values()))
            raise InfeasibleError(
                f"none of {len(entries)} networks whose parts sum to at most "
                f"{self._setting.config.budget} runs in that time as a whole: the fastest takes "
                f"{least}",
                f"--max-latency {least}, or less work a network: --max-stitches",
            )
        return best

    def _without_idle_adapters(self, best: Scored) -> tuple[Scored, list[Scored]]:
        """The network without each adapter that does not beat its removal in the same trial.

        Returns:
            What is left, and all that was tried for it.
        """
        tried: list[Scored] = []
        while True:
            smaller = [self._setting.priced(refs) for refs in without_adapters(best.candidate.refs)]
            smaller = [one for one in smaller if self._setting.admits(one)]
            if not smaller:
                return best, tried
            entries = self.try_out(self.score(smaller, "building without adapters"))
            tried += entries
            other = self._first_in_time(entries)
            if other is None:
                return best, tried
            assert other.trial is not None
            assert best.trial is not None
            if other.trial.cross_entropy > best.trial.cross_entropy:
                return best, tried
            best = other

    def _worth_tuning(
        self,
        best: Scored,
        built: Mapping[Key, Scored],
        controls: Sequence[Control],
        allowance: float,
    ) -> list[Scored]:
        """The best so far, the best of each control, then the others in order; none or several."""
        of_controls = (
            self._first_in_time([built[c.key] for c in control.candidates]) for control in controls
        )
        firsts = [best, *(entry for entry in of_controls if entry is not None)]
        others = filter(self._in_time, ranked([e for e in built.values() if e.trial is not None]))
        order = list({entry.candidate.key: entry for entry in [*firsts, *others]}.values())
        return order[: num_tuned([entry.candidate for entry in order], allowance)]

    def choose(
        self,
        candidates: Sequence[Candidate],
        controls: Sequence[Control],
        *,
        num_finalists: int,
        tuning: float = 0.0,
        forced: bool = False,
    ) -> Choice:
        """The pick and its controls.

        The proxy ranks; where the target has labels, the best by it and all controls are tried as
        they would be delivered, on images that they were not fitted on. That decides, or where the
        network is going to be fine-tuned what a short fine-tuning makes of the best of them.

        Args:
            candidates: To build.
            controls: To compare with; a control that wins the trial is the pick.
            num_finalists: Best by proxy that are tried; the pick loses every adapter that does not
                beat its removal there.
            tuning: Multiply-adds to fine-tune the best with.
            forced: Pick the first candidate, whatever the others come to.

        Raises:
            DeryError: The proxy gives no candidate a finite score.
        """
        scored = self.score(candidates, "building candidates")
        if not any(math.isfinite(entry.proxy) for entry in scored):
            raise DeryError(
                f"the proxy {self._proxy_name} gives no candidate a finite score",
                "choose another --proxy, or leave it out",
            )
        largest = max(scored, key=lambda entry: entry.candidate.params)
        built = {entry.candidate.key: entry for entry in scored}
        others = unique([c for control in controls for c in control.candidates])
        missing = [c for c in others if c.key not in built]
        if missing:
            for entry in self.score(missing, "building controls"):
                built[entry.candidate.key] = entry
        tried = 0
        if num_finalists and self._setting.builder.can_try:
            controls_too = filter(self._in_time, [largest, *(built[c.key] for c in others)])
            last = [*finalists(scored, num_finalists, self._in_time), *controls_too]
            last = list({entry.candidate.key: entry for entry in last}.values())
            built.update({e.candidate.key: e for e in self.try_out(last)})
            tried = len(last)
        best = built[candidates[0].key] if forced else self._pick(list(built.values()))
        tuned: list[Scored] = []
        if tried and not forced:
            best, more = self._without_idle_adapters(best)
            built.update({entry.candidate.key: entry for entry in more})
            tried += len(more)
            tuned = self.tune_out(self._worth_tuning(best, built, controls, tuning))
            built.update({entry.candidate.key: entry for entry in tuned})
            best = self._pick(tuned) if tuned else best
        everything = list(built.values())
        compared = [(PICKED, best)]
        for control in controls:
            first = self._first_in_time([built[c.key] for c in control.candidates])
            if first is not None:
                compared.append((control.role, first))
        compared.append(("largest candidate", built[largest.candidate.key]))
        return Choice(
            scored=everything,
            compared=compared,
            tried=tried,
            tuned=len(tuned),
            too_slow=len(self._too_slow),
        )


def without_adapters(refs: Sequence[BlockRef]) -> list[tuple[BlockRef, ...]]:
    """The networks that are left when one adapter of a network is taken out."""
    return [
        merged([*refs[:place], dataclasses.replace(ref, adapter=False), *refs[place + 1 :]])
        for place, ref in enumerate(refs)
        if ref.adapter
    ]


WHOLE, ADAPTED = "best whole donor", "the same with an adapter"


def whole_controls(setting: Setting, scored: Sequence[Scored]) -> list[Control]:
    """The best whole donor by proxy: plain or with batch norm re-estimated, and with adapters.

    Labels that fit an adapter lift a donor far, so without this control a stitch between donors
    would be given the credit. Without labels an adapter is the identity.
    """
    wholes = [entry for entry in scored if entry.candidate.whole]
    if not wholes:
        return []
    best = pick(wholes).candidate
    ref = best.refs[0]
    controls = [Control(role=WHOLE, candidates=[best, setting.priced((ref,), reestimated=True)])]
    if setting.builder.can_try:
        places = sorted({round(ref.stop * k / (ADAPTERS + 1)) for k in range(1, ADAPTERS + 1)})
        adapted = [
            setting.priced(
                (
                    BlockRef(ref.donor, 0, place),
                    BlockRef(ref.donor, place, ref.stop, adapter=True),
                )
            )
            for place in places
            if 0 < place < ref.stop
        ]
        fitting = [candidate for candidate in adapted if setting.admits(candidate)]
        controls.append(Control(role=ADAPTED, candidates=fitting))
    return controls


def random_control(setting: Setting, space: SearchSpace, role: str) -> list[Control]:
    """A network within the budget drawn by the seed."""
    drawn = random_feasible(space.problem, np.random.default_rng(setting.config.seed))
    return [] if drawn is None else [Control(role=role, candidates=[space.candidate(drawn)])]
