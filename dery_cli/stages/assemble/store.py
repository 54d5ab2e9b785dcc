"""The artifacts of assembling: the assembly, and what was scored and timed on the way."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from dery_cli.errors import InfeasibleError
from dery_cli.io.artifacts import Workspace, read_log, write_log
from dery_cli.io.records import Kind
from dery_cli.io.schema import (
    any_text,
    boolean,
    fields,
    integer,
    list_of,
    mapping,
    number,
    one_of,
    optional,
    plain,
    plain_name,
    row,
)
from dery_cli.zoo import schemas
from dery_cli.zoo.schemas import COUNT, SCORE, network_data

CANDIDATES_FORMAT = "dery/candidates/3"
_BLOCK = (plain_name, COUNT, COUNT)

_TUNED: dict[str, Any] = {"tuned": SCORE, "tuned_loss": SCORE}
_SCORED: dict[str, Any] = {
    "network": any_text,
    "whole": boolean,
    "batch_norm": any_text,
    "blocks": list_of(row(*_BLOCK), least=1),
    "adapters": list_of(boolean, least=1),
    "params": COUNT,
    "flops": COUNT,
    "program_score": SCORE,
    "latency_ns": optional(COUNT),
    "memory_bytes": optional(COUNT),
    "proxy": SCORE,
    "held_out": SCORE,
    "held_out_loss": SCORE,
    "r2": list_of(SCORE),
}
CANDIDATES = fields(
    {
        "schema": one_of(CANDIDATES_FORMAT),
        "proxy": any_text,
        "candidates": list_of(fields({**_SCORED, "predicted": SCORE}, _TUNED), least=1),
    }
)
"""``candidates.json``, a file of the assembly."""

_LEARNING = fields(
    {
        "builds": COUNT,
        "rounds": COUNT,
        "foreseen": COUNT,
        "tau": SCORE,
        "tau_interval": row(SCORE, SCORE),
        "terms": list_of(row(any_text, number())),
    }
)
ASSEMBLY = dataclasses.replace(
    schemas.ASSEMBLY,
    parents=("target",),
    data=network_data(
        {
            "name": any_text,
            "whole": boolean,
            "latency_ns": optional(COUNT),
            "memory_bytes": optional(COUNT),
            "input_shape": row(integer(1), integer(1), integer(1)),
            "budget": any_text,
            "batch_norm": boolean,
            "head": optional(fields({"penalty": number(), "temperature": number()})),
            "match": optional(fields({"before": number(), "after": number(), "kept": boolean})),
            "proxy": fields({"name": any_text, "score": SCORE}),
            "held_out": SCORE,
            "program": fields(
                {
                    "upper_bound": SCORE,
                    "optimal": boolean,
                    "complete": boolean,
                    "solver": any_text,
                    "solver_agrees": boolean,
                    "agreement": any_text,
                    "score": SCORE,
                }
            ),
            "builds": fields(
                {"scored": COUNT, "tried": COUNT},
                {"without_score": COUNT, "too_slow": COUNT, "tuned": COUNT},
            ),
            "learning": optional(_LEARNING),
            "licenses": mapping(list_of(plain_name, least=1)),
            "comparison": list_of(
                fields({"role": any_text, **_SCORED, "mean_r2": SCORE, "test_top1": SCORE}, _TUNED),
                least=1,
            ),
            "test_top1": SCORE,
        }
    ),
)
LOG_FILE = "assembly.log.json"
FRONTIER_FILE = "pareto.csv"
"""All that a folder has where the frontier alone was asked for."""

LOG = fields(
    {
        "seconds": number(),
        "latency": optional(
            fields(
                {
                    "batch_size": integer(1),
                    "sum_of_parts_ns": number(),
                    "built_network_ns": number(),
                    "additive_error": number(),
                }
            )
        ),
    }
)
SCORES = Kind(
    name="scores",
    version=1,
    parents=("partition", "target"),
    data=fields(
        {
            "gains": optional(list_of(row(*_BLOCK, number()))),
            "joints": list_of(row(COUNT, COUNT, number())),
        }
    ),
)
LATENCY = Kind(
    name="latency",
    version=2,
    data=fields(
        {
            "units": mapping(list_of(COUNT, least=1), key=plain_name),
            "heads": list_of(row(COUNT, COUNT)),
            "stitches": list_of(list_of(COUNT)),
            "error": SCORE,
        }
    ),
)
REFUSAL = fields({"message": any_text, "hint": optional(any_text), "details": optional(plain)})
"""Why the last try of a name fitted nothing: a log, which nothing depends on."""


def _refusal_path(space: Workspace, name: str) -> Path:
    assembly = space.assembly(name).parent
    return assembly.with_name(f"{assembly.name}.infeasible.log.json")


def keep_refusal(space: Workspace, name: str, why: InfeasibleError | None) -> None:
    """Keep why nothing fitted, or forget it where something does (None)."""
    path = _refusal_path(space, name)
    with contextlib.suppress(OSError):
        if why is None:
            path.unlink(missing_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_log(path, {"message": why.message, "hint": why.hint, "details": why.details})


def read_refusal(space: Workspace, name: str) -> dict[str, Any] | None:
    """Why the last try of a name fitted nothing; None where it did, or there was none."""
    return read_log(_refusal_path(space, name), REFUSAL) or None
