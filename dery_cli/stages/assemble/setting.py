"""Everything that one ``dery assemble`` works with, loaded once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Protocol

from dery_cli.core.assembly.problem import Assembly, AssemblyProblem
from dery_cli.core.assembly.search import SearchResult, n_best
from dery_cli.core.assembly.solve import cross_check, solve
from dery_cli.core.stitching.network import unfitted_network
from dery_cli.core.stitching.stem import with_fresh_stem
from dery_cli.data.batches import ImageStore
from dery_cli.data.samples import Split
from dery_cli.data.target import Target
from dery_cli.io.artifacts import Workspace
from dery_cli.stages.assemble.build import Builder
from dery_cli.stages.assemble.candidates import Candidate, Proof
from dery_cli.stages.assemble.config import AssembleConfig
from dery_cli.stages.assemble.costs import (
    LatencyTable,
    MemoryTable,
    measure_latency,
    time_network,
)
from dery_cli.stages.embed.store import Embeddings
from dery_cli.types import BlockRef, StemKind, StitchKind
from dery_cli.zoo.donors import DonorPool
from dery_cli.zoo.registry import Zoo
from dery_cli.zoo.whole import network_cost, whole_block

MICRO = 1_000_000
"""Scores of programs are integers in millionths."""

CBC_EDGES = 4000
"""Above so many edges CBC is given those that the search's bounds left."""


class Setting:
    """The donors, the target, the options, and what builds networks of them.

    Args:
        workspace: Where donors' local checkpoints are.
        embeddings: Of all donors.
        target: Target images.
        split: Of the target, which its parts keep to.
        config: Options.
    """

    def __init__(
        self,
        workspace: Workspace,
        embeddings: Embeddings,
        target: Target,
        split: Split,
        config: AssembleConfig,
    ) -> None:
        self.workspace, self.embeddings = workspace, embeddings
        self.zoo: Zoo = embeddings.zoo
        self.target, self.split, self.config = target, split, config
        self.donors = DonorPool(self.zoo, workspace, target.device)
        self.images = ImageStore(
            target.data.train,
            target.all_indices,
            crop=target.crop,
            batch_size=target.batch_size,
            device=target.device,
            workers=target.workers,
        )
        self.stitch, self.stem = StitchKind(config.stitch), StemKind(config.stem)
        self.builder = Builder(
            self.zoo, self.donors, self.images, target, config, workspace.scratch
        )
        self.latency: LatencyTable | None = None
        self.memory: MemoryTable | None = None

    @functools.cached_property
    def costed(self) -> Zoo:
        """The donors with the costs that they have in a network: a fresh stem has its own."""
        if self.stem is StemKind.DONOR:
            return self.zoo
        return Zoo(
            dataclasses.replace(donor, anatomy=with_fresh_stem(donor.anatomy))
            for donor in self.zoo.donors.values()
        )

    def measured_latency(self, advance: Callable[[], None]) -> LatencyTable:
        """Latencies of all parts, measured now; ``latency`` has to be set to count."""
        return measure_latency(
            self.zoo,
            self.donors,
            self.target.device,
            kind=self.stitch,
            batch_size=self.config.latency_batch,
            num_classes=self.num_classes,
            advance=advance,
        )

    def whole_latency(self, refs: Sequence[BlockRef]) -> int:
        """Nanoseconds of a network as a whole, measured now; what stitches hold is all one to it.

        Args:
            refs: Its blocks in order.
        """
        spec, device = self.zoo[refs[0].donor].input, self.target.device
        network = unfitted_network(
            self.donors, refs, kind=self.stitch, stem=self.stem, num_classes=self.num_classes
        )
        shape = (spec.in_chans, *spec.image_size)
        return time_network(network.to(device), shape, device, self.config.latency_batch)

    def use_memory(self) -> None:
        """Let memory count."""
        self.memory = MemoryTable(
            self.zoo,
            self.donors,
            kind=self.stitch,
            batch_size=self.config.memory_batch,
            num_classes=self.num_classes,
        )

    @property
    def num_classes(self) -> int | None:
        return self.target.num_classes

    def is_whole(self, refs: Sequence[BlockRef]) -> bool:
        """Whether a path is a donor as it is; with a fresh stem none is."""
        return (
            self.stem is StemKind.DONOR
            and len(refs) == 1
            and refs[0] == whole_block(self.zoo, refs[0].donor)
        )

    def priced(self, refs: Sequence[BlockRef], *, reestimated: bool = False) -> Candidate:
        """A network that no program gave, with what it costs."""
        cost = network_cost(self.costed, refs, self.num_classes, self.stitch)
        latency, memory = self.latency, self.memory
        return Candidate(
            refs=tuple(refs),
            sets=None,
            params=cost.params,
            flops=cost.flops,
            program_score=None,
            latency=None if latency is None else latency.network(refs),
            memory=None if memory is None else memory.network(refs),
            whole=self.is_whole(refs),
            reestimated=reestimated,
        )

    def admits(self, candidate: Candidate) -> bool:
        """Whether a network is within the budget."""
        return self.config.budget.admits(
            candidate.params,
            candidate.flops,
            latency=candidate.latency,
            memory=candidate.memory,
        )

    def allowed_wholes(self) -> list[Candidate]:
        """Whole donors that no option leaves out, whatever their size; none with a fresh stem."""
        return [
            self.priced((whole_block(self.zoo, name),))
            for name, donor in self.zoo.donors.items()
            if self.config.whole
            and self.stem is StemKind.DONOR
            and not self.config.donors.reasons(donor)
        ]

    def whole_candidates(self) -> list[Candidate]:
        """Whole donors within the budget."""
        return [whole for whole in self.allowed_wholes() if self.admits(whole)]

    def solved(self, problem: AssemblyProblem, count: int) -> tuple[list[Assembly], Proof]:
        """The best answers of a program, what is proven of them, and what CBC says of it."""
        found = best_of(problem, count, self.config)
        answer = solve(
            problem,
            max_seconds=self.config.max_seconds,
            keep_E=found.kept_E if problem.num_edges > CBC_EDGES else None,
        )
        agreement = cross_check(answer, found)
        ranked = list(found.assemblies)
        better = agreement.score_gap is None or agreement.score_gap < 0
        if answer.assembly is not None and not answer.broken and not found.proven and better:
            ranked.insert(0, answer.assembly)  # the search ran out of time before it
        return ranked, {
            "upper_bound": None if found.upper_bound is None else found.upper_bound / MICRO,
            "optimal": found.proven,
            "complete": found.complete,
            "solver": str(answer.status),
            "solver_agrees": agreement.agrees,
            "agreement": agreement.reason,
        }


def best_of(problem: AssemblyProblem, count: int, config: AssembleConfig) -> SearchResult:
    """The best answers of a program, in the time that the options allow."""
    return n_best(problem, count, max_seconds=config.max_seconds)


class SearchSpace(Protocol):
    """Networks that may be picked, as a program and as what its answers stand for."""

    @property
    def problem(self) -> AssemblyProblem:
        """The program."""

    def candidate(self, assembly: Assembly) -> Candidate:
        """The network of an answer."""

    def candidates(self) -> tuple[list[Candidate], Proof]:
        """What is worth building, best first, and what is proven of it.

        Raises:
            InfeasibleError: Nothing is within the budget.
        """

    def check_budget(self) -> None:
        """Refuse a budget that nothing fits, before anything is scored.

        Raises:
            InfeasibleError: Nothing is within it.
        """
