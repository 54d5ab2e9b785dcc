"""The assemble stage with its artifacts: what ``dery assemble`` runs once its options are right."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dery_cli.core.assembly.solve import AssemblyProblem
from dery_cli.data.samples import choose_target, fingerprint
from dery_cli.data.sets import DataSet, open_checked
from dery_cli.errors import DeryError, StaleError, UsageError
from dery_cli.io.artifacts import Workspace, read_log, unchanged, write_log, write_record
from dery_cli.io.files import replace_text
from dery_cli.io.journal import transaction
from dery_cli.io.records import Artifact
from dery_cli.runtime.devices import pick_device
from dery_cli.runtime.terminal import Terminal
from dery_cli.stages.assemble.build import FOLDS, CompleteNetwork, check_size
from dery_cli.stages.assemble.candidates import Candidate, Scored, finalists, pick, ranked
from dery_cli.stages.assemble.config import AssembleConfig
from dery_cli.stages.assemble.costs import PartCosts, latency_options, time_network
from dery_cli.stages.assemble.model_card import model_card
from dery_cli.stages.assemble.search import Assembler, frontier
from dery_cli.stages.assemble.store import (
    ASSEMBLY,
    CANDIDATES,
    CANDIDATES_FORMAT,
    LATENCY,
    LOG,
    SCORES,
)
from dery_cli.stages.assemble.target import Target, choose_fit
from dery_cli.stages.embed.store import Embeddings, embed_command, read_embeddings
from dery_cli.stages.partition.store import require_partition
from dery_cli.types import BlockRef
from dery_cli.zoo.networks import MODEL_FILE, describe_network, licences
from dery_cli.zoo.plugin import find_proxy
from dery_cli.zoo.registry import require_zoo

LOG_FILE = "assembly.log.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assembled:
    """A network that was assembled, now or before.

    Args:
        record: Of the assembly.
        folder: Where it and its weights are.
        latency: What timing the built network gave; None without a budget of latency.
    """

    record: Artifact
    folder: Path
    latency: dict[str, Any] | None


def assemble_network(terminal: Terminal, space: Workspace, config: AssembleConfig) -> Assembled:
    """Assemble the best network within the budget, or say that it is up to date.

    Raises:
        StaleError: An earlier stage is missing or out of date.
        InfeasibleError: Nothing is within the budget.
        DeryError: The optimum is not proven though ``require_optimal`` asks for it.
    """
    path = space.assembly(config.name)
    with space.lock(terminal.note):
        assembler, record, proxy_name = _prepare(terminal, space, config)
        found = unchanged(path, record)
        if found is not None:
            terminal.say(f"the assembly '{config.name}' is up to date")
        else:
            found = _build_assembly(terminal, space, assembler, record, proxy_name)
    _check_proven(config, found.data["program"])
    log = read_log(path.parent / LOG_FILE, LOG)
    return Assembled(record=found, folder=path.parent, latency=log.get("latency"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frontier:
    """Assemblies that no other beats in score and every cost at once.

    Args:
        points: Of each the score, the costs and the network, best first.
        complete: Whether these are all.
        file: Where they are written, as CSV.
    """

    points: list[dict[str, Any]]
    complete: bool
    file: Path


def trace_frontier(terminal: Terminal, space: Workspace, config: AssembleConfig) -> Frontier:
    """The frontier of the program's score over params, multiply-adds and perhaps latency.

    Raises:
        StaleError: An earlier stage is missing or out of date.
        InfeasibleError: Nothing is within the budget.
    """
    with space.lock(terminal.note):
        assembler, record, _ = _prepare(terminal, space, config)
        problem = _problem(terminal, space, assembler, record)
        points, complete = frontier(assembler, problem)
        path = space.assembly(config.name).parent / "pareto.csv"
        timed = [] if assembler.latency is None else ["latency_ns"]
        columns = ["score", "params", "flops", *timed, "network"]
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(columns)
        writer.writerows([p[column] for column in columns] for p in points)
        replace_text(path, table.getvalue())
    return Frontier(points=points, complete=complete, file=path)


def _check_proven(config: AssembleConfig, proof: Mapping[str, Any]) -> None:
    if config.require_optimal and not proof["optimal"]:
        raise DeryError(
            "the program's optimum was not proven in the time allowed",
            "raise or leave out --max-seconds",
        )


def _prepare(
    terminal: Terminal, space: Workspace, config: AssembleConfig
) -> tuple[Assembler, Artifact, str]:
    """Check the stages before, open the target, and say what the record and the proxy will be."""
    zoo = require_zoo(space)
    embeddings = read_embeddings(space, zoo)
    zoo = embeddings.zoo
    for warning in embeddings.warnings:
        terminal.warn(warning)
    partition = require_partition(space, embeddings)
    if config.data is None:
        target_data = _calibration(terminal, embeddings, config.skip_bad)
    else:
        target_data = open_checked(terminal, config.data, skip_bad=config.skip_bad)
    indices = choose_target(target_data, config.target_samples, config.seed)
    proxy_name = config.proxy or ("naswot" if target_data.classes is None else "probe")
    if proxy_name == "probe" and target_data.classes is None:
        raise UsageError(
            f"--proxy probe needs labels, which {target_data.spec} has not",
            "--data with class folders, or --proxy naswot",
        )
    target = Target(
        data=target_data,
        indices=indices,
        fit_indices=choose_fit(indices, config.fit_samples, config.seed),
        crop=embeddings.calibration.crop,
        batch_size=embeddings.calibration.batch_size,
        device=pick_device(config.device),
        workers=config.workers,
    )
    record = Artifact(
        kind=ASSEMBLY,
        parents={
            "partition": partition.record.sha256,
            "target": fingerprint(target_data.train, indices),
            **{f"embedding/{donor}": sha for donor, sha in embeddings.hashes.items()},
        },
        options={
            **config.options(),
            "data": target_data.spec,
            "skip_bad": target_data.skip_bad,
            "proxy": proxy_name,
            "finalists": config.num_finalists(proxy_name),
        },
        seed=config.seed,
    )
    assembler = Assembler(space, zoo, embeddings, partition, target, config)
    if config.budget.max_latency is not None:
        record = _with_latency(terminal, space, assembler, record)
    return assembler, record, proxy_name


def _calibration(terminal: Terminal, embeddings: Embeddings, skip_bad: bool) -> DataSet:
    """The data that were embedded, which must be what they were."""
    used = embeddings.calibration
    data = open_checked(terminal, used.spec, skip_bad=skip_bad or used.skip_bad)
    if fingerprint(data.train, used.indices) != used.digest:
        raise StaleError(
            f"the images of {used.spec} changed since dery embed",
            embed_command(dict(embeddings.options), embeddings.seed),
        )
    return data


def _with_latency(
    terminal: Terminal, space: Workspace, assembler: Assembler, record: Artifact
) -> Artifact:
    """The record with measured latencies among its parents; they are measured or those kept."""
    target, config = assembler.target, assembler.config
    weights = {f"weights/{n}": donor.weights_sha256 for n, donor in assembler.zoo.donors.items()}
    wanted = Artifact(
        kind=LATENCY,
        parents={"partition": record.parents["partition"], **weights},
        options=latency_options(
            target.device, assembler.stitch, config.latency_batch, target.num_classes
        ),
    )
    kept = unchanged(space.latency, wanted)
    if kept is None:
        costs = assembler.measure_latency(terminal.progress)
        kept = write_record(space.latency, dataclasses.replace(wanted, data=costs.to_json()))
    else:
        terminal.detail("latencies are those of an earlier run")
    assembler.latency = PartCosts.from_json(kept.data)
    return dataclasses.replace(record, parents={**record.parents, "latency": kept.sha256})


def _problem(
    terminal: Terminal, space: Workspace, assembler: Assembler, record: Artifact
) -> AssemblyProblem:
    """The program, its gains and joints computed or taken from the scores artifact.

    Raises:
        InfeasibleError: Nothing is within the budget.
    """
    if assembler.config.budget.max_memory is not None:
        assembler.memory = assembler.compute_memory(terminal.progress)
    assembler.check_budget()
    parents = {name: sha for name, sha in record.parents.items() if name != "latency"}
    wanted = Artifact(
        kind=SCORES,
        parents=parents,
        options={"target_samples": record.options["target_samples"]},
        seed=record.seed,
    )
    found = unchanged(space.scores, wanted)
    if found is None:
        count = len(assembler.zoo) * (assembler.target.labels is not None)
        with terminal.progress("scoring blocks", count + len(assembler.blocks)) as bar:
            data = assembler.scores(lambda phase: bar.update(bar.done + 1, phase))
        found = write_record(space.scores, dataclasses.replace(wanted, data=data))
    else:
        terminal.detail("gains and joints are those of an earlier run")
    return assembler.problem_of(found.data)


def _build_assembly(
    terminal: Terminal, space: Workspace, assembler: Assembler, record: Artifact, proxy_name: str
) -> Artifact:
    """Rank, build, score and pick; write the pick and what it was compared with.

    Raises:
        InfeasibleError: Nothing is within the budget.
        DeryError: The optimum is not proven though ``require_optimal`` asks for it, or the built
            network is not the size that the program promised.
    """
    started = time.monotonic()
    config, target = assembler.config, assembler.target
    if target.labels is None:
        terminal.note(f"{target.data.spec} has no labels: no gains, no head; {proxy_name} decides")
    problem = _problem(terminal, space, assembler, record)
    found, proof = assembler.candidates(problem)
    if not proof["solver_agrees"]:
        terminal.warn(f"CBC and the exact search disagree; the search counts: {proof['agreement']}")
    _check_proven(config, proof)
    scored, compared = _choose(terminal, assembler, problem, found, proxy_name)
    best = compared[0][1]
    rows = []
    with terminal.progress("building the pick and its controls", len(compared)) as bar:
        built = assembler.builder.build(best.candidate)
        for role, entry in compared:
            rows.append(_row(assembler, role, entry))
            bar.advance()
    input_shape = _input_shape(assembler, best)
    check_size(built.network, best.candidate, input_shape, config.memory_batch)
    timing = _time_whole(assembler, best.candidate, built.network, input_shape)
    data = {
        **_describe(assembler, best, built),
        "proxy": {"name": proxy_name, "score": rows[0]["proxy"]},
        "held_out": best.held_out,
        "program": {**proof, "score": best.candidate.program_score},
        "licenses": licences(assembler.zoo, best.candidate.refs),
        "comparison": rows,
        "test_top1": rows[0]["test_top1"],
    }
    listing = {
        "schema": CANDIDATES_FORMAT,
        "proxy": proxy_name,
        "candidates": [entry.to_json() for entry in ranked(scored)],
    }
    path = space.assembly(config.name)
    with transaction(path) as work:
        work.write_tensors(MODEL_FILE, built.network.state_dict())
        work.write_json("candidates.json", listing, CANDIDATES)
        work.write_text("README.md", model_card(config.name, data))
        done = work.commit(dataclasses.replace(record, data=data))
    log = {"seconds": time.monotonic() - started, "latency": timing}
    write_log(path.parent / LOG_FILE, log)
    return done


def _describe(assembler: Assembler, best: Scored, built: CompleteNetwork) -> dict[str, Any]:
    """What the record says of the network itself and of what it was made for."""
    chosen, target = best.candidate, assembler.target
    return {
        "network": describe_network(
            assembler.zoo,
            chosen.refs,
            built.fits,
            classes=target.data.classes,
            crop=target.crop,
            sets=chosen.sets,
        ),
        "name": str(chosen),
        "whole": chosen.whole,
        "params": chosen.params,
        "flops": chosen.flops,
        "latency_ns": chosen.latency,
        "memory_bytes": chosen.memory,
        "input_shape": list(_input_shape(assembler, best)),
        "budget": str(assembler.config.budget),
        "target": target.data.spec,
        "target_skip_bad": target.data.skip_bad,
        "match": None if built.match is None else dataclasses.asdict(built.match),
    }


def _time_whole(
    assembler: Assembler, chosen: Candidate, network: Any, input_shape: tuple[int, ...]
) -> dict[str, Any] | None:
    """The built network's own latency beside the sum of its parts; None without a budget."""
    if chosen.latency is None:
        return None
    batch_size = assembler.config.latency_batch
    measured = time_network(network, input_shape, assembler.target.device, batch_size)
    return {
        "batch_size": batch_size,
        "sum_of_parts_ns": chosen.latency,
        "built_network_ns": measured,
        "additive_error": chosen.latency / measured - 1,
    }


