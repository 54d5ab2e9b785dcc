"""How training-free proxies rank built networks: Kendall's tau with accuracy on test images.

Seeded paths within the budget, of 0, 1, ... stitches in turns, are built with stitches fitted
without labels; each proxy scores them as ``dery assemble --proxy`` would, and the accuracy is that
of the complete network (closed-form head, untrained) on test images. Reference: ``params``, what
every proxy has to beat.

    python tests/bench/bench_proxies.py [--paths 30] [--max-params 900k] [--data demo]
    python tests/bench/bench_proxies.py --zoo "--manifest lite --image-size 96" --data DIR
"""

from __future__ import annotations

import argparse
import math
import shlex
import tempfile
import time
from pathlib import Path

import numpy as np
from bench_demo import dery
from scipy.stats import kendalltau

from dery_cli.core.assembly.frontier import random_feasible
from dery_cli.core.scoring import network_outputs
from dery_cli.core.stitching.pseudo_labels import pseudo_labels
from dery_cli.io.artifacts import Workspace
from dery_cli.runtime.terminal import Terminal
from dery_cli.sizes import parse_size
from dery_cli.stages.assemble.candidates import Candidate
from dery_cli.stages.assemble.config import AssembleConfig, Budget
from dery_cli.stages.assemble.features import pseudo_classes
from dery_cli.stages.assemble.features_store import PseudoClasses
from dery_cli.stages.assemble.free_space import PathSearch
from dery_cli.stages.assemble.prepare import prepare
from dery_cli.stages.assemble.setting import Setting
from dery_cli.zoo.plugin import PROXY_GROUP, find_proxy, plugin_names

RESAMPLES = 999
CLUSTERS = "probe of clusters"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="demo")
    parser.add_argument("--zoo", default="--manifest demo", help="options of dery zoo add")
    parser.add_argument("--workspace", help="one with zoo and embeddings, instead of a new one")
    parser.add_argument("--max-params", default="900k")
    parser.add_argument("--paths", type=int, default=30)
    args = parser.parse_args()
    budget = Budget(max_params=parse_size(args.max_params, "--max-params"))
    config = AssembleConfig(budget=budget, data=args.data, purpose="untrained")
    with tempfile.TemporaryDirectory() as folder:
        root = args.workspace or folder
        if args.workspace is None:
            dery("zoo", "add", *shlex.split(args.zoo), "--workspace", root)
            dery("embed", "--data", args.data, "--workspace", root)
        measure(Workspace(Path(root)), config, args.paths)


def measure(space: Workspace, config: AssembleConfig, paths: int) -> None:
    """Print a line for each proxy."""
    terminal = Terminal(quiet=True)
    with space.lock(terminal.note):
        setting = prepare(terminal, space, config).setting
        candidates = drawn(PathSearch(setting), paths)
        scores: dict[str, list[float]] = {}
        seconds: dict[str, float] = {}
        for name in plugin_names(PROXY_GROUP):
            proxy = find_proxy(name)
            for candidate in candidates[:1]:
                setting.builder.score(candidate, proxy)  # stitches are fitted once, and kept
            start = time.perf_counter()
            scores[name] = [setting.builder.score(c, proxy).proxy for c in candidates]
            seconds[name] = time.perf_counter() - start
            print(f"scored by {name} in {seconds[name]:.1f} s", flush=True)
        setting.builder.stand_in = clusters(setting)
        probe = find_proxy("probe")
        scores[CLUSTERS] = [setting.builder.score(c, probe).proxy for c in candidates]
        setting.builder.stand_in = None
        test_B = np.array([setting.builder.test_top1(c, None) for c in candidates])
    print(f"{len(candidates)} networks, test accuracy {test_B.min():.3f} to {test_B.max():.3f}")
    print(f"{'proxy':<18}{'tau':>8}{'95 %':>18}{'over params':>13}{'no score':>10}")
    reference = tau(np.array(scores["params"]), test_B)
    order = sorted(scores, key=lambda name: -tau(np.array(scores[name]), test_B))
    for name in order:
        score_B = np.array(scores[name])
        found = tau(score_B, test_B)
        low, high = interval(score_B, test_B)
        missing = sum(not math.isfinite(value) for value in scores[name])
        spread = f"{low:.2f} to {high:.2f}"
        print(f"{name:<18}{found:>8.3f}{spread:>18}{found - reference:>+13.3f}{missing:>10}")


def clusters(setting: Setting) -> PseudoClasses:
    """What stands for labels where there are none: here they are kept from it."""
    donor = max(setting.zoo.donors.values(), key=lambda d: d.anatomy.params(0, d.anatomy.num_units))
    whole = setting.donors[donor.name].block(0, donor.anatomy.num_units).eval()
    x_NC = network_outputs(whole, setting.builder.view(donor.name))
    count = pseudo_classes(len(setting.target.indices))
    labels = tuple(pseudo_labels(x_NC, count, setting.config.seed).tolist())
    return PseudoClasses(labels=labels, count=count, donor=donor.name, sha256="")


def drawn(searched: PathSearch, paths: int) -> list[Candidate]:
    """Paths within the budget by seed."""
    generator = np.random.default_rng(1)
    stated = searched.stated
    layers = stated.space.max_stitches + 1
    problems = [stated.with_stitches(most) for most in range(layers)]
    found: dict[tuple[object, ...], Candidate] = {}
    for place in range(20 * paths):
        answer = random_feasible(problems[place % layers], generator)
        if answer is not None:
            candidate = searched.candidate(answer)
            found.setdefault(candidate.key, candidate)
        if len(found) == paths:
            break
    return list(found.values())


def tau(score_B: np.ndarray, test_B: np.ndarray) -> float:
    """Kendall's tau; scores that are none rank last, all alike."""
    found = float(kendalltau(np.nan_to_num(score_B, neginf=-1e300), test_B).statistic)
    return found if math.isfinite(found) else 0.0


def interval(score_B: np.ndarray, test_B: np.ndarray) -> tuple[float, float]:
    """Of tau, by a bootstrap over the networks."""
    generator = np.random.default_rng(0)
    count = len(test_B)
    draws = (generator.integers(0, count, count) for _ in range(RESAMPLES))
    taus = [tau(score_B[draw], test_B[draw]) for draw in draws]
    low, high = np.quantile(taus, (0.025, 0.975)).tolist()
    return low, high


if __name__ == "__main__":
    main()
