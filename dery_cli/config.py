"""Options of the stages: frozen, checked when built, free of torch.

Sizes are read as people write them: ``30M``, ``5G``, ``800k``, ``1.5B``.
"""

from __future__ import annotations

import dataclasses
import re
from decimal import Decimal
from typing import Any, ClassVar

from dery_cli.errors import UsageError
from dery_cli.types import Donor, StitchKind, is_name

AUTO = "auto"
_SUFFIXES = {"": 0, "k": 3, "m": 6, "g": 9, "b": 9, "t": 12}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([kKmMgGbBtT]?)\s*")
_TIME = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(us|ms|s)\s*")
_TIME_UNITS = {"us": 3, "ms": 6, "s": 9}


def parse_size(text: str, option: str) -> int:
    """``30M`` -> 30,000,000.

    Raises:
        UsageError: Not a positive number with one of the suffixes, or not a whole count.
    """
    match = _SIZE.fullmatch(text)
    accepted = "a positive number with k, M, G, B or T, such as 30M, 5G, 800k or 1.5B"
    if match is None:
        raise UsageError(f"{option}: '{text}' is not a size", f"accepted is {accepted}")
    value = Decimal(match[1]).scaleb(_SUFFIXES[match[2].lower()])
    if value != value.to_integral_value() or value <= 0:
        raise UsageError(
            f"{option}: '{text}' is not a positive whole count", f"accepted is {accepted}"
        )
    return int(value)


def parse_time(text: str, option: str) -> int:
    """``8ms`` -> 8,000,000 nanoseconds.

    Raises:
        UsageError: Not a positive number with a unit, or not whole nanoseconds.
    """
    match = _TIME.fullmatch(text)
    accepted = "accepted is a positive number with us, ms or s, such as 8ms, 800us or 0.5s"
    if match is None:
        raise UsageError(f"{option}: '{text}' is not a time", accepted)
    value = Decimal(match[1]).scaleb(_TIME_UNITS[match[2]])
    if value != value.to_integral_value() or value <= 0:
        raise UsageError(f"{option}: '{text}' is not a positive time in whole ns", accepted)
    return int(value)


def show_time(nanoseconds: float) -> str:
    """A time in milliseconds, as reports write it: 8_123_456 -> ``8.123 ms``."""
    return f"{nanoseconds / 1e6:,.3f} ms"


