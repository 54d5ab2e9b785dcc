"""CKA of a whole zoo at once against the loop over pairs, torch_cka, and the machine's peak.

    python tests/bench/bench_similarity.py            # under two minutes on two idle cores
    python tests/bench/bench_similarity.py --parts paper scale torch_cka

Features are synthetic: a low-rank part that nodes share, plus noise, in float16, with the channel
counts of 24 well-known models. Loops are timed on a sample of pairs and extrapolated to all pairs;
lines that hold an extrapolated figure say so.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from dery_cli.core.similarity import CKA, Known, MetricOptions, similarity

MODELS = {
    "resnet18": [64] * 2 + [128] * 2 + [256] * 2 + [512] * 3,
    "resnet34": [64] * 3 + [128] * 4 + [256] * 6 + [512] * 4,
    "resnet50": [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 4,
    "resnet101": [256] * 3 + [512] * 4 + [1024] * 23 + [2048] * 4,
    "resnext50": [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 4,
    "wide_resnet50": [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 4,
    "mobilenet_v3": [16] + [24] * 2 + [40] * 3 + [80] * 4 + [112] * 2 + [160] * 3 + [960],
    "efficientnet_b0": [16] + [24] * 2 + [40] * 2 + [80] * 3 + [112] * 3 + [192] * 4 + [320, 1280],
    "regnety_800m": [64] + [144] * 3 + [320] * 8 + [784] * 3,
    "regnety_1.6g": [48] * 2 + [120] * 6 + [336] * 17 + [888] * 3,
    "regnety_8g": [224] * 2 + [448] * 4 + [896] * 10 + [2016] * 2,
    "densenet121": [256, 512, 1024, 1024],
    "convnext_tiny": [96] * 3 + [192] * 3 + [384] * 9 + [768] * 4,
    "convnext_small": [96] * 3 + [192] * 3 + [384] * 27 + [768] * 4,
    "vit_tiny": [192] * 13,
    "vit_small": [384] * 13,
    "vit_base": [768] * 13,
    "deit_small": [384] * 13,
    "swin_tiny": [96] * 2 + [192] * 2 + [384] * 6 + [768] * 3,
    "swin_small": [96] * 2 + [192] * 2 + [384] * 18 + [768] * 3,
    "swin_base": [128] * 2 + [256] * 2 + [512] * 18 + [1024] * 3,
    "mixer_small": [512] * 9,
    "resnet50_inat": [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 4,
    "resnet50_swav": [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 4,
}


def synthetic(channels: int, samples: int, generator: torch.Generator, shared: Tensor) -> Tensor:
    """Features [samples, channels] in float16: a third shared low rank, the rest their own."""
    mix = torch.randn(shared.shape[1], channels, generator=generator)
    own = torch.randn(samples, channels, generator=generator)
    return (shared @ mix * 0.3 + own + 2.0).half()


def peak_rate(size: int = 3072, repeats: int = 3) -> float:
    """The machine's multiply-adds a second on a large float32 product."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    a @ b
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return size**3 / best


def resident(peak: bool = False) -> float:
    """Resident memory of this process in GB, now or at its peak since ``reset_peak``."""
    word = "VmHWM" if peak else "VmRSS"
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(word))
    return int(line.split()[1]) * 1024 / 1e9


def reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def timed(run: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def hsic_textbook(k: Tensor, other: Tensor) -> Tensor:
    """HSIC_1 as the papers print it and research code writes it: with the product K L."""
    m = k.shape[0]
    product = k @ other
    return (
        torch.trace(product)
        + k.sum() * other.sum() / ((m - 1) * (m - 2))
        - 2 * product.sum() / (m - 2)
    )


def hsic_careful(k: Tensor, other: Tensor) -> Tensor:
    """The same without the product."""
    m = k.shape[0]
    return (
        (k * other).sum()
        + k.sum() * other.sum() / ((m - 1) * (m - 2))
        - 2 * (k.sum(0) @ other.sum(0)) / (m - 2)
    )


def pair_loop(
    x: Tensor, y: Tensor, minibatch: int, hsic: Callable[[Tensor, Tensor], Tensor]
) -> float:
    """CKA of one pair of nodes as a loop over pairs computes it: two Grams, three HSICs."""
    total = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(x), minibatch):
        grams = []
        for feat in (x, y):
            feat = feat[start : start + minibatch].float()
            feat = feat - feat.mean(0)
            grams.append((feat @ feat.T).fill_diagonal_(0))
        k, other = grams
        total += torch.stack([hsic(k, other), hsic(k, k), hsic(other, other)]).double()
    return float(total[0] / (total[1] * total[2]).sqrt())


def needed(channels: list[int], samples: int, minibatch: int) -> float:
    """Multiply-adds that the algorithm needs: half Grams, and half of all pairs over half Grams."""
    batches = samples / minibatch
    half = minibatch * (minibatch + 1) / 2
    return batches * half * (sum(channels) + len(channels) * (len(channels) + 1) / 2)


def paper_size(samples: int = 2048) -> None:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(samples, 32, generator=generator)
    channels = [c for widths in MODELS.values() for c in widths]
    features = [synthetic(c, samples, generator, shared) for c in channels]
    nodes = len(channels)
    pairs = nodes * (nodes + 1) // 2
    print(
        f"paper-size zoo: {len(MODELS)} models, {nodes} nodes, {samples} samples, "
        f"{sum(channels) / nodes:.0f} channels on average, {torch.get_num_threads()} threads"
    )
    print(
        f"{'minibatch':>9} {'time':>8} {'of peak':>8} {'memory':>8} "
        f"{'textbook loop':>16} {'ratio':>8} {'careful loop':>16} {'ratio':>8} {'max diff':>9}"
    )
    for minibatch in (256, 2048):
        before, reset = resident(), reset_peak
        reset()
        rate = peak_rate()
        seconds, result = timed(
            lambda m=minibatch: similarity(features, CKA, MetricOptions(minibatch=m))
        )
        rate = max(rate, peak_rate())
        memory = resident(peak=True) - before
        sample = torch.randint(nodes, (6 if minibatch == 2048 else 24, 2), generator=generator)
        loops, diff = [], 0.0
        for hsic in (hsic_textbook, hsic_careful):
            spent = 0.0
            for i, j in sample.tolist():
                took, value = timed(
                    lambda i=i, j=j, h=hsic, m=minibatch: pair_loop(features[i], features[j], m, h)
                )
                spent += took
                diff = max(diff, abs(value - float(result.sim_PP[i, j])))
            loops.append(spent / len(sample) * pairs)
        print(
            f"{minibatch:>9} {seconds:>7.1f}s "
            f"{needed(channels, samples, minibatch) / seconds / rate:>8.2f} {memory:>6.1f}GB "
            f"{loops[0] / 3600:>14.2f}h* {loops[0] / seconds:>7.0f}x "
            f"{loops[1] / 3600:>14.2f}h* {loops[1] / seconds:>7.0f}x {diff:>9.1e}"
        )
    print(f"* extrapolated to {pairs} pairs from the mean of 24 (256) or 6 (2048) random ones")
    print(f"matrix-product peak of this machine: {rate / 1e9:.0f} G multiply-adds a second")


if __name__ == "__main__":
    paper_size()
