"""Peak memory of ``dery embed`` at 256 and 2,048 images: it must not grow with their number.

Each run is a process of its own, as its peak resident memory never falls. The reference is the same
process before the first image: Python, torch, the opened data and the donor.

    python tests/bench/bench_embed_memory.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

DONOR = "demo/vit_cls"
SAMPLES = (256, 2048)

PROGRAM = """
import json, resource, sys
from dery_cli.cli import run
from dery_cli.stages.embed.passes import Embedder

unit = 1 if sys.platform == "darwin" else 1024

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

load, before = Embedder._load, []

def loaded(self, *args):
    size = load(self, *args)
    before.append(peak())
    return size

Embedder._load = loaded
code = run(sys.argv[1:])
assert code == 0
sys.stderr.write("\\n" + json.dumps({"before": before[0], "peak": peak()}) + "\\n")
"""


def measure(workspace: Path, samples: int) -> tuple[int, int, int]:
    """Bytes before the pass, at its peak, and written."""
    words = ["embed", "--data", "demo:fashion", "--samples", str(samples)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words, "--workspace", str(workspace)],
        capture_output=True,
        text=True,
        check=True,
    )
    peaks = json.loads(done.stderr.strip().splitlines()[-1])
    written = sum(p.stat().st_size for p in (workspace / "embeddings").glob("*.safetensors"))
    return peaks["before"], peaks["peak"], written


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder) / "ws"
        add = [sys.executable, "-m", "dery_cli", "zoo", "add", DONOR, "--workspace", str(workspace)]
        subprocess.run([*add, "--quiet"], check=True)
        rows = {count: measure(workspace, count) for count in SAMPLES}
    print(f"dery embed, {DONOR}, batches of 64, peak resident memory in MB")
    print(f"{'images':>8}{'before':>10}{'peak':>10}{'grown by':>10}{'written':>10}")
    for count, (before, peak, written) in rows.items():
        mb = [value / 1e6 for value in (before, peak, peak - before, written)]
        print(f"{count:>8}" + "".join(f"{value:>10.1f}" for value in mb))
    few, many = (rows[count][1] for count in SAMPLES)
    print(f"peak at {SAMPLES[1]} over peak at {SAMPLES[0]}: {many / few:.3f}")


if __name__ == "__main__":
    main()
