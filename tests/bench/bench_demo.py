"""The demo's comparison over seeds and learning rates: assembly, best whole donor, from scratch.

One fine-tuning differs from the next by a point or so; this prints the mean and the range over
seeds. Reference: the best whole donor under the same budget.

    python tests/bench/bench_demo.py [--seeds 3] [--steps 150] [--lr 1e-3 3e-3] [--batch-norm fixed]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile

from dery_cli.cli import run
from dery_cli.stages.demo.run import BUILT_ANEW


def dery(*words: str) -> dict:
    """Run a command line and give its result."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        code = run([*words, "--json"])
    outcome = json.loads(out.getvalue())
    if code:
        raise SystemExit(f"{' '.join(words)}: {outcome['error']}")
    return outcome["result"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-params", default="400k")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", default="150")
    parser.add_argument("--lr", nargs="+", default=["3e-3"])
    parser.add_argument("--batch-norm", default="train")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        space = ["--workspace", folder]
        dery("zoo", "add", "--manifest", "demo", *space)
        dery("embed", "--data", "demo", *space)
        dery("sim", *space)
        dery("partition", *space)
        picked = dery("assemble", "--max-params", args.max_params, *space)
        whole = next(r for r in picked["comparison"] if r["role"] == "best whole donor")
        starts = {
            "assembly": [],
            "best whole donor": ["--donor", whole["blocks"][0][0], "--data", "demo"],
            "from scratch": ["--scratch"],
        }
        for role, name in BUILT_ANEW.items():
            control = next((r for r in picked["comparison"] if r["role"] == role), None)
            if control is not None:
                limit = ("--max-params", args.max_params)
                dery("assemble", *limit, "--blocks", control["network"], "--name", name, *space)
                starts[role] = ["--assembly", name]
        print(f"assembly: {picked['name']}, {picked['params']:,} params")
        print(f"best whole donor: {whole['network']}, {whole['params']:,} params")
        print(f"{'start':<26}{'lr':>8}{'mean':>9}{'least':>9}{'most':>9}{'over whole':>12}")
        for lr in args.lr:
            means = {}
            for name, words in starts.items():
                top1 = [
                    dery(
                        "finetune",
                        *words,
                        "--steps",
                        args.steps,
                        "--lr",
                        lr,
                        "--batch-norm",
                        args.batch_norm,
                        "--valid-fraction",
                        "0",
                        "--seed",
                        str(seed),
                        "--name",
                        "bench",
                        *space,
                    )["test_top1"]
                    for seed in range(args.seeds)
                ]
                means[name] = (sum(top1) / len(top1), min(top1), max(top1))
            reference = means["best whole donor"][0]
            for name, (mean, least, most) in means.items():
                print(
                    f"{name:<26}{lr:>8}{mean:9.4f}{least:9.4f}{most:9.4f}{mean - reference:+12.4f}"
                )


if __name__ == "__main__":
    main()
