"""The exact search against python-mip, on zoos of 24 and 1,000 models.

Reference for the N best: CBC, asked again with one no-good cut after each answer, as python-mip's
users do it. Measured in this run, in seconds of processor time, so that a busy machine changes
little. ``--full`` adds K = 8, larger lists and scores that make a hard knapsack.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from dery_cli.core.assembly.solve import AssemblyProblem, Resource, cross_check, n_best, solve


def zoo(num_models: int, num_stages: int, seed: int = 0, scores: str = "gains") -> AssemblyProblem:
    """Blocks with log-normal params and FLOPs, all edges of consecutive stages, both budgets.

    Args:
        num_models: Donors.
        num_stages: K; also the number of sets, in another order for every donor.
        seed: Of the draw.
        scores: ``gains`` grow slowly with size; ``size`` is almost the params, a hard knapsack.
    """
    rng = np.random.default_rng(seed)
    block_MK = np.arange(num_models * num_stages).reshape(num_models, num_stages)
    num_blocks = block_MK.size
    params_B = (rng.lognormal(0, 1, num_blocks) * 1e6).astype(np.int64)
    flops_B = (rng.lognormal(0, 1, num_blocks) * 1e9).astype(np.int64)
    if scores == "gains":
        score_B = rng.normal(200_000, 150_000, num_blocks) + 0.03 * params_B
    else:
        score_B = params_B + rng.integers(-20_000, 20_000, num_blocks)
    src_E = np.concatenate([np.repeat(block_MK[:, k], num_models) for k in range(num_stages - 1)])
    dst_E = np.concatenate([np.tile(block_MK[:, k + 1], num_models) for k in range(num_stages - 1)])
    stitched_E = src_E // num_stages != dst_E // num_stages
    fit_E = np.log(rng.uniform(0.01, 1, len(src_E)))
    return AssemblyProblem(
        num_stages=num_stages,
        num_sets=num_stages,
        stage_B=np.tile(np.arange(num_stages), num_models),
        set_B=np.concatenate([rng.permutation(num_stages) for _ in range(num_models)]),
        donor_B=np.repeat(np.arange(num_models), num_stages),
        score_B=score_B.astype(np.int64),
        src_E=src_E,
        dst_E=dst_E,
        score_E=(fit_E * 1e5 * stitched_E).astype(np.int64),
        resources=(
            Resource(
                name="params",
                cost_B=params_B,
                cost_E=rng.integers(1_000, 60_000, len(src_E)) * stitched_E,
                maximum=int(np.median(params_B) * num_stages),
            ),
            Resource(
                name="flops",
                cost_B=flops_B,
                cost_E=rng.integers(10**6, 10**8, len(src_E)) * stitched_E,
                maximum=int(np.median(flops_B) * num_stages),
            ),
        ),
    )


def no_good_cuts(problem: AssemblyProblem, count: int) -> tuple[list[int], float]:
    """Scores of the ``count`` best by CBC with a cut against each answer, and the seconds."""
    import mip

    started = time.process_time()
    model = mip.Model(sense=mip.MAXIMIZE, solver_name=mip.CBC)
    model.verbose = 0
    x_B = [model.add_var(var_type=mip.BINARY) for _ in range(problem.num_blocks)]
    y_E = [model.add_var(ub=1) for _ in range(problem.num_edges)]
    score_X = np.concatenate([problem.score_B, problem.score_E]).tolist()
    var_X = x_B + y_E
    model.objective = mip.xsum(s * v for s, v in zip(score_X, var_X, strict=True))
    for label_B in (problem.stage_B, problem.set_B):
        for label in np.unique(label_B):
            model += mip.xsum(x_B[b] for b in np.flatnonzero(label_B == label)) == 1
    for b in range(problem.num_blocks):
        if problem.stage_B[b] < problem.num_stages - 1:
            model += mip.xsum(y_E[e] for e in np.flatnonzero(problem.src_E == b)) == x_B[b]
        if problem.stage_B[b] > 0:
            model += mip.xsum(y_E[e] for e in np.flatnonzero(problem.dst_E == b)) == x_B[b]
    for r in problem.resources:
        share_X = np.concatenate([r.cost_B, r.cost_E]) / r.maximum
        model += mip.xsum(s * v for s, v in zip(share_X.tolist(), var_X, strict=True)) <= 1
    scores = []
    for _ in range(count):
        model.optimize()
        if not model.num_solutions:
            break
        chosen = [b for b in range(problem.num_blocks) if x_B[b].x > 0.5]
        scores.append(round(model.objective_value))
        model += mip.xsum(x_B[b] for b in chosen) <= problem.num_stages - 1
    return scores, time.process_time() - started


def memory_mb() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def row(name: str, seconds: float, *rest: object) -> None:
    """One line of the table."""
    print(f"{name:<46}{seconds:>9.3f} s  {'  '.join(str(r) for r in rest)}", flush=True)


def small_zoo(cuts: int) -> None:
    problem = zoo(24, 4)
    print(f"24 models, K=4: {problem.num_blocks} blocks, {problem.num_edges} edges")
    started = time.process_time()
    best = n_best(problem, 1)
    first = time.process_time() - started
    row("  optimum, exact search", first, f"proven {best.proven}")
    started = time.process_time()
    answer = solve(problem)
    program = time.process_time() - started
    agreement = cross_check(answer, best)
    row("  optimum, python-mip (CBC)", program, f"x{program / first:.0f}", agreement.reason)
    started = time.process_time()
    many = n_best(problem, 500)
    row("  500 best, exact search", time.process_time() - started, f"complete {many.complete}")
    started = time.process_time()
    few = n_best(problem, cuts)
    ours = time.process_time() - started
    scores, theirs = no_good_cuts(problem, cuts)
    same = [a.score for a in few.assemblies] == scores
    row(f"  {cuts} best, exact search", ours)
    row(f"  {cuts} best, CBC and no-good cuts (reference)", theirs, f"x{theirs / ours:.0f}",
        f"same scores {same}")  # fmt: skip


def large_zoo(num_models: int, num_stages: int, count: int, scores: str) -> None:
    started = time.process_time()
    problem = zoo(num_models, num_stages, scores=scores)
    made = time.process_time() - started
    print(f"{num_models:,} models, K={num_stages}, scores '{scores}': {problem.num_edges:,} edges")
    row("  (making the arrays)", made, f"{memory_mb():.0f} MB")
    for n in (1, count):
        started = time.process_time()
        result = n_best(problem, n, max_seconds=60)
        seconds = time.process_time() - started
        proof = "complete" if result.complete else f"gap {(result.gap or 0) / 1e6:.6f}"
        left = f"{int(result.kept_E.sum()):,} edges left"
        row(f"  {n} best, exact search", seconds, proof, left, f"{memory_mb():.0f} MB")
    started = time.process_time()
    answer = solve(problem, keep_E=result.kept_E, max_seconds=60)
    agreement = cross_check(answer, result)
    row("  program on what is left (CBC)", time.process_time() - started,
        f"{answer.num_edges:,} edges", agreement.reason)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true")
    full = parser.parse_args().full
    small_zoo(cuts=100 if full else 10)
    large_zoo(1_000, 4, 32, "gains")
    if full:
        large_zoo(24, 8, 500, "gains")
        large_zoo(24, 8, 500, "size")
        large_zoo(1_000, 4, 32, "size")
        large_zoo(1_000, 8, 32, "gains")


if __name__ == "__main__":
    main()
