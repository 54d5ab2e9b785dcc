"""The program over paths: against python-mip on a small zoo, against time on large ones.

Reference on the small zoo: the whole program in CBC, for the same optimum. On the large ones: the
bounds that were set, two seconds of one core for 24 models, 430 nodes and 3 stitches, and a minute
and 4 GB for 1,000 models, 20,000 nodes and the 16 best partners of each node. Zoos are drawn by
seed: parameters grow with depth, probes get better with it, and stitches lose by the distance in
depth and by chance. Seconds of processor time. ``--full`` adds seeds, other budgets and a limit on
donors.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from dery_cli.core.assembly.paths import Limits, Parts, PathProblem, Space, path_problem
from dery_cli.core.assembly.solve import cross_check, n_best, solve

CLASSES = 100
BEST = 32


def draw_space(models: int, nodes: int, *, partners: int | None = None, seed: int = 0) -> Space:
    """A zoo of ``models`` donors of about ``nodes`` nodes, 3 stitches at most.

    Args:
        models: Donors.
        nodes: Of each, on average.
        partners: Stitches from each node; all pairs by default.
        seed: Of the draw.
    """
    rng = np.random.default_rng(seed)
    num_nodes = np.clip(rng.poisson(nodes - 6, models) + 6, 4, None)
    first_D = np.concatenate([[0], np.cumsum(num_nodes)])
    donor_V = np.repeat(np.arange(models), num_nodes)
    index_V = np.arange(len(donor_V)) - first_D[donor_V]
    depth_V = index_V / (num_nodes[donor_V] - 1)
    size_D = rng.lognormal(np.log(2e7), 0.8, models)

    def spread(share_V: np.ndarray, total_D: np.ndarray) -> np.ndarray:
        share_V = share_V * (index_V > 0)
        return (share_V / np.bincount(donor_V, share_V)[donor_V] * total_D[donor_V]).astype(int)

    count = len(donor_V)
    params = np.cumsum(spread(np.exp(1.5 * depth_V) * rng.lognormal(0, 0.4, count), size_D))
    flops = np.cumsum(spread(rng.lognormal(0, 0.5, count), 180 * size_D))
    chs_V = (64 * 2 ** (3.5 * depth_V) * rng.choice([1, 1.5, 2], count)).astype(int)
    grid_V = np.maximum(7, 56 / 2 ** np.floor(3.9 * depth_V)).astype(int)
    probe_V = 0.1 + 0.7 * depth_V**0.7 * rng.lognormal(0, 0.05, models)[donor_V]
    pairs = [np.triu_indices(n, 1) for n in num_nodes]
    src_G = np.concatenate([f + i for f, (i, _) in zip(first_D, pairs, strict=False)])
    dst_G = np.concatenate([f + j for f, (_, j) in zip(first_D, pairs, strict=False)])
    if partners is None:
        src_J, dst_J = (a.ravel() for a in np.indices((count, count)))
    else:
        src_J = np.repeat(np.arange(count), partners)
        src_J, dst_J = np.unique([src_J, rng.integers(0, count, len(src_J))], axis=1)
    usable = (index_V[src_J] > 0) & (index_V[dst_J] > 0) & (depth_V[dst_J] < 1)
    usable &= (donor_V[src_J] != donor_V[dst_J]) | (dst_J >= src_J)
    src_J, dst_J = src_J[usable], dst_J[usable]
    loss_J = 1.5 * np.abs(depth_V[src_J] - depth_V[dst_J]) + rng.exponential(0.3, len(src_J))
    cells_J = np.minimum(grid_V[src_J], grid_V[dst_J]) ** 2
    ends = np.flatnonzero(index_V > 0)
    return Space(
        donors=tuple(f"d{d}" for d in range(models)),
        num_nodes=tuple(num_nodes.tolist()),
        segments=Parts(
            src=src_G,
            dst=dst_G,
            score=np.zeros(len(src_G), dtype=int),
            costs={
                "params": params[dst_G] - params[src_G],
                "flops": flops[dst_G] - flops[src_G],
            },
        ),
        stitches=Parts(
            src=src_J,
            dst=dst_J,
            score=(-2e5 * loss_J).astype(int),
            costs={
                "params": (chs_V[src_J] + 1) * chs_V[dst_J],
                "flops": chs_V[src_J] * chs_V[dst_J] * cells_J,
            },
        ),
        heads=Parts(
            src=ends,
            dst=ends,
            score=(1e6 * probe_V[ends]).astype(int),
            costs={
                "params": (chs_V[ends] + 1) * CLASSES,
                "flops": chs_V[ends] * CLASSES,
            },
        ),
        max_stitches=3,
    )


def within(space: Space, share: float, **options: int) -> PathProblem:
    """The program under ``share`` of the median donor's params, and 180 multiply-adds for each."""
    ends = (space.first_D[space.donor_V[space.segments.src] + 1] - 1) == space.segments.dst
    whole_G = ends & (space.index_V[space.segments.src] == 0)
    whole_D = space.segments.costs["params"][whole_G]
    most = int(share * float(np.median(whole_D)))
    limits = {"params": Limits(maximum=most), "flops": Limits(maximum=180 * most)}
    return path_problem(space, limits, **options)


def memory_mb() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def against_cbc(seed: int) -> None:
    stated = within(draw_space(5, 9, seed=seed), 0.5)
    started = time.process_time()
    found = n_best(stated.problem, 1)
    ours = time.process_time() - started
    started = time.process_time()
    everything = np.ones(stated.problem.num_edges, dtype=bool)
    answer = solve(stated.problem, keep_E=everything)
    theirs = time.process_time() - started
    agreement = cross_check(answer, found)
    print(
        f"  5 models, seed {seed}: {stated.problem.num_edges:,} edges, search {ours:.3f} s, "
        f"CBC {theirs:.2f} s, ratio {theirs / ours:.0f}; {agreement.reason}",
        flush=True,
    )


def against_time(name: str, space: Space, share: float, bound: float, **options: int) -> None:
    started = time.process_time()
    stated = within(space, share, **options)
    found = n_best(stated.problem, BEST)
    seconds = time.process_time() - started
    gap = "proven" if found.complete else f"gap {(found.gap or 0) / max(1, found.best.score):.2%}"
    print(
        f"  {name}: {sum(space.num_nodes):,} nodes, {stated.problem.num_edges:,} edges, "
        f"{BEST} best in {seconds:.2f} s, {seconds / bound:.2f} of {bound:g} s; {gap}; "
        f"{len({stated.network(a) for a in found.assemblies})} networks, {memory_mb():,.0f} MB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true")
    full = parser.parse_args().full
    print("against the whole program in python-mip (CBC)")
    for seed in range(5 if full else 2):
        against_cbc(seed)
    print("against time")
    for seed in range(4 if full else 1):
        space = draw_space(24, 18, seed=seed)
        for share in (0.5, 0.25, 1.0) if full else (0.5,):
            against_time(f"24 models, {share} of the median, seed {seed}", space, share, 2)
        if full:
            for donors in (1, 2, 3):
                against_time(f"  the same, {donors} donors", space, 0.5, 2, max_donors=donors)
    large = draw_space(1_000, 20, partners=16)
    against_time("1,000 models, 16 partners a node", large, 0.5, 60)


if __name__ == "__main__":
    main()
