"""Updates per second of ``finetune`` against a plain timm training loop, in one run.

The same network, images, augmentation, optimizer, schedule, averaged weights and batch. The two
take turns, so that a busy machine slows both; compared are the medians of all updates' times, by
the clock and by processor time, which other programs disturb less. At least 0.95 is wanted.

    python tests/bench/bench_finetune.py [--updates 12] [--rounds 5] [--threads 1]
"""

from __future__ import annotations

import argparse
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

    def __init__(self, config: FinetuneConfig) -> None:
        rng = np.random.default_rng(0)
        self.images = [
            Image.fromarray(rng.integers(0, 255, (36, 36, 3), dtype=np.uint8)) for _ in range(300)
        ]
        self.labels = [i % 10 for i in range(300)]
        self.transform = train_transform(SPEC, config)

    def __len__(self) -> int:
        return 300

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10)


Times = list[tuple[float, float]]


def now() -> tuple[float, float]:
    """Seconds by the clock, and of this process on a processor."""
    return time.perf_counter(), time.process_time()


def plain(name: str, config: FinetuneConfig) -> Times:
    """What timm's train.py does for an update; returns when each was done."""
    model, steps = network(name).train(), config.steps or 0
    optimizer = create_optimizer_v2(model, "adamw", lr=config.lr, weight_decay=config.weight_decay)
    scheduler = CosineLRScheduler(optimizer, t_initial=steps, t_in_epochs=False)
    ema = ModelEmaV3(model, decay=0.9998, use_warmup=True)
    loss_of = LabelSmoothingCrossEntropy(config.label_smoothing)
    loader = DataLoader(Pictures(config), config.batch_size, shuffle=True, drop_last=True)
    done: Times = []
    stream = itertools.chain.from_iterable(itertools.repeat(loader))
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


def ours(name: str, config: FinetuneConfig) -> Times:
    done: Times = []
    with tempfile.TemporaryDirectory() as folder:
        finetune(
            network(name),
            Pictures(config),
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
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = make_config("default", steps=options.updates, report_every=options.updates)
    print(f"{'network':<16} {'timm/s':>8} {'dery/s':>8} {'ratio':>7} {'ratio by cpu time':>19}")
    for name in ("resnet10t", "test_vit", "test_convnext"):
        rounds = [(plain(name, config), ours(name, config)) for _ in range(options.rounds)]
        their, our = (
            [
                statistics.median(d for pair in rounds for d in durations(pair[side], which))
                for which in range(2)
            ]
            for side in range(2)
        )
        wall, cpu = (their[which] / our[which] for which in range(2))
        print(f"{name:<16} {1 / their[0]:>8.2f} {1 / our[0]:>8.2f} {wall:>7.3f} {cpu:>19.3f}")


if __name__ == "__main__":
    main()
