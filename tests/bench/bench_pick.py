"""What ``dery assemble`` picks, beside its controls: accuracy on test images, untrained.

Reference: the controls under the same budget, with the same labels and the same trial, and the pick
of the paper's space (``--space paper``).

    python tests/bench/bench_pick.py [--data demo] [--budgets 100k 400k 900k] [--seeds 3]
    python tests/bench/bench_pick.py --zoo "--manifest lite --image-size 96" --budgets 5M --data DIR
"""

from __future__ import annotations

import argparse
import shlex
import tempfile

from bench_demo import dery

BUDGETS = ("100k", "400k")
CONTROLS = ("best whole donor", "the same with an adapter", "best slice", "random path")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="demo")
    parser.add_argument("--zoo", default="--manifest demo", help="options of dery zoo add")
    parser.add_argument("--assemble", default="", help="more options of dery assemble")
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS))
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    columns = ("pick", *CONTROLS, "paper's pick")
    found: dict[str, list[float]] = {name: [] for name in columns}
    with tempfile.TemporaryDirectory() as folder:
        space = ["--workspace", folder]
        dery("zoo", "add", *shlex.split(args.zoo), *space)
        dery("embed", "--data", args.data, *space)
        dery("sim", *space)
        dery("partition", *space)
        print(
            f"{'budget':<8}{'seed':>5}" + "".join(f"{name:>26}" for name in columns) + "  network"
        )
        for budget in args.budgets:
            for seed in range(args.seeds):
                line = ["--max-params", budget, "--seed", str(seed), *shlex.split(args.assemble)]
                picked = dery("assemble", *line, *space)
                tops = {row["role"]: row["test_top1"] for row in picked["comparison"]}
                tops["pick"] = picked["test_top1"]
                try:
                    paper = dery("assemble", *line, "--space", "paper", *space)
                    tops["paper's pick"] = paper["test_top1"]
                except SystemExit:  # nothing of that space fits
                    pass
                cells = [f"{tops[n]:>26.4f}" if n in tops else f"{'-':>26}" for n in columns]
                print(f"{budget:<8}{seed:>5}" + "".join(cells) + f"  {picked['name']}", flush=True)
                for name in columns:
                    found[name] += [tops[name]] if name in tops else []
    for name, values in found.items():
        if values:
            print(f"{name}: mean {sum(values) / len(values):.4f} of {len(values)}")


if __name__ == "__main__":
    main()
