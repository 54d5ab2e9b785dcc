"""What the last round of ``dery assemble`` adds: the pick's accuracy on test images, untrained.

Reference: the pick that the proxy alone would make (``--finalists 0``) under the same budget, and
the best whole donor.

    python tests/bench/bench_pick.py [--data demo] [--budgets 300k 400k 600k 900k 1500k]
    python tests/bench/bench_pick.py --zoo "--manifest lite --image-size 96" --budgets 5M --data DIR
"""

from __future__ import annotations

import argparse
import shlex
import tempfile

from bench_demo import dery

BUDGETS = ("400k", "900k")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="demo")
    parser.add_argument("--zoo", default="--manifest demo", help="options of dery zoo add")
    parser.add_argument("--assemble", default="", help="more options of dery assemble")
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS))
    args = parser.parse_args()
    columns = ("best whole", "by proxy", "last round")
    totals = dict.fromkeys(columns, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        space = ["--workspace", folder]
        dery("zoo", "add", *shlex.split(args.zoo), *space)
        dery("embed", "--data", args.data, *space)
        dery("sim", *space)
        dery("partition", *space)
        print(f"{'budget':<8}" + "".join(f"{name:>12}" for name in columns))
        for budget in args.budgets:
            limit = ["--max-params", budget, *shlex.split(args.assemble), *space]
            proxy = dery("assemble", *limit, "--finalists", "0")
            tried = dery("assemble", *limit)
            whole = next(r for r in tried["comparison"] if r["role"] == "best whole donor")
            row = (whole["test_top1"], proxy["test_top1"], tried["test_top1"])
            print(f"{budget:<8}" + "".join(f"{value:>12.4f}" for value in row), flush=True)
            for name, value in zip(columns, row, strict=True):
                totals[name] += value / len(args.budgets)
    print(f"{'mean':<8}" + "".join(f"{value:>12.4f}" for value in totals.values()))
    print(f"last round over proxy {totals['last round'] - totals['by proxy']:+.4f}")


if __name__ == "__main__":
    main()
