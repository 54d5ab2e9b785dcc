"""What a launcher told this process through its environment; free of torch."""

from __future__ import annotations

import os

_PLACES = (
    ("WORLD_SIZE", "RANK"),  # torchrun, accelerate launch
    ("PMI_SIZE", "PMI_RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
)
_LOCAL_COUNTS = (
    "LOCAL_WORLD_SIZE",  # torchrun, accelerate launch
    "MPI_LOCALNRANKS",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MV2_COMM_WORLD_LOCAL_SIZE",
)


class Dismissed(Exception):  # noqa: N818 - no error
    """In a process that is not the main one: what it was ordered to do is over.

    Args:
        code: Exit code, where the whole command is over.
    """

    def __init__(self, code: int | None = None) -> None:
        super().__init__(code)
        self.code = code


def _number(name: str) -> int:
    return int(os.environ.get(name) or 0)


def launched() -> bool:
    """Whether a launcher started several processes: torchrun, Accelerate or MPI."""
    return any(_number(count) > 1 for count, _ in _PLACES)


def is_follower() -> bool:
    """Whether this process is one of several and not the main one, which speaks for all."""
    return any(_number(count) > 1 and _number(rank) > 0 for count, rank in _PLACES)


def local_count() -> int:
    """How many processes of this command run on this machine."""
    return max(1, *map(_number, _LOCAL_COUNTS))


def on_cpus() -> bool:
    """Whether ``accelerate launch --cpu`` started this process."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def precision() -> str | None:
    """What ``accelerate launch --mixed_precision`` asked for, or None without it."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION") or None


def alone_by_mistake() -> str | None:
    """A warning where several processes were asked for and one was started.

    ``accelerate launch --cpu --num_processes 2`` does that: without MPI it starts one process and
    tells it where the others would be, but not how many.
    """
    if launched() or not on_cpus() or "MASTER_PORT" not in os.environ:
        return None
    return (
        "the launcher started this process alone (on CPUs, accelerate starts several only with "
        "MPI); to have N: torchrun --nproc-per-node N -m dery_cli ..."
    )
