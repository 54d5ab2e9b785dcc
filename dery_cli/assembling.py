"""The assemble stage: program, candidates, proxy, pick.

The order is that of DESIGN.md: the program over blocks and edges gives the N best by its additive
objective; whole models within the budget join them; every candidate is built with closed-form
stitches; a training-free proxy of the finished network decides.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dery_cli.artifacts import Artifact, Workspace
from dery_cli.config import AssembleConfig
from dery_cli.core.assemble import AssemblyProblem, cross_check, n_best, solve
from dery_cli.core.assemble_explain import explain
from dery_cli.core.assemble_frontier import pareto, random_feasible
from dery_cli.core.dissect import Dissection
from dery_cli.core.network import AssembledNetwork, NetworkBuilder, linear_head
from dery_cli.core.proxies import ProxyInputs, pre_logits
from dery_cli.core.ridge import fit_classifier
from dery_cli.core.stitch import StitchFit
from dery_cli.data import DataSet, choose_samples
from dery_cli.embeddings import Embeddings
from dery_cli.errors import DeryError, InfeasibleError
from dery_cli.loading import ImageBatches
from dery_cli.plugin import Proxy
from dery_cli.reassembly import (
    MICRO,
    Joint,
    PlacedBlock,
    boundary_nodes,
    build_problem,
    geometric_mean,
    joint_costs,
    merged,
    network_cost,
    probe_nodes,
    score_joints,
    whole_model,
)
from dery_cli.types import BlockRef
from dery_cli.zoo import Zoo, load_donor

CBC_SECONDS = 10.0
"""Time CBC gets to confirm the exact search, which decides."""

CBC_EDGES = 4000
"""Above so many edges CBC is given those that the search's bounds left."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A network that may be picked.

    Args:
        refs: Its blocks in order.
        sets: Equivalence set of each block; None for a whole model.
        params: Parameters, stitches and head included.
        flops: Multiply-adds for one image, likewise.
        program_score: The program's objective; None for a whole model.
    """

    refs: tuple[BlockRef, ...]
    sets: tuple[int, ...] | None
    params: int
    flops: int
    program_score: float | None

    @property
    def whole(self) -> bool:
        return self.sets is None

    def __str__(self) -> str:
        if self.whole:
            return f"whole {self.refs[0].donor}"
        return " + ".join(str(ref) for ref in merged(self.refs))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
    """A built candidate.

    Args:
        candidate: What was built.
        proxy: Its proxy's score.
        fits: Of the stitches.
    """

    candidate: Candidate
    proxy: float
    fits: tuple[StitchFit | None, ...]

    @property
    def r2(self) -> float | None:
        """Geometric mean of the stitches' cross-validated R2."""
        return geometric_mean([fit.r2 for fit in self.fits if fit is not None])

    def to_json(self) -> dict[str, Any]:
        return {
            "network": str(self.candidate),
            "whole": self.candidate.whole,
            "blocks": [[ref.donor, ref.start, ref.stop] for ref in self.candidate.refs],
            "params": self.candidate.params,
            "flops": self.candidate.flops,
            "program_score": self.candidate.program_score,
            "proxy": self.proxy,
            "r2": [None if fit is None else fit.r2 for fit in self.fits],
        }