def _input_shape(assembler: Assembler, best: Scored) -> tuple[int, ...]:
    spec = assembler.zoo[best.candidate.refs[0].donor].input
    return (spec.in_chans, *spec.image_size)


def _choose(
    terminal: Terminal,
    assembler: Assembler,
    problem: AssemblyProblem,
    found: Sequence[Candidate],
    proxy_name: str,
) -> tuple[list[Scored], list[tuple[str, Scored]]]:
    """All candidates scored, and the pick beside what it is compared with.

    The proxy ranks; where the target has labels, the best of them and the controls (the best whole
    model, a random assembly, the largest candidate) are cross-validated, which decides.
    """
    builder, proxy = assembler.builder, find_proxy(proxy_name)
    count = assembler.config.num_finalists(proxy_name)
    drawn = assembler.random_candidate(problem)
    with terminal.progress("building candidates", len(found) + (drawn is not None)) as bar:
        scored = []
        for candidate in [*found, *([] if drawn is None else [drawn])]:
            scored.append(builder.score(candidate, proxy))
            bar.advance()
    random = None if drawn is None else scored.pop()
    if not any(math.isfinite(entry.proxy) for entry in scored):
        raise DeryError(
            f"the proxy {proxy_name} gives no candidate a finite score",
            "choose another --proxy, or leave it out",
        )
    largest = max(scored, key=lambda entry: entry.candidate.params)
    if count and builder.can_cross_validate:
        controls = [largest, *([] if random is None else [random])]
        last = finalists(scored, count)
        last += [entry for entry in controls if entry not in last]
        with terminal.progress("cross-validating the best", FOLDS * len(last)) as bar:
            values = builder.cross_validate([entry.candidate for entry in last], bar.advance)
        held_out = {entry.candidate.refs: value for entry, value in zip(last, values, strict=True)}
        scored = [_with(entry, held_out) for entry in scored]
        largest = _with(largest, held_out)
        random = None if random is None else _with(random, held_out)
    compared = [("picked", pick(scored))]
    wholes = [entry for entry in scored if entry.candidate.whole]
    if wholes:
        compared.append(("best whole model", pick(wholes)))
    if random is not None:
        compared.append(("random assembly", random))
    compared.append(("most params", largest))
    return scored, compared


def _with(entry: Scored, held_out: Mapping[tuple[BlockRef, ...], float]) -> Scored:
    return dataclasses.replace(entry, held_out=held_out.get(entry.candidate.refs))


def _row(assembler: Assembler, role: str, entry: Scored) -> dict[str, Any]:
    return {
        "role": role,
        **entry.to_json(),
        "mean_r2": entry.r2,
        "test_top1": assembler.builder.test_top1(entry.candidate),
    }