def show_count(value: float) -> str:
    """A count as people write it: 24_890_000 -> ``24.89M``."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.2f}{suffix}"
    return f"{value:.0f}"


def check_name(name: str, what: str) -> str:
    """A name for a donor, an assembly or a run: ``[a-z0-9._-]``, not starting with a dot or dash.

    Raises:
        UsageError: Another character.
    """
    if not is_name(name):
        raise UsageError(
            f"bad {what} name: '{name}'", "use lower-case letters, digits, '.', '_', '-'"
        )
    return name


def _positive(option: str, value: float, minimum: float = 1) -> None:
    if value < minimum:
        raise UsageError(f"{option} is {value}; it must be at least {minimum:g}")


def _one_of(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{option} is '{value}'", f"choose from {', '.join(choices)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Options of ``dery embed``; all but ``workers`` belong to the artifact.

    Args:
        batch_size: Images a batch, or ``auto``: what the memory holds. The artifact names ``auto``
            among its options, and the size it came to among its data.
        skip_bad: Leave out images that cannot be decoded; in the artifact, whether any were.
    """

    data: str
    samples: int = 2048
    grid: int = 4
    grid_samples: int = 256
    batch_size: int | str = 64
    dtype: str = "fp16"
    crop: float = 0.95
    skip_bad: bool = False
    seed: int = 0
    workers: int = 0

    DTYPES: ClassVar[tuple[str, ...]] = ("fp16", "fp32")

    def __post_init__(self) -> None:
        _positive("--samples", self.samples, 4)
        _positive("--grid", self.grid)
        _positive("--grid-samples", self.grid_samples, 8)
        if isinstance(self.batch_size, int):
            _positive("--batch-size", self.batch_size)
        elif self.batch_size != AUTO:
            raise UsageError(
                f"--batch-size is '{self.batch_size}'", f"give a number of images, or {AUTO}"
            )
        _positive("--workers", self.workers, 0)
        _one_of("--dtype", self.dtype, self.DTYPES)
        if not 0 < self.crop <= 1:
            raise UsageError(f"--crop is {self.crop}; it must be in (0, 1]")

    def options(self) -> dict[str, Any]:
        """What the artifact records."""
        return {
            "data": self.data,
            "samples": self.samples,
            "grid": self.grid,
            "grid_samples": self.grid_samples,
            "batch_size": self.batch_size,
            "dtype": self.dtype,
            "crop": self.crop,
            "skip_bad": self.skip_bad,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartitionConfig:
    """Options of ``dery partition``."""

    blocks: int = 4
    eps: float = 0.2
    restarts: int = 200
    size: str = "nodes"
    metric: str = "cka"
    max_seconds: float | None = None
    seed: int = 0

    SIZES: ClassVar[tuple[str, ...]] = ("nodes", "macs", "params")

    def __post_init__(self) -> None:
        _positive("-K", self.blocks)
        if self.blocks > 8:
            raise UsageError(f"-K is {self.blocks}; at most 8 blocks are supported")
        _positive("--eps", self.eps, 0)
        _positive("--restarts", self.restarts)
        _one_of("--size", self.size, self.SIZES)
        if self.max_seconds is not None and self.max_seconds <= 0:
            raise UsageError(f"--max-seconds is {self.max_seconds}; it must be positive")

    def options(self) -> dict[str, Any]:
        return {
            "blocks": self.blocks,
            "eps": self.eps,
            "restarts": self.restarts,
            "size": self.size,
            "metric": self.metric,
            "max_seconds": self.max_seconds,
        }


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

    @classmethod
    def parse(
        cls,
        *,
        max_params: str | None,
        min_params: str | None,
        max_flops: str | None,
        min_flops: str | None,
        max_latency: str | None = None,
        max_memory: str | None = None,
    ) -> Budget:
        """From the options' texts.

        Raises:
            UsageError: A size or time that cannot be read, or a minimum above its maximum.
        """

        def read(text: str | None, option: str) -> int | None:
            return None if text is None else parse_size(text, option)

        return cls(
            max_params=read(max_params, "--max-params"),
            min_params=read(min_params, "--min-params"),
            max_flops=read(max_flops, "--max-flops"),
            min_flops=read(min_flops, "--min-flops"),
            max_latency=None if max_latency is None else parse_time(max_latency, "--max-latency"),
            max_memory=read(max_memory, "--max-memory"),
        )

    def admits(
        self, params: int, flops: int, *, latency: int | None = None, memory: int | None = None
    ) -> bool:
        """Whether a network is within all limits; what has none need not be known."""
        for limit, value in ((self.max_latency, latency), (self.max_memory, memory)):
            if limit is not None:
                assert value is not None
                if value > limit:
                    return False
        return (
            (self.max_params is None or params <= self.max_params)
            and (self.min_params is None or params >= self.min_params)
            and (self.max_flops is None or flops <= self.max_flops)
            and (self.min_flops is None or flops >= self.min_flops)
        )

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


FINALISTS = 8
"""Tried by default where the proxy is the probe."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AssembleConfig:
    """Options of ``dery assemble``."""

    budget: Budget = Budget()
    donors: DonorFilter = DonorFilter()
    max_donors: int | None = None
    latency_batch: int = 1
    memory_batch: int = 1
    data: str | None = None
    skip_bad: bool = False
    name: str = "default"
    candidates: int = 32
    finalists: int | None = None
    proxy: str | None = None
    joint_weight: float = 0.1
    stitch: str = "linear"
    match: bool = False
    whole: bool = True
    fit_samples: int = 512
    target_samples: int = 2048
    max_seconds: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_name(self.name, "assembly")
        _positive("--candidates", self.candidates)
        if self.finalists is not None:
            _positive("--finalists", self.finalists, 0)
        _positive("--fit-samples", self.fit_samples, 8)
        _positive("--target-samples", self.target_samples, 8)
        if self.max_donors is not None:
            _positive("--max-donors", self.max_donors)
        _positive("--latency-batch", self.latency_batch)
        _positive("--memory-batch", self.memory_batch)
        _positive("--joint-weight", self.joint_weight, 0)
        _one_of("--stitch", self.stitch, tuple(StitchKind))
        if self.max_seconds is not None and self.max_seconds <= 0:
            raise UsageError(f"--max-seconds is {self.max_seconds}; it must be positive")

    def num_finalists(self, proxy: str) -> int:
        """How many are tried; by default none where the proxy is one that has to be asked for."""
        if self.finalists is not None:
            return self.finalists
        return FINALISTS if proxy == "probe" else 0

    def options(self) -> dict[str, Any]:
        return {
            "budget": dataclasses.asdict(self.budget),
            "donors": {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in dataclasses.asdict(self.donors).items()
            },
            "max_donors": self.max_donors,
            "latency_batch": self.latency_batch,
            "memory_batch": self.memory_batch,
            "data": self.data,
            "skip_bad": self.skip_bad,
            "candidates": self.candidates,
            "finalists": self.finalists,
            "proxy": self.proxy,
            "joint_weight": self.joint_weight,
            "stitch": self.stitch,
            "match": self.match,
            "whole": self.whole,
            "fit_samples": self.fit_samples,
            "target_samples": self.target_samples,
            "max_seconds": self.max_seconds,
        }
