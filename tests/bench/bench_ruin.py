"""Whether fine-tuning at the defaults ever ruins a network that works: starts and ends of many.

Networks are drawn by seed from all paths of none to three stitches through the demo's donors, so
many of each, whatever their size: stitches lead to any donor, slices, adapters and truncations
among them. Each is built as ``assemble`` does (stitches and head fitted with the labels of all
training images), then fine-tuned as ``finetune`` does: rates are tried on three folds, each with a
network built without it. Aim: none ends below its start by more than half a point or two paired
standard errors, whichever is more, and the mean gain is at least that of a fixed rate (``--lr
3e-3``, the recipe before rates were found) on those that it does not ruin.

    python tests/bench/bench_ruin.py [--letters DIR] [--count 40] [--quick] [--lr 3e-3]
        [--network "convnext[0:1] + resnext[8:9]"] [--save F] [--against F]

DIR is made by ``letters.py DIR``; ``--count`` networks of each data set.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

import dery_demo
from dery_cli import dissect
from dery_cli.core.assembly.notation import parse_network
from dery_cli.core.dissection.dissect import Dissection
from dery_cli.core.scoring import network_outputs
from dery_cli.core.stitching.head import fit_head
from dery_cli.core.stitching.network import AssembledNetwork, NetworkBuilder
from dery_cli.core.stitching.probe import stratified_folds
from dery_cli.data.batches import ImageStore, as_dataset
from dery_cli.data.sets import DataSet, ImageDataset, open_data
from dery_cli.training.augment import train_transform
from dery_cli.training.loop import finetune
from dery_cli.training.plan import make_plan
from dery_cli.training.rate_finder import FOLDS, FoundRate, Part, find_rate
from dery_cli.training.recipe import FinetuneConfig, make_config
from dery_cli.zoo.transforms import EvalTransform

SLACK = 0.005
"""A loss of so much top-1 is none."""

INPUT = dery_demo.zoo.card("resnet").input
CPU = torch.device("cpu")
TRUNCATED = 0.25
"""Share of the networks that end before their last donor does."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one network: top-1 on the test images before and after, and how."""

    data: str
    network: str
    params: int
    start: float
    end: float
    error: float
    rate: float
    scale: float
    kept: bool
    trials: str
    seconds: float

    @property
    def gain(self) -> float:
        return self.end - self.start

    @property
    def ruined(self) -> bool:
        return -self.gain > max(SLACK, 2 * self.error)


def draw(donors: dict[str, Dissection], stitches: int, generator: random.Random) -> str:
    """A path of so many stitches."""
    units = {name: donor.anatomy.num_units for name, donor in donors.items()}
    names = sorted(units)
    while True:
        donor, start, text = generator.choice(names), 0, ""
        for place in range(stitches + 1):
            most, last = units[donor], place == stitches
            if start >= most:
                break
            ends = last and generator.random() >= TRUNCATED
            stop = most if ends else generator.randint(start + 1, most)
            text += f"{donor}[{start}:{stop}]"
            if last:
                return text
            before, donor = donor, generator.choice(names)
            lowest = stop if donor == before else 1
            if lowest >= units[donor]:
                break
            start = generator.randrange(lowest, units[donor])
            text += " ~ " if (donor, start) == (before, stop) else " + "


class Images:
    """A data set's training images, to build on, and its test images, to judge by."""

    def __init__(self, name: str, spec: str) -> None:
        self.name, self.data = name, open_data(spec)
        train, test = self.data.train, self.data.test
        self.labels = [int(label) for label in train.labels]
        self.train = ImageStore(train, range(len(train)), crop=0.95, batch_size=128, device=CPU)
        self.test = ImageStore(test, range(len(test)), crop=0.95, batch_size=256, device=CPU)
        self.test_label_N = torch.tensor([int(label) for label in test.labels])

    def right(self, network: torch.nn.Module) -> torch.Tensor:
        """Of each test image whether it is ranked first."""
        view = self.test.view(INPUT, range(len(self.test_label_N)))
        guess_N = network_outputs(network.eval(), view).argmax(1)
        return (guess_N == self.test_label_N).double()

    def build(
        self, donors: dict[str, Dissection], text: str, chosen: Sequence[int], seed: int
    ) -> AssembledNetwork:
        """A network with stitches and head fitted on some of the training images."""
        refs = parse_network(text, {name: donor.anatomy for name, donor in donors.items()})
        labels, view = [self.labels[i] for i in chosen], self.train.view(INPUT, chosen)
        builder = NetworkBuilder(donors, lambda _: view, labels=labels, seed=seed)
        network = builder.build(refs).network.copy()
        fit_head(network, view, labels, len(self.data.classes))
        return network.eval()


def parts(
    donors: dict[str, Dissection], text: str, images: Images, config: FinetuneConfig
) -> list[Part]:
    """Folds with networks that were built without them."""
    fold_N = stratified_folds(torch.tensor(images.labels), FOLDS)
    found, split = [], images.data.train
    for fold in range(FOLDS):
        fit = (fold_N != fold).nonzero().flatten().tolist()
        out = (fold_N == fold).nonzero().flatten().tolist()
        found.append(
            Part(
                start=partial(images.build, donors, text, fit, config.seed),
                fit=as_dataset(ImageDataset(split, train_transform(INPUT, config), fit)),
                held_out=as_dataset(ImageDataset(split, EvalTransform(INPUT), out)),
            )
        )
    return found


