"""Options of ``dery assemble``: the budget, the donors that may be used, and the rest."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from dery_cli.errors import DeryError, UsageError
from dery_cli.sizes import (
    LIMITS,
    check_above,
    check_at_least,
    check_between,
    check_name,
    check_one_of,
    check_seed,
    parse_size,
    parse_time,
    show_count,
    show_time,
    split_limits,
    within,
)
from dery_cli.types import Donor, StemKind, StitchKind
from dery_cli.zoo.plugin import PROXY_GROUP, plugin_names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """Inclusive limits; None where there is none.

    Args:
        max_params: Parameters.
        min_params: Parameters.
        max_flops: Multiply-adds for one image.
        min_flops: Multiply-adds for one image.
        max_latency: Nanoseconds a batch.
        max_memory: Bytes of weights and activations.
    """

    max_params: int | None = None
    min_params: int | None = None
    max_flops: int | None = None
    min_flops: int | None = None
    max_latency: int | None = None
    max_memory: int | None = None

    def __post_init__(self) -> None:
        for what, low, high in (
            ("params", self.min_params, self.max_params),
            ("flops", self.min_flops, self.max_flops),
        ):
            if low is not None and high is not None and low > high:
                raise UsageError(
                    f"--min-{what} {show_count(low)} is above --max-{what} {show_count(high)}"
                )

    def admits(
        self, params: int, flops: int, *, latency: int | None = None, memory: int | None = None
    ) -> bool:
        """Whether a network is within all limits; what has none need not be known."""
        for total, low, high in (
            (params, self.min_params, self.max_params),
            (flops, self.min_flops, self.max_flops),
            (latency, None, self.max_latency),
            (memory, None, self.max_memory),
        ):
            if (low, high) != (None, None):
                assert total is not None
                if not within(total, low, high):
                    return False
        return True

    def __str__(self) -> str:
        parts = [
            f"{word} {show_count(value)} {unit}"
            for word, value, unit in (
                ("at most", self.max_params, "params"),
                ("at least", self.min_params, "params"),
                ("at most", self.max_flops, "multiply-adds"),
                ("at least", self.min_flops, "multiply-adds"),
            )
            if value is not None
        ]
        if self.max_latency is not None:
            parts.append(f"at most {show_time(self.max_latency)}")
        if self.max_memory is not None:
            parts.append(f"at most {show_count(self.max_memory)} bytes of memory")
        return ", ".join(parts) or "no limit"


def parse_budgets(
    *,
    max_params: str | None = None,
    min_params: str | None = None,
    max_flops: str | None = None,
    min_flops: str | None = None,
    max_latency: str | None = None,
    max_memory: str | None = None,
) -> dict[str, Budget]:
    """Budgets as they are written, ``10M,30M`` for several, by what tells them apart.

    Raises:
        UsageError: Something is no size, or as ``split_limits``.
    """
    values = (max_params, min_params, max_flops, min_flops, max_latency, max_memory)
    given = {option: text for option, text in zip(LIMITS, values, strict=True) if text is not None}
    found: dict[str, Budget] = {}
    for key, chosen in split_limits(given).items():
        limits = {
            option.removeprefix("--").replace("-", "_"): (
                parse_time(text, option) if option == "--max-latency" else parse_size(text, option)
            )
            for option, text in chosen.items()
        }
        found[key] = Budget(**limits)
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class DonorFilter:
    """Which donors an assembly may be made of.

    Args:
        licenses: Only donors under one of these licences; empty for any.
        include: Only these donors; empty for all.
        exclude: Not these donors.
        image_size: Only donors registered at this input side.
    """

    licenses: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    image_size: int | None = None

    def reasons(self, donor: Donor) -> list[str]:
        """The options that leave ``donor`` out; empty where it may be used."""
        found = []
        if self.licenses and donor.card.license.lower() not in {x.lower() for x in self.licenses}:
            found.append(f"--license {' --license '.join(self.licenses)}")
        if self.include and donor.name not in self.include:
            found.append(f"--include {' --include '.join(self.include)}")
        if donor.name in self.exclude:
            found.append(f"--exclude {donor.name}")
        if self.image_size is not None and donor.input.image_size != (self.image_size,) * 2:
            found.append(f"--image-size {self.image_size}")
        return found


MOST_STITCHES = 8
"""The program grows with each; a path of nine segments is beyond what anybody asked for."""

LEAST_EFFORT, MOST_EFFORT = 0.01, 10_000

PURPOSES = ("finetuned", "untrained")
"""What is delivered for: a start to fine-tune from, or a network that is used as it is."""

SPACES = ("free", "paper")
"""Every path through the donors, or one block a stage and a set of the partition."""

DRAWS = ("best", "random")
"""Candidates of the paper's space: the best of its program, or drawn within the budget."""

