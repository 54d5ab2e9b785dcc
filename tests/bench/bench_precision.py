"""What half precision and memory layout gain in speed, and what they change in similarity.

    python tests/bench/bench_precision.py [--size 96] [--images 64] [--device cpu] [--models a,b]

For each timm model (random weights, random images): images a second of embed's passes in fp32 with
either layout and in bf16, and how far bf16's pooled features are from fp32's; then the largest
difference of linear CKA between any two nodes of the models. Times are of processor time with one
thread on a CPU, of the clock elsewhere. What ``auto`` chooses is marked by a star.
"""

from __future__ import annotations

import argparse
import time

import timm
import torch

from dery_cli.core.dissection.dissect import dissect
from dery_cli.core.similarity.compare import MetricOptions, similarity
from dery_cli.core.similarity.features import embed_batches
from dery_cli.runtime.devices import Arithmetic, choose_arithmetic, forbid_tf32

MODELS = "resnet18,efficientnet_lite0,regnety_004,convnext_atto,vit_tiny_patch16_224"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", default=MODELS, help="timm models, by commas")
    options = parser.parse_args()
    device = torch.device(options.device)
    forbid_tf32()
    clock = time.perf_counter
    if device.type == "cpu":
        torch.set_num_threads(1)
        clock = time.process_time
        print(f"one thread, {torch.backends.cpu.get_cpu_capability()}")
    draw = torch.Generator().manual_seed(0)
    coarse = torch.randn(options.images, 3, 6, 6, generator=draw)
    x_NCHW = torch.nn.functional.interpolate(coarse, options.size, mode="bicubic").to(device)
    ways = {
        "contiguous": ("fp32", False),
        "channels": ("fp32", True),
        "bf16": ("bf16", True),
    }
    pooled: dict[str, list[torch.Tensor]] = {way: [] for way in ways}
    print(f"{'model':<24}" + "".join(f"{way:>13}" for way in ways) + f"{'bf16 error':>12}")
    for name in options.models.split(","):
        torch.manual_seed(0)
        sized = {"img_size": options.size} if "vit" in name else {}
        model = timm.create_model(name, **sized).eval().to(device)
        dissection = dissect(model, x_NCHW[:1])
        cells, features = [], {}
        chosen = choose_arithmetic("auto", device, model)
        for way, (precision, channels_last) in ways.items():
            arithmetic = Arithmetic(device=device, precision=precision, channels_last=channels_last)
            arithmetic.prepared(model)
            batches = [arithmetic.laid_out(x) for x in torch.split(x_NCHW, options.batch_size)]
            times = []
            for _ in range(options.repeats if precision == "fp32" else 1):
                started = clock()
                given = list(embed_batches(dissection, batches, computing=arithmetic.computing))
                times.append(clock() - started)
            features[way] = [
                torch.cat([batch.nodes[node].feat_NC for batch in given])
                for node in range(1, len(given[0].nodes))
            ]
            pooled[way] += features[way]
            star = "*" if (arithmetic == chosen) else ""
            cells.append(f"{options.images / min(times):.1f}{star}")
        error = max(
            float((half - full).norm() / full.norm())
            for half, full in zip(features["bf16"], features["contiguous"], strict=True)
        )
        print(f"{name:<24}" + "".join(f"{cell:>13}" for cell in cells) + f"{error:>12.4f}")
    sims = {
        way: similarity(found, options=MetricOptions(minibatch=options.images)).sim_PP
        for way, found in pooled.items()
    }
    for way in ("channels", "bf16"):
        change = float((sims[way] - sims["contiguous"]).abs().max())
        print(f"largest change of CKA, {way} against contiguous: {change:.2e}")


if __name__ == "__main__":
    main()
