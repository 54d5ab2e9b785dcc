"""Throughput of embed (all nodes pooled) against the bare forward pass of the same model.

    python tests/bench/bench_embed.py           # resnet18, vit_tiny at 224: about a minute
    python tests/bench/bench_embed.py --full    # resnet50, vit_small, swin_tiny at 224

Passes are paired: bare, embed, bare, embed, ... on the same batch; the ratio is that of the
medians. Images are ready in memory, so that reading and resizing, the same for both, is left out.
"""

from __future__ import annotations

import argparse
import statistics
import time

import timm
import torch

from dery_cli.core.dissection.dissect import dissect
from dery_cli.core.similarity.features import embed_batches

QUICK = ("resnet18", "vit_tiny_patch16_224")
FULL = ("resnet50", "vit_small_patch16_224", "swin_tiny_patch4_window7_224")


def bench(name: str, batch_size: int, repeats: int, device: str, cpu_time: bool) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name).eval().to(device)
    x = torch.randn(batch_size, 3, 224, 224, device=device)
    dissection = dissect(model, x[:1])

    @torch.inference_mode()
    def bare() -> None:
        model(x).cpu()

    def embed() -> None:
        next(embed_batches(dissection, [x], grid=4, grid_samples=batch_size, dtype=torch.float16))

    clock = time.process_time if cpu_time else time.perf_counter
    times: dict[str, list[float]] = {"bare": [], "embed": []}
    for round_ in range(repeats + 1):
        for label, run in (("bare", bare), ("embed", embed)):
            start = clock()
            run()
            if round_:  # the first warms up
                times[label].append(clock() - start)
    rate = {label: batch_size / statistics.median(spent) for label, spent in times.items()}
    print(
        f"{name:<30} {len(dissection.anatomy.nodes):>5} {batch_size:>5} {rate['bare']:>9.1f} "
        f"{rate['embed']:>9.1f} {rate['embed'] / rate['bare']:>6.3f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="the three models of the target")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, this process's time")
    chosen = parser.parse_args()
    if chosen.cpu_time:
        torch.set_num_threads(1)
    print(f"images a second at 224 x 224 on {chosen.device}, {torch.get_num_threads()} threads")
    print(f"{'model':<30} {'nodes':>5} {'batch':>5} {'bare':>9} {'embed':>9} {'ratio':>6}")
    for model_name in FULL if chosen.full else QUICK:
        bench(model_name, chosen.batch_size, chosen.repeats, chosen.device, chosen.cpu_time)
