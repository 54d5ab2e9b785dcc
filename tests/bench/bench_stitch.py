"""How good nine assemblies of the demo's donors are, untrained and fine-tuned, by their stitches.

Reference: plain ridge regression. ``labels`` is what ``dery assemble`` does where the target has
labels, ``match`` trains plain stitches to give the last donor's features, ``paper`` are the paper's
random ones.

    python tests/bench/bench_stitch.py [--data SPEC] [--seeds 2] [--steps 150] [--ways plain labels]
"""

from __future__ import annotations

import argparse
import copy
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

import dery_demo
from dery_cli import dissect
from dery_cli.core.dissection.dissect import Dissection
from dery_cli.core.scoring import network_outputs
from dery_cli.core.stitching.head import fit_head
from dery_cli.core.stitching.match import match_features
from dery_cli.core.stitching.network import AssembledNetwork, NetworkBuilder
from dery_cli.data.batches import ImageBatches, as_dataset
from dery_cli.data.sets import DataSet, ImageDataset, open_data
from dery_cli.training.augment import train_transform
from dery_cli.training.evaluate import evaluate
from dery_cli.training.loop import finetune
from dery_cli.training.recipe import make_config
from dery_cli.types import BlockRef, StitchKind
from dery_cli.zoo.transforms import EvalTransform

ASSEMBLIES = (
    "efficientnet[0:2] mobilenetv3[2:4] vit_avg[4:5] resnext[6:9]",
    "resnext[0:3] regnet[5:8] convnext[6:9]",
    "resnet[0:4] vit_cls[4:8]",
    "convnext[0:4] resnet[4:8]",
    "vit_avg[0:3] resnet[4:8]",
    "mobilenetv3[0:4] swin[6:9]",
    "resnext[0:1] vit_avg[1:2] resnet.rotation[4:6] resnext[6:9]",
    "regnet[0:6] efficientnet[7:10]",
    "resnext[0:3] resnet[4:6] resnext[6:9]",
)
WAYS = ("plain", "labels", "match", "mlp", "paper")
FIT_IMAGES = 512
HEAD_IMAGES = 2048
INPUT = dery_demo.zoo.card("resnet").input


Batches = tuple[list[torch.Tensor], list[int]]


def refs(text: str) -> list[BlockRef]:
    found = re.finditer(r"(\S+)\[(\d+):(\d+)\]", text)
    return [BlockRef(match[1], int(match[2]), int(match[3])) for match in found]


def batches(data: DataSet, count: int) -> Batches:
    """Training images spread evenly over the data, and their labels."""
    indices = list(range(0, len(data.train), max(1, len(data.train) // count)))[:count]
    loaded = ImageBatches(
        data.train, indices, INPUT, crop=0.95, batch_size=128, device=torch.device("cpu")
    )
    return list(loaded), [int(data.train.labels[i]) for i in indices]


def build(
    donors: dict[str, Dissection],
    blocks: list[BlockRef],
    way: str,
    fit: Batches,
    rest: Batches,
    classes: Sequence[str],
    seed: int,
) -> AssembledNetwork:
    """A network with stitches fitted on ``fit`` and a head fitted on ``rest``."""
    images, labels = fit
    kind = StitchKind(way) if way in ("mlp", "paper") else StitchKind.LINEAR
    with_labels = way in ("labels", "mlp")
    builder = NetworkBuilder(
        donors, lambda _: images, labels=labels if with_labels else None, kind=kind, seed=seed
    )
    network = copy.deepcopy(builder.build(blocks).network)
    if way == "match":
        whole = donors[blocks[-1].donor].block(0, blocks[-1].stop).eval()
        wanted = network_outputs(whole, images)
        match_features(network, torch.cat(images), wanted, seed=seed)
    images, labels = rest
    fit_head(network, images, labels, len(classes))
    return network.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="demo")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=0, help="0 does not fine-tune")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    args = parser.parse_args()
    data = open_data(args.data)
    names = sorted({ref.donor for text in ASSEMBLIES for ref in refs(text)})
    donors = {
        name: dissect(dery_demo.zoo.build(name, pretrained=True), torch.zeros(2, 3, 32, 32))
        for name in names
    }
    test = as_dataset(ImageDataset(data.test, EvalTransform(INPUT)))
    fit, rest = batches(data, FIT_IMAGES), batches(data, HEAD_IMAGES)
    means: dict[str, list[float]] = {}
    print(f"{len(data.train)} training images of {len(data.classes)} classes, {len(test)} test")
    print("each column is an assembly: top-1, fine-tuned where there are steps, mean over seeds")
    for way in args.ways:
        before, after = [], []
        for text in ASSEMBLIES:
            scores = [[], []]
            for seed in range(args.seeds):
                network = build(donors, refs(text), way, fit, rest, data.classes, seed)
                scores[0].append(evaluate(network, test, classes=data.classes).top1)
                if args.steps:
                    tune(network, data, args.steps, seed, lr=args.lr)
                    scores[1].append(evaluate(network, test, classes=data.classes).top1)
            before.append(sum(scores[0]) / args.seeds)
            after.append(sum(scores[1]) / args.seeds)
        means[way] = [sum(rows) / len(rows) for rows in (before, after)]
        reference = means.get("plain", means[way])
        for what, rows, mean, plain in zip(
            ("untrained", "fine-tuned"), (before, after), means[way], reference, strict=True
        ):
            if any(rows):
                row = " ".join(f"{value:.3f}" for value in rows)
                print(f"{way:<8}{what:<12}{row}  mean {mean:.4f}  over plain {mean - plain:+.4f}")


def tune(
    network: AssembledNetwork, data: DataSet, steps: int, seed: int, **settings: float | str
) -> None:
    """Fine-tune in place with the default recipe, some settings changed."""
    config = make_config("default", steps=steps, seed=seed, report_every=steps, **settings)
    images = as_dataset(ImageDataset(data.train, train_transform(INPUT, config)))
    with tempfile.TemporaryDirectory() as folder:
        finetune(network, images, None, config, Path(folder), classes=data.classes, device="cpu")


if __name__ == "__main__":
    main()
