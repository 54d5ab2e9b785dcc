"""Updates per second of ``finetune`` against a plain timm training loop, in one run.

The same network, images, augmentation, optimizer, schedule, averaged weights and batch. They take
turns, so that a busy machine slows all; compared are the medians of all updates' times, by the
clock and by processor time, which other programs disturb less. At least 0.95 is wanted. The last
column sets ``finetune`` against the same plain loop on batches that are ready in memory, by the
clock: what its loader costs. There 0.9 is wanted, with ``--workers`` where decoding takes longer;
``--photographs`` trains at 224 pixels on JPEG bytes of 500 x 375 in place of small images.

    python tests/bench/bench_finetune.py [--updates 12] [--rounds 5] [--threads 1] [--workers 2]
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader, Dataset

from dery_cli.training.augment import train_transform
from dery_cli.training.loop import finetune
from dery_cli.training.recipe import FinetuneConfig, make_config
from dery_cli.types import InputSpec

CLASSES = tuple("0123456789")
SPEC = InputSpec(image_size=(32, 32))


class Pictures(Dataset[tuple[torch.Tensor, int]]):
    """Random images through the recipe's augmentation."""

    def __init__(self, config: FinetuneConfig, photographs: bool) -> None:
        rng = np.random.default_rng(0)
        self.photographs = photographs
        self.images: list[Image.Image | bytes] = []
        for _ in range(300):
            small = Image.fromarray(rng.integers(0, 255, (36, 36, 3), dtype=np.uint8))
            self.images.append(_jpeg(small) if photographs else small)
        self.labels = [i % 10 for i in range(300)]
        spec = dataclasses.replace(SPEC, image_size=(224, 224)) if photographs else SPEC
        self.transform = train_transform(spec, config)

    def __len__(self) -> int:
        return 300

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self.images[index]
        if isinstance(image, bytes):
            image = Image.open(io.BytesIO(image)).convert("RGB")
        return self.transform(image), self.labels[index]


def _jpeg(small: Image.Image) -> bytes:
    written = io.BytesIO()
    small.resize((500, 375), Image.Resampling.BICUBIC).save(written, "JPEG", quality=90)
    return written.getvalue()


def network(name: str, photographs: bool) -> nn.Module:
    torch.manual_seed(0)
    sized = {"img_size": 224} if photographs and "vit" in name else {}
    return timm.create_model(name, num_classes=10, **sized)


Times = list[tuple[float, float]]


def now() -> tuple[float, float]:
    """Seconds by the clock, and of this process on a processor."""
    return time.perf_counter(), time.process_time()


def plain(name: str, config: FinetuneConfig, photographs: bool, *, ready: bool) -> Times:
    """What timm's train.py does for an update; returns when each was done.

    With ``ready`` the batches are tensors in memory before the first update.
    """
    model, steps = network(name, photographs).train(), config.steps or 0
    optimizer = create_optimizer_v2(model, "adamw", lr=config.lr, weight_decay=config.weight_decay)
    scheduler = CosineLRScheduler(optimizer, t_initial=steps, t_in_epochs=False)
    ema = ModelEmaV3(model, decay=0.9998, use_warmup=True)
    loss_of = LabelSmoothingCrossEntropy(config.label_smoothing)
    pictures = Pictures(config, photographs)
    workers = 0 if ready else config.workers
    loader = DataLoader(
        pictures, config.batch_size, shuffle=True, drop_last=True, num_workers=workers
    )
    done: Times = []
    batches = list(itertools.islice(loader, 2)) if ready else loader
    stream = itertools.chain.from_iterable(itertools.repeat(batches))
    for step, (images, labels) in enumerate(itertools.islice(stream, steps)):
        loss = loss_of(model(images), labels)
        loss.backward()
        if config.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, step=step)
        scheduler.step_update(step + 1)
        loss.item()
        done.append(now())
    return done


def ours(name: str, config: FinetuneConfig, photographs: bool) -> Times:
    done: Times = []
    with tempfile.TemporaryDirectory() as folder:
        finetune(
            network(name, photographs),
            Pictures(config, photographs),
            None,
            config,
            Path(folder),
            classes=CLASSES,
            device="cpu",
            progress=lambda _: done.append(now()),
        )
    return done


def durations(done: Times, which: int) -> list[float]:
    """Of each update; not the first, which warms up, nor the last, which also saves."""
    times = [moment[which] for moment in done[:-1]]
    return [after - before for before, after in itertools.pairwise(times)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--photographs", action="store_true")
    parser.add_argument("--models", default="resnet10t,test_vit,test_convnext")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sized = {} if options.batch_size is None else {"batch_size": options.batch_size}
    config = make_config(
        "default",
        steps=options.updates,
        report_every=options.updates,
        workers=options.workers,
        **sized,
    )
    print(f"{'network':<16} {'timm/s':>8} {'dery/s':>8} {'ratio':>7} {'by cpu time':>12}", end="")
    print(f" {'over ready batches':>20}")
    large = options.photographs
    for name in options.models.split(","):
        rounds = [
            (
                plain(name, config, large, ready=False),
                ours(name, config, large),
                plain(name, config, large, ready=True),
            )
            for _ in range(options.rounds)
        ]
        their, our, ready = (
            [
                statistics.median(d for turn in rounds for d in durations(turn[side], which))
                for which in range(2)
            ]
            for side in range(3)
        )
        wall, cpu = (their[which] / our[which] for which in range(2))
        print(
            f"{name:<16} {1 / their[0]:>8.2f} {1 / our[0]:>8.2f} {wall:>7.3f} {cpu:>12.3f}", end=""
        )
        print(f" {ready[0] / our[0]:>20.3f}", flush=True)


if __name__ == "__main__":
    main()
