"""The whole chain at the paper's size: time, memory, disk and multiply-adds of every stage.

    python tests/bench/bench_chain.py --images 64 --models resnet18,mobilenetv3_small,vit_tiny
    python tests/bench/bench_chain.py                        # all 21 architectures: an hour or more

The architectures of ``zoo_manifests/paper.toml`` with random weights (nothing is fetched), at 224
pixels, on JPEG files of 500 x 375 that the bench writes. Each stage is a process of its own.
Multiply-adds are counted where they are spent, matrix products of solves included, those that are
traced without numbers left out; counting costs some time. Needed are, for embed and for assemble,
one pass of every donor over the images; assemble may spend ``--effort`` of those. Of finetune,
three forward passes of the assembly for each image of an update.

The last column is what a stage would take at its default number of images, were its time in
proportion: with random weights the numbers say nothing about accuracy.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from photographs import write_photographs

from dery_cli.io.artifacts import Workspace
from dery_cli.stages.assemble.config import AssembleConfig
from dery_cli.stages.embed.config import EmbedConfig
from dery_cli.zoo.registry import read_zoo

PROGRAM = """
import json, resource, sys, time
started = time.perf_counter()
from torch.utils.flop_counter import FlopCounterMode
from dery_cli.cli import run

class Counter(FlopCounterMode):
    def _count_flops(self, packet, out, args, kwargs):
        tensors = [t for t in (*args, out) if hasattr(t, "device")]
        if any(t.device.type == "meta" for t in tensors):
            return out
        return super()._count_flops(packet, out, args, kwargs)

with Counter(display=False) as counter:
    code = run(sys.argv[1:])
unit = 1 if sys.platform == "darwin" else 1024
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
spent = counter.get_total_flops() // 2
seconds = time.perf_counter() - started
sys.stderr.write("\\n" + json.dumps({"macs": spent, "peak": peak, "seconds": seconds}) + "\\n")
sys.exit(code)
"""
MANIFEST = Path(__file__).parents[2] / "zoo_manifests" / "paper.toml"


def architectures(wanted: str | None) -> list[str]:
    """Specs without a tag, each once; those whose name holds one of ``wanted``."""
    models = tomllib.loads(MANIFEST.read_text(encoding="utf-8"))["model"]
    specs = sorted({model["spec"].partition(".")[0] for model in models})
    parts = wanted.split(",") if wanted else [""]
    return [spec for spec in specs if any(part in spec for part in parts)]


def run_stage(line: str, space: Path) -> dict[str, Any]:
    """What a stage took; its error where it failed."""
    words = [*line.split(), "--workspace", str(space), "--json"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(done.stderr[-1500:], file=sys.stderr)
        return {"failed": done.returncode}
    figures: dict[str, Any] = json.loads(done.stderr.strip().splitlines()[-1])
    return {**figures, "result": json.loads(done.stdout)["result"]}


def disk(space: Path) -> int:
    return sum(path.stat().st_size for path in space.rglob("*") if path.is_file())


def show(name: str, found: dict[str, Any], needed: float, written: int, scale: float) -> None:
    if "failed" in found:
        print(f"{name:<10} failed with exit code {found['failed']}")
        return
    ratio = f"{found['macs'] / needed:>10.2f}" if needed else f"{'-':>10}"
    print(
        f"{name:<10}{found['seconds']:>9.1f}{found['peak'] / 1e9:>9.2f}{written / 1e6:>10.1f}",
        end="",
    )
    print(f"{found['macs'] / 1e9:>12.1f}{ratio}{found['seconds'] * scale / 60:>14.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=64, help="calibration and target images")
    parser.add_argument("--models", help="parts of names, by commas; all by default")
    parser.add_argument("--steps", type=int, default=4, help="updates of finetune")
    parser.add_argument("--effort", type=float, default=AssembleConfig.effort)
    parser.add_argument("--max-params", default="30M")
    parser.add_argument("--max-flops", default="5G")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    specs = architectures(options.models)
    with tempfile.TemporaryDirectory() as folder:
        data, space = Path(folder) / "data", Path(folder) / "ws"
        write_photographs(data, options.images * 5 // 4 + 12)
        print(f"{len(specs)} donors, {options.images} images on {options.device}")
        head = f"{'stage':<10}{'wall s':>9}{'peak GB':>9}{'disk MB':>10}{'GMACs':>12}"
        print(f"{head}{'over need':>10}{'default min':>14}")
        added = run_stage(f"zoo add {' '.join(specs)} --no-pretrained", space)
        show("zoo add", added, 0, disk(space), 1)
        donors = read_zoo(Workspace(space)).donors.values()
        one_pass = sum(d.anatomy.flops(0, d.anatomy.num_units) for d in donors) * options.images
        more = EmbedConfig.samples / options.images
        on = f"--device {options.device}"
        effort = f"--effort {options.effort} --target-samples {options.images}"
        limits = f"--max-params {options.max_params} --max-flops {options.max_flops}"
        lines = {
            "embed": (
                f"embed --data {data} --samples {options.images} --precision "
                f"{options.precision} {on}",
                one_pass,
                more,
            ),
            "sim": (f"sim {on}", 0, more),
            "partition": ("partition", 0, 1),
            "assemble": (f"assemble {limits} {effort} {on}", one_pass, more),
        }
        for name, (line, needed, scale) in lines.items():
            before = disk(space)
            show(name, run_stage(line, space), needed, disk(space) - before, scale)
        before = disk(space)
        batch = min(32, options.images // 2)
        line = f"finetune --steps {options.steps} --batch-size {batch} {on}"
        record = json.loads((space / "assemblies/default/assembly.json").read_text())
        macs = 3 * record["data"]["flops"] * batch * options.steps
        show("finetune", run_stage(line, space), macs, disk(space) - before, 1)


if __name__ == "__main__":
    main()
