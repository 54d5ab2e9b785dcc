"""Which figure foresees a fine-tuned network: held-out images before, or after few updates.

Networks are drawn by seed from all paths of none to three stitches through the demo's donors,
within a budget. Each is built without a third of the training images and asked about these as it
is, and after 48 and 96 updates at the default recipe's rate and a third of it; then built on all of
them and fine-tuned for the recipe's 30 epochs. Printed is Kendall's tau of each figure with the
accuracy on test images after that. ``assemble --for finetuned`` chooses by 48 updates at a third of
the rate.

    python tests/bench/letters.py DIR
    python tests/bench/bench_tuned.py --letters DIR [--count 16] [--max-params 900k]
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import random
import tempfile
from pathlib import Path

import torch
from bench_ruin import CPU, INPUT, Images, draw, tune
from scipy.stats import kendalltau
from torch.nn.functional import cross_entropy

import dery_demo
from dery_cli import dissect
from dery_cli.core.scoring import network_outputs, top1
from dery_cli.core.stitching.network import AssembledNetwork
from dery_cli.core.stitching.probe import stratified_folds
from dery_cli.data.batches import as_dataset
from dery_cli.data.sets import ImageDataset
from dery_cli.sizes import parse_size
from dery_cli.training.augment import train_transform
from dery_cli.training.rate_finder import short_run
from dery_cli.training.recipe import FinetuneConfig, make_config

FOLDS = 3
UPDATES = (48, 96)
SHARES = (1.0, 1 / 3)
"""Of the recipe's rate."""


class HeldOut:
    """A fold of the training images, and the others to fit on."""

    def __init__(self, images: Images) -> None:
        self.images = images
        fold_N = stratified_folds(torch.tensor(images.labels), FOLDS)
        self.fit = (fold_N != 0).nonzero().flatten().tolist()
        self.asked = (fold_N == 0).nonzero().flatten().tolist()
        self.label_N = torch.tensor([images.labels[index] for index in self.asked])

    def figures(self, network: AssembledNetwork) -> tuple[float, float]:
        """Accuracy and cross-entropy on the fold."""
        view = self.images.train.view(INPUT, self.asked)
        logits_NC = network_outputs(network.eval(), view).double()
        return float(top1(logits_NC, self.label_N)), float(cross_entropy(logits_NC, self.label_N))

    def trained(self, network: AssembledNetwork, config: FinetuneConfig) -> tuple[float, float]:
        """The same after a short run on the other images; the worst where its loss rose."""
        network, data = copy.deepcopy(network), self.images.data
        fit = as_dataset(ImageDataset(data.train, train_transform(INPUT, config), self.fit))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run"
            if not short_run(network, fit, config, path, classes=data.classes, device=CPU):
                return 0.0, float("inf")
        return self.figures(network)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--letters", required=True, help="folder made by letters.py")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--max-params", default="900k")
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    most = parse_size(args.max_params, "--max-params")
    names = [card.partition("/")[2] or card for card in dery_demo.zoo.list_models()]
    example = torch.zeros(2, INPUT.in_chans, *INPUT.image_size)
    donors = {name: dissect(dery_demo.zoo.build(name, pretrained=True), example) for name in names}
    images, generator = Images("letters", args.letters), random.Random(args.seed)
    held_out, config = HeldOut(images), make_config("default", seed=0, effort=0.0)
    found: list[dict[str, float]] = []
    drawn = 0
    while len(found) < args.count:
        text = draw(donors, drawn % 4, generator)
        drawn += 1
        start = images.build(donors, text, held_out.fit, 0)
        if sum(p.numel() for p in start.parameters()) > most:
            continue
        row: dict[str, float] = {}
        row["top-1 at once"], row["loss at once"] = held_out.figures(start)
        for updates in UPDATES:
            for share in SHARES:
                short = dataclasses.replace(
                    config, steps=updates, epochs=None, lr=share * config.lr
                )
                key = f"after {updates} at {short.lr:.0e}"
                row[f"top-1 {key}"], row[f"loss {key}"] = held_out.trained(start, short)
        network = images.build(donors, text, range(len(images.labels)), 0)
        tune(donors, text, network, images, config)
        row["end"] = float(images.right(network).mean())
        found.append(row)
        print(
            f"{row['top-1 at once']:.3f} held out, {row['end']:.3f} in the end  {text}", flush=True
        )
    end = [row["end"] for row in found]
    print(f"{len(found)} networks, {min(end):.3f} to {max(end):.3f} in the end")
    for key in (key for key in found[0] if key != "end"):
        sign = -1 if key.startswith("loss") else 1
        tau = kendalltau([sign * row[key] for row in found], end).statistic
        print(f"{key:<28}{float(tau):>7.2f}")


if __name__ == "__main__":
    main()
