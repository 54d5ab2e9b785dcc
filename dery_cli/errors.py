"""Errors a user can act on, and the exit codes they become."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """The process exit codes of every ``dery`` command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    INFEASIBLE = 3
    STALE = 4
    INTERRUPTED = 130
    TERMINATED = 143


class DeryError(Exception):
    """A run-time failure that is nobody's bug: damaged file, hash mismatch, full disk.

    Args:
        message: What failed, with the offending value, in one line.
        hint: What to do about it, preferably the next command to type.
        details: Machine-readable extras for ``--json``.
    """

    exit_code = ExitCode.FAILED
    code = "failed"

    def __init__(
        self, message: str, hint: str | None = None, *, details: dict[str, object] | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details


class UsageError(DeryError):
    """Something is wrong in an argument or a recipe: unknown name, bad size, K too large."""

    exit_code = ExitCode.USAGE
    code = "usage"


class InfeasibleError(DeryError):
    """No partition or no assembly satisfies the limits."""

    exit_code = ExitCode.INFEASIBLE
    code = "infeasible"


class StaleError(DeryError):
    """An earlier stage is missing, or its inputs or options changed since it ran."""

    exit_code = ExitCode.STALE
    code = "stale"
