"""The assemble stage with its artifacts: what ``dery assemble`` runs once its options are right.

Nothing here imports torch unless there is something to do.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dery_cli.errors import InfeasibleError
from dery_cli.io.artifacts import Workspace, read_log, unchanged
from dery_cli.io.records import Artifact
from dery_cli.runtime.terminal import Terminal
from dery_cli.stages.assemble.config import AssembleConfig
from dery_cli.stages.assemble.inputs import Inputs, read_inputs
from dery_cli.stages.assemble.store import LOG, LOG_FILE, keep_refusal

if TYPE_CHECKING:
    from dery_cli.stages.assemble.why import Explanation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assembled:
    """A network that was assembled, now or before.

    Args:
        record: Of the assembly.
        folder: Where it and its weights are.
        latency: What timing the built network gave; None without a budget of latency.
        explanation: Why it was picked; None where that was not asked.
    """

    record: Artifact
    folder: Path
    latency: dict[str, Any] | None
    explanation: Explanation | None


def assemble_network(terminal: Terminal, space: Workspace, config: AssembleConfig) -> Assembled:
    """Assemble the best network within the budget, or say that it is up to date.

    Raises:
        StaleError: An earlier stage is missing or out of date.
        InfeasibleError: Nothing is within the budget.
        DeryError: The optimum is not proven though ``require_optimal`` asks for it.
    """
    path = space.assembly(config.name)
    with space.lock(terminal.note):
        try:
            inputs = read_inputs(terminal, space, config)
            timed = config.budget.max_latency is not None
            found = None if timed or config.explain else unchanged(path, inputs.record)
            explanation = None
            if found is None:
                found, explanation = _made(terminal, space, config, inputs, path)
            else:
                _say_up_to_date(terminal, config)
        except InfeasibleError as why:
            keep_refusal(space, config.name, why)
            raise
        keep_refusal(space, config.name, None)
    config.check_proven(optimal=found.data["program"]["optimal"])
    log = read_log(path.parent / LOG_FILE, LOG)
    return Assembled(
        record=found, folder=path.parent, latency=log.get("latency"), explanation=explanation
    )


def _made(
    terminal: Terminal, space: Workspace, config: AssembleConfig, inputs: Inputs, path: Path
) -> tuple[Artifact, Explanation | None]:
    """What torch is needed for: measured parents, the network, why it was picked."""
    from dery_cli.stages.assemble.make import make_assembly
    from dery_cli.stages.assemble.prepare import prepare
    from dery_cli.stages.assemble.why import explain_pick

    job = prepare(terminal, space, config, inputs)
    found = unchanged(path, job.record)
    if found is None:
        found = make_assembly(job)
    else:
        _say_up_to_date(terminal, config)
    return found, explain_pick(job, found) if config.explain else None


def _say_up_to_date(terminal: Terminal, config: AssembleConfig) -> None:
    terminal.say(f"the assembly '{config.name}' is up to date")
