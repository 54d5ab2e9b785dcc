"""What every joint of a zoo would lose, against the loop over pairs.

The reference fits each pair alone: for every fold a ridge regression onto the target's probe logits
with the penalty of the same pair, from normal equations in float64. It is timed on a sample of
pairs, spread over the sources, and extrapolated to all; its answers are compared with ours.

    python tests/bench/bench_joints.py [--models 24] [--images 2048] [--classes 100]

Features are synthetic: a low-rank part that all nodes share, more of it with depth, and noise.
"""

from __future__ import annotations

import argparse
import random
import time

import torch

from dery_cli.core.stitching.joint_logits import JointTargets, joint_losses, probe_node
from dery_cli.core.stitching.ridge import RIDGE_PENALTIES

WIDTHS = ((64, 128, 256, 512), (96, 192, 384, 768), (256, 512, 1024, 2048), (384,), (192,))
UNITS = 18
SHARED = 160
CHUNK = 64


def synthetic(models, images, classes, seed=0):
    """Features and labels: ``models`` times ``UNITS`` nodes."""
    generator = torch.Generator().manual_seed(seed)
    label_N = torch.randint(classes, (images,), generator=generator)
    known_NS = torch.randn(classes, SHARED, generator=generator)[label_N]
    known_NS = known_NS + torch.randn(images, SHARED, generator=generator)
    nodes = []
    for model in range(models):
        widths = WIDTHS[model % len(WIDTHS)]
        for unit in range(UNITS):
            channels = widths[unit * len(widths) // UNITS]
            depth = (unit + 1) / UNITS
            mix_SC = torch.randn(SHARED, channels, generator=generator) / SHARED**0.5
            noise_NC = torch.randn(images, channels, generator=generator)
            nodes.append(depth * known_NS @ mix_SC + (1.2 - depth) * noise_NC)
    return nodes, label_N


def reference(x_NC, logits_ND, folds=4):
    """R2 and KL of one pair: the penalty of least held-out error over the same grid."""
    x_NC, y_ND = x_NC.double(), logits_ND.double()
    x_NC = (x_NC - x_NC.mean(0)) / x_NC.std(0, correction=0)
    unit = float(x_NC.square().sum()) / min(x_NC.shape)
    fold_N = torch.arange(len(x_NC)) % folds
    told_PND = torch.empty(len(RIDGE_PENALTIES), *y_ND.shape, dtype=torch.float64)
    spread = 0.0
    for fold in range(folds):
        kept_N, out_N = fold_N != fold, fold_N == fold
        mean_C, mean_D = x_NC[kept_N].mean(0), y_ND[kept_N].mean(0)
        z_NC, r_ND = x_NC[kept_N] - mean_C, y_ND[kept_N] - mean_D
        value_C, vector_CC = torch.linalg.eigh(z_NC.T @ z_NC)
        right_CD = vector_CC.T @ (z_NC.T @ r_ND)
        left_NC = (x_NC[out_N] - mean_C) @ vector_CC
        for number, penalty in enumerate(RIDGE_PENALTIES):
            shrunk_CD = right_CD / (value_C.clamp(min=0) + penalty * unit)[:, None]
            told_PND[number, out_N] = left_NC @ shrunk_CD + mean_D
        spread += float((y_ND[out_N] - mean_D).square().sum())
    error_P = (told_PND - y_ND).square().sum((1, 2))
    told_ND = told_PND[error_P.argmin()]
    kl = torch.nn.functional.kl_div(
        told_ND.log_softmax(1), y_ND.log_softmax(1), reduction="batchmean", log_target=True
    )
    return 1 - float(error_P.min()) / spread, float(kl)


def main() -> None:
    """Print the time of probes and of all pairs, beside the reference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=24)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--sample", type=int, default=12, help="pairs of the reference")
    parser.add_argument("--sources", type=int, default=0, help="0: all; else so many, extrapolated")
    args = parser.parse_args()
    nodes, label_N = synthetic(args.models, args.images, args.classes)
    print(
        f"{args.models} models, {len(nodes)} nodes of 64 to 2048 channels, {args.images} images, "
        f"{args.classes} classes, {torch.get_num_threads()} threads"
    )
    start = time.perf_counter()
    probes = [probe_node(x_NC, label_N, args.classes) for x_NC in nodes]
    print(f"probes                     {time.perf_counter() - start:8.1f} s", flush=True)
    start = time.perf_counter()
    chunks = [
        JointTargets.of([probe.logits_ND for probe in probes[first : first + CHUNK]], label_N)
        for first in range(0, len(probes), CHUNK)
    ]
    print(f"targets                    {time.perf_counter() - start:8.1f} s", flush=True)
    asked = list(range(len(nodes)))
    if args.sources:
        asked = random.Random(0).sample(asked, args.sources)
    start = time.perf_counter()
    found = {u: joint_losses(nodes[u], chunks) for u in asked}
    ours = (time.perf_counter() - start) * len(nodes) / len(asked)
    note = f", extrapolated from {len(asked)} sources" if args.sources else ""
    print(f"all {len(nodes) ** 2:,} pairs          {ours:8.1f} s{note}", flush=True)
    pairs = [(u, random.Random(u).randrange(len(nodes))) for u in asked]
    pairs = random.Random(1).sample(pairs, min(args.sample, len(pairs)))
    start = time.perf_counter()
    wanted = [reference(nodes[u], probes[v].logits_ND) for u, v in pairs]
    loop = (time.perf_counter() - start) / len(pairs) * len(nodes) ** 2
    print(f"loop over pairs            {loop:8.1f} s, extrapolated from {len(pairs)} pairs")
    print(f"ratio                      {loop / ours:8.0f}")
    r2 = max(abs(float(found[u].r2_V[v]) - w[0]) for (u, v), w in zip(pairs, wanted, strict=True))
    kl = max(abs(float(found[u].kl_V[v]) - w[1]) for (u, v), w in zip(pairs, wanted, strict=True))
    print(f"largest difference: R2 {r2:.4f}, KL {kl:.4f} (the reference's penalty is of folds)")


if __name__ == "__main__":
    main()
