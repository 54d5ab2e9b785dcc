"""The assemble stage: program, candidates, proxy, pick.

The order is that of DESIGN.md: the program over blocks and edges gives the N best by its additive
objective; whole models within the budget join them; every candidate is built with closed-form
stitches and ranked by a training-free proxy. ``run`` then cross-validates the first of them, which
decides where the target has labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from dery_cli.core.assembly.explain import explain
from dery_cli.core.assembly.frontier import pareto, random_feasible
from dery_cli.core.assembly.solve import Assembly, AssemblyProblem, cross_check, n_best, solve
from dery_cli.errors import InfeasibleError
from dery_cli.io.artifacts import Workspace
from dery_cli.sizes import show_time
from dery_cli.stages.assemble.build import Builder
from dery_cli.stages.assemble.candidates import Candidate
from dery_cli.stages.assemble.config import AssembleConfig
from dery_cli.stages.assemble.costs import (
    REPEATS,
    WARMUP,
    MemoryCosts,
    PartCosts,
    compute_memory,
    measure_latency,
    more_resources,
)
from dery_cli.stages.assemble.problem import (
    MICRO,
    Joint,
    PlacedBlock,
    boundary_nodes,
    build_problem,
    joint_costs,
    merged,
    probe_nodes,
    score_joints,
)
from dery_cli.stages.assemble.target import Target
from dery_cli.stages.embed.store import Embeddings
from dery_cli.stages.partition.store import StoredPartition
from dery_cli.types import BlockRef, StitchKind
from dery_cli.zoo.donors import DonorPool
from dery_cli.zoo.registry import Zoo
from dery_cli.zoo.whole import whole_block, whole_cost

Progress = Callable[[str, int], AbstractContextManager[Any]]
"""Opens a progress bar: what is done, and in how many steps."""

CBC_SECONDS = 10.0
"""Time CBC gets to confirm the exact search, which decides."""

CBC_EDGES = 4000
"""Above so many edges CBC is given those that the search's bounds left."""


