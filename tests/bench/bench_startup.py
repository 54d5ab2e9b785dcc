"""How long ``dery`` takes to answer where there is nothing to do, over ``import typer``.

    python tests/bench/bench_startup.py [--repeats 5]

A small demo zoo is taken through all stages once, then each is asked again. The commands take
turns with ``python -c 'import typer'``; compared are the medians of processor time, which other
programs disturb less, and of wall time. ``--help`` is to stay below 4, a stage with nothing to do
below 8; whether it imported torch is told too.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

LINES = {
    "--help": "--help",
    "embed": "embed --data demo --samples 128",
    "sim": "sim",
    "partition": "partition -K 2 --eps 0.5",
    "assemble": "assemble --max-params 400k --effort 2",
    "finetune": "finetune --steps 2",
    "eval": "eval",
}
PROGRAM = """
import sys
from dery_cli.cli import run
code = run(sys.argv[1:])
sys.stderr.write(f"\\ncode {code} torch {'torch' in sys.modules}\\n")
"""


def measure(command: list[str]) -> tuple[float, float, str]:
    """Wall and processor seconds of a process, and its last line on stderr."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu, (done.stderr.strip().splitlines() or [""])[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DERY_WORKSPACE"] = folder
        add = "zoo add demo/resnext demo/vit_cls demo/convnext --quiet"
        subprocess.run([sys.executable, "-m", "dery_cli", *add.split()], check=True)
        for line in LINES.values():
            words = [sys.executable, "-m", "dery_cli", *line.split()]
            subprocess.run(words, check=True, capture_output=True)
        print(f"{'command':<12}{'wall s':>8}{'cpu s':>8}{'over typer':>12}{'by cpu':>8}  torch")
        for name, line in LINES.items():
            typer, ours = [], []
            for _ in range(repeats):
                typer.append(measure([sys.executable, "-c", "import typer"]))
                ours.append(measure([sys.executable, "-c", PROGRAM, *line.split()]))
            base, spent = (
                [statistics.median(run[which] for run in runs) for which in range(2)]
                for runs in (typer, ours)
            )
            ratios = [mine / least for mine, least in zip(spent, base, strict=True)]
            print(f"{name:<12}{spent[0]:>8.2f}{spent[1]:>8.2f}", end="")
            print(f"{ratios[0]:>12.1f}{ratios[1]:>8.1f}  {ours[-1][2].endswith('True')}")


if __name__ == "__main__":
    main()