class DonorPool:
    """Donors built and dissected on one device, each when it is first asked for."""

    def __init__(self, zoo: Zoo, workspace: Workspace, device: torch.device) -> None:
        self._zoo, self._workspace, self._device = zoo, workspace, device
        self._loaded: dict[str, Dissection] = {}

    def __getitem__(self, name: str) -> Dissection:
        if name not in self._loaded:
            self._loaded[name] = load_donor(self._zoo[name], self._workspace, device=self._device)
        return self._loaded[name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """The target images as every donor sees them.

    Args:
        data: The data set.
        indices: Training images that things are fitted and chosen on.
        crop: Field of view.
        batch_size: Images a batch.
        device: Where the batches go.
        workers: Processes that decode.
    """

    data: DataSet
    indices: tuple[int, ...]
    crop: float
    batch_size: int
    device: torch.device
    workers: int

    @property
    def labels(self) -> list[int] | None:
        labels = self.data.train.labels
        return None if labels is None else [int(labels[i]) for i in self.indices]

    @property
    def num_classes(self) -> int | None:
        return None if self.data.classes is None else len(self.data.classes)


class Assembler:
    """Everything one ``dery assemble`` needs, loaded once.

    Args:
        workspace: Where donors' local checkpoints are.
        zoo: The donors.
        embeddings: Of all of them.
        partition: The partition's record.
        target: Target images.
        config: Options.
    """

    def __init__(
        self,
        workspace: Workspace,
        zoo: Zoo,
        embeddings: Embeddings,
        calibration: DataSet,
        partition: Artifact,
        target: Target,
        config: AssembleConfig,
    ) -> None:
        self.zoo, self.embeddings, self.target, self.config = zoo, embeddings, target, config
        self.blocks = placed_blocks(partition)
        self.donors = DonorPool(zoo, workspace, target.device)
        self._calibration = calibration
        self._views: dict[tuple[str, str], ImageBatches] = {}
        self._builder = NetworkBuilder(self.donors, lambda name: self._view("calibration", name))

    def _view(self, which: str, donor: str) -> ImageBatches:
        """Images as a donor sees them, decoded once."""
        key = (which, donor)
        if key not in self._views:
            calibration = which == "calibration"
            indices = self.embeddings.calibration.indices[: self.config.fit_samples]
            self._views[key] = ImageBatches(
                self._calibration.train if calibration else self.target.data.train,
                indices if calibration else self.target.indices,
                self.zoo[donor].input,
                crop=self.target.crop,
                batch_size=self.target.batch_size,
                device=self.target.device,
                workers=self.target.workers,
                keep=True,
            )
        return self._views[key]

    def check_budget(self) -> None:
        """Refuse a budget that nothing fits, before anything is built.

        Raises:
            InfeasibleError: No assembly and no whole model is within it.
        """
        problem = self.problem(None, joint_costs(self.blocks, self.zoo))
        wholes = self.whole_models() if self.config.whole else []
        if not wholes and n_best(problem, 1, max_seconds=self.config.max_seconds).best is None:
            raise explain_infeasible(problem, self.zoo, self.target.num_classes, self.config)

    def scores(self, advance: Callable[[str], None]) -> dict[str, Any]:
        """Gains and joints as the scores artifact keeps them: no budget or filter enters."""
        gains = self.gains(lambda: advance("probing blocks"))
        joints = self.joints(lambda: advance("scoring joints"))
        return {
            "gains": None
            if gains is None
            else [[b.ref.donor, b.ref.start, b.ref.stop, gains[b.ref]] for b in self.blocks],
            "joints": [[*pair, joint.r2] for pair, joint in sorted(joints.items())],
        }

    def problem_of(self, scores: Mapping[str, Any]) -> AssemblyProblem:
        """The integer program from the scores artifact's data."""
        gains = None
        if scores["gains"] is not None:
            gains = {BlockRef(*entry[:3]): float(entry[3]) for entry in scores["gains"]}
        joints = joint_costs(self.blocks, self.zoo)
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
            batches = iter(self._view("target", donor))
            found = probe_nodes(self.donors[donor], nodes, batches, labels, num_classes)
            accuracy.update({(donor, node): q for node, q in found.items()})
            accuracy[donor, 0] = 1 / num_classes
            advance()
        return {
            b.ref: accuracy[b.ref.donor, b.ref.stop] - accuracy[b.ref.donor, b.ref.start]
            for b in self.blocks
        }

    def joints(self, advance: Callable[[], None]) -> dict[tuple[int, int], Joint]:
        """R2 and cost of every joint."""
        return score_joints(self.blocks, self.embeddings, advance)

    def problem(
        self, gains: dict[BlockRef, float] | None, joints: dict[tuple[int, int], Joint]
    ) -> AssemblyProblem:
        """The integer program."""
        return build_problem(
            self.blocks,
            self.zoo,
            joints,
            gains,
            num_classes=self.target.num_classes,
            config=self.config,
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
            members = [self.blocks[number] for number in assembly.blocks]
            refs = tuple(member.ref for member in members)
            if len(merged(refs)) == 1:  # a whole model; it joins below
                continue
            seen.add(merged(refs))
            chosen.append(
                Candidate(
                    refs=refs,
                    sets=tuple(member.set_index for member in members),
                    params=assembly.costs[0],
                    flops=assembly.costs[1],
                    program_score=assembly.score / MICRO,
                )
            )
        wholes = self.whole_models() if self.config.whole else []
        chosen += [whole for whole in wholes if merged(whole.refs) not in seen]
        if not chosen:
            raise explain_infeasible(problem, self.zoo, self.target.num_classes, self.config)
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
        fitting = []
        for name, donor in self.zoo.donors.items():
            if self.config.donors.reasons(donor):
                continue
            ref = whole_model(self.zoo, name)
            cost = network_cost(self.zoo, [ref], self.target.num_classes)
            if self.config.budget.admits(cost.params, cost.flops):
                fitting.append(
                    Candidate(
                        refs=(ref,),
                        sets=None,
                        params=cost.params,
                        flops=cost.flops,
                        program_score=None,
                    )
                )
        return fitting

    def random_candidate(self, problem: AssemblyProblem) -> Candidate | None:
        """A feasible assembly drawn at random: the control."""
        generator = np.random.default_rng(self.config.seed)
        assembly = random_feasible(problem, generator)
        if assembly is None:
            return None
        members = [self.blocks[number] for number in assembly.blocks]
        return Candidate(
            refs=tuple(member.ref for member in members),
            sets=tuple(member.set_index for member in members),
            params=assembly.costs[0],
            flops=assembly.costs[1],
            program_score=assembly.score / MICRO,
        )

    def score(self, candidate: Candidate, proxy: Proxy) -> Scored:
        """Build a candidate with closed-form stitches and ask the proxy."""
        built = self._builder.build(candidate.refs)
        batches = self._view("target", candidate.refs[0].donor)
        value = proxy(
            ProxyInputs(
                network=built.network,
                batches=lambda: iter(batches),
                labels=self.target.labels,
                num_classes=self.target.num_classes,
            )
        )
        return Scored(candidate=candidate, proxy=float(value), fits=built.fits)

    def finish(self, candidate: Candidate) -> AssembledNetwork:
        """The candidate as a network of its own, with a closed-form head where there are labels."""
        network = copy.deepcopy(self._builder.build(candidate.refs).network)
        labels, num_classes = self.target.labels, self.target.num_classes
        if labels is not None and num_classes is not None:
            batches = self._view("target", candidate.refs[0].donor)
            x_NC = pre_logits(network, batches)
            classifier = fit_classifier(x_NC, torch.tensor(labels), num_classes)
            network.head = linear_head(classifier).to(self.target.device)
        return network.eval()

    def test_accuracy(self, network: AssembledNetwork, donor: str) -> float | None:
        """Top-1 on the test images, which nothing was chosen on; None where there are none."""
        test = self.target.data.test
        if test is None or test.labels is None or network.head is None:
            return None
        batches = ImageBatches(
            test,
            range(len(test)),
            self.zoo[donor].input,
            crop=self.target.crop,
            batch_size=self.target.batch_size,
            device=self.target.device,
            workers=self.target.workers,
        )
        return accuracy(network, batches, test.labels)


def accuracy(network: AssembledNetwork, batches: Iterable[Tensor], labels: Sequence[int]) -> float:
    """Top-1 accuracy of a network's logits."""
    with torch.inference_mode():
        guess = torch.cat([network(x).argmax(1).cpu() for x in batches])
    return float((guess == torch.tensor(list(labels))).double().mean())


def placed_blocks(partition: Artifact) -> list[PlacedBlock]:
    """The partition's blocks, stage by stage, donors in order."""
    blocks = []
    for donor in partition.data["donors"]:
        for stage, index in enumerate(donor["sets"]):
            ref = BlockRef(donor["donor"], donor["cuts"][stage], donor["cuts"][stage + 1])
            blocks.append(PlacedBlock(ref=ref, stage=stage, set_index=index))
    return sorted(blocks, key=lambda block: (block.stage, block.ref))


def choose_target(data: DataSet, samples: int, seed: int) -> tuple[int, ...]:
    """The target's training images that heads and probes are fitted on, in order."""
    return tuple(sorted(choose_samples(len(data.train), samples, seed)))


def pick(scored: Sequence[Scored]) -> Scored:
    """The best by proxy; ties go to the smaller network, then to the first by name."""

    def order(entry: Scored) -> tuple[float, int, int, str]:
        candidate = entry.candidate
        return (-entry.proxy, candidate.params, candidate.flops, str(candidate))

    return min(scored, key=order)


def explain_infeasible(
    problem: AssemblyProblem, zoo: Zoo, num_classes: int | None, config: AssembleConfig
) -> InfeasibleError:
    """The error that says which limit is broken, by how much, and what would fit."""
    reason = explain(problem, max_seconds=config.max_seconds)
    if reason is None:
        return InfeasibleError("whole models are all that fits", "allow them: leave out --no-whole")
    error = reason.to_error()
    sizes = {
        name: network_cost(zoo, [whole_model(zoo, name)], num_classes)
        for name, donor in zoo.donors.items()
        if not config.donors.reasons(donor)
    }
    if config.whole and sizes:
        name = min(sizes, key=lambda each: (sizes[each].params, sizes[each].flops))
        cost = sizes[name]
        whole = {"donor": name, "params": cost.params, "flops": cost.flops}
        error.details = {**(error.details or {}), "smallest_whole_model": whole}
        error.hint = (
            f"{error.hint}; the smallest whole model is {name} with {cost.params:,} params and "
            f"{cost.flops:,} multiply-adds"
        )
    return error


FRONTIER_POINTS = 24


def frontier(assembler: Assembler, problem: AssemblyProblem) -> tuple[list[dict[str, Any]], bool]:
    """Assemblies that no other beats in score, params and multiply-adds at once, best first.

    Returns:
        At most ``FRONTIER_POINTS`` of them, and whether these are all.
    """
    found = pareto(problem, max_points=FRONTIER_POINTS, max_seconds=assembler.config.max_seconds)
    points = []
    for assembly in found.assemblies:
        refs = [assembler.blocks[number].ref for number in assembly.blocks]
        points.append(
            {
                "score": assembly.score / MICRO,
                "params": assembly.costs[0],
                "flops": assembly.costs[1],
                "network": " + ".join(str(ref) for ref in merged(refs)),
                "blocks": [[ref.donor, ref.start, ref.stop] for ref in refs],
            }
        )
    return points, found.complete


def check_size(network: AssembledNetwork, candidate: Candidate, input_size: Sequence[int]) -> None:
    """Count the built network again.

    Raises:
        DeryError: It is not the size that the program promised.
    """
    from dery_cli.core.cost import count_flops, count_params

    params = count_params(network)
    flops = count_flops(network, torch.zeros(1, *input_size))
    if (params, flops) != (candidate.params, candidate.flops):
        raise DeryError(
            f"the built network has {params:,} params and {flops:,} multiply-adds, the program "
            f"counted {candidate.params:,} and {candidate.flops:,}",
            "please report this as a bug",
        )