class Assembler:
    """Everything one ``dery assemble`` needs, loaded once.

    Args:
        workspace: Where donors' local checkpoints are.
        zoo: The donors.
        embeddings: Of all of them.
        partition: Of all of them.
        target: Target images.
        config: Options.
    """

    def __init__(
        self,
        workspace: Workspace,
        zoo: Zoo,
        embeddings: Embeddings,
        partition: StoredPartition,
        target: Target,
        config: AssembleConfig,
    ) -> None:
        self.zoo, self.embeddings, self.target, self.config = zoo, embeddings, target, config
        self.blocks = placed_blocks(partition)
        self.donors = DonorPool(zoo, workspace, target.device)
        self.latency: PartCosts | None = None
        self.memory: MemoryCosts | None = None
        self.stitch = StitchKind(config.stitch)
        self.builder = Builder(zoo, self.donors, target, config)

    def measure_latency(self, progress: Progress) -> PartCosts:
        """Latencies of all parts; ``latency`` must be set before a problem with such a budget."""
        with progress("timing blocks and stitches", WARMUP + REPEATS) as bar:
            return measure_latency(
                self.zoo,
                self.donors,
                self.blocks,
                self.target.device,
                kind=self.stitch,
                batch_size=self.config.latency_batch,
                num_classes=self.target.num_classes,
                advance=bar.advance,
            )

    def compute_memory(self, progress: Progress) -> MemoryCosts:
        """Bytes of all parts; ``memory`` must be set before a problem with such a budget."""
        with progress("computing memory", len(self.blocks) + len(self.zoo)) as bar:
            return compute_memory(
                self.zoo,
                self.donors,
                self.blocks,
                kind=self.stitch,
                batch_size=self.config.memory_batch,
                num_classes=self.target.num_classes,
                advance=bar.advance,
            )

    def check_budget(self) -> None:
        """Refuse a budget that nothing fits, before anything is built.

        Raises:
            InfeasibleError: No assembly and no whole model is within it.
        """
        problem = self.problem(None, joint_costs(self.blocks, self.zoo, self.stitch))
        wholes = self.whole_models() if self.config.whole else []
        if not wholes and n_best(problem, 1, max_seconds=self.config.max_seconds).best is None:
            raise self._infeasible(problem)

    def scores(self, advance: Callable[[str], None]) -> dict[str, Any]:
        """Gains and joints as the scores artifact keeps them: no budget or filter enters."""
        gains = self.gains(lambda: advance("probing blocks"))
        joints = self.joints(lambda: advance("scoring joints"))
        return {
            "gains": None
            if gains is None
            else [[b.ref.donor, b.ref.start, b.ref.stop, gains[b.ref]] for b in self.blocks],
            "joints": [[*pair, r2] for pair, r2 in sorted(joints.items())],
        }

    def problem_of(self, scores: Mapping[str, Any]) -> AssemblyProblem:
        """The integer program from the scores artifact's data."""
        gains = None
        if scores["gains"] is not None:
            gains = {BlockRef(*entry[:3]): float(entry[3]) for entry in scores["gains"]}
        joints = joint_costs(self.blocks, self.zoo, self.stitch)
        for before, after, r2 in scores["joints"]:
            joints[before, after] = dataclasses.replace(joints[before, after], r2=r2)
        return self.problem(gains, joints)

    def gains(self, advance: Callable[[], None]) -> dict[BlockRef, float] | None:
        """Probe accuracy gained by every block; None without labels."""
        labels, num_classes = self.target.labels, self.target.num_classes
        if labels is None or num_classes is None:
            return None
        accuracy: dict[tuple[str, int], float] = {}
        for donor, nodes in boundary_nodes(self.blocks).items():
            batches = iter(self.builder.view(donor))
            found = probe_nodes(self.donors[donor], nodes, batches, labels, num_classes)
            accuracy.update({(donor, node): q for node, q in found.items()})
            accuracy[donor, 0] = 1 / num_classes
            advance()
        return {
            b.ref: accuracy[b.ref.donor, b.ref.stop] - accuracy[b.ref.donor, b.ref.start]
            for b in self.blocks
        }

    def joints(self, advance: Callable[[], None]) -> dict[tuple[int, int], float]:
        """R2 of every joint."""
        return score_joints(self.blocks, self.embeddings, advance)

    def problem(
        self, gains: dict[BlockRef, float] | None, joints: dict[tuple[int, int], Joint]
    ) -> AssemblyProblem:
        """The integer program."""
        budget = self.config.budget
        latency = memory = None
        if budget.max_latency is not None:
            assert self.latency is not None
            latency = (self.latency, budget.max_latency)
        if budget.max_memory is not None:
            assert self.memory is not None
            memory = (self.memory, budget.max_memory)
        return build_problem(
            self.blocks,
            self.zoo,
            joints,
            gains,
            num_classes=self.target.num_classes,
            config=self.config,
            more=more_resources(self.blocks, sorted(joints), latency, memory),
        )

    def candidates(self, problem: AssemblyProblem) -> tuple[list[Candidate], dict[str, Any]]:
        """The N best of the program and the whole models within the budget, and what was proven.

        Raises:
            InfeasibleError: Nothing fits.
        """
        found = n_best(problem, self.config.candidates, max_seconds=self.config.max_seconds)
        answer = solve(
            problem,
            max_seconds=self.config.max_seconds or CBC_SECONDS,
            keep_E=found.kept_E if problem.num_edges > CBC_EDGES else None,
        )
        agreement = cross_check(answer, found)
        ranked = list(found.assemblies)
        better = agreement.score_gap is None or agreement.score_gap < 0
        if answer.assembly is not None and not answer.broken and not found.proven and better:
            ranked.insert(0, answer.assembly)  # the search ran out of time before it
        seen: set[tuple[BlockRef, ...]] = set()
        chosen: list[Candidate] = []
        for assembly in ranked:
            candidate = self._candidate(problem, assembly)
            if len(merged(candidate.refs)) == 1:  # a whole model; it joins below
                continue
            seen.add(merged(candidate.refs))
            chosen.append(candidate)
        wholes = self.whole_models() if self.config.whole else []
        chosen += [whole for whole in wholes if merged(whole.refs) not in seen]
        if not chosen:
            raise self._infeasible(problem)
        proof = {
            "upper_bound": None if found.upper_bound is None else found.upper_bound / MICRO,
            "optimal": found.proven,
            "complete": found.complete,
            "solver": str(answer.status),
            "solver_agrees": agreement.agrees,
            "agreement": agreement.reason,
        }
        return chosen, proof

    def whole_models(self) -> list[Candidate]:
        """Whole donors within the budget; exempt from the set constraint."""
        budget = self.config.budget
        return [
            whole
            for whole in self._allowed_wholes()
            if budget.admits(whole.params, whole.flops, latency=whole.latency, memory=whole.memory)
        ]

    def _allowed_wholes(self) -> list[Candidate]:
        """Whole donors that no filter leaves out, whatever their size."""
        found = []
        for name, donor in self.zoo.donors.items():
            if self.config.donors.reasons(donor):
                continue
            ref = whole_block(self.zoo, name)
            cost = whole_cost(self.zoo, name, self.target.num_classes)
            found.append(
                Candidate(
                    refs=(ref,),
                    sets=None,
                    params=cost.params,
                    flops=cost.flops,
                    program_score=None,
                    latency=None if self.latency is None else self.latency.wholes[name],
                    memory=None if self.memory is None else self.memory.weights.wholes[name],
                )
            )
        return found

    def _infeasible(self, problem: AssemblyProblem) -> InfeasibleError:
        wholes = self._allowed_wholes() if self.config.whole else []
        return explain_infeasible(problem, wholes, self.config)

    def _candidate(self, problem: AssemblyProblem, assembly: Assembly) -> Candidate:
        members = [self.blocks[number] for number in assembly.blocks]
        return Candidate(
            refs=tuple(member.ref for member in members),
            sets=tuple(member.set_index for member in members),
            params=assembly.costs[0],
            flops=assembly.costs[1],
            program_score=assembly.score / MICRO,
            latency=problem.total("latency", assembly.costs),
            memory=problem.total("memory", assembly.costs),
        )

    def random_candidate(self, problem: AssemblyProblem) -> Candidate | None:
        """A feasible assembly drawn at random: the control."""
        generator = np.random.default_rng(self.config.seed)
        assembly = random_feasible(problem, generator)
        return None if assembly is None else self._candidate(problem, assembly)


