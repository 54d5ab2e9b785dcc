"""Why nothing is within the budget, in the words of ``dery assemble``."""

from __future__ import annotations

from typing import Any

from dery_cli.core.assembly.explain import explain
from dery_cli.core.assembly.problem import AssemblyProblem
from dery_cli.errors import InfeasibleError
from dery_cli.sizes import show_time
from dery_cli.stages.assemble.setting import Setting


def explain_infeasible(problem: AssemblyProblem, setting: Setting) -> InfeasibleError:
    """The error that says which limit is broken, by how much, and what would fit."""
    reason = explain(problem, max_seconds=setting.config.max_seconds)
    if reason is None:
        return InfeasibleError("whole models are all that fits", "allow them: leave out --no-whole")
    error = reason.to_error()
    wholes = setting.allowed_wholes()
    if not wholes:
        return error
    least = min(wholes, key=lambda each: (each.params, each.flops))
    name = least.refs[0].donor
    whole: dict[str, Any] = {"donor": name, "params": least.params, "flops": least.flops}
    words = f"{name} with {least.params:,} params and {least.flops:,} multiply-adds"
    error.hint = f"{error.hint}; the smallest whole model is {words}"
    error.details = {**(error.details or {}), "smallest_whole_model": whole}
    if least.latency is not None:
        fast = min(wholes, key=lambda each: (each.latency or 0, each.params))
        error.details["fastest_whole_model"] = {
            "donor": fast.refs[0].donor,
            "latency_ns": fast.latency,
        }
        error.hint += f"; the fastest is {fast.refs[0].donor} with {show_time(fast.latency or 0)}"
    if least.memory is not None:
        slim = min(wholes, key=lambda each: (each.memory or 0, each.params))
        error.details["whole_model_of_least_memory"] = {
            "donor": slim.refs[0].donor,
            "memory_bytes": slim.memory,
        }
        error.hint += f"; least memory takes {slim.refs[0].donor} with {slim.memory:,} bytes"
    return error