PRESETS = {
    "paper": {
        "stem": "paper",
        "stitch": "paper",
        "space": "paper",
        "proxy": "naswot",
        "draw": "random",
    }
}
"""Options that go together, by what they are together; one that is given stands."""


def preset_options(preset: str | None, **given: str | None) -> dict[str, str]:
    """The options of a preset, under those that are given; neither names what has its default.

    Raises:
        UsageError: There is no such preset.
    """
    if preset is not None:
        check_one_of("--preset", preset, tuple(PRESETS))
    named = {name: value for name, value in given.items() if value is not None}
    return {**PRESETS.get(preset or "", {}), **named}


GONE = {
    "candidates": "--effort says how much is built",
    "finalists": "--effort says how much is tried",
    "joint-weight": "the objective has no weight to set; --effort says how much is built and tried",
}
"""Options of earlier versions, and what took their place."""


def refuse_gone(name: str) -> None:
    """What an option that is gone says.

    Raises:
        UsageError: Always.
    """
    raise UsageError(f"--{name} is gone", GONE[name])


def check_explain(explain: bool, **beside: bool) -> None:
    """Refuse ``--explain`` beside options that leave nothing to explain.

    Args:
        explain: Whether it is given.
        beside: Whether each of those options is.

    Raises:
        UsageError: It is given beside one of them.
    """
    for option in [option for option, given in beside.items() if explain and given]:
        raise UsageError(
            f"--explain tells why a network was picked of all paths, and {option} picks none so",
            f"leave out --explain, or {option}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AssembleConfig:
    """Options of ``dery assemble``; those of ``options`` and the seed belong to the artifact.

    Args:
        space: One of ``SPACES``.
        max_stitches: Of a path.
        blocks: The network itself, ``a[0:4] + b[7:9]``; nothing is searched then.
        start: Piece that the network begins with.
        end: Piece that it ends with.
        require: Pieces that it has.
        exclude: Pieces that it has not, ``a[0:4]``; whole donors are in ``donors``.
        purpose: One of ``PURPOSES``; ``untrained`` fits what is delivered on all training images.
        effort: Work of building and trying, in passes of all donors over the target's images.
        latency_from: File of times that another machine measured; None measures here.
        stem: What networks begin with.
        draw: One of ``DRAWS``.
        proxy_batches: Of the few images that all proxies but the probe look at.
        proxy_batch_size: Likewise.
        require_optimal: Fail where the program's optimum is not proven in ``max_seconds``.
        explain: Say why this network was picked; it changes nothing of the answer.
    """

    budget: Budget = Budget()
    donors: DonorFilter = DonorFilter()
    max_donors: int | None = None
    space: str = "free"
    max_stitches: int = 3
    blocks: str | None = None
    start: str | None = None
    end: str | None = None
    require: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    purpose: str = "finetuned"
    effort: float = 8.0
    latency_batch: int = 1
    latency_from: Path | None = None
    memory_batch: int = 1
    data: str | None = None
    skip_bad: bool = False
    name: str = "default"
    proxy: str | None = None
    proxy_batches: int = 5
    proxy_batch_size: int = 32
    stitch: str = "linear"
    stem: str = "donor"
    draw: str = "best"
    match: bool = False
    whole: bool = True
    fit_samples: int = 512
    target_samples: int | None = None
    max_seconds: float | None = None
    seed: int = 0
    require_optimal: bool = False
    explain: bool = False
    device: str | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        check_name(self.name, "assembly")
        check_one_of("--space", self.space, SPACES)
        check_one_of("--for", self.purpose, PURPOSES)
        check_between("--max-stitches", self.max_stitches, 0, MOST_STITCHES)
        check_between("--effort", self.effort, LEAST_EFFORT, MOST_EFFORT)
        self._check_pins()
        check_at_least("--fit-samples", self.fit_samples, 8)
        if self.target_samples is not None:
            check_at_least("--target-samples", self.target_samples, 8)
        if self.max_donors is not None:
            check_at_least("--max-donors", self.max_donors)
        if self.donors.image_size is not None:
            check_at_least("--image-size", self.donors.image_size)
        check_at_least("--latency-batch", self.latency_batch)
        check_at_least("--memory-batch", self.memory_batch)
        if self.latency_from is not None and self.budget.max_latency is None:
            raise UsageError("--latency-from is for a limit of latency", "--max-latency 8ms")
        check_one_of("--stitch", self.stitch, tuple(StitchKind))
        check_one_of("--stem", self.stem, tuple(StemKind))
        check_one_of("--draw", self.draw, DRAWS)
        self._check_paper()
        beside = {"--space paper": self.space == "paper", "--blocks": self.blocks is not None}
        check_explain(self.explain, **beside)
        if self.proxy is not None:
            check_one_of("--proxy", self.proxy, tuple(plugin_names(PROXY_GROUP)))
        check_at_least("--proxy-batches", self.proxy_batches)
        check_at_least("--proxy-batch-size", self.proxy_batch_size, 2)
        if self.max_seconds is not None:
            check_above("--max-seconds", self.max_seconds)
        check_seed(self.seed)

    def _check_paper(self) -> None:
        if self.draw == "random" and self.space != "paper":
            raise UsageError(
                "--draw random draws candidates of the paper's space alone", "--space paper"
            )
        for option, limit in (
            ("--max-latency", self.budget.max_latency),
            ("--max-memory", self.budget.max_memory),
        ):
            if self.stem != StemKind.DONOR and limit is not None:
                raise UsageError(
                    f"{option} does not know the fresh stem of --stem {self.stem}",
                    f"leave out {option}, or --stem",
                )

    def _check_pins(self) -> None:
        pins = {
            "--start": self.start,
            "--end": self.end,
            "--require": self.require,
            "--exclude of a piece": self.exclude,
        }
        given = [name for name, value in pins.items() if value]
        if self.space == "paper" and (given or self.blocks is not None):
            name = (given or ["--blocks"])[0]
            raise UsageError(
                f"{name} is of the free space, and --space paper takes the partition's blocks",
                "leave out --space paper",
            )
        if self.blocks is not None and given:
            raise UsageError(
                f"--blocks is a whole network, so {given[0]} has nothing to choose",
                f"leave out {given[0]}",
            )

    def check_proven(self, *, optimal: bool) -> None:
        """Whether the program's optimum had to be proven, and was not.

        Raises:
            DeryError: So it is.
        """
        if self.require_optimal and not optimal:
            raise DeryError(
                "the program's optimum was not proven in the time allowed",
                "raise or leave out --max-seconds",
            )

    def options(self) -> dict[str, Any]:
        return {
            "budget": dataclasses.asdict(self.budget),
            "donors": {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in dataclasses.asdict(self.donors).items()
            },
            "max_donors": self.max_donors,
            "space": self.space,
            "max_stitches": self.max_stitches,
            "blocks": self.blocks,
            "start": self.start,
            "end": self.end,
            "require": list(self.require),
            "exclude": list(self.exclude),
            "for": self.purpose,
            "effort": self.effort,
            "latency_batch": self.latency_batch,
            "latency_from": self.latency_from is not None,
            "memory_batch": self.memory_batch,
            "data": self.data,
            "skip_bad": self.skip_bad,
            "proxy": self.proxy,
            "proxy_batches": self.proxy_batches,
            "proxy_batch_size": self.proxy_batch_size,
            "stitch": self.stitch,
            "stem": self.stem,
            "draw": self.draw,
            "match": self.match,
            "whole": self.whole,
            "fit_samples": self.fit_samples,
            "target_samples": self.target_samples,
            "max_seconds": self.max_seconds,
        }