def placed_blocks(stored: StoredPartition) -> list[PlacedBlock]:
    """The partition's blocks, stage by stage, donors in order."""
    blocks = [
        PlacedBlock(ref=stored.block(donor, stage), stage=stage, set_index=index)
        for donor, sets in enumerate(stored.partition.sets)
        for stage, index in enumerate(sets)
    ]
    return sorted(blocks, key=lambda block: (block.stage, block.ref))


FRONTIER_POINTS = 24


def frontier(assembler: Assembler, problem: AssemblyProblem) -> tuple[list[dict[str, Any]], bool]:
    """Assemblies that no other beats in score and every cost at once, best first.

    The costs are params, multiply-adds and, where its budget is given, latency.

    Returns:
        At most ``FRONTIER_POINTS`` of them, and whether these are all.
    """
    traded = [r.name for r in problem.resources if r.name in ("params", "flops", "latency")]
    found = pareto(
        problem, traded, max_points=FRONTIER_POINTS, max_seconds=assembler.config.max_seconds
    )
    points = []
    for assembly in found.assemblies:
        refs = [assembler.blocks[number].ref for number in assembly.blocks]
        points.append(
            {
                "score": assembly.score / MICRO,
                "params": assembly.costs[0],
                "flops": assembly.costs[1],
                "latency_ns": problem.total("latency", assembly.costs),
                "memory_bytes": problem.total("memory", assembly.costs),
                "network": " + ".join(str(ref) for ref in merged(refs)),
                "blocks": [[ref.donor, ref.start, ref.stop] for ref in refs],
            }
        )
    return points, found.complete


def explain_infeasible(
    problem: AssemblyProblem, wholes: Sequence[Candidate], config: AssembleConfig
) -> InfeasibleError:
    """The error that says which limit is broken, by how much, and what would fit."""
    reason = explain(problem, max_seconds=config.max_seconds)
    if reason is None:
        return InfeasibleError("whole models are all that fits", "allow them: leave out --no-whole")
    error = reason.to_error()
    if wholes:
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
            error.hint += (
                f"; the fastest is {fast.refs[0].donor} with {show_time(fast.latency or 0)}"
            )
        if least.memory is not None:
            slim = min(wholes, key=lambda each: (each.memory or 0, each.params))
            error.details["whole_model_of_least_memory"] = {
                "donor": slim.refs[0].donor,
                "memory_bytes": slim.memory,
            }
            error.hint += f"; least memory takes {slim.refs[0].donor} with {slim.memory:,} bytes"
    return error