def tune(
    donors: dict[str, Dissection],
    text: str,
    network: AssembledNetwork,
    images: Images,
    config: FinetuneConfig,
) -> FoundRate | None:
    """Fine-tune in place as ``dery finetune`` does; returns what was found."""
    data: DataSet = images.data
    found = None
    with tempfile.TemporaryDirectory() as folder:
        if config.effort != 0:
            steps = make_plan(config, len(data.train)).steps
            folds = parts(donors, text, images, config)
            found = find_rate(folds, config, steps, Path(folder), classes=data.classes, device=CPU)
        if found is not None:
            if not found.admitted:
                return found
            config = dataclasses.replace(config, lr=found.lr, block_lr_scale=found.block_lr_scale)
        train = as_dataset(ImageDataset(data.train, train_transform(INPUT, config)))
        finetune(
            network, train, None, config, Path(folder) / "run", classes=data.classes, device=CPU
        )
    return found


def one(donors: dict[str, Dissection], text: str, images: Images, config: FinetuneConfig) -> Row:
    network = images.build(donors, text, range(len(images.labels)), config.seed)
    before_N, began = images.right(network), time.perf_counter()
    found = tune(donors, text, network, images, config)
    seconds = time.perf_counter() - began
    difference_N = images.right(network) - before_N
    trials = "" if found is None else f"{found.start_top1:.3f}:"
    for trial in () if found is None else found.trials:
        trials += " rose" if trial.diverged else f" {trial.gain:+.3f}"
    return Row(
        data=images.name,
        network=text,
        params=sum(p.numel() for p in network.parameters()),
        start=float(before_N.mean()),
        end=float((before_N + difference_N).mean()),
        error=float(difference_N.std() / len(difference_N) ** 0.5),
        rate=config.lr if found is None else found.lr,
        scale=config.block_lr_scale if found is None else found.block_lr_scale,
        kept=found is not None and not found.admitted,
        trials=trials,
        seconds=seconds,
    )


def show(rows: list[Row], against: list[Row]) -> None:
    ruined = [row for row in rows if row.ruined]
    gain = statistics.mean(row.gain for row in rows)
    print(f"{len(rows)} networks: mean gain {gain:+.4f}, worst {min(r.gain for r in rows):+.4f}")
    print(f"{sum(row.kept for row in rows)} kept their start")
    print(f"{len(ruined)} end below their start: {', '.join(r.network for r in ruined) or 'none'}")
    others = {(row.data, row.network): row for row in against}
    pairs = [(row, others[key]) for row in rows if (key := (row.data, row.network)) in others]
    kept = [(row, other) for row, other in pairs if not other.ruined]
    if kept:
        ours, theirs = (statistics.mean(pair[i].gain for pair in kept) for i in range(2))
        print(
            f"on the {len(kept)} of {len(pairs)} not ruined there: {ours:+.4f}, there {theirs:+.4f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--letters", type=Path, help="folder made by letters.py")
    parser.add_argument("--only-letters", action="store_true")
    parser.add_argument("--count", type=int, default=40, help="networks, of each data set")
    parser.add_argument("--quick", action="store_true", help="six networks in all")
    parser.add_argument("--lr", type=float, help="fixed rate instead of one that is found")
    parser.add_argument("--network", action="append", help="these instead of those drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--against", type=Path, help="what --save wrote of another run")
    args = parser.parse_args()
    names = [card.partition("/")[2] or card for card in dery_demo.zoo.list_models()]
    example = torch.zeros(2, INPUT.in_chans, *INPUT.image_size)
    donors = {name: dissect(dery_demo.zoo.build(name, pretrained=True), example) for name in names}
    specs = {} if args.only_letters else {"digits": "demo"}
    if args.letters is not None:
        specs["letters"] = str(args.letters)
    count = 6 // len(specs) if args.quick else args.count
    fixed = {} if args.lr is None else {"lr": args.lr, "effort": 0.0}
    config = make_config("default", seed=args.seed, **fixed)
    rows: list[Row] = []
    print(f"{'data':<8}{'params':>10}{'start':>7}{'end':>7}{'2 se':>7}{'rate':>9}{'s':>5}  network")
    for name, spec in specs.items():
        images, generator = Images(name, spec), random.Random(args.seed)
        for text in args.network or [draw(donors, i % 4, generator) for i in range(count)]:
            row = one(donors, text, images, config)
            rows.append(row)
            rate = "kept" if row.kept else f"{row.rate:.0e}" + ("" if row.scale == 1 else "*")
            print(
                f"{name:<8}{row.params:>10,}{row.start:>7.3f}{row.end:>7.3f}{2 * row.error:>7.3f}"
                f"{rate:>9}{row.seconds:>5.0f}  {text}  ({row.trials})"
                f"{'  RUINED' if row.ruined else ''}",
                flush=True,
            )
            if args.save:
                args.save.write_text(json.dumps([dataclasses.asdict(r) for r in rows]))
    against = json.loads(args.against.read_text()) if args.against else []
    show(rows, [Row(**entry) for entry in against])


if __name__ == "__main__":
    main()
