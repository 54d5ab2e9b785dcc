"""How much is built and tried: as much as an allowance of multiply-adds pays for.

The allowance is ``--effort`` passes of all donors over the target's images, a small zoo counting as
one of ``FEW_DONORS``; half of it is for building and scoring, half for trials. Where the network is
going to be fine-tuned, as much again is for short fine-tunings. It is counted, never timed, so that
a slow machine and a fast one build the same networks.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

from dery_cli.errors import UsageError
from dery_cli.sizes import show_count
from dery_cli.stages.assemble.candidates import Candidate
from dery_cli.stages.assemble.setting import Setting
from dery_cli.training.tuned_trial import images_seen, trial_config

FEW_DONORS = 12
"""Fewer donors offer fewer networks, but not so many fewer."""

MOST_BUILDS = 128
"""So many are built at most, whatever the allowance."""

MOST_FINALISTS = 32
"""Likewise of those that are tried."""

MOST_TUNED = 12
"""Likewise of those that are fine-tuned."""

CONTROLS = 8
"""Networks that are built and tried beside these, about: whole donors, adapters, a slice and more.
They are always; the allowance is for candidates."""

_PASSES_OF_A_FIT = 3
"""Over the images that stitches are fitted on, a build takes about so many passes of its network:
what it delivers, what the donors have there, and batch norm anew."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is built and tried.

    Args:
        builds: Candidates that are built and scored.
        finalists: The best of them by proxy that are tried; 0 where the proxy decides.
        tuned: Of them, that are fine-tuned for a few updates.
        tuning: Multiply-adds that they may be fine-tuned with.
        work: Multiply-adds of all that and of controls, about.
    """

    builds: int
    finalists: int
    tuned: int
    tuning: float
    work: int


def zoo_pass(setting: Setting) -> int:
    """Multiply-adds of all donors over the target's images, once."""
    zoo = setting.zoo
    one = sum(zoo[name].anatomy.flops(0, zoo[name].anatomy.num_units) for name in zoo.names())
    return one * len(setting.target.all_indices)


def allowance(setting: Setting) -> float:
    """Multiply-adds that ``--effort`` pays for: half to build and score, half to try."""
    unit = zoo_pass(setting) * max(1, FEW_DONORS / len(setting.zoo))
    return setting.config.effort * unit


def build_cost(setting: Setting, candidate: Candidate) -> int:
    """Multiply-adds of building a candidate without labels and scoring it, about."""
    target = setting.target
    passes = len(target.indices) + _PASSES_OF_A_FIT * len(target.fit_indices)
    return candidate.flops * passes


def _tuning_cost(candidate: Candidate) -> int:
    """Multiply-adds of fine-tuning a candidate for a trial."""
    return candidate.flops * images_seen(trial_config(0))


def num_tuned(candidates: Sequence[Candidate], allowance: float) -> int:
    """How many candidates in their order are fine-tuned: one alone would decide nothing."""
    count = _affordable([_tuning_cost(one) for one in candidates], allowance, MOST_TUNED)
    return count if count > 1 else 0


def planned(setting: Setting, candidates: Sequence[Candidate], proxy: str) -> Plan:
    """What the allowance pays for, of candidates in their order.

    With another proxy than the probe, which is asked for by name, the proxy decides alone.

    Raises:
        UsageError: It does not pay for the first.
    """
    target = setting.target
    fitted = len(target.fit_indices)
    half = allowance(setting) / 2
    costs = [build_cost(setting, candidate) for candidate in candidates]
    builds = _affordable(costs, half, MOST_BUILDS)
    if not builds:
        least = setting.config.effort * costs[0] / half
        raise UsageError(
            f"--effort {setting.config.effort:g} pays for no build: the first takes "
            f"{show_count(costs[0])} multiply-adds",
            f"--effort {math.ceil(least * 100) / 100:g} or more",
        )
    # labels in the stitches are tried at several weights
    builder = setting.builder
    each = builder.trial_builds * 2 * (len(target.all_indices) + _PASSES_OF_A_FIT * fitted)
    tries = [c.flops * each for c in candidates]
    finalists = _affordable(tries[:builds], half, MOST_FINALISTS)
    if proxy != "probe" or not builder.can_try:
        finalists = 0
    tuning = allowance(setting) if finalists and setting.config.purpose == "finetuned" else 0.0
    tuned = num_tuned(candidates[:finalists], tuning)
    return Plan(
        builds=builds,
        finalists=finalists,
        tuned=tuned,
        tuning=tuning,
        work=sum(costs[:builds])
        + sum(tries[:finalists])
        + CONTROLS * (costs[0] + (tries[0] if finalists else 0))
        + sum(_tuning_cost(c) for c in candidates[:tuned]),
    )


def _affordable(costs: Sequence[int], allowance: float, most: int) -> int:
    """How many in a row an allowance pays for, ``most`` at most."""
    totals = itertools.accumulate(costs[:most])
    return sum(1 for total in totals if total <= allowance)
