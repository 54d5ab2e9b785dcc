"""Fine-tuning settings over several assemblies of the demo's donors, beside training from scratch.

Reference: the same architecture from random weights, trained the same way, at its own best
settings. What the default recipe was chosen by, on letters (``letters.py DIR``), which nothing else
is reported on.

    python tests/bench/bench_recipe.py [--data DIR] [--lr 1e-3 3e-3] [--scale 0.3 1] [--seeds 2]
"""

from __future__ import annotations

import argparse
import itertools

import torch
from bench_stitch import ASSEMBLIES, FIT_IMAGES, HEAD_IMAGES, INPUT, batches, build, refs, tune

import dery_demo
from dery_cli import dissect
from dery_cli.core.dissection.dissect import Dissection
from dery_cli.core.stitching.network import AssembledNetwork, needs_stitch
from dery_cli.core.stitching.stitch import Stitch
from dery_cli.data.batches import as_dataset
from dery_cli.data.sets import ImageDataset, open_data
from dery_cli.training.evaluate import evaluate
from dery_cli.zoo.transforms import EvalTransform

STARTS = ("assembly", "scratch")


def load_donors(pretrained: bool, seed: int = 0) -> dict[str, Dissection]:
    """All donors of the assemblies."""
    torch.manual_seed(seed)
    names = sorted({ref.donor for text in ASSEMBLIES for ref in refs(text)})
    example = torch.zeros(2, INPUT.in_chans, *INPUT.image_size)
    return {
        name: dissect(dery_demo.zoo.build(name, pretrained=pretrained), example) for name in names
    }


def random_network(text: str, classes: int, seed: int) -> AssembledNetwork:
    """The architecture of an assembly with fresh weights."""
    donors, blocks = load_donors(pretrained=False, seed=seed), refs(text)
    stitches: list[Stitch | None] = [None]
    for before, after in itertools.pairwise(blocks):
        source = donors[before.donor].anatomy.nodes[before.stop]
        target = donors[after.donor].anatomy.nodes[after.start]
        stitches.append(Stitch(source, target) if needs_stitch(before, after) else None)
    width = donors[blocks[-1].donor].anatomy.nodes[-1].num_chs
    parts = [donors[ref.donor].block(ref.start, ref.stop) for ref in blocks]
    return AssembledNetwork(parts, stitches, torch.nn.Linear(width, classes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="demo")
    parser.add_argument("--assemblies", type=int, nargs="+", default=[0, 1, 3])
    parser.add_argument("--starts", nargs="+", default=list(STARTS), choices=STARTS)
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-3])
    parser.add_argument("--scale", type=float, nargs="+", default=[1.0], help="rate of the blocks")
    parser.add_argument("--batch-norm", nargs="+", default=["train"])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    data = open_data(args.data)
    test = as_dataset(ImageDataset(data.test, EvalTransform(INPUT)))
    fit, rest = batches(data, FIT_IMAGES), batches(data, HEAD_IMAGES)
    pretrained = load_donors(pretrained=True)
    texts = [ASSEMBLIES[index] for index in args.assemblies]
    print(f"{len(data.train)} training images of {len(data.classes)} classes, {len(test)} test")
    print(f"{len(texts)} assemblies, {args.seeds} seeds, {args.steps} updates: mean top-1")
    print(f"{'lr':>8}{'blocks':>8}{'norms':>7}" + "".join(f"{s:>10}" for s in args.starts))
    best = dict.fromkeys(args.starts, 0.0)
    for lr, scale, norms in itertools.product(args.lr, args.scale, args.batch_norm):
        row = []
        for start in args.starts:
            top1 = []
            for text, seed in itertools.product(texts, range(args.seeds)):
                if start == "scratch":
                    network = random_network(text, len(data.classes), seed)
                else:
                    network = build(pretrained, refs(text), "labels", fit, rest, data.classes, seed)
                settings = {"lr": lr, "block_lr_scale": scale, "batch_norm": norms}
                tune(network, data, args.steps, seed, **settings)
                top1.append(evaluate(network, test, classes=data.classes).top1)
            row.append(sum(top1) / len(top1))
            best[start] = max(best[start], row[-1])
        columns = "".join(f"{value:>10.4f}" for value in row)
        print(f"{lr:>8g}{scale:>8g}{norms:>7}{columns}", flush=True)
    print(f"{'best':<23}" + "".join(f"{best[start]:>10.4f}" for start in args.starts))
    if len(best) == 2:
        print(f"assembly over scratch, each at its best: {best['assembly'] - best['scratch']:+.4f}")


if __name__ == "__main__":
    main()
