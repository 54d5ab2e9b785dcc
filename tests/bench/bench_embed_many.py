"""``dery embed`` of several donors from JPEG files, over their bare forward passes.

    python tests/bench/bench_embed_many.py                  # five donors, 96 images: some minutes
    python tests/bench/bench_embed_many.py --images 512 --threads 8 --precision bf16 --device cuda

The bench writes the files (500 x 375). The bare passes are over tensors that are ready, in batches
of the same size, precision and memory layout, as far as the logits; they are timed before and
after. Two times of embed are set against them: that of the passes alone, and that of the whole
command, which also starts Python, builds, checks and dissects every donor, and hashes the images.
At least 0.8 is wanted of the passes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
from photographs import write_photographs

from dery_cli.runtime.devices import choose_arithmetic

MODELS = "resnet18,mobilenetv2_100,regnety_004,vit_tiny_patch16_224,convnext_atto"


def bare_seconds(names: list[str], options: argparse.Namespace) -> dict[str, float]:
    """The forward passes alone, by model."""
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    spent = {}
    for name in names:
        model = timm.create_model(name).eval()
        arithmetic = choose_arithmetic(options.precision, device, model)
        model = arithmetic.prepared(model.to(device))
        x = arithmetic.laid_out(torch.randn(options.batch_size, 3, 224, 224, device=device))
        with torch.inference_mode(), arithmetic.computing():
            model(x[:2]).cpu()
            started = time.perf_counter()
            for start in range(0, options.images, options.batch_size):
                model(x[: options.images - start]).float().cpu()
            spent[name] = time.perf_counter() - started
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--models", default=MODELS, help="timm models, by commas")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto")
    options = parser.parse_args()
    names = options.models.split(",")
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        data, space = Path(folder) / "data", Path(folder) / "ws"
        # a fifth is held out to test on
        write_photographs(data, options.images * 5 // 4 + 8)
        dery = [sys.executable, "-m", "dery_cli"]
        where = ["--workspace", str(space), "--quiet"]
        specs = [f"timm/{name}" for name in names]
        subprocess.run([*dery, "zoo", "add", *specs, "--no-pretrained", *where], check=True)
        before = bare_seconds(names, options)
        words = f"embed --samples {options.images} --batch-size {options.batch_size}".split()
        words += f"--threads {options.threads} --device {options.device}".split()
        words += ["--precision", options.precision, "--data", str(data)]
        words += [] if options.workers is None else ["--workers", str(options.workers)]
        started = time.perf_counter()
        subprocess.run([*dery, *words, *where], check=True)
        whole = time.perf_counter() - started
        after = bare_seconds(names, options)
        print(f"{'model':<28}{'bare images/s':>14}{'embed images/s':>15}{'ratio':>8}")
        bare = passes = 0.0
        for name in names:
            log = json.loads((space / "embeddings" / f"timm__{name}.log.json").read_text())
            seconds = (before[name] + after[name]) / 2
            bare, passes = bare + seconds, passes + options.images / log["images_per_second"]
            rate = options.images / seconds
            print(f"{name:<28}{rate:>14.1f}", end="")
            print(f"{log['images_per_second']:>15.1f}{log['images_per_second'] / rate:>8.3f}")
    print(f"{len(names)} donors, {options.images} images, bare passes {bare:.1f} s")
    print(f"passes of embed {passes:.1f} s: {bare / passes:.3f}")
    print(f"the whole command {whole:.1f} s: {bare / whole:.3f}")


if __name__ == "__main__":
    main()
